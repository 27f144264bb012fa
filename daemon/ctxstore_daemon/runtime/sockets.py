"""Bound sockets: TCP ports, and the unix socket with the choice of its directory.

Owns the errors of taken ports and paths, and the removal of sockets that nobody serves any more.
It must not accept connections.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ctxstore.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ctxstore.config import Address

PATH_BYTES_MAX: Final = 107
"""sun_path holds 108 bytes with the terminating zero."""


def bind_tcp(address: Address, *, what: str) -> socket.socket:
    """A bound, not yet listening socket. Raises ConfigError that says who should change what."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # A restarted daemon takes its port back although old connections linger in TIME_WAIT.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address.host, address.port))
        bound.listen(1)
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"cannot listen on {address} for {what} ({error.strerror}): "
            "is another daemon running? Choose another --listen, or port 0 for a free one"
        ) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """host:port of a bound TCP socket."""
    found = bound.getsockname()
    return (
        f"[{found[0]}]:{found[1]}" if bound.family == socket.AF_INET6 else f"{found[0]}:{found[1]}"
    )


def candidate_directories(environment: Mapping[str, str], uid: int) -> Iterator[Path]:
    """Directories in order of preference: the user's own, the system's, a private one in /tmp."""
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        yield Path(runtime) / "ctxstore"
    yield Path("/run/ctxstore")
    yield Path("/tmp") / f"ctxstore-{uid}"


def bind_unix(setting: str, node_id: bytes) -> tuple[socket.socket, Path] | None:
    """A bound socket of mode 0600 and its path, or None if there is to be none or no place works.

    `setting` is "off", a path, or "auto": then the directory is one that only its owner enters,
    and two daemons that carry the same node id (a copied data directory) get different names.
    A given path that cannot be used raises ConfigError.
    """
    if setting == "off":
        return None
    if setting != "auto":
        return _bind_given(Path(setting).absolute())
    for directory in candidate_directories(os.environ, os.getuid()):
        if not _own_directory(directory):
            continue
        for name in (f"{node_id.hex()[:16]}.sock", f"{node_id.hex()[:16]}-{os.getpid()}.sock"):
            path = directory / name
            if len(os.fsencode(path)) > PATH_BYTES_MAX or _is_served(path):
                continue
            if bound := _bind(path):
                return bound, path
    return None


def _bind_given(path: Path) -> tuple[socket.socket, Path]:
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise ConfigError(
            f"unix socket path {path} has {len(os.fsencode(path))} bytes, "
            f"at most {PATH_BYTES_MAX} can be used"
        )
    if path.exists() and not path.is_socket():
        raise ConfigError(f"unix socket path {path} exists and is no socket")
    if _is_served(path):
        raise ConfigError(f"unix socket {path} is served by another process")
    bound = _bind(path)
    if bound is None:
        raise ConfigError(f"cannot listen on unix socket {path}: is its directory writable?")
    return bound, path


def remove_socket(path: Path) -> None:
    """Delete the socket; missing is fine."""
    with contextlib.suppress(OSError):
        path.unlink()


def _own_directory(directory: Path) -> bool:
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except OSError:
        return False
    # In /tmp anybody can make the directory first: never use what another user owns or may enter.
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return private and not found.st_mode & 0o077 and os.access(directory, os.W_OK | os.X_OK)


def _is_served(path: Path) -> bool:
    if not path.exists():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
        return True


def _bind(path: Path) -> socket.socket | None:
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path.unlink(missing_ok=True)
        bound.bind(os.fspath(path))
        path.chmod(0o600)
    except OSError:
        bound.close()
        return None
    return bound
