"""One connection limit for all your workers."""

from . import _speed

speed = _speed.choose(__path__)  # "compiled" or "pure"; before anything else is imported

from .control import (
    attach,
    find_pool,
    get_stats,
    permit,
    pool_stats,
    start,
    start_pool,
    stop,
    stop_pool,
    worker_stats,
)
from .drivers import Driver
from .drivers import permit as _permit_driver
from .drivers import tcp as _tcp_driver
from .drivers import unix as _unix_driver
from .errors import (
    ArbiterLost,
    AttachRefused,
    ConnectFailed,
    ConnectTimeout,
    FileLimit,
    LeaseError,
    NotSupported,
    OptionError,
    PoolBroken,
    PoolNotFound,
    PoolOptionsDiffer,
    PoolStopped,
    PoolTimeout,
    SharedPoolError,
    StartFailed,
    TooManyWaiting,
)
from .lease import Lease
from .options import PoolInfo, PoolOptions
from .pool import Permit, Pool
from .stats import Histogram, KeyStats, PoolStats

__all__ = [
    "ArbiterLost",
    "AttachRefused",
    "ConnectFailed",
    "ConnectTimeout",
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
    "SharedPoolError",
    "StartFailed",
    "TooManyWaiting",
    "attach",
    "find_pool",
    "get_stats",
    "permit",
    "pool_stats",
    "start",
    "start_pool",
    "stop",
    "stop_pool",
    "worker_stats",
]

__version__ = "0.1.0.dev0"

del _permit_driver, _tcp_driver, _unix_driver
