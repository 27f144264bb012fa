"""The memory tier's bytes as the rest of the node sees them.

Owns the protocol of an arena, its form without shared memory, and a plain tier over it. An arena
must not know slots: the engine carves those. Layout: a generation (u32) for each 4 KiB page of the
whole arena, rounded up to 2 MiB, then the slots; all offsets count from the arena's start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import numpy.typing as npt

from ctxstore import limits
from ctxstore.errors import OutOfSpace
from ctxstore_daemon.engine.events import ReadStatus, Statuses
from ctxstore_daemon.tiers.base import LOCATION_DTYPE, Locations, Pages, Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ctxstore_daemon.engine.records import RecordArray


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


_PAGE: Final = limits.PAGE_BYTES


class MemoryTier(Tier):
    """`Tier` over an arena that nobody else carves: first fit by whole pages.

    A node's engine carves its arena itself; this is for tools and for stacking tiers.
    """

    def __init__(self, arena: ArenaMemory) -> None:
        self._arena = arena
        table_bytes = -(-len(arena.generations) * 4 // limits.HUGE_PAGE_BYTES)
        first = table_bytes * limits.HUGE_PAGE_BYTES // _PAGE
        # Runs of free pages, ordered and never touching each other: [first, end).
        self._free: list[tuple[int, int]] = [(first, arena.populated_bytes // _PAGE)]

    @property
    def room_bytes(self) -> int:
        """The longest free run."""
        return max((end - first for first, end in self._free), default=0) * _PAGE

    async def write(self, records: RecordArray, payloads: Sequence[Pages]) -> Locations:
        """See `Tier.write`. Memory lasts as long as the process."""
        locations: Locations = np.zeros(len(records), LOCATION_DTYPE)
        locations["length"], locations["checksum"] = records["length"], records["checksum"]
        taken: list[tuple[int, int]] = []
        try:
            for row in locations:
                pages = -(-int(row["length"]) // _PAGE)
                taken.append(self._take(pages))
                row["page"] = taken[-1][0]
        except OutOfSpace:
            for run in taken:
                self._give(run)
            raise
        for row, payload in zip(locations, payloads, strict=True):
            page = int(row["page"])
            # Bumped before the bytes change: a reader of what was here notices.
            self._arena.generations[page] += 1
            row["generation"] = self._arena.generations[page]
            slot = self._arena.data[page * _PAGE :][: len(payload)]
            np.copyto(slot, payload)
        return locations

    async def read(self, locations: Locations, buffers: Sequence[Pages]) -> Statuses:
        """See `Tier.read`. Bytes that never left memory are not summed again."""
        statuses = np.full(len(locations), int(ReadStatus.FAILED), np.uint8)
        for index, (row, buffer) in enumerate(zip(locations, buffers, strict=True)):
            page, length = int(row["page"]), int(row["length"])
            np.copyto(buffer[:length], self._arena.data[page * _PAGE :][:length])
            if self._arena.generations[page] == row["generation"]:
                statuses[index] = int(ReadStatus.OK)
        return statuses

    async def free(self, locations: Locations) -> None:
        """See `Tier.free`."""
        for row in locations:
            page, length = int(row["page"]), int(row["length"])
            assert self._arena.generations[page] == row["generation"], "a location is freed once"
            self._arena.generations[page] += 1
            self._give((page, page + -(-length // _PAGE)))

    async def close(self) -> None:
        """Forget everything; the arena is its owner's."""
        self._free.clear()

    def _take(self, pages: int) -> tuple[int, int]:
        for index, (first, end) in enumerate(self._free):
            if end - first >= pages:
                rest = (first + pages, end)
                self._free[index : index + 1] = [rest] if rest[0] < end else []
                return first, first + pages
        raise OutOfSpace(f"no free run of {pages} pages in the arena")

    def _give(self, run: tuple[int, int]) -> None:
        runs = sorted([*self._free, run])
        merged = runs[:1]
        for first, end in runs[1:]:
            if first == merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((first, end))
        self._free = merged
