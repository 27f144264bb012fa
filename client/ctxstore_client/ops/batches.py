"""How batches are cut: into requests that fit the daemon's bounds, and into runs for one copy each.

Owns cutting and the layout inside a staging. Pure arithmetic on lengths and offsets; it must not
know messages or connections.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ctxstore import limits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ctxstore_client.ops.requests import ByteArray

Indices = npt.NDArray[np.int64]

STAGING_ALIGN_SMALL: Final = 64
STAGING_ALIGN: Final = limits.PAGE_BYTES


def cut_by_count(indices: Indices, keys_max: int) -> Iterator[Indices]:
    """Consecutive pieces of at most `keys_max`."""
    for first in range(0, len(indices), keys_max):
        yield indices[first : first + keys_max]


def cut_by_bytes(
    indices: Indices, sizes: npt.NDArray[np.int64], *, keys_max: int, bytes_max: int
) -> list[Indices]:
    """Consecutive pieces of at most `keys_max` keys and `bytes_max` bytes; a larger one goes alone.

    `sizes` holds the bytes of each of `indices`.
    """
    ends = np.cumsum(sizes)
    pieces: list[Indices] = []
    first = 0
    while first < len(indices):
        before = int(ends[first - 1]) if first else 0
        stop = int(np.searchsorted(ends, before + bytes_max, side="right"))
        stop = min(max(stop, first + 1), first + keys_max)
        pieces.append(indices[first:stop])
        first = stop
    return pieces


def staged_sizes(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Bytes that shards take in a staging: whole pages, and whole cache lines for small ones."""
    align = np.where(lengths < limits.PAGE_BYTES, STAGING_ALIGN_SMALL, STAGING_ALIGN)
    return (lengths + align - 1) // align * align


def slot_sizes(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Bytes that shards take in a node's memory at least: what its shares are counted in."""
    return (lengths + limits.PAGE_BYTES - 1) // limits.PAGE_BYTES * limits.PAGE_BYTES


class RingState:
    """Room in a staging, handed out and taken back in the same order. Not thread-safe."""

    __slots__ = ("_lent", "_size", "_tail")

    def __init__(self, size: int) -> None:
        self._size = size
        self._tail = 0
        self._lent: deque[tuple[int, int]] = deque()

    def take(self, size: int) -> int | None:
        """Offset of `size` contiguous bytes, page aligned; None until more is given back."""
        size = -(-size // STAGING_ALIGN) * STAGING_ALIGN
        if not self._lent:
            self._tail = 0
            return self._lend(0, size) if size <= self._size else None
        head = self._lent[0][0]
        if self._tail > head:
            if self._tail + size <= self._size:
                return self._lend(self._tail, size)
            # The free room before the oldest piece; it may fill up to, not onto, that piece.
            return self._lend(0, size) if size <= head else None
        return self._lend(self._tail, size) if self._tail + size <= head else None

    def _lend(self, offset: int, size: int) -> int:
        self._lent.append((offset, size))
        self._tail = offset + size
        return offset

    def give_back_oldest(self) -> None:
        """The oldest piece is free again."""
        self._lent.popleft()


class _Span:
    """Memory described by address, for numpy to look at; `keep` owns it."""

    __slots__ = ("__array_interface__", "keep")

    def __init__(self, address: int, size: int, keep: object) -> None:
        self.keep = keep
        self.__array_interface__: dict[str, Any] = {
            "data": (address, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }


def run_starts(
    offsets: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> Indices:
    """Where runs begin: pieces that are neighbours both in the source and in the destination."""
    joined = (offsets[1:] == offsets[:-1] + lengths[:-1]) & (
        starts[1:] == starts[:-1] + lengths[:-1]
    )
    return np.concatenate(([0], np.flatnonzero(~joined) + 1)).astype(np.int64)


def spanning(first: ByteArray, address: int, size: int, keep: object) -> ByteArray:
    """One array over neighbouring destinations, of which `first` is the first."""
    if size <= first.size:
        return first[:size]
    return np.asarray(_Span(address, size, keep))
