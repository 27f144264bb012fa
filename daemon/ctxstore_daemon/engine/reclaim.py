"""Reclaim: frees the oldest segment of the nvme tier, and takes out of it what should live on.

Owns the one segment being reclaimed and its phase. Survivors are all held shards, and of those that
were read since they were written up to a share of the segment; they are written again by
write-behind before the segment is recycled. It must not free a segment that a read still uses.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore_daemon.engine.core import NS_PER_S, Core
from ctxstore_daemon.engine.events import RecycleSegment
from ctxstore_daemon.engine.index import (
    DIRTY,
    HELD,
    HIT,
    INLINE,
    LOADING,
    WRITING,
)
from ctxstore_daemon.engine.loads import LoadsState, LoadWaiter
from ctxstore_daemon.engine.writeback import Hurry, WritebackState

if TYPE_CHECKING:
    from ctxstore_daemon.engine.extents import ExtentsState, SegmentState

_DROPPED_PER_EVENT: Final = 1024
"""Rows forgotten in one event, so that a large segment does not stall the node."""

_READ_PATIENCE_NS: Final = 2 * NS_PER_S
"""After this, survivors that were only read lately are not waited for."""


class ReclaimPhase(Enum):
    """Where the reclaim stands."""

    IDLE = "nothing to do"
    READING = "survivors that are not in memory are being read"
    WRITING = "survivors are being written elsewhere"
    DROPPING = "all other rows lose their copy"
    DRAINING = "reads of the segment are still running"
    RECYCLING = "the segment is being made free"


class SurvivorReads(LoadWaiter):
    """Brings survivors to memory on behalf of a reclaim; belongs to no connection."""

    __slots__ = ("reclaim", "waiting")

    def __init__(self, reclaim: ReclaimState, *, deadline_ns: int, waiting: int) -> None:
        super().__init__(-1, 0, deadline_ns)
        self.reclaim = reclaim
        self.waiting = waiting

    def loaded(self, item: int, row: int) -> None:
        self.waiting -= 1
        if row:
            self.reclaim.rescue(row)

    def expire(self) -> None:
        self.reclaim.lose_patience()

    def abandon(self) -> None:
        """Never called: there is no connection."""


class ReclaimState:
    """At most one segment at a time."""

    def __init__(
        self, core: Core, *, extents: ExtentsState, loads: LoadsState, writeback: WritebackState
    ) -> None:
        self._core = core
        self._extents = extents
        self._loads = loads
        self._writeback = writeback
        self.phase = ReclaimPhase.IDLE
        self.segment: SegmentState | None = None
        self._survivors: list[tuple[int, int]] = []
        self._reads: SurvivorReads | None = None
        self._impatient = False
        self._to_drop: list[int] = []

    # ------------------------------------------------------------ progress

    def pump(self) -> None:
        """Go on as far as possible now."""
        if self._survivors and self._writeback.blocked and not self._extents.free:
            self._give_way()
        if self.phase is ReclaimPhase.IDLE:
            self._maybe_start()
        reads = self._reads
        if self.phase is ReclaimPhase.READING and reads is not None and not reads.waiting:
            self._core.finish(reads)
            self.phase = ReclaimPhase.WRITING
        if self.phase is ReclaimPhase.WRITING and self._all_moved():
            self.phase = ReclaimPhase.DROPPING
            assert self.segment is not None, "a reclaim without segment"
            self._to_drop = self._extents.rows_in(self.segment.segment).tolist()
        if self.phase is ReclaimPhase.DROPPING:
            self._drop_some()
        if self.phase is ReclaimPhase.DRAINING:
            self._maybe_recycle()
        self._writeback.survivors_only = self._needs_last_segment()

    def _needs_last_segment(self) -> bool:
        """Whether others must not open the last free segment, or the one that is being made free:
        what they leave of it may be too little for the survivors of a segment full of holds.
        """
        if self.phase in (ReclaimPhase.READING, ReclaimPhase.WRITING):
            return self._extents.free <= 1 and not self._impatient
        return self.phase is not ReclaimPhase.IDLE and not self._extents.free

    def next_step(self) -> int | None:
        """Now, while there are rows left to drop."""
        return self._core.now_ns if self.phase is ReclaimPhase.DROPPING else None

    def segment_gone(self, segment: int) -> None:
        """The segment was recycled, or is lost: whatever was planned with it is over."""
        if self.segment is None or self.segment.segment != segment:
            return
        if self._reads is not None:
            self._core.finish(self._reads)
        self.phase = ReclaimPhase.IDLE
        self.segment = None
        self._survivors = []
        self._to_drop = []
        self._core.entries_wanted = False

    def _give_way(self) -> None:
        """The disk filled up under this reclaim: survivors would wait for room that only a reclaim
        can make. Begin again with a segment that keeps nothing, if there is one.
        """
        if self.phase not in (ReclaimPhase.READING, ReclaimPhase.WRITING):
            return
        assert self.segment is not None, "a reclaim without segment"
        if self._without_holds() is not None:
            self.segment_gone(self.segment.segment)

    # ------------------------------------------------------------ start

    def _maybe_start(self) -> None:
        extents, writeback = self._extents, self._writeback
        if not extents.known or not extents.disk_ok:
            return
        short = extents.free < self._core.settings.reclaim_free_min
        if not short and not writeback.blocked and not self._core.entries_wanted:
            return
        stuck = writeback.blocked and not extents.free
        segment = self._without_holds() if stuck else extents.oldest_sealed()
        if segment is None:
            if writeback.blocked:
                writeback.fail_blocked()
            return
        self.segment = segment
        self._impatient = False
        survivors = [] if stuck else self._choose(segment)
        self._survivors = [(row, self._core.index.birth_at[row]) for row in survivors]
        self._core.counters.reclaim_survivors += len(survivors)
        self.phase = ReclaimPhase.READING
        self._read(survivors)

    def _without_holds(self) -> SegmentState | None:
        """With no room to copy anything to, only a segment that keeps nothing will do."""
        flags = self._core.index.flags
        for segment in self._extents.sealed():
            if not (flags[self._extents.rows_in(segment.segment)] & HELD).any():
                return segment
        return None

    def _choose(self, segment: SegmentState) -> list[int]:
        """Held rows, and rows read since written: high priority first, parents before children."""
        core = self._core
        index = core.index
        rows = self._extents.rows_in(segment.segment)
        alive = rows[index.expires_ns[rows] > core.now_ns]
        flags = index.flags[alive]
        held: list[int] = alive[(flags & HELD) != 0].tolist()
        if core.entries_wanted:
            return held
        read = alive[((flags & HIT) != 0) & ((flags & HELD) == 0)]
        read = read[np.lexsort((index.depth[read], -index.priority[read].astype(np.int32)))]
        share = int(core.settings.segment_bytes * core.settings.survivor_fraction)
        sizes = np.maximum(index.length[read].astype(np.int64), 1)
        kept: list[int] = read[np.cumsum(sizes) <= share].tolist()
        return held + kept

    def _read(self, survivors: list[int]) -> None:
        core = self._core
        index = core.index
        missing: list[tuple[int, int]] = []
        for row in survivors:
            if index.slot_at[row] or index.flags_at[row] & INLINE:
                self.rescue(row)
            else:
                missing.append((0, row))
        deadline = core.now_ns + _READ_PATIENCE_NS
        self._reads = SurvivorReads(self, deadline_ns=deadline, waiting=len(missing))
        core.start(self._reads)
        if missing:
            self._loads.want(self._reads, missing, background=True)

    def rescue(self, row: int) -> None:
        """A survivor is in memory: write it elsewhere."""
        if self.segment is not None and self._core.index.segment_at[row] == self.segment.segment:
            self._writeback.add(row, Hurry.RESCUE)

    def lose_patience(self) -> None:
        """There is no room to read survivors: only held ones are waited for, behind everything
        else.
        """
        reads = self._reads
        if reads is None or reads.done:
            return
        self._core.finish(reads)
        self._impatient = True
        index = self._core.index
        held = [
            (0, row)
            for row, birth in self._survivors
            if index.birth_at[row] == birth
            and index.flags_at[row] & HELD
            and not index.slot_at[row]
            and not index.flags_at[row] & INLINE
        ]
        deadline = self._core.now_ns + _READ_PATIENCE_NS
        self._reads = SurvivorReads(self, deadline_ns=deadline, waiting=len(held))
        self._core.start(self._reads)
        if held:
            self._loads.want(self._reads, held)

    # ------------------------------------------------------------ end

    def _all_moved(self) -> bool:
        index = self._core.index
        assert self.segment is not None, "a reclaim without segment"
        while self._survivors:
            row, birth = self._survivors[-1]
            here = index.birth_at[row] == birth and index.segment_at[row] == self.segment.segment
            if here and index.flags_at[row] & (DIRTY | WRITING | LOADING):
                return False
            self._survivors.pop()
        return True

    def _drop_some(self) -> None:
        core = self._core
        index = core.index
        assert self.segment is not None, "a reclaim without segment"
        part, self._to_drop = (
            self._to_drop[:_DROPPED_PER_EVENT],
            self._to_drop[_DROPPED_PER_EVENT:],
        )
        for row in part:
            if index.segment_at[row] != self.segment.segment:
                continue
            core.counters.reclaim_dropped += 1
            if index.flags_at[row] & (INLINE | DIRTY | WRITING) == INLINE:
                core.drop(row)
            else:
                self._extents.lose_copy(row)
        if not self._to_drop:
            self.phase = ReclaimPhase.DRAINING

    def _maybe_recycle(self) -> None:
        assert self.segment is not None, "a reclaim without segment"
        if self.segment.readers:
            return
        assert not len(self._extents.rows_in(self.segment.segment)), "rows are still there"
        self.segment.recycling = True
        self.phase = ReclaimPhase.RECYCLING
        self._core.emit(RecycleSegment(self.segment.segment))

    def audit(self) -> list[str]:
        """What is wrong with the books; empty when all is well."""
        if (self.segment is None) != (self.phase is ReclaimPhase.IDLE):
            return [f"reclaim is {self.phase.name} with segment {self.segment}"]
        return []
