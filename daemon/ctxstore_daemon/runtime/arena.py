"""The arena: all memory in which shards live, shared read-only with the clients of this host.

Owns the memory file, the ladder of page kinds and the growing watermark of populated bytes. It must
not know slots; the engine carves those. Layout: a generation (u32) for each 4 KiB page of the whole
arena, rounded up to 2 MiB, then the slots; all offsets count from the arena's start.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from ctxstore import limits
from ctxstore.errors import StorageError
from ctxstore_daemon.runtime.memfd import (
    F_SEAL_FUTURE_WRITE,
    MemoryFile,
    PageKind,
)

STEP_BYTES: Final = limits.GIB
"""Populated at once: a second or so on 4 KiB pages, during which nothing can be stopped."""

FIRST_STEP_BYTES: Final = 64 * limits.MIB
"""Populated before the daemon says that it is ready."""


class Arena:
    """Implements `ArenaMemory` on a memfd that clients can map but never write.

    Call order: construct, `populate_step` until `complete`, `close`. `populate_step` may run in any
    thread, one at a time; `populated_bytes` only grows and may be read by anyone.
    """

    __slots__ = ("_file", "_table_bytes", "bytes_total", "data", "generations", "populated_bytes")

    def __init__(self, bytes_total: int, *, kinds: tuple[PageKind, ...]) -> None:
        """Take the first of `kinds` that can be had. Raises StorageError when none can."""
        self._file = _obtain(bytes_total, kinds)
        self.bytes_total = bytes_total
        self.populated_bytes = 0
        pages = bytes_total // limits.PAGE_BYTES
        self._table_bytes = -(-pages * 4 // limits.HUGE_PAGE_BYTES) * limits.HUGE_PAGE_BYTES
        self.data: npt.NDArray[np.uint8] = self._file.data
        self.generations: npt.NDArray[np.uint32] = self.data[: pages * 4].view(np.uint32)

    @property
    def fd(self) -> int:
        """Descriptor for clients: every writable mapping, write and truncation of it fails."""
        return self._file.fd

    @property
    def kind(self) -> PageKind:
        """The rung of the ladder that was obtained."""
        return self._file.kind

    @property
    def complete(self) -> bool:
        """Whether all bytes are populated."""
        return self.populated_bytes >= self.bytes_total

    def huge_bytes(self) -> int:
        """Bytes that really stand on huge pages; for the log and the metrics."""
        return self._file.huge_bytes()

    def populate_step(self) -> int:
        """Populate the next step; returns the new watermark.

        Raises OutOfSpace when pages are short: the watermark stays and a later call may succeed.
        """
        start = self.populated_bytes
        step = STEP_BYTES if start else FIRST_STEP_BYTES + self._table_bytes
        stop = min(self.bytes_total, start + step)
        self._file.populate(start, stop)
        self.populated_bytes = stop
        return stop

    def close(self) -> None:
        """Let go of the memory, which is unmapped with the last view of it. Idempotent."""
        self.data = np.zeros(0, np.uint8)
        self.generations = np.zeros(0, np.uint32)
        self._file.close()


def _obtain(bytes_total: int, kinds: tuple[PageKind, ...]) -> MemoryFile:
    refused: StorageError | None = None
    for kind in kinds:
        try:
            return MemoryFile("ctxstore-arena", bytes_total, kind=kind, seals=F_SEAL_FUTURE_WRITE)
        except StorageError as error:
            refused = error
    assert refused is not None, "the ladder has no rungs"
    raise refused
