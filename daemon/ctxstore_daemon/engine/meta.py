"""What goes to the meta log, and who waits for it.

Owns the records of removals, holds, TTLs, quarantines and sequence reservations, and the reserve of
sequence numbers. It must not decide who is removed or held. On a node without a disk nothing is
logged and every append counts as done: there is nothing that could come back.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore_daemon.engine.events import AppendMeta, MetaDone, ReserveMeta
from ctxstore_daemon.engine.index import WRITING, Rows
from ctxstore_daemon.engine.records import META_DTYPE, MetaKind, RecordArray

if TYPE_CHECKING:
    from ctxstore_daemon.engine.core import Core
    from ctxstore_daemon.engine.extents import ExtentsState

SEQUENCE_STEP: Final = 1 << 20
"""Numbers reserved at a time: a crash costs at most two such steps of 2**64."""

OnDone = Callable[[bool], None]


class Reserved(Enum):
    """What became of a wish for room in the log."""

    YES = "kept until an append gives it back"
    FULL = "the log's budget is used up"
    FAILED = "the log could not be written"


OnReserved = Callable[[Reserved], None]


class MetaState:
    """Appends under way. `done` callbacks run inside the event that ends the append."""

    def __init__(self, core: Core, extents: ExtentsState) -> None:
        self._core = core
        self._extents = extents
        self._waiting: dict[int, OnDone | None] = {}
        self._reserving: dict[int, OnReserved] = {}
        self._reserved = 0

    @property
    def pending(self) -> int:
        """Appends and reservations that have not been answered."""
        return len(self._waiting) + len(self._reserving)

    def reserve(self, count: int, done: OnReserved) -> None:
        """Keep room for `count` records: with YES the caller owes an `append` that takes it.

        For what must not be half done: once there is room, only a failing disk keeps it out.
        """
        if not self._core.settings.disk_bytes:
            done(Reserved.YES)
            return
        meta_id = self._core.new_id()
        self._reserving[meta_id] = done
        self._core.emit(ReserveMeta(meta_id, count))

    def append(
        self, records: RecordArray, *, sync: bool, done: OnDone | None = None, reserved: int = 0
    ) -> None:
        """Log the records; `done(ok)` is called when they are written (with `sync`: durable).

        `reserved` is what `reserve` has kept for them; without records it is only given back.
        """
        if not self._core.settings.disk_bytes or not (len(records) or reserved):
            if done is not None:
                done(True)
            return
        meta_id = self._core.new_id()
        self._waiting[meta_id] = done
        self._core.emit(AppendMeta(meta_id, records, sync, reserved))

    def on_done(self, event: MetaDone) -> None:
        """The log answered."""
        reserving = self._reserving.pop(event.meta_id, None)
        if reserving is not None:
            failed = Reserved.FULL if event.full else Reserved.FAILED
            reserving(Reserved.YES if event.ok else failed)
            return
        done = self._waiting.pop(event.meta_id)
        if not event.ok:
            self._core.counters.meta_failed += 1
        if done is not None:
            done(event.ok)

    def reserve_sequence(self, *, sync: bool = False) -> None:
        """Keep numbers reserved ahead, so that none is used again after a crash."""
        core = self._core
        if core.seq + SEQUENCE_STEP // 2 <= self._reserved:
            return
        self._reserved = core.seq + SEQUENCE_STEP
        record = np.zeros(1, META_DTYPE)
        record["kind"] = MetaKind.SEQUENCE
        record["seq"] = self._reserved
        record["at_wall_ns"] = core.wall_ns
        self.append(record, sync=sync)

    # ------------------------------------------------------------ records

    def tombstones(self, ns: int, keys: bytes) -> RecordArray:
        """One tombstone per packed key, all under a sequence number above every birth so far."""
        records = self._keyed(ns, MetaKind.TOMBSTONE, len(keys) // 16)
        records["key"] = np.frombuffer(keys, np.uint8).reshape(-1, 16)
        records["seq"] = self._core.next_seq()
        return records

    def of_rows(self, kind: MetaKind, rows: Rows, *, ttl_ms: int) -> RecordArray:
        """HOLD or TTL records for rows of one namespace, counted from now."""
        index = self._core.index
        if not len(rows):
            return np.zeros(0, META_DTYPE)
        records = self._keyed(int(index.ns[rows[0]]), kind, len(rows))
        records["key"] = index.keys[rows]
        records["birth"] = index.birth[rows]
        records["seq"] = self._core.next_seq()
        records["at_wall_ns"] = self._core.wall_ns
        records["ttl_ms"] = ttl_ms
        return records

    def log_expiry(self, rows: list[int], *, sync: bool, done: OnDone | None = None) -> None:
        """Log the expiry that these rows have now, where a copy on disk says another one."""
        core = self._core
        index = core.index
        stored = [
            row for row in rows if index.segment_at[row] >= 0 or index.flags_at[row] & WRITING
        ]
        records = np.zeros(len(stored), META_DTYPE)
        seq = core.next_seq() if stored else 0
        for record, row in zip(records, stored, strict=True):
            namespace = core.settings.namespaces[index.ns_at[row]]
            record["kind"] = MetaKind.TTL
            record["ns_id"] = namespace.ns_id
            record["incarnation"] = namespace.incarnation
            record["key"] = index.keys[row]
            record["birth"] = index.birth_at[row]
            record["seq"] = seq
            record["at_wall_ns"] = core.wall_ns
            record["ttl_ms"] = core.remaining_ms(row)
        self.append(records, sync=sync, done=done)

    def quarantine(self, segment: int, generation: int, page: int) -> None:
        """Never serve the copy that stands there, also after a restart."""
        record = np.zeros(1, META_DTYPE)
        record["kind"] = MetaKind.QUARANTINE
        record["segment"] = segment
        record["generation"] = generation
        record["page"] = page
        record["seq"] = self._core.next_seq()
        record["at_wall_ns"] = self._core.wall_ns
        self.append(record, sync=False)

    def _keyed(self, ns: int, kind: MetaKind, count: int) -> RecordArray:
        namespace = self._core.settings.namespaces[ns]
        records = np.zeros(count, META_DTYPE)
        records["kind"] = kind
        records["ns_id"] = namespace.ns_id
        records["incarnation"] = namespace.incarnation
        records["at_wall_ns"] = self._core.wall_ns
        return records
