"""The data directory as a whole: made, checked, locked, and its published addresses.

Owns LOCK and endpoints.json. It must not touch segments, logs or IDENTITY; `segments` does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from ctxstore.errors import DataDirError

if TYPE_CHECKING:
    from pathlib import Path

LOCK_NAME: Final = "LOCK"
ENDPOINTS_NAME: Final = "endpoints.json"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """What endpoints.json says. `unix` is None where there is no unix socket."""

    control: str
    data: str
    http: str
    unix: str | None
    pid: int
    node_id: str
    version: str


class DataDirLock:
    """Exclusive use of a data directory by this process, until `release` or its end.

    The kernel drops the lock with the process, so a killed daemon leaves none behind.
    """

    __slots__ = ("_fd", "path")

    def __init__(self, path: Path, *, create: bool) -> None:
        """Take the lock. Raises DataDirError that says what is wrong and what to do."""
        self.path = path
        self._fd = -1
        if create:
            _make(path)
        self._fd = _open_lock(path)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip()
            os.close(self._fd)
            self._fd = -1
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise DataDirError(
                    f"data directory {path} is in use by process {holder or 'unknown'}; "
                    "stop that daemon or choose another --data-dir"
                ) from error
            raise DataDirError(f"cannot lock {path}: {error.strerror}") from error

    def release(self) -> None:
        """Idempotent. The file stays: deleting it would let two daemons lock two files."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _make(path: Path) -> None:
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise DataDirError(f"{path} is not a directory") from None
    except FileNotFoundError:
        raise DataDirError(
            f"cannot create data directory {path}: {path.parent} does not exist"
        ) from None
    except OSError as error:
        raise DataDirError(f"cannot create data directory {path}: {error.strerror}") from error


def _open_lock(path: Path) -> int:
    try:
        return os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise DataDirError(f"data directory {path} does not exist") from None
    except NotADirectoryError:
        raise DataDirError(f"{path} is not a directory") from None
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise DataDirError(
                f"data directory {path} is not writable ({error.strerror}); "
                "the store keeps its segments there and needs to write"
            ) from error
        raise DataDirError(f"cannot use data directory {path}: {error.strerror}") from error


def publish_endpoints(directory: Path, endpoints: Endpoints) -> None:
    """Write endpoints.json so that a reader sees all of it or none."""
    temporary = directory / f".{ENDPOINTS_NAME}.{os.getpid()}"
    text = json.dumps(asdict(endpoints), indent=2) + "\n"
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, directory / ENDPOINTS_NAME)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise DataDirError(f"cannot write {ENDPOINTS_NAME}: {error.strerror}") from error


def withdraw_endpoints(directory: Path) -> None:
    """Delete endpoints.json; missing is fine."""
    try:
        (directory / ENDPOINTS_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise DataDirError(f"cannot delete {ENDPOINTS_NAME}: {error.strerror}") from error
