"""Which runtime directory a process uses, and whether it is safe. One scope = one directory = one arbiter.

The directory holds sockets and locks only, is ours and 0700, and is refused otherwise.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from typing import TypeVar

from .errors import NO_DESCRIPTOR, StartFailed, file_limit
from .options import check_app_name

ARBITER_SOCKET = "arbiter.sock"
REGISTRY_SOCKET = "registry.sock"
START_LOCK = "start.lock"
LEADER_LOCK = "leader.lock"
OUR_FILES = (ARBITER_SOCKET, REGISTRY_SOCKET, START_LOCK, LEADER_LOCK)

DEFAULT_APP = "default"
_SUBDIRECTORY = "sharedpool"
_PRIVATE = "private-"
_TRIES = 20

T = TypeVar("T")


def directory_for(environ: Mapping[str, str], app: str | None = None, *, make: bool = True) -> str:
    """The runtime directory's path.

    Order: the app given, SHAREDPOOL_DIR, SHAREDPOOL_APP, the app "default".

    Args:
        environ: The environment.
        app: The app's name, if the caller named it.
        make: Make the directory, and check it. Otherwise it may not be there, and then nobody serves it.

    Raises:
        StartFailed: No directory can be used; the message lists what was tried and why each failed.
        OptionError: The app's name is none.
    """
    if app is not None:
        return _for_app(environ, check_app_name(app), make=make)
    if environ.get("SHAREDPOOL_DIR"):
        path = os.path.join(os.path.abspath(environ["SHAREDPOOL_DIR"]), _SUBDIRECTORY)
        return prepare(path) if make else path
    name = environ.get("SHAREDPOOL_APP") or DEFAULT_APP
    return _for_app(environ, check_app_name(name, "the environment's SHAREDPOOL_APP"), make=make)


def private_directory(environ: Mapping[str, str]) -> str:
    """A new directory of the caller's own, to be given as SHAREDPOOL_DIR."""

    def make(root: str) -> str:
        return tempfile.mkdtemp(prefix=_PRIVATE, dir=prepare(root))

    return _first_usable(environ, make)


def is_private(directory: str) -> bool:
    """Whether the directory lies in one made by `private_directory`, which goes with it."""
    return os.path.basename(os.path.dirname(directory)).startswith(_PRIVATE)


def known(environ: Mapping[str, str]) -> list[str]:
    """The runtime directories of this user that are there now, wherever scopes are made by default, and the given one.

    A scope whose SHAREDPOOL_DIR is not in this environment cannot be found.
    """
    runtime = f"/run/user/{os.geteuid()}"  # also where XDG_RUNTIME_DIR is not set: sudo, cron, su
    roots = [*_roots(environ), *_roots({"XDG_RUNTIME_DIR": runtime})]
    found = [path for root in dict.fromkeys(roots) for path in _scopes_below(root)]
    if environ.get("SHAREDPOOL_DIR"):
        found.append(directory_for(environ, make=False))
    return [path for path in dict.fromkeys(found) if os.path.isdir(path)]


def _scopes_below(root: str) -> list[str]:
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return []
    return [os.path.join(root, name, *([_SUBDIRECTORY] * name.startswith(_PRIVATE))) for name in names]


def _for_app(environ: Mapping[str, str], app: str, *, make: bool) -> str:
    if make:
        return _first_usable(environ, lambda root: prepare(os.path.join(prepare(root), app)))
    paths = [os.path.join(root, app) for root in _roots(environ)]
    return next(filter(os.path.isdir, paths), paths[0])


def _roots(environ: Mapping[str, str]) -> list[str]:
    """Where directories of apps and private ones may be, the preferred place first."""
    user = f"sharedpool-{os.geteuid()}"
    runtime = environ.get("XDG_RUNTIME_DIR")
    others = [os.path.join("/dev/shm", user), os.path.join(environ.get("TMPDIR") or "/tmp", user)]
    return [os.path.join(runtime, "sharedpool"), *others] if runtime else others


def _first_usable(environ: Mapping[str, str], use: Callable[[str], T]) -> T:
    failures = []
    for root in _roots(environ):
        try:
            return use(root)
        except (OSError, StartFailed) as error:
            failures.append(f"{root}: {error}")
    raise StartFailed("no runtime directory can be used; tried " + "; ".join(failures) + "; set SHAREDPOOL_DIR")


def prepare(path: str) -> str:
    """Make the directory if it is not there, and check that it is ours alone.

    Raises:
        StartFailed: It cannot be made, or is not a directory of this user with mode 0700.
    """
    for _ in range(_TRIES):  # an arbiter that ends may take it along just now
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            os.close(open_directory(path))
            return path
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StartFailed(f"the runtime directory {path} cannot be made: {error}") from error
    raise StartFailed(f"the runtime directory {path} vanishes as soon as it is made")


def open_directory(path: str) -> int:
    """A descriptor of the checked directory; what is reached through it cannot be exchanged underneath.

    Raises:
        StartFailed: It is a symbolic link, somebody else's, or not 0700.
        FileNotFoundError: It is gone: an arbiter that ends takes it along.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:
            raise file_limit(error, f"open the runtime directory {path}") from error
        raise StartFailed(
            f"the runtime directory {path} cannot be used (a symbolic link is refused): {error}"
        ) from error
    status = os.fstat(fd)
    mode = stat.S_IMODE(status.st_mode)
    problem = None
    if status.st_uid != os.geteuid():
        problem = f"belongs to uid {status.st_uid}, this process is uid {os.geteuid()}"
    elif mode & 0o777 != 0o700:
        problem = f"has mode {mode:04o}, only 0700 is safe"
    if problem:
        os.close(fd)
        raise StartFailed(f"the runtime directory {path} {problem}")
    return fd


def inside(directory: int, name: str) -> str:
    """A path below an open directory that fits into a socket's 107 bytes however long the directory's own is."""
    return f"/proc/self/fd/{directory}/{name}"
