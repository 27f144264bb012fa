"""Puts: from offered keys to committed shards, for both kinds of connection.

Owns the puts under way, the queue of those that wait for room, copies in flight, and who waits for
a key that another put is writing. It must not copy or write: it names slots, and hears when bytes
are there or durable.

A put stands in one queue until each of its new keys has a slot; only the head takes slots, so two
puts never starve each other with half of what both need. A key is claimed (invisible row) together
with its slot.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore.limits import INLINE_BYTES_MAX, PAGE_BYTES
from ctxstore.wire import messages as wire
from ctxstore.wire.messages import WANTED, Durability, PutResult
from ctxstore_daemon.engine.events import (
    CopyDone,
    CopyIn,
    OfferPut,
    PayloadDone,
    PutFinished,
    StreamPutArrived,
)
from ctxstore_daemon.engine.index import VISIBLE
from ctxstore_daemon.engine.put_operation import OPEN, PutOperation
from ctxstore_daemon.engine.slabs import payload_pages, slot_pages
from ctxstore_daemon.engine.writeback import Hurry, WritebackState

if TYPE_CHECKING:
    from ctxstore_daemon.engine.core import Core
    from ctxstore_daemon.engine.extents import ExtentsState
    from ctxstore_daemon.engine.leases import LeasesState
    from ctxstore_daemon.engine.meta import MetaState
    from ctxstore_daemon.engine.room import Room

_STORED: Final = (int(PutResult.COMMITTED), int(PutResult.EXISTS))
_SLICE_KEYS: Final = 256


@dataclass(slots=True)
class CopyState:
    """One CopyIn in flight."""

    operation: PutOperation
    items: list[int]


class PutsState:
    """Puts under way."""

    def __init__(
        self, core: Core, *, extents: ExtentsState, room: Room, writeback: WritebackState,
        meta: MetaState, leases: LeasesState,
    ) -> None:  # fmt: skip
        self._core = core
        self._extents = extents
        self._room = room
        self._writeback = writeback
        self._meta = meta
        self._share_bytes = leases.share_bytes
        self.queue: deque[PutOperation] = deque()
        self.copies: dict[int, CopyState] = {}
        self.offers: dict[tuple[int, int], PutOperation] = {}
        self._waiters: dict[int, list[tuple[PutOperation, int]]] = {}
        """Row on its way to those who put the same key."""

    # ------------------------------------------------------------ arrival

    def put(self, conn_id: int, message: wire.Put, deadline_ns: int) -> None:
        """A put from staging."""
        self._start(conn_id, message, deadline_ns, stream=False)

    def stream_put(self, event: StreamPutArrived) -> None:
        """An offer on a data connection."""
        if event.conn in self._core.conns:
            self._start(event.conn, event.message, event.deadline_ns, stream=True)

    def _start(self, conn_id: int, message: wire.Put, deadline_ns: int, *, stream: bool) -> None:
        core = self._core
        ns = core.conns[conn_id].ns
        durability = message.durability
        if durability == Durability.DEFAULT:
            durability = core.settings.namespaces[ns].durability
        operation = PutOperation(
            self, conn=conn_id, ns=ns, message=message, deadline_ns=deadline_ns, stream=stream,
            group=durability == Durability.GROUP,
        )  # fmt: skip
        first: dict[bytes, int] = {}
        for item, name in enumerate(operation.names):
            found = first.setdefault(name, item)
            if found == item:
                operation.todo.append(item)
            else:
                operation.first_of[item] = found
        core.start(operation)
        if core.stopping or len(self.queue) >= core.settings.waiting_puts_max:
            self._decide_todo(operation, PutResult.OVERLOADED)
            self._settle(operation)
            return
        self._enqueue(operation)
        if self.queue[0] is operation:
            self._serve_heads()

    def _enqueue(self, operation: PutOperation) -> None:
        if not operation.queued:
            operation.queued = True
            self.queue.append(operation)

    def pump(self, *, room: bool) -> None:
        """Go on when there may be `room` now, or keys to look at again."""
        if self.queue and (room or not self.queue[0].todo):
            self._serve_heads()

    def _serve_heads(self) -> None:
        while self.queue:
            head = self.queue[0]
            if not head.done and not self._serve(head):
                return
            self.queue.popleft()
            head.queued = False
            if not head.done:
                self._settle(head)

    # ------------------------------------------------------------ looking at keys

    def _serve(self, operation: PutOperation) -> bool:
        """Decide, claim or start waiting for each item to do; False while some have no room.

        A put that waits for room is looked at again whenever a group was written: then a slice
        at a time, so that it does not cost its whole rest. A stream put is offered in one piece.
        """
        while operation.todo:
            sliced = operation.waited and not operation.stream
            count = _SLICE_KEYS if sliced else len(operation.todo)
            if not self._serve_slice(operation, count):
                operation.waited = True
                return False
        return True

    def _serve_slice(self, operation: PutOperation, count: int) -> bool:
        fresh: dict[int, list[int]] = {}
        left: list[int] = []
        for _ in range(min(count, len(operation.todo))):
            item = operation.todo.popleft()
            if operation.results[item] == OPEN and not self._look(operation, item):
                length = operation.lengths[item]
                pages = 0 if length <= INLINE_BYTES_MAX else slot_pages(length)
                fresh.setdefault(pages, []).append(item)
        claimed: list[int] = []
        for pages, items in fresh.items():
            claimed += self._claim(operation, pages, items, left)
        operation.todo.extendleft(sorted(left, reverse=True))
        self._log_raised(operation)
        if claimed:
            claimed.sort()
            if operation.stream:
                operation.offered += claimed
            else:
                self._copy(operation, claimed)
        return not left

    def _log_raised(self, operation: PutOperation) -> None:
        """Log TTLs that this put has raised; a group put is answered when that is durable."""
        rows, operation.raised = operation.raised, []
        if not rows:
            return
        if not operation.group:
            self._meta.log_expiry(rows, sync=False)
            return
        operation.logs += 1

        def logged(ok: bool) -> None:
            operation.logs -= 1
            self._settle(operation)

        self._meta.log_expiry(rows, sync=True, done=logged)

    def _look(self, operation: PutOperation, item: int) -> bool:
        """Decide an item or let it wait for somebody else; False: it needs room for its bytes."""
        core = self._core
        index = core.index
        row = index.find(operation.ns, operation.names[item])
        if row and index.flags_at[row] & VISIBLE and index.expires_ns_at[row] <= core.now_ns:
            core.counters.expired += 1
            core.drop(row)
            row = 0
        if row and index.flags_at[row] & VISIBLE:
            self._exists(operation, item, row)
            return True
        if row and operation.stream and operation.offered:
            # This put keeps others waiting itself: two that wait for each other would never end.
            operation.decide(item, PutResult.OVERLOADED)
            return True
        if row:
            self._waiters.setdefault(row, []).append((operation, item))
            return True
        refusal = self._refusal(operation, item)
        if refusal is not None:
            operation.decide(item, refusal)
        return refusal is not None

    def _refusal(self, operation: PutOperation, item: int) -> PutResult | None:
        core = self._core
        length = operation.lengths[item]
        if length > core.settings.shard_bytes_max:
            return PutResult.REFUSED
        if length > INLINE_BYTES_MAX and not core.slabs.fits_ever(slot_pages(length)):
            return PutResult.REFUSED
        if operation.group and not self._extents.disk_ok:
            return PutResult.REFUSED
        quota = core.settings.namespaces[operation.ns].quota_bytes
        if quota and core.ns_bytes[operation.ns] + length > quota:
            return PutResult.REFUSED
        if operation.stream and operation.claimed_bytes:
            more = payload_pages(length) * PAGE_BYTES
            if operation.claimed_bytes + more > self._share_bytes:
                return PutResult.OVERLOADED
        operation.claimed_bytes += payload_pages(length) * PAGE_BYTES
        return None

    def _claim(
        self, operation: PutOperation, pages: int, items: list[int], left: list[int]
    ) -> list[int]:
        """Take a slot and a row for each item; what finds no room goes to `left`."""
        core = self._core
        index = core.index
        writes = self._extents.disk_ok
        wanted = len(items)
        if not (operation.stream and any(operation.rows)):
            # What a stream put has claimed is dirty only when it has all: it must not wait now.
            wanted = self._writeback.room_for(pages * PAGE_BYTES or INLINE_BYTES_MAX, wanted)
        core.room_wanted |= wanted < len(items)
        slots = [0] * wanted
        if pages and wanted:
            slots = self._room.slots(pages, wanted)
        claimed: list[int] = []
        quota = core.settings.namespaces[operation.ns].quota_bytes
        for item, slot in zip(items, slots, strict=False):
            length = operation.lengths[item]
            if quota and core.ns_bytes[operation.ns] + length > quota:
                operation.decide(item, PutResult.REFUSED)
                continue
            if not (pages or self._room.inline(length)) or not self._room.entry():
                break
            row = core.claim(operation.ns, operation.names[item], length)
            operation.rows[item] = row
            if writes:
                self._writeback.claim(row, payload_pages(length) * PAGE_BYTES if pages else length)
            index.depth_at[row] = operation.depth[item]
            index.cost_s_at[row] = operation.cost[item]
            index.priority_at[row] = operation.priority[item]
            if slot:
                core.place(row, slot)
                core.slabs.pin(slot)
            claimed.append(item)
        used = dict.fromkeys(index.slot_at[operation.rows[item]] for item in claimed)
        self._room.give_back([slot for slot in slots if slot and slot not in used])
        for item in items:
            if not operation.rows[item] and operation.results[item] == OPEN:
                operation.claimed_bytes -= payload_pages(operation.lengths[item]) * PAGE_BYTES
                left.append(item)
        return claimed

    def _exists(self, operation: PutOperation, item: int, row: int) -> None:
        """The key is stored already: keep the better of both promises."""
        core = self._core
        index = core.index
        if index.length_at[row] != operation.lengths[item]:
            core.counters.put_length_differs += 1
        expires = core.expiry(operation.ttl_ms[item])
        if expires > index.expires_ns_at[row]:
            index.expires_ns_at[row] = expires
            operation.raised.append(row)
        if operation.priority[item] > index.priority_at[row]:
            core.set_priority(row, operation.priority[item])
        if not operation.group or self._writeback.is_durable(row):
            operation.decide(item, PutResult.EXISTS)
        elif not self._extents.disk_ok:
            operation.decide(item, PutResult.REFUSED)
        else:
            self._writeback.wait_durable(row, operation, item)

    # ------------------------------------------------------------ bytes

    def _copy(self, operation: PutOperation, items: list[int]) -> None:
        core = self._core
        index = core.index
        copy_id = core.new_id()
        rows = np.array([operation.rows[item] for item in items], np.int64)
        lengths = [operation.lengths[item] for item in items]
        operation.copies += 1
        self.copies[copy_id] = CopyState(operation, items)
        core.emit(
            CopyIn(
                copy_id=copy_id,
                conn=operation.conn,
                staging_offsets=np.array([operation.offsets[item] for item in items], np.int64),
                slot_offsets=_slot_offsets([index.slot_at[row] for row in rows.tolist()]),
                slot_bytes=_slot_bytes(lengths),
                lengths=np.array(lengths, np.uint32),
                seeds=core.seeds(rows),
            )
        )

    def on_copy_done(self, event: CopyDone) -> bool:
        """Bytes are in their slots. False: this copy was not a put's."""
        copy = self.copies.pop(event.copy_id, None)
        if copy is None:
            return False
        copy.operation.copies -= 1
        sums = event.sums.tolist()
        ok = [True] * len(sums)
        self._arrived(copy.operation, copy.items, ok=ok, sums=sums, inline=event.inline)
        self._settle(copy.operation)
        return True

    def on_payload(self, event: PayloadDone) -> None:
        """A data connection has delivered, or died."""
        operation = self.offers.pop((event.conn, event.rid), None)
        if operation is None:
            return
        items, operation.offered = operation.offered, []
        self._arrived(
            operation, items, ok=event.ok.tolist(), sums=event.sums.tolist(), inline=event.inline
        )
        operation.copies -= 1
        self._settle(operation)

    def _arrived(
        self, operation: PutOperation, items: list[int], *, ok: list[bool], sums: list[int],
        inline: bytes,
    ) -> None:  # fmt: skip
        core = self._core
        index = core.index
        at = 0
        whole: list[int] = []
        for item, good, checksum in zip(items, ok, sums, strict=True):
            row = operation.rows[item]
            slot = index.slot_at[row]
            length = operation.lengths[item]
            payload = b""
            if slot:
                core.slabs.unpin(slot)
            else:
                payload = inline[at : at + length]
                at += length
            if not good:
                core.counters.put_payload_failed += 1
                self._fail(operation, item, PutResult.REFUSED)
                continue
            if not slot:
                index.set_inline(row, payload)
            index.checksum_at[row] = checksum
            whole.append(item)
        depth = operation.depth
        for item in sorted(whole, key=lambda i: -depth[i]):
            # Children before parents, so that they also leave memory first.
            self._commit(operation, item, operation.rows[item])

    def _commit(self, operation: PutOperation, item: int, row: int) -> None:
        """The payload is whole: visible now, or after its group's sync."""
        core = self._core
        index = core.index
        self._writeback.end_claim(row)
        index.birth_at[row] = core.next_seq()
        index.expires_ns_at[row] = core.expiry(operation.ttl_ms[item])
        if operation.group:
            if self._extents.disk_ok:
                self._writeback.wait_durable(row, operation, item)
            else:
                self._fail(operation, item, PutResult.REFUSED)
            return
        self._publish(operation, item, row)
        if self._extents.disk_ok and core.admission.admit(index, row):
            self._writeback.add(row, Hurry.BEHIND)

    def _publish(self, operation: PutOperation, item: int, row: int) -> None:
        core = self._core
        operation.rows[item] = 0
        core.publish(row)
        core.counters.put_committed += 1
        core.counters.put_committed_bytes += operation.lengths[item]
        operation.decide(item, PutResult.COMMITTED)
        for other, other_item in self._waiters.pop(row, ()):
            if not other.done:
                self._exists(other, other_item, row)
                self._log_raised(other)
                self._settle(other)

    def item_durable(self, operation: PutOperation, item: int, ok: bool) -> None:
        """A row this put waits for is on disk, was removed after that, or will never be."""
        row = operation.rows[item]
        core = self._core
        if not row:
            operation.decide(item, PutResult.EXISTS if ok else PutResult.REFUSED)
        elif not ok:
            self._fail(operation, item, PutResult.REFUSED)
        elif core.is_detached(row):
            operation.rows[item] = 0
            operation.decide(item, PutResult.COMMITTED)
            self._wake(row)
        else:
            self._publish(operation, item, row)
        self._settle(operation)

    def _fail(self, operation: PutOperation, item: int, result: PutResult) -> None:
        """The claim is given up; others who put the same key send their own bytes."""
        row = operation.rows[item]
        operation.rows[item] = 0
        operation.decide(item, result)
        self._wake(row)
        if not self._core.is_detached(row):
            self._core.drop(row)

    def _wake(self, row: int) -> None:
        """Let those who waited for this row look again. They do so in the next pump, not now."""
        for other, item in self._waiters.pop(row, ()):
            if not other.done:
                other.todo.append(item)
                self._enqueue(other)
                self._core.room_changed = True

    # ------------------------------------------------------------ ends

    def expire(self, operation: PutOperation) -> None:
        """The deadline passed. Copies in flight still read the client's staging: they are waited
        for.
        """
        self._decide_todo(operation, PutResult.OVERLOADED)
        if operation.stream and operation.offered and not operation.copies:
            for item in operation.offered:
                self._release_claim(operation, item, PutResult.OVERLOADED)
            operation.offered = []
        writing = dict.fromkeys(
            item for copy in self.copies.values() if copy.operation is operation
            for item in copy.items
        )  # fmt: skip
        if operation.stream and operation.copies:
            writing = dict.fromkeys(operation.offered)
        for item in range(len(operation.results)):
            if item not in writing and item not in operation.first_of:
                operation.decide(item, PutResult.TIMEOUT)
        if operation.group:
            for item in writing:
                operation.decide(item, PutResult.TIMEOUT)
        self._settle(operation)

    def abandon(self, operation: PutOperation) -> None:
        """The connection died. Bytes that have arrived or are being copied are still committed."""
        self._decide_todo(operation, PutResult.OVERLOADED)
        if operation.stream and not operation.copies:
            for item in operation.offered:
                self._release_claim(operation, item, PutResult.OVERLOADED)
            operation.offered = []
        self._core.finish(operation)

    def _release_claim(self, operation: PutOperation, item: int, result: PutResult) -> None:
        slot = self._core.index.slot_at[operation.rows[item]]
        if slot:
            self._core.slabs.unpin(slot)
        self._fail(operation, item, result)

    def _decide_todo(self, operation: PutOperation, result: PutResult) -> None:
        while operation.todo:
            operation.decide(operation.todo.popleft(), result)

    def _settle(self, operation: PutOperation) -> None:
        """Answer a put that has nothing left to wait for; make the offer of a stream put."""
        if operation.done or operation.todo:
            return
        duplicates = operation.first_of
        left = operation.open - len(duplicates)
        if left:
            ready = operation.stream and not operation.copies
            if ready and left == len(operation.offered):
                self._offer(operation)
            return
        late = operation.deadline_ns <= self._core.now_ns
        if operation.copies or (operation.logs and not late):
            return
        for item, first in duplicates.items():
            result = operation.results[first]
            operation.decide(item, PutResult.EXISTS if result in _STORED else result)
        self._answer(operation)

    def _offer(self, operation: PutOperation) -> None:
        core = self._core
        index = core.index
        items = sorted(operation.offered)
        operation.offered = items
        operation.copies = 1
        operation.was_offered = True
        self.offers[operation.conn, operation.rid] = operation
        verdicts = np.array(operation.results, np.uint8)
        verdicts[items] = WANTED
        for item, first in operation.first_of.items():
            result = operation.results[first]
            verdicts[item] = PutResult.EXISTS if result in (*_STORED, OPEN) else result
        rows = np.array([operation.rows[item] for item in items], np.int64)
        lengths = [operation.lengths[item] for item in items]
        core.emit(
            OfferPut(
                conn=operation.conn,
                rid=operation.rid,
                verdicts=verdicts,
                slot_offsets=_slot_offsets([index.slot_at[row] for row in rows.tolist()]),
                slot_bytes=_slot_bytes(lengths),
                lengths=np.array(lengths, np.uint32),
                seeds=core.seeds(rows),
            )
        )

    def _answer(self, operation: PutOperation) -> None:
        core = self._core
        core.finish(operation)
        results = np.array(operation.results, np.uint8)
        counts = np.bincount(results, minlength=len(PutResult)).tolist()
        core.counters.put_exists += counts[PutResult.EXISTS]
        core.counters.put_refused += counts[PutResult.REFUSED]
        core.counters.put_overloaded += counts[PutResult.OVERLOADED]
        core.counters.put_timeouts += counts[PutResult.TIMEOUT]
        if not operation.stream:
            core.reply(operation.conn, wire.PutReply(operation.rid, results.tobytes()))
        elif operation.was_offered:
            core.emit(PutFinished(operation.conn, operation.rid, results))
        else:
            none = np.zeros(0, np.int64)
            core.emit(
                OfferPut(
                    conn=operation.conn,
                    rid=operation.rid,
                    verdicts=results,
                    slot_offsets=none,
                    slot_bytes=none,
                    lengths=none.astype(np.uint32),
                    seeds=none.astype(np.uint64),
                )
            )

    @property
    def in_flight(self) -> bool:
        """Whether bytes of a put are on their way."""
        return bool(self.copies or self.offers)

    # ------------------------------------------------------------ invariants

    def _holding(self) -> list[PutOperation]:
        """Operations whose bytes are on their way, or that have slots for them."""
        found = {copy.operation: None for copy in self.copies.values()}
        found |= dict.fromkeys(self.offers.values())
        for conn in self._core.conns.values():
            found |= {op: None for op in conn.operations if isinstance(op, PutOperation)}
        return list(found)

    def pins(self) -> list[int]:
        """Slots pinned for bytes on their way, once for each."""
        slot_at = self._core.index.slot_at
        items = [(copy.operation, item) for copy in self.copies.values() for item in copy.items]
        items += [(op, item) for op in self._holding() if op.stream for item in op.offered]
        slots = (slot_at[operation.rows[item]] for operation, item in items)
        return [slot for slot in slots if slot]

    def claimed_rows(self) -> list[int]:
        """Rows that some put still has to publish or drop."""
        rows = [row for operation in self._holding() for row in operation.rows if row]
        return rows + self._writeback.waited_rows()

    def audit(self) -> list[str]:
        """What is wrong with the books; empty when all is well."""
        index = self._core.index
        return [
            f"row {row} is waited for, but visible or forgotten"
            for row in self._waiters
            if index.flags_at[row] & VISIBLE or not index.length_at[row] >= 0
        ]


def _slot_offsets(slots: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array([slot * PAGE_BYTES if slot else -1 for slot in slots], np.int64)


def _slot_bytes(lengths: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(
        [
            payload_pages(length) * PAGE_BYTES if length > INLINE_BYTES_MAX else 0
            for length in lengths
        ],
        np.int64,
    )
