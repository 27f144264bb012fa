"""The real disk: one directory, read and written by a thread pool.

Owns file descriptors, O_DIRECT and its fallback, and the mapping of errno to `StorageError`. It
must not know what the files hold. An io_uring engine can take its place behind the same seam.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
from aiofiles import ospath

from ctxstore.errors import DataDirError, DeviceError, OutOfSpace, StorageError
from ctxstore.limits import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from pathlib import Path
    from typing import Any

    from ctxstore.seams import ByteBuffer

_LOG: Final = logging.getLogger(__name__)

DISK_THREADS: Final = 8
"""Calls to the device at once: 2 MiB reads reach its rate with four, 256 KiB reads with more."""

IOV_MAX: Final = 1024
"""Buffers the kernel takes in one call."""

_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_DIRECT: Final = {errno.EINVAL, errno.EOPNOTSUPP}
_NO_FALLOCATE: Final = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

T = TypeVar("T")


class _Call:
    """One call on its way through the pool: tells whether a thread may still be in it."""

    __slots__ = ("_begun", "_done", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = False
        self._done = False

    def run(self, work: Callable[..., T], *args: Any) -> T:
        """On a thread."""
        with self._lock:
            if self._done:
                raise OSError(errno.ECANCELED, "cancelled before it began")
            self._begun = True
        try:
            return work(*args)
        finally:
            self._done = True

    def abandon(self) -> bool:
        """Keep the call from beginning; False if it has begun."""
        with self._lock:
            if not self._begun:
                self._done = True
            return self._done

    @property
    def done(self) -> bool:
        """Whether no thread is in it, now or later."""
        return self._done


class RealFile:
    """`DiskFile` on a descriptor. Calls may run concurrently, as many as there are threads."""

    def __init__(self, disk: RealDisk, name: str, fd: int, *, direct: bool) -> None:
        self._disk = disk
        self._name = name
        self._fd = fd
        self._direct = direct
        self._calls: set[_Call] = set()
        self._closed = False

    @property
    def name(self) -> str:
        """File name inside the data directory."""
        return self._name

    @property
    def direct(self) -> bool:
        """Whether O_DIRECT was obtained."""
        return self._direct

    async def preadv(self, buffers: Sequence[ByteBuffer], offset: int) -> int:
        """See `DiskFile.preadv`."""
        self._check_alignment(buffers, offset)
        return await self._call(self._transfer, os.preadv, buffers, offset)

    async def pwritev(self, buffers: Sequence[ByteBuffer], offset: int) -> int:
        """See `DiskFile.pwritev`."""
        self._check_alignment(buffers, offset)
        return await self._call(self._transfer, os.pwritev, buffers, offset)

    async def fdatasync(self) -> None:
        """See `DiskFile.fdatasync`. Also fails when the file was deleted: it would not last."""
        await self._call(_sync, self._fd)

    async def size(self) -> int:
        """Bytes in the file."""
        return await self._call(_size, self._fd)

    async def truncate(self, size: int) -> None:
        """Cut the file to `size` bytes."""
        await self._call(os.ftruncate, self._fd, size)

    async def close(self) -> None:
        """Wait for running calls, also of cancelled callers, and close. Idempotent."""
        if self._closed:
            return
        self._closed = True
        calls = list(self._calls)
        if calls:
            await self._disk.run(self._name, _wait_for, calls)
        await self._disk.run(self._name, os.close, self._fd)

    async def _call(self, work: Callable[..., T], *args: Any) -> T:
        if self._closed:
            raise DeviceError(f"{self._name} is closed")
        call = _Call()
        self._calls.add(call)
        try:
            result: T = await self._disk.run(self._name, call.run, work, *args)
        except asyncio.CancelledError:
            # A thread cannot be called back: if it has begun, `close` waits for it.
            if call.abandon():
                self._calls.discard(call)
            raise
        except BaseException:
            self._calls.discard(call)
            raise
        self._calls.discard(call)
        return result

    def _transfer(
        self, call: Callable[..., int], buffers: Sequence[ByteBuffer], offset: int
    ) -> int:
        """On a thread. Some file systems open with O_DIRECT and refuse it at the first transfer."""
        try:
            return _transfer_all(call, self._fd, buffers, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._direct = False
        self._disk.note_no_direct()
        _LOG.warning("no_direct_io file=%s effect=slower_reads_and_page_cache", self._name)
        return _transfer_all(call, self._fd, buffers, offset)

    def _check_alignment(self, buffers: Sequence[ByteBuffer], offset: int) -> None:
        if not self._direct:
            return
        assert offset % PAGE_BYTES == 0, f"offset {offset} of {self._name} is not aligned"
        for buffer in buffers:
            array = buffer if isinstance(buffer, np.ndarray) else np.frombuffer(buffer, np.uint8)
            address: int = array.__array_interface__["data"][0]
            assert address % PAGE_BYTES == 0, f"buffer at {address:#x} is not aligned"
            assert array.nbytes % PAGE_BYTES == 0, f"buffer of {array.nbytes} bytes is not aligned"


class RealDisk:
    """`Disk` on one directory. Close every file, then call `close` once."""

    def __init__(
        self, directory: Path, *, threads: int = DISK_THREADS, direct: bool = True
    ) -> None:
        self._path = directory
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ctxstore-disk")
        self._threads = threads
        self._direct_refused = not direct

    def note_no_direct(self) -> None:
        """A file took O_DIRECT at open and refused it at the first transfer."""
        self._direct_refused = True

    def about(self) -> dict[str, Any]:
        """Which engine moves the bytes, and whether it goes round the page cache."""
        direct = not self._direct_refused
        return {"io_engine": "preadv threads", "io_threads": self._threads, "direct_io": direct}

    async def open(self, name: str, *, create: bool = False, direct: bool = True) -> RealFile:
        """See `Disk.open`. Where the file system has no O_DIRECT the file is opened without."""
        fd, obtained = await self.run(
            name, self._open, name, create=create, direct=direct and not self._direct_refused
        )
        if direct and not obtained and not self._direct_refused:
            self._direct_refused = True
            _LOG.warning("no_direct_io path=%s effect=slower_reads_and_page_cache", self._path)
        return RealFile(self, name, fd, direct=obtained)

    async def allocate(self, name: str, size: int) -> None:
        """See `Disk.allocate`."""
        await self.run(name, self._allocate, name, size)

    async def listdir(self) -> list[str]:
        """Names in the directory, sorted."""
        return sorted(await self.run(".", os.listdir, self._path))

    async def remove(self, name: str) -> None:
        """Delete a file; missing is fine."""
        await self.run(name, partial((self._path / name).unlink, missing_ok=True))

    async def rename(self, old: str, new: str) -> None:
        """See `Disk.rename`."""
        await self.run(old, os.replace, self._path / old, self._path / new)

    async def sync_dir(self) -> None:
        """Make creations, removals and renames durable."""
        await self.run(".", self._sync_dir)

    async def used_bytes(self) -> int:
        """Allocated bytes of all files in the directory."""
        return await self.run(".", self._used_bytes)

    def close(self) -> None:
        """Wait for running calls and end the threads. Idempotent."""
        self._pool.shutdown(wait=True)

    async def run(self, name: str, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a blocking call on a thread and map its error."""
        wrapped: Callable[..., Coroutine[Any, Any, T]] = ospath.wrap(work)  # type: ignore[attr-defined]
        try:
            return await wrapped(*args, executor=self._pool, **kwargs)
        except OSError as error:
            raise _mapped(error, name) from error

    def _open(self, name: str, *, create: bool, direct: bool) -> tuple[int, bool]:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        path = self._path / name
        if direct:
            try:
                return os.open(path, flags | os.O_DIRECT, 0o600), True
            except OSError as error:
                if error.errno not in _NO_DIRECT:
                    raise
        return os.open(path, flags, 0o600), False

    def _allocate(self, name: str, size: int) -> None:
        fd = os.open(self._path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
            os.ftruncate(fd, size)
        finally:
            os.close(fd)

    def _sync_dir(self) -> None:
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _used_bytes(self) -> int:
        with os.scandir(self._path) as entries:
            return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)


