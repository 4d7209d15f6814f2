"""One connection limit for all your workers."""

from . import _speed

speed = _speed.choose(__path__)  # "compiled" or "pure"; before anything else is imported

from .control import (
    attach,
    checkin,
    checkout,
    count,
    drain,
    find_pool,
    get_stats,
    kill,
    max_connections,
    notify,
    pause,
    permit,
    ping,
    pool_stats,
    reset_stats,
    resume,
    set_max_connections,
    set_timeout,
    start,
    start_link,
    start_pool,
    stop,
    stop_pool,
    timeout,
    worker_stats,
)
from .drivers import Driver
from .drivers import permit as _permit_driver
from .drivers import postgres as _postgres_wire
from .drivers import tcp as _tcp_driver
from .drivers import unix as _unix_driver
from .errors import (
    ArbiterLost,
    AttachRefused,
    ConnectFailed,
    ConnectTimeout,
    DrainTimeout,
    FileLimit,
    LeaseError,
    NotSupported,
    OptionError,
    PoolBroken,
    PoolNotFound,
    PoolOptionsDiffer,
    PoolStopped,
    PoolTimeout,
    RegistryTimeout,
    SessionNotKept,
    SharedPoolError,
    StartFailed,
    TooManyWaiting,
)
from .lease import Lease
from .options import PoolInfo, PoolOptions
from .pool import Permit, Pool
from .stats import Histogram, KeyStats, PoolStats
from .supervise import ChildSpec, child_spec

__all__ = [
    "ArbiterLost",
    "AttachRefused",
    "ChildSpec",
    "ConnectFailed",
    "ConnectTimeout",
    "DrainTimeout",
    "Driver",
    "FileLimit",
    "Histogram",
    "KeyStats",
    "Lease",
    "LeaseError",
    "NotSupported",
    "OptionError",
    "Permit",
    "Pool",
    "PoolBroken",
    "PoolInfo",
    "PoolNotFound",
    "PoolOptions",
    "PoolOptionsDiffer",
    "PoolStats",
    "PoolStopped",
    "PoolTimeout",
    "RegistryTimeout",
    "SessionNotKept",
    "SharedPoolError",
    "StartFailed",
    "TooManyWaiting",
    "attach",
    "checkin",
    "checkout",
    "child_spec",
    "count",
    "drain",
    "find_pool",
    "get_stats",
    "kill",
    "max_connections",
    "notify",
    "pause",
    "permit",
    "ping",
    "pool_stats",
    "reset_stats",
    "resume",
    "set_max_connections",
    "set_timeout",
    "start",
    "start_link",
    "start_pool",
    "stop",
    "stop_pool",
    "timeout",
    "worker_stats",
]

__version__ = "0.1.0.dev0"

del _permit_driver, _postgres_wire, _tcp_driver, _unix_driver
