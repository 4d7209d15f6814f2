"""Which runtime directory a process uses, and whether it is safe. One scope = one directory = one arbiter.

The directory holds sockets, locks and the roster only, is ours and 0700, and is refused otherwise.
"""

from __future__ import annotations

import contextlib
import errno
import functools
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
ROSTER = "roster"
ROSTER_DRAFT = "roster.new"
OUR_FILES = (ARBITER_SOCKET, REGISTRY_SOCKET, START_LOCK, LEADER_LOCK, ROSTER, ROSTER_DRAFT)

DEFAULT_APP = "default"
_SUBDIRECTORY = "sharedpool"
_PRIVATE = "private-"
_TRIES = 20
#: As many symbolic links as the kernel follows in one path.
_LINKS = 40

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
    """Make the directory if it is not there, and check that it is ours alone and that nobody else can exchange it.

    Raises:
        StartFailed: It cannot be made, is not a directory of this user with mode 0700, or a parent is not safe.
    """
    for _ in range(_TRIES):  # an arbiter that ends may take it along just now
        try:
            _make(path)
            _check_parents(path)
            os.close(open_directory(path))
            return path
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StartFailed(f"the runtime directory {path} cannot be made: {error}") from error
    raise StartFailed(f"the runtime directory {path} vanishes as soon as it is made")


def missing_parents(path: str) -> list[str]:
    """The directories above it that are not there, the highest first."""
    missing: list[str] = []
    parent = os.path.dirname(path)
    while parent != os.path.dirname(parent) and not os.path.lexists(parent):
        missing.insert(0, parent)
        parent = os.path.dirname(parent)
    return missing


def _make(path: str) -> None:
    """Make a directory and those parents that are not there. All are 0700, whatever the umask is."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        parent = os.path.dirname(path)
        if parent == path or os.path.lexists(parent):  # a link that leads nowhere, or it has just been made
            raise
        _make(parent)
        _make(path)
        return
    if stat.S_IMODE(os.lstat(path).st_mode) & 0o700 != 0o700:  # a umask that takes our own rights away
        os.chmod(path, 0o700)


def _check_parents(path: str) -> None:
    """Every directory on the way is ours or root's, and nobody else may rename or remove what lies in it.

    Raises:
        StartFailed: One is not; the message names it.
    """
    left = os.path.abspath(path).split("/")[1:-1]
    at = "/"
    links = 0
    while True:
        _check_parent(path, at, os.lstat(at))
        if not left:
            return
        name = left.pop(0)
        if name in ("", "."):
            continue
        following = os.path.dirname(at) if name == ".." else os.path.join(at, name)
        status = os.lstat(following)
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > _LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), following)
            _check_owner(path, following, status)
            target = os.readlink(following)
            left = target.split("/") + left
            following = "/" if target.startswith("/") else at
        at = following


def _check_parent(path: str, parent: str, status: os.stat_result) -> None:
    _check_owner(path, parent, status)
    mode = stat.S_IMODE(status.st_mode)
    by_others = mode & stat.S_IWOTH or (mode & stat.S_IWGRP and status.st_gid not in (0, os.getegid()))
    if by_others and not mode & stat.S_ISVTX:
        raise StartFailed(
            f"the runtime directory {path} is not safe: its parent {parent} has mode {mode:04o} and gid"
            f" {status.st_gid}, so other users can exchange what lies in it; take their right to write (or set the"
            " sticky bit), or choose another place"
        )


def _check_owner(path: str, parent: str, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.geteuid(), _nobody()):
        raise StartFailed(
            f"the runtime directory {path} is not safe: its parent {parent} belongs to uid {status.st_uid}, who can"
            f" exchange what lies in it; every parent must belong to root or to uid {os.geteuid()}"
        )


@functools.cache
def _nobody() -> int:
    """In a user namespace: as whom the users outside it are seen, root among them. Elsewhere: root."""
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/uid_map", encoding="ascii") as file:
            all_users = file.read().split() == ["0", "0", "4294967295"]
        if not all_users:
            with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
                return int(file.read())
    return 0


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
