"""Watches what a node orders and what comes of it, between engine and executor.

Owns what can be known there without trusting the engine's books: where durable copies stand, which
losses are legal, who reads and writes which page of the arena, and whether caps hold. It outlives
the node, as the disk does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from ctxstore.limits import PAGE_BYTES
from ctxstore.testing.checkers import HistoryViolation, Loss, ShardId
from ctxstore.wire import messages as wire
from ctxstore_daemon.engine import events
from ctxstore_daemon.engine.machine import Machine

if TYPE_CHECKING:
    import numpy.typing as npt

    from ctxstore.seams import Now

AUDIT_EVERY = 101
"""Events between two audits of the engine's books; the caps are looked at more often."""
CAPS_EVERY = 9

Place = tuple[int, int, int]
"""(segment, generation, page)"""


@dataclass(slots=True)
class Expected:
    """What the run allows itself to do to the node; anything else is a bug when it happens."""

    reclaim: bool = True
    """The disk may fill up, so that segments are reclaimed."""
    read_faults: bool = False
    write_faults: bool = False
    full: bool = False
    """Groups may find no room."""
    misdirected: bool = False
    """Writes may land elsewhere: a read of anything may fail its checksum."""


class ArenaShadow:
    """Who reads and writes which page of one node's arena, told by its instructions."""

    def __init__(self, generations: npt.NDArray[np.uint32]) -> None:
        pages = len(generations)
        self._generations = generations
        self._readers = np.zeros(pages, np.int32)
        self._writing = np.zeros(pages, np.bool_)
        self._shown = np.full(pages, -1, np.int64)
        """Generation that was last told to a reader, per page."""
        self._held: dict[tuple[Any, ...], npt.NDArray[np.int64]] = {}
        self.leases: dict[int, list[int]] = {}

    def write(self, key: tuple[Any, ...], pages: npt.NDArray[np.int64]) -> None:
        """Somebody begins to write these pages."""
        if self._readers[pages].any():
            raise HistoryViolation(f"{key}: writes pages that somebody still reads")
        if self._writing[pages].any():
            raise HistoryViolation(f"{key}: writes pages that somebody else writes")
        stale = self._shown[pages] == self._generations[pages]
        if stale.any():
            raise HistoryViolation(
                f"{key}: reuses page {pages[stale][0]} under the generation of an earlier reader"
            )
        self._writing[pages] = True
        self._held["w", *key] = pages

    def end_write(self, key: tuple[Any, ...]) -> None:
        """The writer is done."""
        self._writing[self._held.pop(("w", *key), _NONE)] = False

    def read(self, key: tuple[Any, ...], pages: npt.NDArray[np.int64]) -> None:
        """Somebody begins to read these pages."""
        if self._writing[pages].any():
            raise HistoryViolation(f"{key}: reads pages that are being written")
        self._readers[pages] += 1
        self._held["r", *key] = pages

    def show(self, pages: npt.NDArray[np.int64]) -> None:
        """A client was told the present generation of these pages."""
        self._shown[pages] = self._generations[pages]

    def end_read(self, key: tuple[Any, ...]) -> None:
        """The reader is done."""
        self._readers[self._held.pop(("r", *key), _NONE)] -= 1

    def end_connection(self, conn: int) -> None:
        """Leases end with their connection."""
        for lease in self.leases.pop(conn, ()):
            self.end_read(("lease", conn, lease))

    def left(self) -> list[str]:
        """Who still reads or writes."""
        return [repr(key) for key in self._held]


_NONE = np.zeros(0, np.int64)


@dataclass(slots=True)
class _Copies:
    """Durable copies of one birth of one shard."""

    places: dict[Place, None] = field(default_factory=dict)
    failed: bool = False
    """Its last group was not written."""


