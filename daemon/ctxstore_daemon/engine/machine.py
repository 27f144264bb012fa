"""The node engine: events in, instructions out.

Owns the wiring of the engine's parts and the order in which they act on one event. It never touches
clock, disk, socket or thread, and it holds no payload but inline shards. One thread at a time may
call it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ctxstore.errors import Overloaded
from ctxstore.wire import messages as wire
from ctxstore_daemon.engine import audit, events, lookups, prefetch, recovery
from ctxstore_daemon.engine.checks import ChecksState
from ctxstore_daemon.engine.core import ConnState, Core
from ctxstore_daemon.engine.eviction import EvictionPolicy, S3Fifo
from ctxstore_daemon.engine.expiry import ExpiryState
from ctxstore_daemon.engine.extents import ExtentsState
from ctxstore_daemon.engine.gets import GetsState
from ctxstore_daemon.engine.holds import HoldsState
from ctxstore_daemon.engine.leases import LeasesState
from ctxstore_daemon.engine.loads import LoadsState, LoadState
from ctxstore_daemon.engine.meta import MetaState
from ctxstore_daemon.engine.puts import PutsState
from ctxstore_daemon.engine.reclaim import ReclaimState
from ctxstore_daemon.engine.room import Room
from ctxstore_daemon.engine.stats import EngineStats
from ctxstore_daemon.engine.writeback import WritebackState

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ctxstore.seams import Now
    from ctxstore_daemon.engine.admission import AdmissionPolicy
    from ctxstore_daemon.engine.index import IndexState
    from ctxstore_daemon.engine.records import Recovered
    from ctxstore_daemon.engine.settings import EngineSettings

_ROUNDS_MAX = 4
"""How often one event may let waiting work try again: freed room may free more."""

Handler = Callable[[Any], None]


class Machine:
    """One node's decisions.

    `load` once, then `handle` for every event; call `handle(Tick())` no later than
    `next_wakeup_ns`. Instructions must be carried out in order of arrival where they name the same
    slot or segment.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        generations: npt.NDArray[np.uint32],
        policy: Callable[[IndexState], EvictionPolicy] = S3Fifo,
        admission: AdmissionPolicy | None = None,
    ) -> None:
        core = Core(settings, generations=generations, policy=policy, admission=admission)
        self.core = core
        self.extents = ExtentsState(core)
        self.room = Room(core, self.extents)
        self.leases = LeasesState(core)
        self.meta = MetaState(core, self.extents)
        self.writeback = WritebackState(core, self.extents)
        self.loads = LoadsState(core, self.extents, self.room)
        self.gets = GetsState(core, self.leases, self.loads)
        self.puts = PutsState(
            core,
            extents=self.extents,
            room=self.room,
            writeback=self.writeback,
            meta=self.meta,
            leases=self.leases,
        )
        self.holds = HoldsState(
            core, extents=self.extents, meta=self.meta, writeback=self.writeback
        )
        self.expiry = ExpiryState(core)
        self.checks = ChecksState(
            core, extents=self.extents, meta=self.meta, writeback=self.writeback
        )
        self.reclaim = ReclaimState(
            core, extents=self.extents, loads=self.loads, writeback=self.writeback
        )
        self.loads.on_damaged = self._load_damaged
        self._on_event: dict[type, Handler] = {
            events.ConnOpened: self._conn_opened,
            events.ConnClosed: self._conn_closed,
            events.RequestArrived: self._request,
            events.StreamGetArrived: self.gets.stream_get,
            events.StreamGetDone: self.gets.stream_done,
            events.StreamPutArrived: self.puts.stream_put,
            events.PayloadDone: self.puts.on_payload,
            events.CopyDone: self._copy_done,
            events.ReadsDone: self._reads_done,
            events.GroupDone: self.writeback.on_done,
            events.GroupFailed: self.writeback.on_failed,
            events.SegmentsChanged: self._segments_changed,
            events.SegmentRecycled: self._segment_recycled,
            events.SegmentLost: self._segment_lost,
            events.MetaDone: self.meta.on_done,
            events.ArenaGrew: self._arena_grew,
            events.Tick: self._tick,
            events.Stopping: self._stopping,
        }
        self._on_request = self._request_handlers()

    def _request_handlers(self) -> dict[type, Callable[[int, Any, int], None]]:
        return {
            wire.Get: self.gets.get,
            wire.Put: self.puts.put,
            wire.Exists: self._exists,
            wire.Match: self._match,
            wire.Stat: self._stat,
            wire.Explain: self._explain,
            wire.Release: self._release,
            wire.Hold: self.holds.hold,
            wire.Touch: self.holds.touch,
            wire.Remove: self.holds.remove,
            wire.Flush: self._flush,
            wire.Stats: self._stats,
            wire.Ping: self._ping,
            wire.Prefetch: self._prefetch,
            wire.Report: self.checks.report,
            wire.Verify: self.checks.verify,
        }

    # ------------------------------------------------------------ in and out

    def load(self, recovered: Recovered, now: Now) -> list[events.Instruction]:
        """Take over what the data directory held. Carry the instructions out before serving
        anybody.
        """
        core = self.core
        core.begin(now)
        for row, until in recovery.load(core, self.extents, recovered):
            self.holds.set(row, until)
        self.room.inline(0)
        self.meta.reserve_sequence(sync=True)
        return core.out

    def handle(self, event: events.Event, now: Now) -> list[events.Instruction]:
        """Decide what this event leads to. Never raises for what a client or disk may do."""
        core = self.core
        core.begin(now)
        self._on_event[type(event)](event)
        self._settle()
        return core.out

    def _settle(self) -> None:
        """Let work that waits for room, bytes or a group go on, as far as it can now."""
        core = self.core
        for _ in range(_ROUNDS_MAX):
            # Taken first: room that any of these makes is for the next round, not forgotten.
            room, core.room_changed = core.room_changed, False
            self.loads.pump(room=room)
            self.puts.pump(room=room)
            self.reclaim.pump()
            self.writeback.pump()
            if not core.room_changed:
                break
        self.meta.reserve_sequence()

    def next_wakeup_ns(self) -> int | None:
        """Monotonic time at which `Tick` is due at the latest."""
        times = (
            self.core.next_deadline(),
            self.leases.next_expiry(),
            self.writeback.next_write(),
            self.holds.next_end(),
            self.expiry.next_sweep(),
            self.reclaim.next_step(),
            self.checks.next_step(),
            self._next_round(),
        )
        return min((time for time in times if time is not None), default=None)

    def _next_round(self) -> int | None:
        """Now, when the rounds of the last event did not get through with what freed room leads
        to.
        """
        waiting = self.core.room_changed and (self.puts.queue or self.loads.waiting)
        return self.core.now_ns if waiting else None

    @property
    def quiescent(self) -> bool:
        """Nothing is in flight or waits to be written: a stopping node may close its disk."""
        return not (
            self.writeback.dirty_rows
            or self.writeback.group
            or self.puts.in_flight
            or self.loads.reads
            or self.checks.in_flight
            or self.meta.pending
        )

    # ------------------------------------------------------------ events

    def _conn_opened(self, event: events.ConnOpened) -> None:
        assert event.conn not in self.core.conns, "connection number in use"
        self.core.conns[event.conn] = ConnState(event.ns)

    def _conn_closed(self, event: events.ConnClosed) -> None:
        conn = self.core.conns.get(event.conn)
        if conn is None:
            return
        for operation in list(conn.operations):
            operation.abandon()
        self.leases.close(event.conn)
        del self.core.conns[event.conn]
        self.core.room_changed = True

    def _request(self, event: events.RequestArrived) -> None:
        core = self.core
        if event.conn not in core.conns:
            return
        message = event.message
        if core.stopping and isinstance(message, wire.Hold | wire.Touch | wire.Remove):
            error = Overloaded("the node is stopping", retry_after_s=1.0)
            core.reply(event.conn, wire.failure_from_error(message.rid, error))
            return
        self._on_request[type(message)](event.conn, message, event.deadline_ns)

    def _copy_done(self, event: events.CopyDone) -> None:
        if not self.puts.on_copy_done(event):
            self.checks.on_copy_done(event)

    def _reads_done(self, event: events.ReadsDone) -> None:
        if not self.checks.on_reads_done(event):
            self.loads.on_reads_done(event)

    def _load_damaged(self, row: int, load: LoadState) -> None:
        self.checks.damaged(row, segment=load.segment, generation=load.generation, page=load.page)

    def _segments_changed(self, event: events.SegmentsChanged) -> None:
        extents = self.extents
        if event.free > extents.free:
            self.writeback.unblock()
        extents.free = event.free
        extents.usable = event.usable
        extents.known = True
        self.core.room_changed = True

    def _segment_recycled(self, event: events.SegmentRecycled) -> None:
        self.extents.segments.pop(event.segment, None)
        self.core.counters.reclaimed_segments += 1
        self.reclaim.segment_gone(event.segment)
        self.writeback.unblock()
        self.core.room_changed = True

    def _segment_lost(self, event: events.SegmentLost) -> None:
        self.core.counters.segments_lost += 1
        for row in self.extents.rows_in(event.segment).tolist():
            self.extents.lose_copy(row)
        self.extents.segments.pop(event.segment, None)
        self.reclaim.segment_gone(event.segment)
        self.core.room_changed = True

    def _arena_grew(self, event: events.ArenaGrew) -> None:
        self.core.slabs.grow(event.populated_bytes)
        self.core.room_changed = True

    def _tick(self, event: events.Tick) -> None:
        self.core.expire_operations()
        self.leases.expire()
        self.holds.expire()
        self.expiry.sweep()
        self.checks.tick()

    def _stopping(self, event: events.Stopping) -> None:
        self.core.stopping = True

    # ------------------------------------------------------------ small requests

    def _exists(self, conn: int, message: wire.Exists, deadline_ns: int) -> None:
        lookups.exists(self.core, conn, message)

    def _match(self, conn: int, message: wire.Match, deadline_ns: int) -> None:
        lookups.match(self.core, conn, message)

    def _stat(self, conn: int, message: wire.Stat, deadline_ns: int) -> None:
        lookups.stat(self.core, conn, message)

    def _explain(self, conn: int, message: wire.Explain, deadline_ns: int) -> None:
        lookups.explain(self.core, conn, message)

    def _release(self, conn: int, message: wire.Release, deadline_ns: int) -> None:
        self.leases.release(conn, message.lease_column.tolist())

    def _flush(self, conn: int, message: wire.Flush, deadline_ns: int) -> None:
        self.writeback.flush(conn, message.rid, deadline_ns)

    def _ping(self, conn: int, message: wire.Ping, deadline_ns: int) -> None:
        self.core.reply(conn, wire.CountReply(message.rid, 0))

    def _prefetch(self, conn: int, message: wire.Prefetch, deadline_ns: int) -> None:
        prefetch.prefetch(
            self.core, leases=self.leases, loads=self.loads, conn=conn, message=message
        )

    def _stats(self, conn: int, message: wire.Stats, deadline_ns: int) -> None:
        text = json.dumps(asdict(self.stats()))
        self.core.reply(conn, wire.TextReply(message.rid, text))

    # ------------------------------------------------------------ figures and invariants

    def stats(self) -> EngineStats:
        """Figures of this moment."""
        core = self.core
        slabs = core.slabs
        return EngineStats(
            entries=core.index.count,
            entries_max=core.index.entries_max,
            index_bytes=core.index.table_bytes(),
            arena_bytes=core.settings.arena_bytes,
            arena_populated_bytes=slabs.populated_bytes,
            arena_used_bytes=slabs.used_pages * 4096,
            inline_bytes=core.inline_bytes,
            leases=len(self.leases.leases),
            leased_bytes=sum(conn.leased_bytes for conn in core.conns.values()),
            holds=len(self.holds.ends),
            held_bytes=self.holds.held_bytes,
            dirty_shards=self.writeback.dirty_rows,
            dirty_bytes=self.writeback.dirty_bytes,
            waiting_puts=len(self.puts.queue),
            waiting_gets=self.gets.waiting,
            loading=len(self.loads.loading),
            connections=len(core.conns),
            segments=len(self.extents.segments),
            segments_free=self.extents.free,
            segments_usable=self.extents.usable,
            disk_ok=self.extents.disk_ok,
            sequence=core.seq,
            counters=core.counters.as_dict(),
        )

    def audit(self) -> list[str]:
        """Check every book against every other: no leaked slot, pin, lease or row; caps held.

        For tests and simulation: it takes time in proportion to everything there is.
        """
        return audit.audit(self)
