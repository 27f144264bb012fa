"""The memory tier's bytes as the rest of the node sees them.

Owns the protocol of an arena and its form without shared memory. It must not know slots: the
engine carves those. Layout: a generation (u32) for each 4 KiB page of the whole arena, rounded up
to 2 MiB, then the slots; all offsets count from the arena's start.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from ctxstore import limits


class ArenaMemory(Protocol):
    """Memory in which shards live. Attributes may be read from any thread."""

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """The whole mapping, one-dimensional."""
        ...

    @property
    def generations(self) -> npt.NDArray[np.uint32]:
        """View of the generation table: one per 4 KiB page of the whole arena."""
        ...

    @property
    def bytes_total(self) -> int:
        """Length of `data`."""
        ...

    @property
    def populated_bytes(self) -> int:
        """How far from the start pages have memory; only grows. Slots beyond may not be used."""
        ...


class HeapArena:
    """An arena in plain memory that no other process can map, populated from the start."""

    __slots__ = ("bytes_total", "data", "generations", "populated_bytes")

    def __init__(self, bytes_total: int) -> None:
        # Aligned like the real one: disks opened with O_DIRECT read straight into slots.
        raw = np.zeros(bytes_total + limits.PAGE_BYTES, np.uint8)
        lead = -raw.ctypes.data % limits.PAGE_BYTES
        self.data: npt.NDArray[np.uint8] = raw[lead : lead + bytes_total]
        pages = bytes_total // limits.PAGE_BYTES
        self.generations: npt.NDArray[np.uint32] = self.data[: pages * 4].view(np.uint32)
        self.bytes_total = bytes_total
        self.populated_bytes = bytes_total
