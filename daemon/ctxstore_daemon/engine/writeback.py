"""Write-behind: which committed shards are not on disk yet, and the groups that bring them there.

Owns the dirty queues, the one group in flight, those who wait for a shard to be durable, and
flushes. It must not answer puts: it tells their waiters. What a reclaim has to copy out is written
first, then what somebody waits for, then the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore.errors import DeadlineExceeded, StorageError
from ctxstore.limits import PAGE_BYTES
from ctxstore.wire import messages as wire
from ctxstore_daemon.engine.core import NS_PER_S, Core, Operation
from ctxstore_daemon.engine.events import GroupDone, GroupFailed, WriteGroup
from ctxstore_daemon.engine.index import (
    DETACHED,
    DIRTY,
    HIT,
    INLINE,
    NEVER_NS,
    VISIBLE,
    WRITING,
    Rows,
)
from ctxstore_daemon.engine.records import RECORD_DTYPE, RecordBatch, RecordFlag
from ctxstore_daemon.engine.slabs import payload_pages

if TYPE_CHECKING:
    from ctxstore_daemon.engine.extents import ExtentsState


_HEADER_BYTES: Final = 2 * PAGE_BYTES
_RECORD_BYTES: Final = 128
"""What a group needs beside its extents, generously."""


class Hurry(IntEnum):
    """Which queue a dirty row goes to, in the order in which they are written."""

    RESCUE = 0
    """A survivor: its segment is freed when it stands elsewhere."""
    WAITED = 1
    """A put waits for it."""
    BEHIND = 2
    """Written behind, within the flush interval."""


class DurableWaiter(ABC):
    """Somebody who waits until a row is on disk."""

    __slots__ = ()

    @abstractmethod
    def durable(self, item: int, ok: bool) -> None:
        """The row is on disk (or was removed after it was committed); False: it will not be."""


class FlushOperation(Operation):
    """A flush waits for every group that holds a shard dirty at its arrival."""

    __slots__ = ("count", "marks", "writeback")

    def __init__(
        self, writeback: WritebackState, *, conn: int, rid: int, deadline_ns: int, count: int
    ) -> None:
        super().__init__(conn, rid, deadline_ns)
        self.writeback = writeback
        self.count = count
        self.marks = 0

    def expire(self) -> None:
        error = DeadlineExceeded("flush did not finish in time")
        self.writeback.end_flush(self, wire.failure_from_error(self.rid, error))

    def abandon(self) -> None:
        self.writeback.end_flush(self, None)


@dataclass(slots=True)
class GroupState:
    """The group in flight. A row counts as its own only while birth and WRITING still agree."""

    group_id: int
    rows: list[int]
    births: list[int]
    slots: list[int]
    hurries: list[Hurry]
    flushes: list[FlushOperation] = field(default_factory=list)


Queue = deque[int | FlushOperation]


class WritebackState:
    """Dirty rows. A queue entry counts while its row is DIRTY; a flush in a queue is a mark."""

    def __init__(self, core: Core, extents: ExtentsState) -> None:
        self._core = core
        self._extents = extents
        self._queues: dict[Hurry, Queue] = {hurry: deque() for hurry in Hurry}
        self._behind_since_ns = 0
        self._full_failures = 0
        self._waiters: dict[int, list[tuple[DurableWaiter, int]]] = {}
        self.group: GroupState | None = None
        self.dirty_rows = 0
        """Rows DIRTY or WRITING."""
        self.dirty_bytes = 0
        self._claimed: dict[int, int] = {}
        self.claimed_bytes = 0
        """Payloads that puts are copying or receiving; dirty when they have come."""
        self.flushes = 0
        self.blocked = False
        """The disk was full: no group until a segment becomes free."""
        self.survivors_only = False
        """The last free segment is kept for what a reclaim copies out."""
        self.dirty_bytes_max = int(core.slabs.usable_bytes * core.settings.dirty_fraction)
        self._flush_ns = int(core.settings.flush_interval_s * NS_PER_S)
        core.on_drop.append(self._row_dropped)

    # ------------------------------------------------------------ becoming dirty

    def room_for(self, size: int, count: int) -> int:
        """How many of `count` shards of this size may be on their way to memory and wait for the
        disk from now on; one always may when nothing else does.
        """
        if not self._extents.disk_ok:
            return count
        busy = self.dirty_bytes + self.claimed_bytes
        fits = (self.dirty_bytes_max - busy) // max(size, 1)
        return min(count, max(fits, 0 if busy else 1))

    def claim(self, row: int, size: int) -> None:
        """The row's payload is on its way: it takes its part of what may wait for the disk."""
        self._claimed[row] = size
        self.claimed_bytes += size

    def end_claim(self, row: int) -> None:
        """The payload has come, or never will."""
        self.claimed_bytes -= self._claimed.pop(row, 0)

    def add(self, row: int, hurry: Hurry) -> None:
        """The row has to be written (its payload is in memory)."""
        index = self._core.index
        flags = index.flags_at[row]
        if flags & WRITING:
            return
        if not flags & DIRTY:
            index.flags_at[row] = flags | DIRTY
            self.dirty_rows += 1
            self.dirty_bytes += self._core.payload_bytes(row)
        elif hurry == Hurry.BEHIND:
            return
        queue = self._queues[hurry]
        if hurry == Hurry.BEHIND and not queue:
            self._behind_since_ns = self._core.now_ns
        queue.append(row)

    def wait_durable(self, row: int, waiter: DurableWaiter, item: int) -> None:
        """Tell the waiter when the row is on disk; it is written without delay."""
        self._waiters.setdefault(row, []).append((waiter, item))
        self.add(row, Hurry.WAITED)

    def is_durable(self, row: int) -> bool:
        """Whether a copy on disk would survive a crash now."""
        index = self._core.index
        return index.segment_at[row] >= 0

    def flush(self, conn: int, rid: int, deadline_ns: int) -> None:
        """Answer when everything that is dirty now is on disk."""
        core = self._core
        if core.settings.disk_bytes and not self._extents.disk_ok:
            error = StorageError("the disk has failed: nothing can be flushed")
            core.reply(conn, wire.failure_from_error(rid, error))
            return
        operation = FlushOperation(
            self, conn=conn, rid=rid, deadline_ns=deadline_ns, count=self.dirty_rows
        )
        for queue in self._queues.values():
            if queue:
                queue.append(operation)
                operation.marks += 1
        if self.group is not None:
            self.group.flushes.append(operation)
            operation.marks += 1
        if not operation.marks:
            core.reply(conn, wire.CountReply(rid, operation.count))
            return
        self.flushes += 1
        core.start(operation)

    def end_flush(self, operation: FlushOperation, reply: wire.Reply | None) -> None:
        """Answer a flush; its marks in the queues mean nothing from now on."""
        self._core.finish(operation)
        self.flushes -= 1
        if reply is not None:
            self._core.reply(operation.conn, reply)

    def _mark_passed(self, operation: FlushOperation) -> None:
        operation.marks -= 1
        if not operation.done and not operation.marks:
            self.end_flush(operation, wire.CountReply(operation.rid, operation.count))

    # ------------------------------------------------------------ groups

    def pump(self) -> None:
        """Write the next group if one is due."""
        if self.group is not None or not (self.dirty_rows or self.flushes):
            return
        if not self._extents.disk_ok:
            self._give_up_all()
            return
        if not self.blocked and self._due():
            self._write_group()

    def _due(self) -> bool:
        core = self._core
        if self._queues[Hurry.RESCUE]:
            return True
        if self.survivors_only:
            return False
        if self._queues[Hurry.WAITED]:
            return True
        settings = core.settings
        return (
            self.flushes > 0
            or core.stopping
            or core.room_wanted
            or self.dirty_rows >= settings.group_shards_target
            or self.dirty_bytes >= settings.group_bytes_target
            or core.now_ns - self._behind_since_ns >= self._flush_ns
        )

    def next_write(self) -> int | None:
        """When the flush interval of the oldest lazy row ends."""
        if self.group is not None or self.blocked or self.survivors_only:
            return None
        if not self._queues[Hurry.BEHIND]:
            return None
        return self._behind_since_ns + self._flush_ns

    def _write_group(self) -> None:
        core = self._core
        flushes: list[FlushOperation] = []
        rows: dict[int, Hurry] = {}
        self._take(rows, flushes)
        self._behind_since_ns = core.now_ns
        core.room_wanted = False
        for operation in flushes:
            if rows:
                operation.marks += 1
            self._mark_passed(operation)
        if not rows:
            return
        index = core.index
        order = list(rows)
        slots = [index.slot_at[row] for row in order]
        for slot in slots:
            if slot:
                core.slabs.pin(slot)
        births = [index.birth_at[row] for row in order]
        hurries = list(rows.values())
        self.group = GroupState(core.new_id(), order, births, slots, hurries, flushes)
        array = np.array(order, np.int64)
        index.flags[array] = (index.flags[array] | WRITING) & ~np.uint16(DIRTY | HIT)
        lengths = index.length[array].tolist()
        slot_column = np.array(slots, np.int64)
        core.emit(
            WriteGroup(
                group_id=self.group.group_id,
                seq=core.next_seq(),
                batch=self._batch(array),
                slot_offsets=np.where(slot_column > 0, slot_column * PAGE_BYTES, -1),
                slot_bytes=np.array(
                    [
                        payload_pages(length) * PAGE_BYTES if slot else 0
                        for slot, length in zip(slots, lengths, strict=True)
                    ],
                    np.int64,
                ),
            )
        )

    def _take(self, rows: dict[int, Hurry], flushes: list[FlushOperation]) -> None:
        """Move dirty rows from the queues to `rows` until the group is full."""
        core = self._core
        flags_at = core.index.flags_at
        size = _HEADER_BYTES
        for hurry, queue in self._queues.items():
            if self.survivors_only and hurry != Hurry.RESCUE:
                return
            while queue:
                head = queue[0]
                if isinstance(head, FlushOperation):
                    flushes.append(head)
                elif flags_at[head] & DIRTY and head not in rows:
                    more = core.payload_bytes(head) + _RECORD_BYTES
                    if rows and size + more > core.settings.group_bytes_max:
                        return
                    if len(rows) >= core.settings.group_shards_max:
                        return
                    size += more
                    rows[head] = hurry
                queue.popleft()

    def _batch(self, rows: Rows) -> RecordBatch:
        core = self._core
        index = core.index
        records = np.zeros(len(rows), RECORD_DTYPE)
        records["key"] = index.keys[rows]
        numbers = index.ns[rows]
        namespaces = core.settings.namespaces
        records["ns_id"] = np.array([ns.ns_id for ns in namespaces], np.uint64)[numbers]
        records["incarnation"] = np.array([ns.incarnation for ns in namespaces], np.uint64)[numbers]
        records["birth"] = index.birth[rows]
        records["checksum"] = index.checksum[rows]
        records["written_at_ns"] = core.wall_ns
        expires = index.expires_ns[rows]
        left = np.maximum((expires - core.now_ns) // 1_000_000, 1)
        records["ttl_ms"] = np.where(expires == NEVER_NS, 0, left)
        records["length"] = index.length[rows]
        records["depth"] = index.depth[rows]
        records["cost_s"] = index.cost_s[rows]
        records["priority"] = index.priority[rows]
        inline = (index.flags[rows] & INLINE) != 0
        records["flags"] = np.where(inline, int(RecordFlag.INLINE), 0)
        payload = b"".join(index.inline[row] for row in rows[inline].tolist())
        return RecordBatch(records, payload)

    # ------------------------------------------------------------ results

    def on_done(self, event: GroupDone) -> None:
        """The group is durable."""
        group = self._end_group(event.group_id)
        core = self._core
        self._full_failures = 0
        self._extents.written(event.segment, event.generation, event.seq)
        core.counters.groups_written += 1
        index = core.index
        pages = event.pages.tolist()
        for row, birth, page in zip(group.rows, group.births, pages, strict=True):
            if not self._still_own(row, birth):
                continue
            self._clean(row)
            core.counters.shards_written += 1
            core.counters.bytes_written += index.length_at[row]
            index.segment_at[row] = event.segment
            index.page_at[row] = page
            index.attempts_at[row] = 0
            self._resolve(row, True)
            if index.flags_at[row] & DETACHED:
                core.drop(row)
        for operation in group.flushes:
            self._mark_passed(operation)
        core.room_changed = True

    def on_failed(self, event: GroupFailed) -> None:
        """The group is not durable. Tried again: after a reclaim (full), elsewhere (a fault)."""
        group = self._end_group(event.group_id)
        core = self._core
        core.counters.groups_failed += 1
        core.room_changed = True
        retry = event.full and self._full_failures < core.settings.write_attempts_max
        if event.full:
            self._full_failures += 1
            # A segment that became free in the meantime will not become free again.
            self.blocked = retry and not self._extents.free
        again: list[int] = []
        for row, birth in zip(group.rows, group.births, strict=True):
            if not self._still_own(row, birth):
                continue
            self._clean(row)
            if retry or self._try_again(row):
                again.append(row)
            else:
                self._give_up(row)
        self._requeue(again, group, retry)

    def _try_again(self, row: int) -> bool:
        """After a device fault: a group put fails at once, anything else gets a few segments."""
        index = self._core.index
        if row in self._waiters:
            self._resolve(row, False)
            if not index.birth_at[row] or not index.flags_at[row] & VISIBLE:
                return False
        index.attempts_at[row] += 1
        return (
            self._extents.disk_ok
            and index.attempts_at[row] < self._core.settings.write_attempts_max
        )

    def _requeue(self, rows: list[int], group: GroupState, retry: bool) -> None:
        hurries = dict(zip(group.rows, group.hurries, strict=True))
        index = self._core.index
        back: dict[Hurry, Queue] = {}
        for row in rows:
            index.flags_at[row] |= DIRTY
            self.dirty_rows += 1
            self.dirty_bytes += self._core.payload_bytes(row)
            back.setdefault(hurries[row], deque()).append(row)
        for operation in group.flushes:
            if operation.done:
                continue
            if retry:
                for part in back.values():
                    part.append(operation)
                    operation.marks += 1
                self._mark_passed(operation)
            else:
                error = StorageError("a group could not be written")
                self.end_flush(operation, wire.failure_from_error(operation.rid, error))
        for hurry, part in back.items():
            self._queues[hurry].extendleft(reversed(part))

    def _end_group(self, group_id: int) -> GroupState:
        group = self.group
        assert group is not None, "no group is in flight"
        assert group.group_id == group_id, "another group is in flight"
        self.group = None
        for slot in group.slots:
            if slot:
                self._core.slabs.unpin(slot)
        return group

    def _still_own(self, row: int, birth: int) -> bool:
        index = self._core.index
        return index.birth_at[row] == birth and bool(index.flags_at[row] & WRITING)

    def _clean(self, row: int) -> None:
        self._core.index.flags_at[row] &= ~(DIRTY | WRITING)
        self.dirty_rows -= 1
        self.dirty_bytes -= self._core.payload_bytes(row)

    def _resolve(self, row: int, ok: bool) -> None:
        for waiter, item in self._waiters.pop(row, ()):
            waiter.durable(item, ok)

    def _give_up(self, row: int) -> None:
        """The row stays in memory only, or goes if nobody was told that it is stored."""
        core = self._core
        core.counters.write_given_up += 1
        self._resolve(row, False)
        flags = core.index.flags_at[row]
        # A put whose last waiter heard "no" has dropped its own row by now.
        if flags & DETACHED:
            core.drop(row)

    def _give_up_all(self) -> None:
        """There is no disk any more: this is a memory-only node from now on."""
        flags_at = self._core.index.flags_at
        for queue in self._queues.values():
            while queue:
                head = queue.popleft()
                if isinstance(head, FlushOperation):
                    if not head.done:
                        error = StorageError("the disk has failed")
                        self.end_flush(head, wire.failure_from_error(head.rid, error))
                elif flags_at[head] & DIRTY:
                    self._clean(head)
                    self._give_up(head)
        self._core.room_changed = True

    def fail_blocked(self) -> None:
        """The disk is full and no reclaim can make room: what waits is kept in memory only."""
        self.blocked = False
        self._full_failures = 0
        self._give_up_all()

    def unblock(self) -> None:
        """A segment is free again."""
        self.blocked = False

    def _row_dropped(self, row: int) -> None:
        self.end_claim(row)
        if self._core.index.flags_at[row] & (DIRTY | WRITING):
            self._clean(row)
        self._resolve(row, True)

    # ------------------------------------------------------------ invariants

    def waited_rows(self) -> list[int]:
        """Rows that somebody waits for."""
        return list(self._waiters)

    def audit(self) -> list[str]:
        """What is wrong with the books; empty when all is well."""
        index = self._core.index
        dirty = np.flatnonzero(index.flags[: index.high] & (DIRTY | WRITING)).tolist()
        wrong = []
        if len(dirty) != self.dirty_rows:
            wrong.append(f"{self.dirty_rows} dirty rows, {len(dirty)} found")
        if sum(map(self._core.payload_bytes, dirty)) != self.dirty_bytes:
            wrong.append("dirty bytes are miscounted")
        if sum(self._claimed.values()) != self.claimed_bytes:
            wrong.append("claimed bytes are miscounted")
        wrong.extend(
            f"row {row} is claimed, but its payload has come"
            for row in self._claimed
            if index.birth_at[row]
        )
        queued = {row for queue in self._queues.values() for row in queue}
        wrong.extend(
            f"row {row} is dirty but in no queue"
            for row in dirty
            if index.flags_at[row] & DIRTY and row not in queued
        )
        wrong.extend(
            f"row {row} has waiters but is neither dirty nor on its way"
            for row in self._waiters
            if not index.flags_at[row] & (DIRTY | WRITING)
        )
        return wrong
