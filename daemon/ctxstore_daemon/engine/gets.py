"""Gets: from keys to leased slots (control connections) or pinned slots (data connections).

Owns the answers to Get and StreamGet. What is in memory is answered at once by column; what is on
nvme is promoted first, until the deadline. It must not read anything itself, and a get never
changes what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from ctxstore.limits import PAGE_BYTES
from ctxstore.wire import messages as wire
from ctxstore.wire.messages import Lookup
from ctxstore_daemon.engine.events import SendShards, StreamGetArrived, StreamGetDone
from ctxstore_daemon.engine.index import HIT, INLINE, VISIBLE, BoolArray, Rows
from ctxstore_daemon.engine.loads import LoadsState, LoadWaiter

if TYPE_CHECKING:
    from ctxstore_daemon.engine.core import ConnState, Core
    from ctxstore_daemon.engine.leases import LeasesState
    from ctxstore_daemon.engine.slabs import Pages

_OPEN: Final = 255
_PAGE_MASK: Final = PAGE_BYTES - 1
_NO_SUMS: Final = np.zeros(0, np.uint64)


@dataclass(slots=True)
class AnswerState:
    """What a get knows so far, one row per key. `slots` 0: no payload in the arena."""

    rows: Rows
    status: npt.NDArray[np.uint8]
    slots: Pages
    lengths: npt.NDArray[np.uint32]
    sums: npt.NDArray[np.uint64]
    """Only filled for data connections, and where there are inline payloads."""
    inline: dict[int, bytes]
    kept_bytes: int = 0
    """Counted in `leased_bytes` of the connection, pages rounded up."""


@dataclass(slots=True)
class StreamState:
    """Slots that a data thread is sending, by (conn, rid), until StreamGetDone."""

    slots: Pages
    kept_bytes: int


class GetOperation(LoadWaiter):
    """A get with keys that are not in memory yet."""

    __slots__ = ("answer", "gets", "reading", "stream", "waiting")

    def __init__(
        self,
        gets: GetsState,
        *,
        conn: int,
        rid: int,
        deadline_ns: int,
        stream: bool,
        answer: AnswerState,
    ) -> None:
        super().__init__(conn, rid, deadline_ns)
        self.gets = gets
        self.stream = stream
        self.answer = answer
        self.waiting = 0

    def loaded(self, item: int, row: int) -> None:
        self.gets.item_loaded(self, item, row)

    def expire(self) -> None:
        self.gets.give_up(self)

    def abandon(self) -> None:
        self.gets.abandon(self)


class GetsState:
    """Gets under way, and slots that data threads are sending."""

    def __init__(self, core: Core, leases: LeasesState, loads: LoadsState) -> None:
        self._core = core
        self._leases = leases
        self._loads = loads
        self.streams: dict[tuple[int, int], StreamState] = {}
        self.waiting = 0

    # ------------------------------------------------------------ arrival

    def get(self, conn_id: int, message: wire.Get, deadline_ns: int) -> None:
        """A get on a control connection."""
        core = self._core
        conn = core.conns[conn_id]
        rows = core.index.find_batch(conn.ns, message.keys)
        flags = core.index.flags[rows]
        seen = (flags & VISIBLE) != 0
        seen &= core.index.expires_ns[rows] > core.now_ns
        answer, need = self._look(conn, rows, seen, flags)
        if need is None:
            self._reply(conn_id, message.rid, answer)
        else:
            self._wait(conn_id, message.rid, deadline_ns, stream=False, answer=answer, need=need)

    def stream_get(self, event: StreamGetArrived) -> None:
        """A get on a data connection, which also says what its buffers hold."""
        core = self._core
        conn = core.conns.get(event.conn)
        if conn is None:
            return
        rows = core.index.find_batch(conn.ns, event.keys)
        seen = core.index.visible(rows, core.now_ns)
        lengths = core.index.length[rows]
        if event.exact:
            seen &= lengths == event.capacities
            small = np.zeros(0, np.int64)
        else:
            small = np.flatnonzero(seen & (lengths > event.capacities))
            seen[small] = False
        answer, need = self._look(conn, rows, seen, core.index.flags[rows])
        answer.sums = core.index.checksum[rows]
        if len(small):
            answer.status[small] = Lookup.TOO_SMALL
            answer.lengths[small] = lengths[small]
            core.counters.get_too_small += len(small)
        if need is None:
            self._send(event.conn, event.rid, answer)
        else:
            self._wait(
                event.conn, event.rid, event.deadline_ns, stream=True, answer=answer, need=need
            )

    def _look(
        self, conn: ConnState, rows: Rows, seen: BoolArray, flags: npt.NDArray[np.uint16]
    ) -> tuple[AnswerState, Rows | None]:
        """Answer what can be answered now; the second value names the items that need a promotion.

        Counts all of it against the share of the connection and pins what is in memory.
        """
        core = self._core
        index = core.index
        n = len(rows)
        all_seen = bool(seen.all())
        if not n or not (all_seen or seen.any()):
            core.counters.get_misses += n
            return self._nothing(rows), None
        slots = index.slot[rows].astype(np.int64)
        lengths = index.length[rows]
        status = np.zeros(n, np.uint8)
        if not all_seen:
            status[~seen] = Lookup.MISS
            slots *= seen
            lengths = lengths * seen
            core.counters.get_misses += int(np.count_nonzero(status))
        inline: dict[int, bytes] = {}
        inlined = (flags & INLINE) != 0
        kept = (lengths.astype(np.int64) + _PAGE_MASK) & ~_PAGE_MASK
        if inlined.any():
            self._take_inline(rows, seen, status, inline)
            all_seen = all_seen and not status.any()
            kept[inlined] = 0
        total = int(kept.sum())
        if total > self._leases.left(conn):
            total = self._refuse(conn, kept=kept, status=status, slots=slots, seen=seen)
            all_seen = False
        conn.leased_bytes += total
        here = slots if slots.all() else slots[slots > 0]
        self._pin(here)
        found = slice(None) if all_seen else seen & (status == 0)
        hits = rows[found]
        core.policy.touch(hits)
        index.flags[hits] = flags[found] | HIT
        answer = AnswerState(rows, status, slots, lengths, _NO_SUMS, inline, total)
        if inline:
            answer.sums = index.checksum[rows]
        if len(here) + len(inline) == len(hits):
            core.counters.get_hits_memory += len(hits)
            hit_lengths = lengths if all_seen else lengths[status == 0]
            core.counters.get_hit_bytes += int(hit_lengths.sum(dtype=np.int64))
            return answer, None
        need = np.flatnonzero((slots == 0) & (status == 0))
        if inline:
            need = need[~inlined[need]]
        core.counters.get_hits_memory += len(hits) - len(need)
        return answer, need

    def _pin(self, slots: Pages) -> None:
        if len(slots):
            self._core.slabs.pin_batch(slots)
            self._core.slabs.used_at(slots)

    def _nothing(self, rows: Rows) -> AnswerState:
        n = len(rows)
        return AnswerState(
            rows,
            np.full(n, Lookup.MISS, np.uint8),
            np.zeros(n, np.int64),
            np.zeros(n, np.uint32),
            _NO_SUMS,
            {},
        )

    def _take_inline(
        self,
        rows: Rows,
        seen: BoolArray,
        status: npt.NDArray[np.uint8],
        inline: dict[int, bytes],
    ) -> None:
        index = self._core.index
        left = self._core.settings.inline_reply_bytes_max
        for item in np.flatnonzero(seen & ((index.flags[rows] & INLINE) != 0)).tolist():
            payload = index.inline[int(rows[item])]
            if len(payload) > left:
                status[item] = Lookup.OVERLOADED
                seen[item] = False
                self._core.counters.get_overloaded += 1
                continue
            left -= len(payload)
            inline[item] = payload

    def _refuse(
        self,
        conn: ConnState,
        *,
        kept: npt.NDArray[np.int64],
        status: npt.NDArray[np.uint8],
        slots: Pages,
        seen: BoolArray,
    ) -> int:
        """Leave out what does not fit into the share, in key order; returns the bytes that do."""
        left = self._leases.left(conn)
        fits = np.cumsum(kept) <= left
        over = ~fits & (kept > 0)
        status[over] = Lookup.OVERLOADED
        slots[over] = 0
        seen[over] = False
        self._core.counters.get_overloaded += int(np.count_nonzero(over))
        return int(kept[fits].sum())

    # ------------------------------------------------------------ waiting for nvme

    def _wait(
        self,
        conn: int,
        rid: int,
        deadline_ns: int,
        *,
        stream: bool,
        answer: AnswerState,
        need: Rows,
    ) -> None:
        operation = GetOperation(
            self, conn=conn, rid=rid, deadline_ns=deadline_ns, stream=stream, answer=answer
        )
        answer.status[need] = _OPEN
        operation.waiting = len(need)
        self.waiting += 1
        self._core.start(operation)
        self._loads.want(
            operation,
            list(zip(need.tolist(), answer.rows[need].tolist(), strict=True)),
        )

    def item_loaded(self, operation: GetOperation, item: int, row: int) -> None:
        """One key of a waiting get is in memory (row) or lost (0)."""
        core = self._core
        answer = operation.answer
        operation.waiting -= 1
        if row:
            slot = core.index.slot_at[row]
            core.slabs.pin(slot)
            answer.slots[item] = slot
            answer.status[item] = Lookup.HIT
            core.counters.get_hits_nvme += 1
            core.counters.get_hit_bytes += int(answer.lengths[item])
        else:
            answer.status[item] = Lookup.MISS
            core.counters.get_misses += 1
        if not operation.waiting:
            self._finish(operation)

    def give_up(self, operation: GetOperation) -> None:
        """The deadline passed: what has not been read yet is not waited for."""
        for item in self._loads.without_room(operation):
            operation.answer.status[item] = Lookup.OVERLOADED
            self._core.counters.get_overloaded += 1
        left = operation.answer.status == _OPEN
        operation.answer.status[left] = Lookup.TIMEOUT
        self._core.counters.get_timeouts += int(np.count_nonzero(left))
        self._finish(operation)

    def _finish(self, operation: GetOperation) -> None:
        answer = operation.answer
        self._core.finish(operation)
        self.waiting -= 1
        lost = np.flatnonzero((answer.status != Lookup.HIT) & (answer.slots == 0))
        if len(lost):
            self._uncount(operation.conn, answer)
        if operation.stream:
            self._send(operation.conn, operation.rid, answer)
        else:
            self._reply(operation.conn, operation.rid, answer)

    def _uncount(self, conn_id: int, answer: AnswerState) -> None:
        """Give back the share of keys that did not become hits."""
        lengths = answer.lengths[answer.slots > 0].astype(np.int64)
        kept = int(((lengths + _PAGE_MASK) & ~_PAGE_MASK).sum())
        self._core.conns[conn_id].leased_bytes -= answer.kept_bytes - kept
        answer.kept_bytes = kept

    def abandon(self, operation: GetOperation) -> None:
        """The connection died: what was pinned for it is let go."""
        answer = operation.answer
        self._core.finish(operation)
        self.waiting -= 1
        self._core.slabs.unpin_batch(answer.slots[answer.slots > 0])
        self._core.conns[operation.conn].leased_bytes -= answer.kept_bytes
        self._core.room_changed = True

    # ------------------------------------------------------------ answers

    def _reply(self, conn_id: int, rid: int, answer: AnswerState) -> None:
        core = self._core
        slots = answer.slots
        entries = np.zeros(len(slots), wire.ENTRY_DTYPE)
        entries["offset"] = slots << 12
        entries["length"] = answer.lengths
        entries["generation"] = core.slabs.generations[slots]
        entries["status"] = answer.status
        lease = 0
        if answer.kept_bytes:
            here = slots if slots.all() else slots[slots > 0]
            lease = self._leases.grant(conn_id, here, answer.kept_bytes)
        blob = b""
        if answer.inline:
            at = 0
            for item, payload in answer.inline.items():
                entries["offset"][item] = at
                entries["flags"][item] = wire.EntryFlag.INLINE
                entries["sum"][item] = answer.sums[item]
                at += len(payload)
            blob = b"".join(answer.inline.values())
        core.reply(conn_id, wire.GetReply(rid, lease, entries.tobytes(), blob))

    def _send(self, conn_id: int, rid: int, answer: AnswerState) -> None:
        slots = answer.slots
        entries = np.zeros(len(slots), wire.DATA_ENTRY_DTYPE)
        hit = answer.status == Lookup.HIT
        entries["length"] = answer.lengths
        entries["status"] = answer.status
        entries["sum"] = answer.sums * hit
        offsets = np.where(slots > 0, slots * PAGE_BYTES, -1)
        inline_offsets = np.full(len(slots), -1, np.int64)
        at = 0
        for item, payload in answer.inline.items():
            inline_offsets[item] = at
            at += len(payload)
        here = slots[slots > 0]
        if len(here):
            self.streams[conn_id, rid] = StreamState(here, answer.kept_bytes)
        self._core.emit(
            SendShards(
                conn=conn_id,
                rid=rid,
                entries=entries,
                slot_offsets=offsets,
                inline_offsets=inline_offsets,
                inline=b"".join(answer.inline.values()),
            )
        )

    def stream_done(self, event: StreamGetDone) -> None:
        """The data thread does not look at the slots any more."""
        state = self.streams.pop((event.conn, event.rid), None)
        if state is None:
            return
        conn = self._core.conns.get(event.conn)
        if conn is not None:
            conn.leased_bytes -= state.kept_bytes
        self._core.slabs.unpin_batch(state.slots)
        self._core.room_changed = True

    def waiting_pins(self) -> list[list[int]]:
        """Slots pinned by gets that are not answered yet."""
        return [
            operation.answer.slots[operation.answer.slots > 0].tolist()
            for conn in self._core.conns.values()
            for operation in conn.operations
            if isinstance(operation, GetOperation)
        ]
