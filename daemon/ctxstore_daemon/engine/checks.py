"""Doubt about stored bytes: quarantine, reports of clients, and the scrub behind `verify`.

Owns checks under way. A copy is only given up after this node has seen the damage itself; a
quarantine names the place on disk, so that it holds after a restart. It must not serve anybody from
what it checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore import checksum
from ctxstore.limits import MIB, PAGE_BYTES
from ctxstore.wire import messages as wire
from ctxstore_daemon.engine.core import NS_PER_S, Core, Operation
from ctxstore_daemon.engine.events import CopyDone, CopyIn, ReadExtents, ReadsDone, ReadStatus
from ctxstore_daemon.engine.index import DIRTY, INLINE, NEVER_NS, VISIBLE, WRITING, Rows
from ctxstore_daemon.engine.slabs import payload_pages
from ctxstore_daemon.engine.writeback import Hurry, WritebackState

if TYPE_CHECKING:
    from ctxstore_daemon.engine.extents import ExtentsState
    from ctxstore_daemon.engine.meta import MetaState

_BATCH_BYTES: Final = 16 * MIB
_BATCH_SHARDS: Final = 64
_INLINE_PER_EVENT: Final = 512
"""Inline shards a scrub hashes in one event: about a millisecond."""
_PROGRESS_NS: Final = NS_PER_S // 2
_CHECKS_MAX: Final = 64
"""Reported shards being hashed at one time; further reports are only counted."""


@dataclass(slots=True)
class HashState:
    """A copy in memory being hashed again."""

    row: int
    birth: int
    slot: int


@dataclass(slots=True)
class PlaceState:
    """An extent being read for its checksum only."""

    row: int
    birth: int
    segment: int
    generation: int
    page: int


class VerifyOperation(Operation):
    """One scrub: rows as they were at its start, in the order in which they lie on disk."""

    __slots__ = (
        "births", "bytes_per_s", "checked_bytes", "checks", "damaged", "due_ns", "next", "rows",
        "said_ns", "shards", "silence_ns", "started_ns", "unreadable",
    )  # fmt: skip

    def __init__(self, checks: ChecksState, *, conn: int, message: wire.Verify, rows: Rows) -> None:
        super().__init__(conn, message.rid, NEVER_NS)
        now = checks.now_ns
        self.checks = checks
        self.rows = rows
        self.births = checks.births(rows)
        self.bytes_per_s = message.bytes_per_s
        self.silence_ns = min(_PROGRESS_NS, max(message.timeout_us, 1) * 1000 // 4)
        self.started_ns = now
        self.said_ns = now
        self.due_ns = now
        self.next = 0
        self.shards = 0
        self.checked_bytes = 0
        self.damaged = 0
        self.unreadable = 0

    def expire(self) -> None:
        """Never called: a scrub has no deadline."""

    def abandon(self) -> None:
        self.checks.end(self)

    def count(self, status: int, length: int) -> None:
        """One extent was checked."""
        self.shards += 1
        self.checked_bytes += length
        self.damaged += status == ReadStatus.DAMAGED
        self.unreadable += status == ReadStatus.FAILED

    def progress(self, *, done: bool) -> wire.VerifyReply:
        """What to tell the client."""
        return wire.VerifyReply(
            rid=self.rid,
            done=done,
            shards=self.shards,
            checked_bytes=self.checked_bytes,
            damaged=self.damaged,
            unreadable=self.unreadable,
            total=len(self.rows),
        )


class ChecksState:
    """Hashes and reads under way."""

    def __init__(
        self, core: Core, *, extents: ExtentsState, meta: MetaState, writeback: WritebackState
    ) -> None:
        self._core = core
        self._extents = extents
        self._meta = meta
        self._writeback = writeback
        self._hashes: dict[int, HashState] = {}
        self._reads: dict[int, tuple[VerifyOperation | None, list[PlaceState]]] = {}
        self._scrubs: dict[VerifyOperation, bool] = {}
        """Scrub to whether a batch of it is being read."""

    @property
    def now_ns(self) -> int:
        """Monotonic time of this event."""
        return self._core.now_ns

    def births(self, rows: Rows) -> list[int]:
        """Births of the rows, to know them again later."""
        births: list[int] = self._core.index.birth[rows].tolist()
        return births

    # ------------------------------------------------------------ quarantine

    def damaged(self, row: int, *, segment: int, generation: int, page: int) -> None:
        """The extent does not hold what was put: never serve it again."""
        core = self._core
        index = core.index
        core.counters.quarantined += 1
        self._meta.quarantine(segment, generation, page)
        if index.segment_at[row] != segment or index.page_at[row] != page:
            return
        birth = index.birth_at[row]
        self._extents.lose_copy(row)
        if index.birth_at[row] == birth and index.slot_at[row] and self._extents.disk_ok:
            # The copy in memory is good and would be the last one.
            self._writeback.add(row, Hurry.BEHIND)

    # ------------------------------------------------------------ reports

    def report(self, conn: int, message: wire.Report, deadline_ns: int) -> None:
        """A client got other bytes than were announced: look at the copy that it was sent."""
        core = self._core
        index = core.index
        core.counters.reports += message.count
        rows = index.find_batch(core.conns[conn].ns, message.keys)
        on_disk: list[int] = []
        for row, announced in zip(rows.tolist(), message.sum_column.tolist(), strict=True):
            if not index.flags_at[row] & VISIBLE or index.checksum_at[row] != announced:
                continue
            if len(self._hashes) + len(self._reads) >= _CHECKS_MAX:
                return
            if index.flags_at[row] & INLINE:
                self._check_inline(row)
            elif index.slot_at[row]:
                self._hash(row)
            else:
                on_disk.append(row)
        if on_disk:
            self._read(on_disk, None)

    def _check_inline(self, row: int) -> None:
        if not self._inline_intact([row])[0]:
            self._core.counters.reports_confirmed += 1

    def _inline_intact(self, rows: list[int]) -> list[bool]:
        """Whether each inline payload is what was put; those that are not are forgotten."""
        core = self._core
        index = core.index
        seeds = core.seeds(np.array(rows, np.int64)).tolist()
        intact = [
            checksum.checksum(index.inline[row], seed) == index.checksum_at[row]
            for row, seed in zip(rows, seeds, strict=True)
        ]
        for row, good in zip(rows, intact, strict=True):
            if not good:
                # There is no place to quarantine: a start reads the record with its group's header
                # and takes it only if the header's checksum is right.
                core.counters.quarantined += 1
                core.drop(row)
        return intact

    def _hash(self, row: int) -> None:
        core = self._core
        index = core.index
        slot = index.slot_at[row]
        core.slabs.pin(slot)
        copy_id = core.new_id()
        self._hashes[copy_id] = HashState(row, index.birth_at[row], slot)
        rows = np.array([row], np.int64)
        core.emit(
            CopyIn(
                copy_id=copy_id,
                conn=-1,
                staging_offsets=np.full(1, -1, np.int64),
                slot_offsets=np.full(1, slot * PAGE_BYTES, np.int64),
                slot_bytes=np.full(1, core.page_bytes(row), np.int64),
                lengths=index.length[rows],
                seeds=core.seeds(rows),
            )
        )

    def on_copy_done(self, event: CopyDone) -> None:
        """A copy in memory has been hashed."""
        core = self._core
        index = core.index
        check = self._hashes.pop(event.copy_id)
        core.slabs.unpin(check.slot)
        core.room_changed = True
        row = check.row
        if index.birth_at[row] != check.birth or index.slot_at[row] != check.slot:
            return
        if int(event.sums[0]) == index.checksum_at[row]:
            return
        core.counters.reports_confirmed += 1
        core.counters.quarantined += 1
        if index.segment_at[row] >= 0 and not index.flags_at[row] & (DIRTY | WRITING):
            # The copy on disk is verified when it is read.
            core.give_up_slot(row)
        else:
            core.drop(row)

    # ------------------------------------------------------------ reading for the checksum

    def _read(self, rows: list[int], operation: VerifyOperation | None) -> None:
        core = self._core
        index = core.index
        places: list[PlaceState] = []
        for row in rows:
            segment = self._extents.segments[index.segment_at[row]]
            segment.readers += 1
            places.append(
                PlaceState(
                    row, index.birth_at[row], segment.segment, segment.generation,
                    index.page_at[row],
                )
            )  # fmt: skip
        array = np.array(rows, np.int64)
        lengths = index.length[array]
        read_id = core.new_id()
        self._reads[read_id] = (operation, places)
        core.emit(
            ReadExtents(
                read_id=read_id,
                segments=np.array([place.segment for place in places], np.uint32),
                generations=np.array([place.generation for place in places], np.uint32),
                pages=index.page[array],
                lengths=lengths,
                slot_offsets=np.full(len(rows), -1, np.int64),
                slot_bytes=np.array(
                    [payload_pages(length) * PAGE_BYTES for length in lengths.tolist()], np.int64
                ),
                seeds=core.seeds(array),
                checksums=index.checksum[array],
            )
        )

    def on_reads_done(self, event: ReadsDone) -> bool:
        """Extents were read for a check. False: this read was not a check's."""
        found = self._reads.pop(event.read_id, None)
        if found is None:
            return False
        operation, places = found
        core = self._core
        index = core.index
        for place, status in zip(places, event.statuses.tolist(), strict=True):
            segment = self._extents.segments.get(place.segment)
            if segment is not None and segment.generation == place.generation:
                segment.readers -= 1
            same = index.birth_at[place.row] == place.birth
            if operation is not None:
                operation.count(status, index.length_at[place.row] if same else 0)
            if same and status == ReadStatus.DAMAGED:
                core.counters.reports_confirmed += operation is None
                self.damaged(
                    place.row,
                    segment=place.segment,
                    generation=place.generation,
                    page=place.page,
                )
            elif same and status == ReadStatus.FAILED:
                core.counters.read_failed += 1
                self._unreadable(place)
        if operation is not None and not operation.done:
            self._scrubs[operation] = False
            self._go_on(operation)
        return True

    def _unreadable(self, place: PlaceState) -> None:
        index = self._core.index
        if index.segment_at[place.row] == place.segment and index.page_at[place.row] == place.page:
            self._extents.lose_copy(place.row)

    # ------------------------------------------------------------ scrub

    def verify(self, conn: int, message: wire.Verify, deadline_ns: int) -> None:
        """Check every shard on disk, then every inline shard in memory, telling the client how far
        it is.

        Inline shards are always served from memory; their records on disk are read by starts and by
        the off-line verify only.
        """
        core = self._core
        index = core.index
        flags = index.flags[: index.high]
        inline = (flags & INLINE) != 0
        visible = (flags & VISIBLE) != 0
        rows = np.flatnonzero((index.segment[: index.high] >= 0) & ~inline & visible)
        rows = rows[np.lexsort((index.page[rows], index.segment[rows]))]
        rows = np.concatenate([rows, np.flatnonzero(inline & visible)])
        operation = VerifyOperation(self, conn=conn, message=message, rows=rows)
        self._scrubs[operation] = False
        core.start(operation)
        self._go_on(operation)

    def _go_on(self, operation: VerifyOperation) -> None:
        """Say how far it is, and read the next batch when its time has come."""
        core = self._core
        if self._scrubs[operation]:
            return
        if operation.due_ns <= core.now_ns:
            rows = self._next_batch(operation)
            if rows:
                self._scrubs[operation] = True
                self._read(rows, operation)
            elif operation.next == len(operation.rows):
                core.reply(operation.conn, operation.progress(done=True))
                self.end(operation)
                return
        if core.now_ns - operation.said_ns >= operation.silence_ns:
            operation.said_ns = core.now_ns
            core.reply(operation.conn, operation.progress(done=False))

    def _next_batch(self, operation: VerifyOperation) -> list[int]:
        """Rows to read from disk; none when all are done, or when inline ones had their turn."""
        index = self._core.index
        batch: list[int] = []
        inline: list[int] = []
        size = 0
        while operation.next < len(operation.rows) and len(batch) < _BATCH_SHARDS:
            at = operation.next
            row = int(operation.rows[at])
            known = index.birth_at[row] == operation.births[at]
            if known and index.flags_at[row] & INLINE:
                if batch or len(inline) == _INLINE_PER_EVENT:
                    break
                inline.append(row)
            elif known and index.segment_at[row] >= 0:
                if batch and size + index.length_at[row] > _BATCH_BYTES:
                    break
                size += index.length_at[row]
                batch.append(row)
            else:
                operation.shards += 1  # gone since the scrub began
            operation.next += 1
        lengths = [index.length_at[row] for row in inline]
        for length, good in zip(lengths, self._inline_intact(inline), strict=True):
            operation.count(ReadStatus.OK if good else ReadStatus.DAMAGED, length)
        if operation.bytes_per_s:
            read = operation.checked_bytes + size
            due = operation.started_ns + read * NS_PER_S // operation.bytes_per_s
            operation.due_ns = max(due, self._core.now_ns)
        return batch

    def end(self, operation: VerifyOperation) -> None:
        """The scrub is over, or its client is gone."""
        self._core.finish(operation)
        self._scrubs.pop(operation, None)

    def tick(self) -> None:
        """Time passed: go on with scrubs that keep to a rate, and break silences."""
        for operation in list(self._scrubs):
            if operation.due_ns <= self._core.now_ns and not self._scrubs[operation]:
                self._go_on(operation)
            elif self._core.now_ns - operation.said_ns >= operation.silence_ns:
                operation.said_ns = self._core.now_ns
                self._core.reply(operation.conn, operation.progress(done=False))

    def next_step(self) -> int | None:
        """When `tick` has something to do."""
        times = [
            operation.said_ns + operation.silence_ns
            if reading
            else min(operation.due_ns, operation.said_ns + operation.silence_ns)
            for operation, reading in self._scrubs.items()
        ]
        return min(times, default=None)

    @property
    def in_flight(self) -> bool:
        """Whether a hash or read is running."""
        return bool(self._hashes or self._reads)

    def pins(self) -> list[int]:
        """Slots pinned while they are hashed."""
        return [check.slot for check in self._hashes.values()]
