"""Memory of the client: maps of the daemon's arena and staging, and pooled local buffers.

Owns mapping, unmapping and reuse. It must not know connections or messages. Children of this
process inherit no map; memory that somebody still refers to is left to its last reference.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from ctxstore import limits
from ctxstore.errors import Overloaded, TransportError

if TYPE_CHECKING:
    from ctxstore_client.ops.requests import ByteArray

LOCAL_BYTES_MAX: Final = 1 * limits.GIB
"""Local buffers lent at once, over TCP; one more view or allocation is Overloaded."""

LOCAL_IDLE_BYTES_MAX: Final = 256 * limits.MIB
"""Local buffers kept for reuse."""

_GENERATION_BYTES: Final = 4
_MAP_FIXED: Final = 0x10  # Linux; the mmap module does not name it


class _Map:
    """A shared mapping of a file that the daemon sealed against shrinking."""

    def __init__(self, fd: int, size: int, *, writable: bool) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            self._map: mmap.mmap | None = mmap.mmap(fd, size, mmap.MAP_SHARED, protection)
        except (OSError, ValueError) as error:
            raise TransportError(f"cannot map {size} bytes of the daemon: {error}") from error
        # A child would see the parent's leases end without noticing.
        self._map.madvise(mmap.MADV_DONTFORK)
        self.data: ByteArray = np.frombuffer(self._map, np.uint8)
        self.left_mapped = False
        """Whether views outlived `close`."""

    def close(self) -> None:
        """Unmap now, or with the last view that somebody else still holds."""
        mapped, self._map = self._map, None
        self.data = np.empty(0, np.uint8)
        if mapped is not None:
            try:
                mapped.close()
            except BufferError:
                self.left_mapped = True


class ArenaMap(_Map):
    """The daemon's arena, read-only, shared by all connections to the same run of a daemon.

    Made for its first user; `acquire` and `release` may be called from any thread.
    """

    def __init__(self, fd: int, size: int) -> None:
        super().__init__(fd, size, writable=False)
        pages = size // limits.PAGE_BYTES
        table = self.data[: pages * _GENERATION_BYTES]
        self.generations: npt.NDArray[np.uint32] = table.view("<u4")
        self._lock = threading.Lock()
        self._users = 1

    def acquire(self) -> bool:
        """One more connection uses it; False when the last one had gone already."""
        with self._lock:
            if self._users:
                self._users += 1
            return self._users > 0

    def release(self) -> None:
        """A connection is over; with the last one the arena is unmapped."""
        with self._lock:
            self._users -= 1
            over = not self._users
        if over:
            self.generations = np.empty(0, np.uint32)
            self.close()


class StagingMap(_Map):
    """Staging of one connection, writable on both sides."""

    def __init__(self, fd: int, size: int) -> None:
        super().__init__(fd, size, writable=True)

    def close(self) -> None:
        """Part from the daemon's memory at once, also where the caller keeps views of it.

        The daemon may still read a put whose answer nobody waited for, and it clears the memory
        when the connection is gone. So views that are left show local memory from now on, zeros at
        first: what is written through them must not become part of a shard.
        """
        address, size = self.data.ctypes.data, self.data.nbytes
        super().close()
        if self.left_mapped and size:
            _map_anonymous(address, size)


def _map_anonymous(address: int, size: int) -> None:
    """Replace what is mapped there, in one step, by memory of this process alone."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    found = library.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if found != address:
        raise MemoryError(f"cannot take {size} bytes of staging back: errno {ctypes.get_errno()}")


class LocalBuffers:
    """Buffers by power of two, touched once when new: first touches cost several times a copy.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[int, list[ByteArray]] = {}
        self._idle_bytes = 0
        self._lent_bytes = 0

    def take(self, size: int) -> ByteArray:
        """At least `size` bytes, on pages that are there already. Raises Overloaded."""
        room = _room_for(size)
        with self._lock:
            if self._lent_bytes + room > LOCAL_BYTES_MAX:
                raise Overloaded(f"{LOCAL_BYTES_MAX} bytes of local buffers are in use")
            self._lent_bytes += room
            kept = self._idle.get(room)
            if kept:
                self._idle_bytes -= room
                return kept.pop()
        fresh = np.empty(room, np.uint8)
        fresh[:: limits.PAGE_BYTES] = 0
        return fresh

    def give_back(self, buffer: ByteArray) -> None:
        """Keep the memory under `buffer` (which may be the front of what was taken) for reuse."""
        whole = buffer if buffer.base is None else buffer.base
        assert isinstance(whole, np.ndarray), "a buffer that was taken here"
        with self._lock:
            self._lent_bytes -= whole.nbytes
            if self._idle_bytes + whole.nbytes <= LOCAL_IDLE_BYTES_MAX:
                self._idle.setdefault(whole.nbytes, []).append(whole)
                self._idle_bytes += whole.nbytes

    def forget(self, buffer: ByteArray) -> None:
        """The caller kept a reference: the memory is his now."""
        whole = buffer if buffer.base is None else buffer.base
        assert isinstance(whole, np.ndarray), "a buffer that was taken here"
        with self._lock:
            self._lent_bytes -= whole.nbytes


def _room_for(size: int) -> int:
    return max(limits.PAGE_BYTES, 1 << (size - 1).bit_length())
