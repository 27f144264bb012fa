"""Holds, touches and removals: what users wish for shards by call, durable before it is
acknowledged.

Owns which rows are held until when, their share of the tier, and the requests that wait for the
meta log. A hold keeps a shard from eviction and reclaim; it does not outlive the shard's TTL or its
removal.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore.errors import CtxStoreError, DeadlineExceeded, Overloaded, StorageError
from ctxstore.wire import messages as wire
from ctxstore_daemon.engine.core import Core, Operation
from ctxstore_daemon.engine.index import DIRTY, HELD, INLINE, VISIBLE, WRITING, Rows, split_keys
from ctxstore_daemon.engine.meta import Reserved
from ctxstore_daemon.engine.records import META_DTYPE, MetaKind, RecordArray
from ctxstore_daemon.engine.writeback import Hurry, WritebackState

if TYPE_CHECKING:
    from ctxstore_daemon.engine.extents import ExtentsState
    from ctxstore_daemon.engine.meta import MetaState

_LOG_FULL_RETRY_S: Final = 60.0


_STALE_MAX: Final = 64
"""Ends of past holds kept in the heap, beside as many as there are holds."""


class LoggedOperation(Operation):
    """A request that is answered with `mask` when the meta log has it."""

    __slots__ = ("core", "mask")

    def __init__(self, core: Core, *, conn: int, rid: int, deadline_ns: int, mask: bytes) -> None:
        super().__init__(conn, rid, deadline_ns)
        self.core = core
        self.mask = mask

    def logged(self, ok: bool) -> None:
        """The log answered."""
        if self.done:
            return
        self.core.finish(self)
        if ok:
            self.core.reply(self.conn, wire.MaskReply(self.rid, self.mask))
        else:
            error = StorageError("the meta log could not be written; the change may be lost")
            self.core.reply(self.conn, wire.failure_from_error(self.rid, error))

    def expire(self) -> None:
        self.core.finish(self)
        error = DeadlineExceeded("the meta log was not synced in time; outcome unknown")
        self.core.reply(self.conn, wire.failure_from_error(self.rid, error))

    def abandon(self) -> None:
        self.core.finish(self)


class HoldsState:
    """Held rows and the ends of their holds."""

    def __init__(
        self, core: Core, *, extents: ExtentsState, meta: MetaState, writeback: WritebackState
    ) -> None:
        self._core = core
        self._extents = extents
        self._meta = meta
        self._writeback = writeback
        self.ends: dict[int, int] = {}
        """Held row to the end of its hold."""
        self.held_bytes = 0
        self._heap: list[tuple[int, int]] = []
        core.on_drop.append(self._row_dropped)

    @property
    def share_bytes(self) -> int:
        """What holds may keep of the largest tier."""
        settings = self._core.settings
        tier = settings.disk_bytes or self._core.slabs.usable_bytes
        return int(tier * settings.hold_fraction)

    # ------------------------------------------------------------ requests

    def hold(self, conn: int, message: wire.Hold, deadline_ns: int) -> None:
        """Hold what is there, until `ttl_ms` from now; 0 lets go."""
        core = self._core
        rows, mask = self._visible(conn, message.keys)
        more = sum(int(core.index.length_at[row]) for row in rows.tolist() if row not in self.ends)
        if message.ttl_ms and more and self.held_bytes + more > self.share_bytes:
            error = Overloaded("holds keep their share of the store already", retry_after_s=1.0)
            core.reply(conn, wire.failure_from_error(message.rid, error))
            return
        until = core.expiry(message.ttl_ms) if message.ttl_ms else 0
        for row in rows.tolist():
            if until:
                self.set(row, until)
            else:
                self._end(row)
        records = self._meta.of_rows(MetaKind.HOLD, rows, ttl_ms=message.ttl_ms)
        self._log(conn, message.rid, deadline_ns, mask, records)

    def touch(self, conn: int, message: wire.Touch, deadline_ns: int) -> None:
        """Count as a read, and raise the TTL to `ttl_ms` from now (0: leave it)."""
        core = self._core
        rows, mask = self._visible(conn, message.keys)
        core.policy.touch(rows)
        raised = []
        if message.ttl_ms:
            until = core.expiry(message.ttl_ms)
            expires_at = core.index.expires_ns_at
            for row in rows.tolist():
                if expires_at[row] < until:
                    expires_at[row] = until
                    raised.append(row)
        operation = self._start(conn, message.rid, deadline_ns, mask)
        self._meta.log_expiry(raised, sync=True, done=operation.logged)

    def remove(self, conn: int, message: wire.Remove, deadline_ns: int) -> None:
        """Forget the keys as soon as the log has room for their tombstones: all or none. Answer
        when those are durable.
        """
        names = split_keys(message.keys)
        unique = list(dict.fromkeys(names))
        ns = self._core.conns[conn].ns
        operation = self._start(conn, message.rid, deadline_ns, b"")

        def reserved(room: Reserved) -> None:
            if room is not Reserved.YES:
                self._refuse_removal(operation, room)
            elif operation.done:
                # Applied now it could hit what was put after this call had ended.
                nothing = np.zeros(0, META_DTYPE)
                self._meta.append(nothing, sync=False, reserved=len(unique))
            else:
                operation.mask = self._forget(ns, names)
                # Every key gets a tombstone, whatever the index says of it. One that is unknown or
                # in memory only may have an older copy in a segment: its row was evicted, or lost
                # to a full index, or its group failed after it had reached the disk. No column
                # tells, and recovery would find it. The log keeps one tombstone per key.
                records = self._meta.tombstones(ns, b"".join(unique))
                self._meta.append(records, sync=True, done=operation.logged, reserved=len(unique))

        self._meta.reserve(len(unique), reserved)

    def _refuse_removal(self, operation: LoggedOperation, room: Reserved) -> None:
        if operation.done:
            return
        core = self._core
        core.finish(operation)
        error: CtxStoreError = StorageError("nothing was removed: the meta log cannot be written")
        if room is Reserved.FULL:
            error = Overloaded(
                "nothing was removed: the log of removals is full, each stays in it for at least "
                "24 hours; a larger --disk makes it larger",
                retry_after_s=_LOG_FULL_RETRY_S,
            )
        core.reply(operation.conn, wire.failure_from_error(operation.rid, error))

    def _forget(self, ns: int, names: list[bytes]) -> bytes:
        """Drop the rows of these keys; 1 for each that was there."""
        core = self._core
        index = core.index
        mask = bytearray(len(names))
        for item, name in enumerate(names):
            row = index.find(ns, name)
            if not row:
                continue
            if index.flags_at[row] & VISIBLE:
                mask[item] = index.expires_ns_at[row] > core.now_ns
                core.drop(row)
                core.counters.removed += mask[item]
            elif index.birth_at[row]:
                # Its group is under way with an older birth: committed, then removed.
                mask[item] = 1
                core.detach(row)
        return bytes(mask)

    def _visible(self, conn: int, keys: wire.Column) -> tuple[Rows, bytes]:
        index = self._core.index
        rows = index.find_batch(self._core.conns[conn].ns, keys)
        seen = index.visible(rows, self._core.now_ns)
        return np.unique(rows[seen]), seen.tobytes()

    def _start(self, conn: int, rid: int, deadline_ns: int, mask: bytes) -> LoggedOperation:
        operation = LoggedOperation(
            self._core, conn=conn, rid=rid, deadline_ns=deadline_ns, mask=mask
        )
        self._core.start(operation)
        return operation

    def _log(
        self, conn: int, rid: int, deadline_ns: int, mask: bytes, records: RecordArray
    ) -> None:
        operation = self._start(conn, rid, deadline_ns, mask)
        self._meta.append(records, sync=True, done=operation.logged)

    # ------------------------------------------------------------ holds

    def set(self, row: int, until_ns: int) -> None:
        """Hold the row until then; a shorter hold replaces a longer one."""
        core = self._core
        if row not in self.ends:
            self.held_bytes += core.index.length_at[row]
        self.ends[row] = until_ns
        heapq.heappush(self._heap, (until_ns, row))
        if len(self._heap) > 2 * len(self.ends) + _STALE_MAX:
            # A hold that is renewed leaves its old end behind.
            self._heap = [(end, held) for held, end in self.ends.items()]
            heapq.heapify(self._heap)
        flags = core.index.flags_at[row]
        core.index.flags_at[row] = flags | HELD
        stored = core.index.segment_at[row] >= 0 or flags & (DIRTY | WRITING)
        if not stored and self._extents.disk_ok and (core.index.slot_at[row] or flags & INLINE):
            # Admission had left it in memory only: a hold survives a restart, so must the shard.
            self._writeback.add(row, Hurry.BEHIND)

    def _end(self, row: int) -> None:
        if self.ends.pop(row, 0):
            self.held_bytes -= self._core.index.length_at[row]
            self._core.index.flags_at[row] &= ~HELD
            self._core.room_changed = True

    def _row_dropped(self, row: int) -> None:
        self._end(row)

    def expire(self) -> None:
        """Let go of what was held until now."""
        while self._heap and self._heap[0][0] <= self._core.now_ns:
            until, row = heapq.heappop(self._heap)
            if self.ends.get(row) == until:
                self._end(row)

    def next_end(self) -> int | None:
        """When `expire` has something to do, or less."""
        return self._heap[0][0] if self._heap else None

    def audit(self) -> list[str]:
        """What is wrong with the books; empty when all is well."""
        index = self._core.index
        flagged = np.flatnonzero(index.flags[: index.high] & HELD).tolist()
        wrong = []
        if flagged != sorted(self.ends):
            wrong.append("held rows and flags differ")
        if sum(index.length_at[row] for row in flagged) != self.held_bytes:
            wrong.append("held bytes are miscounted")
        return wrong
