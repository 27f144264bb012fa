"""Where the unix socket stands, and making room for it there.

Owns the choice of directory and the removal of sockets that nobody serves any more. It must not
listen itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PATH_BYTES_MAX: Final = 107
"""sun_path holds 108 bytes with the terminating zero."""


def candidate_directories(environment: Mapping[str, str], uid: int) -> Iterator[Path]:
    """Directories in order of preference: the user's own, the system's, a private one in /tmp."""
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        yield Path(runtime) / "ctxstore"
    yield Path("/run/ctxstore")
    yield Path("/tmp") / f"ctxstore-{uid}"


def bind_unix(node_id: bytes) -> tuple[socket.socket, Path] | None:
    """A bound socket (mode 0600, in a directory only its owner enters), or None if no place does.

    Two daemons that carry the same node id (a copied data directory) get different names.
    """
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