class DeviceWatch:
    """Implements `LossOracle`. `begin_node` for each start of the node, then `saw` per event."""

    def __init__(self, namespaces: dict[int, str]) -> None:
        self.expected = Expected()
        self.digest = xxhash.xxh3_64()
        self.events = 0
        self.reclaims = 0
        self.faults_seen = 0
        self.disk_bytes: Any = None
        """() -> bytes on disk now, and its cap."""
        self._namespaces = namespaces
        self._shards: dict[ShardId, dict[int, _Copies]] = {}
        self._by_place: dict[Place, tuple[ShardId, int]] = {}
        self._segments: dict[int, dict[Place, None]] = {}
        self._reclaimed: dict[ShardId, tuple[int, int]] = {}
        """When the last copy of which birth was reclaimed."""
        self._fault_ns: dict[ShardId, int] = {}
        self._written_ns: dict[ShardId, int] = {}
        self._damaged: dict[Place, None] = {}
        self._damaged_segments: dict[int, None] = {}
        self._groups: dict[int, list[tuple[ShardId, int]]] = {}
        self._reads: dict[int, list[Place]] = {}
        self._given_up = False
        self._shadow = ArenaShadow(np.zeros(0, np.uint32))

    # ------------------------------------------------------------------------- the outside

    def begin_node(self, generations: npt.NDArray[np.uint32]) -> None:
        """A node starts with a fresh arena; what was in flight in the last one is over."""
        self._shadow = ArenaShadow(generations)
        self._groups.clear()
        self._reads.clear()

    def note(self, *facts: object) -> None:
        """Something that a replay must repeat."""
        self.digest.update(repr(facts).encode())

    def places(self) -> list[Place]:
        """Where current durable copies stand, oldest first."""
        return list(self._by_place)

    def damage(self, place: Place) -> None:
        """The payload there is being damaged."""
        self._damaged[place] = None

    def damage_segment(self, segment: int) -> None:
        """Something of the segment's present life is being damaged: any copy in it may go."""
        self._damaged_segments[segment] = None

    def loss_of(self, shard: ShardId, since_ns: int) -> Loss:
        """See LossOracle."""
        if self._fault_ns.get(shard, -1) >= since_ns:
            return Loss.FAULT
        births = list(self._shards.get(shard, {}).values())
        for copies in births:
            if copies.places and all(map(self._is_damaged, copies.places)):
                return Loss.FAULT
            if not copies.places and copies.failed:
                return Loss.FAULT
        if self._given_up and self._written_ns.get(shard, -1) < since_ns:
            return Loss.FAULT
        reclaimed_ns, birth = self._reclaimed.get(shard, (-1, 0))
        # What stays in memory when its segment is reclaimed may go at any later time.
        if reclaimed_ns >= since_ns or birth in sorted(self._shards.get(shard, ()))[-2:]:
            return Loss.RECLAIMED
        return Loss.NONE

    def left(self) -> list[str]:
        """Readers and writers of the arena that never ended."""
        return self._shadow.left()

    def _is_damaged(self, place: Place) -> bool:
        return place in self._damaged or place[0] in self._damaged_segments

    # ------------------------------------------------------------------------- the tap

    def saw(
        self, machine: Machine, event: events.Event, orders: list[events.Instruction], now: Now
    ) -> None:
        """The machine handled an event."""
        self.events += 1
        self.note(now.mono_ns, type(event).__name__, *(type(order).__name__ for order in orders))
        self._look_for_surrender(machine)
        self._take_event(event, now.mono_ns)
        for order in orders:
            self._take_order(order, now.mono_ns)
        if self.events % CAPS_EVERY == 0:
            self.check_caps(machine)
        if self.events % AUDIT_EVERY == 0:
            self.audit(machine)

    def _look_for_surrender(self, machine: Machine) -> None:
        """A node without a working disk keeps shards in memory only, from where any may go."""
        if machine.core.counters.write_given_up or not machine.extents.disk_ok:
            if not (self.expected.write_faults or self.expected.full):
                raise HistoryViolation("a shard was given up on a healthy disk")
            self._given_up = True

    def check_caps(self, machine: Machine) -> None:
        """No cap is passed, ever."""
        stats = machine.stats()
        for what, used, cap in (
            ("arena", stats.arena_used_bytes, stats.arena_bytes),
            ("entries", stats.entries, stats.entries_max),
            ("disk", *self.disk_bytes()),
        ):
            if used > cap:
                raise HistoryViolation(f"{what}: {used} is above the cap of {cap}")

    def audit(self, machine: Machine) -> None:
        """The engine's own books agree with each other."""
        wrong = machine.audit()
        if wrong:
            raise HistoryViolation("audit: " + "; ".join(wrong[:5]))

    def _take_event(self, event: events.Event, now_ns: int) -> None:
        shadow = self._shadow
        match event:
            case events.RequestArrived(conn=conn, message=wire.Release() as release):
                for lease in release.lease_column.tolist():
                    if lease in shadow.leases.get(conn, ()):
                        shadow.leases[conn].remove(lease)
                        shadow.end_read(("lease", conn, lease))
            case events.ConnClosed(conn=conn):
                shadow.end_connection(conn)
            case events.CopyDone(copy_id=copy_id):
                shadow.end_write(("copy", copy_id))
            case events.PayloadDone(conn=conn, rid=rid):
                shadow.end_write(("offer", conn, rid))
            case events.StreamGetDone(conn=conn, rid=rid):
                shadow.end_read(("send", conn, rid))
            case events.ReadsDone():
                self._reads_done(event, now_ns)
            case events.GroupDone():
                self._group_done(event, now_ns)
            case events.GroupFailed():
                self._group_failed(event)
            case events.SegmentLost(segment=segment):
                self._lose_segment(segment, now_ns)
            case _:
                pass

    def _take_order(self, order: events.Instruction, now_ns: int) -> None:
        shadow = self._shadow
        match order:
            case events.Reply(conn=conn, message=wire.GetReply() as reply):
                self._lease(conn, reply)
            case events.CopyIn():
                shadow.write(("copy", order.copy_id), _slot_pages(order))
            case events.OfferPut(conn=conn, rid=rid):
                if (order.verdicts == wire.WANTED).any():
                    shadow.write(("offer", conn, rid), _slot_pages(order))
            case events.SendShards(conn=conn, rid=rid):
                lengths = order.entries["length"].astype(np.int64)
                hit = order.slot_offsets >= 0
                pages = _pages(order.slot_offsets[hit], lengths[hit])
                shadow.read(("send", conn, rid), pages)
            case events.ReadExtents():
                self._read_extents(order)
            case events.WriteGroup():
                self._write_group(order)
            case events.RecycleSegment(segment=segment):
                self._recycle(segment, now_ns)
            case _:
                pass

    # ------------------------------------------------------------------------- arena

    def _lease(self, conn: int, reply: wire.GetReply) -> None:
        rows = reply.rows
        mapped = rows[(rows["status"] == wire.Lookup.HIT) & (rows["flags"] == 0)]
        if not len(mapped):
            return
        if not reply.lease:
            raise HistoryViolation("slots were shown to a client without a lease")
        pages = _pages(mapped["offset"].astype(np.int64), mapped["length"].astype(np.int64))
        self._shadow.read(("lease", conn, reply.lease), pages)
        self._shadow.show((mapped["offset"] // PAGE_BYTES).astype(np.int64))
        self._shadow.leases.setdefault(conn, []).append(reply.lease)

    # ------------------------------------------------------------------------- disk

    def _read_extents(self, order: events.ReadExtents) -> None:
        columns = (order.segments.tolist(), order.generations.tolist(), order.pages.tolist())
        self._reads[order.read_id] = list(zip(*columns, strict=True))
        self._shadow.write(("read", order.read_id), _slot_pages(order))

    def _reads_done(self, event: events.ReadsDone, now_ns: int) -> None:
        self._shadow.end_write(("read", event.read_id))
        places = self._reads.pop(event.read_id)
        for place, status in zip(places, event.statuses.tolist(), strict=True):
            if status == events.ReadStatus.OK:
                continue
            self.faults_seen += 1
            known = self._is_damaged(place) or self.expected.misdirected
            if not known and not self.expected.read_faults:
                raise HistoryViolation(
                    f"extent {place} was read as {events.ReadStatus(status).name} "
                    "though nobody harmed it"
                )
            if place in self._by_place:
                self._fault_ns[self._by_place[place][0]] = now_ns

    def _write_group(self, order: events.WriteGroup) -> None:
        records = order.batch.records
        self._groups[order.group_id] = [
            (ShardId(self._namespaces[ns_id], key.tobytes()), birth)
            for ns_id, key, birth in zip(
                records["ns_id"].tolist(), records["key"], records["birth"].tolist(), strict=True
            )
        ]
        self._shadow.read(("group", order.group_id), _slot_pages(order))

    def _group_done(self, event: events.GroupDone, now_ns: int) -> None:
        self._shadow.end_read(("group", event.group_id))
        items = self._groups.pop(event.group_id)
        for index, ((shard, birth), page) in enumerate(zip(items, event.pages, strict=True)):
            # Inline shards have no page of their own: their place is that of their record.
            spot = int(page) or -(event.seq * 1000 + index + 1)
            place = (event.segment, event.generation, spot)
            copies = self._shards.setdefault(shard, {}).setdefault(birth, _Copies())
            copies.failed = False
            copies.places[place] = None
            self._written_ns[shard] = now_ns
            if self._reclaimed.get(shard, (0, 0))[1] == birth:
                del self._reclaimed[shard]  # a survivor after all
            self._by_place[place] = (shard, birth)
            self._segments.setdefault(event.segment, {})[place] = None

    def _group_failed(self, event: events.GroupFailed) -> None:
        self._shadow.end_read(("group", event.group_id))
        self.faults_seen += 1
        allowed = self.expected.full if event.full else self.expected.write_faults
        if not allowed:
            raise HistoryViolation(f"a group failed on a healthy disk: {event.reason}")
        for shard, birth in self._groups.pop(event.group_id):
            self._shards.setdefault(shard, {}).setdefault(birth, _Copies()).failed = True

    def _recycle(self, segment: int, now_ns: int) -> None:
        self.reclaims += 1
        if not self.expected.reclaim:
            raise HistoryViolation(f"segment {segment} is reclaimed without any pressure")
        for shard, birth in self._forget_segment(segment):
            self._reclaimed[shard] = (now_ns, birth)

    def _lose_segment(self, segment: int, now_ns: int) -> None:
        self.faults_seen += 1
        if not (self.expected.read_faults or self.expected.write_faults):
            raise HistoryViolation(f"segment {segment} was lost on a healthy disk")
        for shard, _ in self._forget_segment(segment):
            self._fault_ns[shard] = now_ns

    def _forget_segment(self, segment: int) -> list[tuple[ShardId, int]]:
        gone: list[tuple[ShardId, int]] = []
        self._damaged_segments.pop(segment, None)
        for place in self._segments.pop(segment, {}):
            shard, birth = self._by_place.pop(place)
            self._damaged.pop(place, None)
            copies = self._shards[shard][birth]
            copies.places.pop(place, None)
            if not copies.places and birth == max(self._shards[shard]):
                gone.append((shard, birth))
        return gone


class WatchedMachine(Machine):
    """A machine whose every step is watched."""

    watch: DeviceWatch

    def handle(self, event: events.Event, now: Now) -> list[events.Instruction]:
        orders = super().handle(event, now)
        self.watch.saw(self, event, orders, now)
        return orders


def _slot_pages(order: Any) -> npt.NDArray[np.int64]:
    """Pages of all slots that an instruction names."""
    slots = order.slot_offsets >= 0
    return _pages(order.slot_offsets[slots], order.slot_bytes[slots])


def _pages(offsets: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    if not len(offsets):
        return _NONE
    firsts = offsets // PAGE_BYTES
    counts = -(-lengths // PAGE_BYTES)
    parts = [np.arange(first, first + count) for first, count in zip(firsts, counts, strict=True)]
    return np.concatenate(parts)
