"""Reading extents: neighbours together, bounded in number, verified where they land.

Owns nothing on the disk. It must not raise for what a disk may do: each extent gets a status.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
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


@dataclass(slots=True)
class _ReadState:
    """One call of `read` under way. Changed only by its workers."""

    lengths: list[int]
    seeds: list[int]
    checksums: list[int]
    slot_of: _SlotOf
    scratch: bool
    runs: deque[_Run]
    statuses: Statuses
    landed: list[tuple[int, npt.NDArray[np.uint8]]]  # not yet verified
    verifying: bool = False


class ExtentReader:
    """Any number of `read` calls at once share one bound."""

    def __init__(
        self, files: SegmentFiles, mover: Mover, generation_of: Callable[[int], int | None]
    ) -> None:
        self._files = files
        self._mover = mover
        self._generation_of = generation_of
        self._gate = asyncio.Semaphore(READS_IN_FLIGHT_MAX)

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
        segments = order.segments.tolist()
        wanted = order.generations.tolist()
        usable = [
            index
            for index, segment in enumerate(segments)
            if self._generation_of(segment) == wanted[index]
        ]
        state = _ReadState(
            lengths=order.lengths.tolist(),
            seeds=order.seeds.tolist(),
            checksums=order.checksums.tolist(),
            slot_of=slot_of,
            scratch=bool((order.slot_offsets < 0).any()),
            runs=deque(_runs(order, usable)),
            statuses=np.full(len(segments), int(ReadStatus.FAILED), np.uint8),
            landed=[],
        )
        workers = min(len(state.runs), SCRATCH_READS_MAX if state.scratch else READS_IN_FLIGHT_MAX)
        async with asyncio.TaskGroup() as group:
            for _ in range(workers - 1):
                group.create_task(self._work(state))
            await self._work(state)
        return state.statuses

    async def _work(self, state: _ReadState) -> None:
        """Read runs until none is left; whoever finds bytes that nobody verifies does it."""
        while state.runs:
            run = state.runs.popleft()
            async with self._gate:
                slots = [state.slot_of(index) for index in run.items]
                try:
                    async with self._files.with_file(run.segment) as file:
                        there = await _fill(file, state, run, slots)
                except StorageError:
                    continue  # the file is gone: FAILED stands
            state.landed += [
                (index, slot) for index, slot, ok in zip(run.items, slots, there, strict=True) if ok
            ]
            # Scratch memory is bounded: nobody reads on before it is verified.
            if state.scratch or not state.verifying:
                await self._verify(state)

    async def _verify(self, state: _ReadState) -> None:
        """Check all that has landed, in batches: a hop to a thread costs as much as a read."""
        state.verifying = True
        try:
            while state.landed:
                batch, state.landed = state.landed, []
                sums = await self._mover.copy_in(
                    [
                        CopyJob(None, slot, state.lengths[index], state.seeds[index])
                        for index, slot in batch
                    ]
                )
                for (index, _), value in zip(batch, sums, strict=True):
                    good = value == state.checksums[index]
                    state.statuses[index] = int(ReadStatus.OK if good else ReadStatus.DAMAGED)
        finally:
            state.verifying = False


def _slot(order: ReadExtents, arena: npt.NDArray[np.uint8], index: int) -> npt.NDArray[np.uint8]:
    """The whole slot, or scratch memory where only the checksum is wanted."""
    offset = int(order.slot_offsets[index])
    if offset < 0:
        return aligned_empty(extent_bytes(int(order.lengths[index])))
    return arena[offset : offset + int(order.slot_bytes[index])]


async def _fill(
    file: DiskFile, state: _ReadState, run: _Run, slots: list[npt.NDArray[np.uint8]]
) -> list[bool]:
    """Read a run in one call; if that fails, extent by extent to find out which ones fail."""
    parts = [
        slot[: extent_bytes(state.lengths[index])]
        for index, slot in zip(run.items, slots, strict=True)
    ]
    try:
        count = await file.preadv(parts, run.offset)
    except StorageError:
        if len(parts) == 1:
            return [False]
    else:
        ends = itertools.accumulate(len(part) for part in parts)
        return [end <= count for end in ends]
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
