"""Reading extents: neighbours together, bounded in number, verified where they land.

Owns nothing on the disk. It must not raise for what a disk may do: each extent gets a status.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore.errors import StorageError
from ctxstore.limits import MIB, PAGE_BYTES
from ctxstore.seams import CopyJob
from ctxstore_daemon.engine.events import ReadExtents, ReadStatus, Statuses
from ctxstore_daemon.segments.buffers import aligned_empty
from ctxstore_daemon.segments.format import extent_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from ctxstore.seams import DiskFile, Mover
    from ctxstore_daemon.segments.files import SegmentFiles

    _SlotOf = Callable[[int], npt.NDArray[np.uint8]]

READS_IN_FLIGHT_MAX: Final = 16
"""Calls to the disk at once: twice the threads that serve them, so that none of them idles."""

SCRATCH_READS_MAX: Final = 2
"""Reads only to verify, at once: each has memory of its own, beside the node's memory cap."""

_RUN_BYTES_MAX: Final = 4 * MIB
_RUN_EXTENTS_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class _Run:
    """Extents that stand one behind the other in a segment; `items` index the instruction."""

    segment: int
    offset: int
    items: tuple[int, ...]


class ExtentReader:
    """Any number of `read` calls at once share one bound."""

    def __init__(
        self, files: SegmentFiles, mover: Mover, generation_of: Callable[[int], int | None]
    ) -> None:
        self._files = files
        self._mover = mover
        self._generation_of = generation_of
        self._gate = asyncio.Semaphore(READS_IN_FLIGHT_MAX)
        self._scratch_gate = asyncio.Semaphore(SCRATCH_READS_MAX)

    async def read(self, order: ReadExtents, arena: npt.NDArray[np.uint8]) -> Statuses:
        """Fill the slots and verify them; a ReadStatus for each. Slots not OK have undefined bytes.

        When cancelled, a read may still be landing in the arena until the files are closed.
        """
        return await self._read(order, lambda index: _slot(order, arena, index))

    async def read_into(
        self, order: ReadExtents, slots: Sequence[npt.NDArray[np.uint8]]
    ) -> Statuses:
        """The same into buffers of whole pages, one for each extent, instead of the arena."""
        return await self._read(order, slots.__getitem__)

    async def _read(self, order: ReadExtents, slot_of: _SlotOf) -> Statuses:
        statuses = np.full(len(order.segments), int(ReadStatus.FAILED), np.uint8)
        segments = order.segments.tolist()
        wanted = order.generations.tolist()
        scratch = (order.slot_offsets < 0).tolist()
        usable = [
            index
            for index, segment in enumerate(segments)
            if self._generation_of(segment) == wanted[index]
        ]
        async with asyncio.TaskGroup() as group:
            for run in _runs(order, usable):
                gate = self._scratch_gate if scratch[run.items[0]] else self._gate
                group.create_task(self._read_run(order, slot_of, run, gate, statuses))
        return statuses

    async def _read_run(
        self,
        order: ReadExtents,
        slot_of: _SlotOf,
        run: _Run,
        gate: asyncio.Semaphore,
        statuses: Statuses,
    ) -> None:
        async with gate:
            slots = [slot_of(index) for index in run.items]
            try:
                async with self._files.with_file(run.segment) as file:
                    landed = await _fill(file, order, run, slots)
            except StorageError:
                return  # the file is gone: FAILED stands
            jobs = [
                CopyJob(None, slot, int(order.lengths[index]), int(order.seeds[index]))
                for index, slot, there in zip(run.items, slots, landed, strict=True)
                if there
            ]
            sums = iter(await self._mover.copy_in(jobs)) if jobs else iter(())
        for index, there in zip(run.items, landed, strict=True):
            if there:
                good = next(sums) == int(order.checksums[index])
                statuses[index] = int(ReadStatus.OK if good else ReadStatus.DAMAGED)


def _slot(order: ReadExtents, arena: npt.NDArray[np.uint8], index: int) -> npt.NDArray[np.uint8]:
    """The whole slot, or scratch memory where only the checksum is wanted."""
    offset = int(order.slot_offsets[index])
    if offset < 0:
        return aligned_empty(extent_bytes(int(order.lengths[index])))
    return arena[offset : offset + int(order.slot_bytes[index])]


async def _fill(
    file: DiskFile, order: ReadExtents, run: _Run, slots: list[npt.NDArray[np.uint8]]
) -> list[bool]:
    """Read a run in one call; if that fails, extent by extent to find out which ones fail."""
    parts = [
        slot[: extent_bytes(int(order.lengths[index]))]
        for index, slot in zip(run.items, slots, strict=True)
    ]
    try:
        count = await file.preadv(parts, run.offset)
    except StorageError:
        if len(parts) == 1:
            return [False]
    else:
        ends = np.cumsum([len(part) for part in parts])
        return [bool(end <= count) for end in ends]
    landed: list[bool] = []
    offset = run.offset
    for part in parts:
        try:
            landed.append(await file.preadv([part], offset) == len(part))
        except StorageError:
            landed.append(False)
        offset += len(part)
    return landed


def _runs(order: ReadExtents, usable: list[int]) -> list[_Run]:
    """Group extents that are neighbours on the disk; memory need not be contiguous for that."""
    segments = order.segments.tolist()
    offsets = (order.pages.astype(np.int64) * PAGE_BYTES).tolist()
    lengths = order.lengths.tolist()
    runs: list[_Run] = []
    items: list[int] = []
    size = 0
    for index in sorted(usable, key=lambda i: (segments[i], offsets[i])):
        last = items[-1] if items else -1
        joins = (
            items
            and segments[last] == segments[index]
            and offsets[items[0]] + size == offsets[index]
            and size + lengths[index] <= _RUN_BYTES_MAX
            and len(items) < _RUN_EXTENTS_MAX
        )
        if items and not joins:
            runs.append(_Run(segments[items[0]], offsets[items[0]], tuple(items)))
            items, size = [], 0
        items.append(index)
        size += extent_bytes(lengths[index])
    if items:
        runs.append(_Run(segments[items[0]], offsets[items[0]], tuple(items)))
    return runs
