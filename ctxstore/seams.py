"""The seams between what a node decides and the machine it runs on.

Owns the protocols of clock, disk, byte mover and randomness. Everything above them runs unchanged
in a
real daemon and on the virtual clock of `ctxstore.testing`. A seam must not leak foreign errors: a
disk
raises `StorageError`s only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

ByteBuffer = memoryview | npt.NDArray[np.uint8]
"""One-dimensional contiguous bytes: a memoryview of format 'B' or a uint8 array."""


@dataclass(frozen=True, slots=True)
class Now:
    """One reading of both clocks, in nanoseconds. `mono_ns` orders and measures; `wall_ns` is
    only stored."""

    mono_ns: int
    wall_ns: int


class Clock(Protocol):
    """Time. `now` may be called from any thread."""

    def now(self) -> Now:
        """Monotonic and wall time in one reading."""
        ...


class Rng(Protocol):
    """Seedable randomness for jitter and ids, never for secrets."""

    def random(self) -> float:
        """Uniform in [0, 1)."""
        ...

    def getrandbits(self, k: int, /) -> int:
        """An integer of k random bits."""
        ...


class DiskFile(Protocol):
    """An open file. Offsets, lengths and buffer addresses are multiples of 4 KiB when it was
    opened `direct`.

    All calls raise `DeviceError` (EIO and the like) or `OutOfSpace`. They may run concurrently. A
    cancelled
    call may still complete on the disk: its buffers must stay alive and untouched until `close`
    returned.
    """

    @property
    def name(self) -> str:
        """File name inside the data directory."""
        ...

    @property
    def direct(self) -> bool:
        """Whether O_DIRECT was obtained."""
        ...

    async def preadv(self, buffers: Sequence[ByteBuffer], offset: int) -> int:
        """Fill buffers from `offset`; returns bytes read, short only at the end of the file."""
        ...

    async def pwritev(self, buffers: Sequence[ByteBuffer], offset: int) -> int:
        """Write all buffers at `offset`; returns their total. Not durable before `fdatasync`."""
        ...

    async def fdatasync(self) -> None:
        """Make every write that completed before this call durable. A failure is final for the
        file."""
        ...

    async def size(self) -> int:
        """Bytes in the file."""
        ...

    async def truncate(self, size: int) -> None:
        """Cut the file to `size` bytes."""
        ...

    async def close(self) -> None:
        """Wait for running calls and close. Idempotent."""
        ...


class Disk(Protocol):
    """One directory of one file system. Names are plain file names without a slash."""

    async def open(self, name: str, *, create: bool = False, direct: bool = True) -> DiskFile:
        """Open for reading and writing. Raises StorageError when it does not exist and `create`
        is false."""
        ...

    async def allocate(self, name: str, size: int) -> None:
        """Create the file if need be and reserve `size` bytes for it. Raises OutOfSpace."""
        ...

    async def listdir(self) -> list[str]:
        """Names in the directory, sorted."""
        ...

    async def remove(self, name: str) -> None:
        """Delete a file; missing is fine."""
        ...

    async def rename(self, old: str, new: str) -> None:
        """Atomically replace `new` by `old`. Durable after `sync_dir`."""
        ...

    async def sync_dir(self) -> None:
        """Make creations, removals and renames durable."""
        ...

    async def used_bytes(self) -> int:
        """Allocated bytes of all files in the directory."""
        ...


@dataclass(frozen=True, slots=True)
class CopyJob:
    """Copy `length` bytes into an arena slot, zero the slot's padding, hash the arena's copy.

    `source` is the caller's memory (staging), None when the bytes already are in the slot.
    `slot` is the whole slot (a multiple of 4 KiB), `seed` the checksum seed of key and namespace.
    """

    source: ByteBuffer | None
    slot: ByteBuffer
    length: int
    seed: int


class Mover(Protocol):
    """Moves and hashes bytes off the control thread."""

    async def copy_in(self, jobs: Sequence[CopyJob]) -> list[int]:
        """xxh3-64 of each slot's first `length` bytes, taken after the copy. Order as given."""
        ...
