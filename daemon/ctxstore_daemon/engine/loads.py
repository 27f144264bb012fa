"""Promotion: reading extents into slots, once for all who want them.

Owns which rows are on their way from nvme to memory, who waits for each, and the queues of those
for which there is no room yet. It must not answer requests: waiters are told row by row.

Room goes to those who wait for an answer first; prefetches and the survivors of a reclaim wait in
the background until nobody else does. In both lines each slot class has a queue of its own, so that
one class without room keeps no other waiting.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ctxstore.limits import PAGE_BYTES
from ctxstore_daemon.engine.core import Core, Operation
from ctxstore_daemon.engine.events import ReadExtents, ReadsDone, ReadStatus
from ctxstore_daemon.engine.index import INLINE, LOADING, VISIBLE
from ctxstore_daemon.engine.slabs import payload_pages, slot_pages

if TYPE_CHECKING:
    from ctxstore_daemon.engine.extents import ExtentsState
    from ctxstore_daemon.engine.room import Room


class LoadWaiter(Operation):
    """An operation that wants rows in memory."""

    __slots__ = ()

    @abstractmethod
    def loaded(self, item: int, row: int) -> None:
        """The row is in memory now and may be pinned; 0: it cannot be had."""


@dataclass(slots=True)
class LoadState:
    """One extent on its way into one slot. `row` is 0 once the row was dropped meanwhile."""

    row: int
    slot: int
    segment: int
    generation: int
    page: int
    waiters: list[tuple[LoadWaiter, int]] = field(default_factory=list)


@dataclass(slots=True)
class WantState:
    """Items of one waiter and slot class that have no slot yet: (item, row, birth)."""

    waiter: LoadWaiter
    items: deque[tuple[int, int, int]]


WantQueues = dict[int, deque[WantState]]
"""Wants by slot class, each in order of arrival; classes in order of the first that waits."""

Damaged = Callable[[int, LoadState], None]
"""Told (row, load) when the bytes read do not fit their checksum."""


class LoadsState:
    """Loads under way by row, reads by id, and those that wait for room."""

    def __init__(self, core: Core, extents: ExtentsState, room: Room) -> None:
        self._core = core
        self._extents = extents
        self._room = room
        self.loading: dict[int, LoadState] = {}
        self.reads: dict[int, list[LoadState]] = {}
        self._foreground: WantQueues = {}
        self._background: WantQueues = {}
        self._started: list[LoadState] = []
        """Have a slot, and are read when all queues have been looked at."""
        self._background_due = False
        """The background was passed over since it was served last."""
        self.on_damaged: Damaged | None = None
        core.on_drop.append(self._row_dropped)

    def want(
        self, waiter: LoadWaiter, items: list[tuple[int, int]], *, background: bool = False
    ) -> None:
        """Bring rows (item, row) to memory; the waiter hears of each, maybe before this returns."""
        index = self._core.index
        birth = index.birth_at
        by_class: dict[int, WantState] = {}
        for item, row in items:
            if not self._settled(waiter, item, row, birth[row]):
                pages = slot_pages(index.length_at[row])
                want = by_class.setdefault(pages, WantState(waiter, deque()))
                want.items.append((item, row, birth[row]))
        queues = self._background if background else self._foreground
        for pages, want in by_class.items():
            queue = queues.setdefault(pages, deque())
            queue.append(want)
            if background and self._foreground:
                self._background_due = True
            elif len(queue) == 1:
                self._serve_class(queues, pages)
        self._read_started()

    @property
    def waiting(self) -> bool:
        """Whether anybody waits for room."""
        return bool(self._foreground or self._background)

    def without_room(self, waiter: LoadWaiter) -> list[int]:
        """Items of this waiter whose read has not begun."""
        wants = [
            want
            for queues in (self._foreground, self._background)
            for queue in queues.values()
            for want in queue
        ]
        return [item for want in wants if want.waiter is waiter for item, _, _ in want.items]

    def pump(self, *, room: bool) -> None:
        """Go on when there may be `room` now, or somebody who stood first has gone."""
        self._pump(self._foreground, room)
        if self._foreground:
            self._background_due |= room
        else:
            self._pump(self._background, room or self._background_due)
            self._background_due = False
        self._read_started()

    def _pump(self, queues: WantQueues, room: bool) -> None:
        for pages in list(queues):
            if room or queues[pages][0].waiter.done:
                self._serve_class(queues, pages)

    def _serve_class(self, queues: WantQueues, pages: int) -> None:
        queue = queues[pages]
        while queue:
            want = queue[0]
            if not want.waiter.done and not self._serve(want, pages):
                return
            queue.popleft()
        del queues[pages]

    def _settled(self, waiter: LoadWaiter, item: int, row: int, birth: int) -> bool:
        """Tell the waiter at once, or join a load under way; False: the row needs a slot."""
        index = self._core.index
        if index.birth_at[row] != birth or not index.flags_at[row] & VISIBLE:
            waiter.loaded(item, 0)
        elif index.slot_at[row] or index.flags_at[row] & INLINE:
            waiter.loaded(item, row)
        elif row in self.loading:
            self.loading[row].waiters.append((waiter, item))
        elif index.segment_at[row] < 0:
            waiter.loaded(item, 0)
        else:
            return False
        return True

    def _serve(self, want: WantState, pages: int) -> bool:
        """Start or join loads for all items; False when some found no room."""
        items = [entry for entry in want.items if not self._settled(want.waiter, *entry)]
        want.items.clear()
        rows = list(dict.fromkeys(row for _, row, _ in items))
        slots = dict(zip(rows, self._room.slots(pages, len(rows)), strict=False)) if rows else {}
        for item, row, birth in items:
            if row in self.loading:
                self.loading[row].waiters.append((want.waiter, item))
            elif row in slots:
                load = self._load(row, slots[row])
                load.waiters.append((want.waiter, item))
                self._started.append(load)
            else:
                want.items.append((item, row, birth))
        return not want.items

    def _read_started(self) -> None:
        started, self._started = self._started, []
        for at in range(0, len(started), self._core.settings.read_shards_max):
            self._read(started[at : at + self._core.settings.read_shards_max])

    def _load(self, row: int, slot: int) -> LoadState:
        index = self._core.index
        segment = index.segment_at[row]
        generation = self._extents.segments[segment].generation
        load = LoadState(row, slot, segment, generation, index.page_at[row])
        index.flags_at[row] |= LOADING
        self._core.slabs.owner_at[slot] = row
        self._core.slabs.pin(slot)
        self._extents.segments[segment].readers += 1
        self.loading[row] = load
        return load

    def _read(self, loads: list[LoadState]) -> None:
        core = self._core
        index = core.index
        rows = np.array([load.row for load in loads], np.int64)
        lengths = index.length[rows]
        read_id = core.new_id()
        self.reads[read_id] = loads
        core.emit(
            ReadExtents(
                read_id=read_id,
                segments=np.array([load.segment for load in loads], np.uint32),
                generations=np.array([load.generation for load in loads], np.uint32),
                pages=index.page[rows],
                lengths=lengths,
                slot_offsets=np.array([load.slot for load in loads], np.int64) * PAGE_BYTES,
                slot_bytes=np.array(
                    [payload_pages(length) * PAGE_BYTES for length in lengths.tolist()], np.int64
                ),
                seeds=core.seeds(rows),
                checksums=index.checksum[rows],
            )
        )

    def on_reads_done(self, event: ReadsDone) -> None:
        """Bytes are in their slots and verified, or cannot be had."""
        loads = self.reads.pop(event.read_id)
        arrived: list[int] = []
        for load, status in zip(loads, event.statuses.tolist(), strict=True):
            segment = self._extents.segments.get(load.segment)
            if segment is not None and segment.generation == load.generation:
                segment.readers -= 1
            if load.row:
                del self.loading[load.row]
                self._core.index.flags_at[load.row] &= ~LOADING
                if status == ReadStatus.OK:
                    self._core.place(load.row, load.slot)
                    self._core.counters.promoted += 1
                    arrived.append(load.row)
                else:
                    self._lost(load, status)
            for waiter, item in load.waiters:
                if not waiter.done:
                    waiter.loaded(item, load.row)
            # Only now: the waiters' own pins keep the slot from here on.
            self._core.slabs.unpin(load.slot)
            self._core.room_changed = True
        depth = self._core.index.depth_at
        for row in sorted(arrived, key=lambda r: -depth[r]):
            # Children before parents, so that they also leave first.
            self._core.enqueue(row)

    def _lost(self, load: LoadState, status: int) -> None:
        core = self._core
        row, load.row = load.row, 0
        core.slabs.owner_at[load.slot] = 0
        moved = core.index.segment_at[row] != load.segment or core.index.page_at[row] != load.page
        if core.index.segment_at[row] < 0:
            core.drop(row)
        elif moved:
            return
        elif status == ReadStatus.DAMAGED and self.on_damaged is not None:
            self.on_damaged(row, load)
        else:
            core.counters.read_failed += 1
            self._extents.lose_copy(row)

    def _row_dropped(self, row: int) -> None:
        load = self.loading.pop(row, None)
        if load is not None:
            load.row = 0
            self._core.slabs.owner_at[load.slot] = 0
