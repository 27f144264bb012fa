"""Promotion: reading extents into slots, once for all who want them.

Owns which rows are on their way from nvme to memory, who waits for each, and the queue of those for
which there is no room yet. It must not answer requests: waiters are told row by row.
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
    """Items of one waiter that have no slot yet: (item, row, birth)."""

    waiter: LoadWaiter
    items: deque[tuple[int, int, int]]


Damaged = Callable[[int, LoadState], None]
"""Told (row, load) when the bytes read do not fit their checksum."""


class LoadsState:
    """Loads under way by row, reads by id, and those that wait for room in order of arrival."""

    def __init__(self, core: Core, extents: ExtentsState, room: Room) -> None:
        self._core = core
        self._extents = extents
        self._room = room
        self.loading: dict[int, LoadState] = {}
        self.reads: dict[int, list[LoadState]] = {}
        self.queue: deque[WantState] = deque()
        self.on_damaged: Damaged | None = None
        core.on_drop.append(self._row_dropped)

    def want(self, waiter: LoadWaiter, items: list[tuple[int, int]]) -> None:
        """Bring rows (item, row) to memory; the waiter hears of each, maybe before this returns."""
        birth = self._core.index.birth_at
        self.queue.append(WantState(waiter, deque((i, row, birth[row]) for i, row in items)))
        if len(self.queue) == 1:
            self._serve_head()

    def without_room(self, waiter: LoadWaiter) -> list[int]:
        """Items of this waiter whose read has not begun."""
        return [item for want in self.queue if want.waiter is waiter for item, _, _ in want.items]

    def pump(self) -> None:
        """There may be room now."""
        while self.queue and (self.queue[0].waiter.done or not self.queue[0].items):
            self.queue.popleft()
        if self.queue and self._core.room_changed:
            self._serve_head()

    def _serve_head(self) -> None:
        while self.queue:
            want = self.queue[0]
            if not want.waiter.done and not self._serve(want):
                return
            self.queue.popleft()

    def _serve(self, want: WantState) -> bool:
        """Start or join loads for all items; False when some found no room."""
        index = self._core.index
        fresh: dict[int, list[tuple[int, int, int]]] = {}
        for item, row, birth in want.items:
            if index.birth_at[row] != birth or not index.flags_at[row] & VISIBLE:
                want.waiter.loaded(item, 0)
            elif index.slot_at[row] or index.flags_at[row] & INLINE:
                want.waiter.loaded(item, row)
            elif row in self.loading:
                self.loading[row].waiters.append((want.waiter, item))
            elif index.segment_at[row] < 0:
                want.waiter.loaded(item, 0)
            else:
                fresh.setdefault(slot_pages(index.length_at[row]), []).append((item, row, birth))
        want.items.clear()
        started: list[LoadState] = []
        for pages, items in fresh.items():
            rows = list(dict.fromkeys(row for _, row, _ in items))
            slots = dict(zip(rows, self._room.slots(pages, len(rows)), strict=False))
            for item, row, birth in items:
                if row in self.loading:
                    self.loading[row].waiters.append((want.waiter, item))
                elif row in slots:
                    load = self._load(row, slots[row])
                    load.waiters.append((want.waiter, item))
                    started.append(load)
                else:
                    want.items.append((item, row, birth))
        for at in range(0, len(started), self._core.settings.read_shards_max):
            self._read(started[at : at + self._core.settings.read_shards_max])
        return not want.items

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