def _mapped(error: OSError, name: str) -> StorageError:
    text = f"{name}: {os.strerror(error.errno) if error.errno else error}"
    if error.errno in _FULL:
        return OutOfSpace(text)
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return DataDirError(f"{text}; the data directory must be writable")
    return DeviceError(text)


# ---------------------------------------------------------------- on the pool's threads


def _transfer_all(
    call: Callable[..., int], fd: int, buffers: Sequence[ByteBuffer], offset: int
) -> int:
    """All buffers, in as many calls as the kernel wants; fewer bytes only at the end of a file."""
    total = 0
    left = [_view(buffer) for buffer in buffers]
    while left:
        count = call(fd, left[:IOV_MAX], offset + total)
        if count == 0:
            if call is os.pwritev:
                raise OSError(errno.EIO, "the device takes no bytes")
            break
        total += count
        left = _after(left, count)
    return total


def _view(buffer: ByteBuffer) -> memoryview:
    return memoryview(buffer.data if isinstance(buffer, np.ndarray) else buffer).cast("B")


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `views` after their first `count` bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]] if count else views[index:]
        count -= len(view)
    return []


def _wait_for(calls: Sequence[_Call]) -> None:
    """Only after a cancellation, at the end of a file: asking every millisecond is good enough."""
    while not all(call.done for call in calls):
        time.sleep(0.001)


def _sync(fd: int) -> None:
    os.fdatasync(fd)
    if os.fstat(fd).st_nlink == 0:
        raise OSError(errno.ENOENT, "the file was deleted")


def _size(fd: int) -> int:
    return os.fstat(fd).st_size
