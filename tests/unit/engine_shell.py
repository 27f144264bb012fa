"""A shell for engine tests: carries out instructions in memory, so that whole stories can be told.

Owns fake segments, staging and meta log, and switches for what should go wrong. It must not know
how the engine decides: it checks only what any executor could (bytes, bounds, one answer per
instruction).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ctxstore import checksum
from ctxstore.limits import MIB, PAGE_BYTES
from ctxstore.seams import Now
from ctxstore.wire import messages as wire
from ctxstore.wire.messages import Durability
from ctxstore_daemon.engine import events
from ctxstore_daemon.engine.machine import Machine
from ctxstore_daemon.engine.records import (
    META_DTYPE,
    RecordBatch,
    Recovered,
    SegmentImage,
)
from ctxstore_daemon.engine.settings import EngineSettings, NamespaceSettings

NS = NamespaceSettings("default", checksum.namespace_id("default"))
OTHER = NamespaceSettings("other", checksum.namespace_id("other"), durability=Durability.GROUP)
WALL0 = 1_700_000_000_000_000_000
S = 1_000_000_000
MS = 1_000_000


def key(n: int) -> bytes:
    return n.to_bytes(16, "big")


def payload(n: int, length: int) -> np.ndarray:
    return np.resize(np.frombuffer(key(n) + b"payload", np.uint8), length)


def settings(**changes) -> EngineSettings:
    base: dict[str, Any] = {
        "namespaces": (NS, OTHER),
        "arena_bytes": 34 * MIB,
        "entries_max": 10_000,
        "shard_bytes_max": 8 * MIB,
        "disk_bytes": 64 * MIB,
        "segment_bytes": 8 * MIB,
    }
    return EngineSettings(**(base | changes))


@dataclass
class Segment:
    generation: int = 1
    used_pages: int = 1
    pages: dict[int, np.ndarray] = field(default_factory=dict)
    groups: list[tuple[int, RecordBatch]] = field(default_factory=list)


class FakeShell:
    """Runs a Machine. With `auto` instructions are carried out at once, else `step` takes one."""

    def __init__(
        self, *, recovered=None, grow=True, auto=True, disk=None, wall_ns=WALL0, **changes
    ):
        self.settings = settings(**changes)
        self.arena = np.zeros(self.settings.arena_bytes, np.uint8)
        self.machine = Machine(
            self.settings,
            generations=self.arena[: self.settings.arena_bytes // PAGE_BYTES * 4].view(np.uint32),
        )
        self.now_ns = 1_000 * S
        self.wall_ns = wall_ns
        self.auto = auto
        self.pending: deque[events.Instruction] = deque()
        self.replies: dict[tuple[int, int], list[Any]] = {}
        self.offers: dict[tuple[int, int], events.OfferPut] = {}
        self.finished: dict[tuple[int, int], np.ndarray] = {}
        self.sends: dict[tuple[int, int], events.SendShards] = {}
        self.closed: dict[int, str] = {}
        self.staging: dict[int, np.ndarray] = {}
        self.disk: dict[int, Segment] = disk if disk is not None else {}
        self.retired: list[int] = []
        self.open_segment = -1
        self.meta: list[np.ndarray] = []
        self.meta_ok = True
        self.meta_room = 1_000_000
        self.meta_reserved = 0
        self.group_fault = ""
        self.read_fault: dict[tuple[int, int], int] = {}
        self.reads = 0
        self.hold_back: tuple[type, ...] = ()
        self._rid = 0
        self._run(self.machine.load(recovered or Recovered(), self.now))
        if grow:
            self.event(events.ArenaGrew(self.settings.arena_bytes))
        self._announce()

    # ---------------------------------------------------------------- time and events

    @property
    def now(self) -> Now:
        return Now(self.now_ns, self.wall_ns)

    def event(self, event) -> None:
        self._run(self.machine.handle(event, self.now))

    def advance(self, ns: int) -> None:
        """Let time pass, ticking whenever the machine asks for it."""
        until = self.now_ns + ns
        while (wake := self.machine.next_wakeup_ns()) is not None and wake <= until:
            step = max(wake, self.now_ns) - self.now_ns
            self.now_ns += step
            self.wall_ns += step
            before = wake
            self.event(events.Tick())
            after = self.machine.next_wakeup_ns()
            assert after is None or after > before or after > self.now_ns - 1, "wakes for nothing"
            if after is not None and after <= self.now_ns:
                self.now_ns += MS
                self.wall_ns += MS
        if until > self.now_ns:
            self.wall_ns += until - self.now_ns
            self.now_ns = until
        self.event(events.Tick())

    def _run(self, out) -> None:
        self.pending.extend(out)
        if self.auto:
            self.drain()

    def drain(self) -> None:
        """Carry out what is pending, except what is held back."""
        kept: deque[events.Instruction] = deque()
        while self.pending:
            instruction = self.pending.popleft()
            if isinstance(instruction, self.hold_back):
                kept.append(instruction)
            else:
                self.step(instruction)
        self.pending.extend(kept)

    def let_go(self) -> None:
        """Carry out what was held back."""
        self.hold_back = ()
        self.drain()

    def step(self, instruction) -> None:
        name = type(instruction).__name__
        getattr(self, f"_do_{name}")(instruction)

    def answer(self, event) -> None:
        self.pending.extend(self.machine.handle(event, self.now))

    # ---------------------------------------------------------------- instructions

    def _do_Reply(self, i) -> None:
        self.replies.setdefault((i.conn, i.message.rid), []).append(i.message)

    def _do_CloseConn(self, i) -> None:
        self.closed[i.conn] = i.reason

    def _do_CopyIn(self, i) -> None:
        sums, inline = [], []
        for at, slot, size, length, seed in zip(
            i.staging_offsets.tolist(),
            i.slot_offsets.tolist(),
            i.slot_bytes.tolist(),
            i.lengths.tolist(),
            i.seeds.tolist(),
            strict=True,
        ):
            if at < 0:
                data = self.arena[slot : slot + length]
            elif slot < 0:
                assert size == 0
                data = self.staging[i.conn][at : at + length].copy()
                inline.append(data.tobytes())
            else:
                self._fill(slot, size, self.staging[i.conn][at : at + length])
                data = self.arena[slot : slot + length]
            sums.append(checksum.checksum(np.ascontiguousarray(data), seed))
        self.answer(events.CopyDone(i.copy_id, np.array(sums, np.uint64), b"".join(inline)))

    def _fill(self, slot: int, size: int, data: np.ndarray) -> None:
        assert slot % PAGE_BYTES == 0
        assert size % PAGE_BYTES == 0
        assert len(data) <= size < len(data) + PAGE_BYTES
        assert slot >= self.machine.core.slabs.first_chunk * 2 * MIB
        assert slot + size <= len(self.arena)
        self.arena[slot : slot + len(data)] = data
        self.arena[slot + len(data) : slot + size] = 0

    def _do_ReadExtents(self, i) -> None:
        self.reads += 1
        statuses = []
        for segment, generation, page, length, slot, size, seed, total in zip(
            i.segments.tolist(),
            i.generations.tolist(),
            i.pages.tolist(),
            i.lengths.tolist(),
            i.slot_offsets.tolist(),
            i.slot_bytes.tolist(),
            i.seeds.tolist(),
            i.checksums.tolist(),
            strict=True,
        ):
            found = self.disk.get(segment)
            status = self.read_fault.get((segment, page), 0)
            if found is None or found.generation != generation:
                status = int(events.ReadStatus.FAILED)
            elif not status:
                data = found.pages[page][:length]
                if slot >= 0:
                    self._fill(slot, size, data)
                if checksum.checksum(np.ascontiguousarray(data), seed) != total:
                    status = int(events.ReadStatus.DAMAGED)
            statuses.append(status)
        self.answer(events.ReadsDone(i.read_id, np.array(statuses, np.uint8)))

    def _do_WriteGroup(self, i) -> None:
        if self.group_fault == "device":
            self._retire()
            self.answer(events.GroupFailed(i.group_id, full=False, reason="EIO"))
            self._announce()
            return
        need = 1 + int(i.slot_bytes.sum()) // PAGE_BYTES
        segment = self.disk.get(self.open_segment)
        capacity = self.settings.segment_bytes // PAGE_BYTES
        if segment is None or segment.used_pages + need > capacity:
            free = self._free()
            if not free or self.group_fault == "full":
                self.answer(events.GroupFailed(i.group_id, full=True, reason="no segment"))
                return
            self.open_segment = free[0]
            segment = self.disk.setdefault(self.open_segment, Segment())
        page = segment.used_pages + 1
        records = i.batch.records.copy()
        pages = []
        for slot, size in zip(i.slot_offsets.tolist(), i.slot_bytes.tolist(), strict=True):
            if slot < 0:
                pages.append(0)
                continue
            segment.pages[page] = self.arena[slot : slot + size].copy()
            pages.append(page)
            page += size // PAGE_BYTES
        segment.used_pages += need
        records["page"] = pages
        segment.groups.append((i.seq, RecordBatch(records, i.batch.inline)))
        self.answer(
            events.GroupDone(
                i.group_id,
                segment=self.open_segment,
                generation=segment.generation,
                seq=i.seq,
                pages=np.array(pages, np.uint32),
            )
        )
        self._announce()

    def _retire(self) -> None:
        if self.open_segment < 0:
            free = self._free()
            self.open_segment = free[0] if free else -1
        if self.open_segment >= 0:
            self.retired.append(self.open_segment)
            self.disk.setdefault(self.open_segment, Segment())
        self.open_segment = -1

    def _free(self) -> list[int]:
        total = self.settings.disk_bytes // self.settings.segment_bytes
        return [
            n
            for n in range(total)
            if n not in self.retired and n != self.open_segment
            and not (n in self.disk and self.disk[n].groups)
        ]  # fmt: skip

    def _announce(self) -> None:
        if not self.settings.disk_bytes:
            return
        total = self.settings.disk_bytes // self.settings.segment_bytes
        out = self.machine.handle(
            events.SegmentsChanged(free=len(self._free()), usable=total - len(self.retired)),
            self.now,
        )
        self.pending.extend(out)

    def _do_RecycleSegment(self, i) -> None:
        segment = self.disk[i.segment]
        assert i.segment != self.open_segment
        if i.segment in self.retired:
            self.answer(events.SegmentLost(i.segment, "retired"))
            return
        self.disk[i.segment] = Segment(generation=segment.generation + 1)
        self.answer(events.SegmentRecycled(i.segment))
        self._announce()

    def _do_ReserveMeta(self, i) -> None:
        room = self.meta_room - self.meta_reserved
        full = i.count > room
        self.meta_reserved += 0 if full else i.count
        self.answer(events.MetaDone(i.meta_id, ok=not full, full=full))

    def _do_AppendMeta(self, i) -> None:
        self.meta_reserved -= i.reserved
        if self.meta_ok:
            self.meta.append(i.records.copy())
            self.meta_room -= len(i.records)
        self.answer(events.MetaDone(i.meta_id, ok=self.meta_ok))

    def _do_SendShards(self, i) -> None:
        self.sends[i.conn, i.rid] = i

    def _do_OfferPut(self, i) -> None:
        self.offers[i.conn, i.rid] = i

    def _do_PutFinished(self, i) -> None:
        self.finished[i.conn, i.rid] = i.results

    # ---------------------------------------------------------------- what a restart would find

    def recovered(self) -> Recovered:
        images = []
        top = 0
        for number, segment in self.disk.items():
            if not segment.groups:
                continue
            seqs = [seq for seq, batch in segment.groups for _ in range(len(batch.records))]
            batch = RecordBatch(
                np.concatenate([batch.records for _, batch in segment.groups]),
                b"".join(batch.inline for _, batch in segment.groups),
            )
            first, last = segment.groups[0][0], segment.groups[-1][0]
            top = max(top, last, int(batch.records["birth"].max(initial=0)))
            images.append(
                SegmentImage(
                    segment=number,
                    generation=segment.generation,
                    first_seq=first,
                    last_seq=last,
                    batch=batch,
                    group_seq=np.array(seqs, np.uint64),
                    sealed=number != self.open_segment,
                )
            )
        meta = np.concatenate(self.meta) if self.meta else np.zeros(0, META_DTYPE)
        return Recovered(tuple(images), meta, max(top, int(meta["seq"].max(initial=0))) + 1)

    def restart(self, **changes) -> FakeShell:
        """A new node over the same disk."""
        changes.setdefault("wall_ns", self.wall_ns)
        shell = FakeShell(recovered=self.recovered(), disk=self.disk, **changes)
        shell.retired = list(self.retired)
        shell._announce()
        shell.drain()
        shell.meta = list(self.meta) + shell.meta
        return shell

    # ---------------------------------------------------------------- client side

    def connect(self, conn: int = 1, ns: int = 0, staging: int = 16 * MIB) -> int:
        self.staging[conn] = np.zeros(staging, np.uint8)
        self.event(events.ConnOpened(conn, ns))
        return conn

    def disconnect(self, conn: int = 1) -> None:
        self.event(events.ConnClosed(conn))

    def rid(self) -> int:
        self._rid += 1
        return self._rid

    def request(self, message, conn: int = 1, timeout_s: float = 1.0) -> list[Any]:
        """Send a control request; returns its replies so far."""
        deadline = self.now_ns + int(timeout_s * S)
        self.event(events.RequestArrived(conn, message, deadline))
        return self.replies.get((conn, message.rid), [])

    def make_put(self, numbers, length=8192, offsets=None, lengths=None, **options) -> wire.Put:
        lengths = lengths or [length] * len(numbers)
        if offsets is None:
            offsets = (np.cumsum([0, *lengths[:-1]])).tolist()
        column = lambda name, dtype, default: np.atleast_1d(  # noqa: E731
            np.array(options.get(name, default), dtype)
        ).tobytes()
        return wire.Put(
            rid=options.get("rid") or self.rid(),
            timeout_us=1_000_000,
            durability=options.get("durability", Durability.DEFAULT),
            keys=b"".join(map(key, numbers)),
            lengths=np.array(lengths, np.uint32).tobytes(),
            offsets=np.array(offsets, np.uint64).tobytes(),
            ttl_ms=column("ttl_ms", np.uint64, 0),
            priority=column("priority", np.int16, 0),
            depth=column("depth", np.uint32, 0),
            cost=column("cost", np.float32, np.nan),
        )

    def stage(self, conn, numbers, message, data=None) -> None:
        lengths, offsets = message.length_column.tolist(), message.offset_column.tolist()
        for n, length, at in zip(numbers, lengths, offsets, strict=True):
            self.staging[conn][at : at + length] = payload(n if data is None else data, length)

    def put(self, numbers, length=8192, *, conn=1, timeout_s=1.0, data=None, **options):
        """Put payload(n) under key(n); returns results, or None while there is no answer."""
        message = self.make_put(numbers, length, **options)
        self.stage(conn, numbers, message, data)
        replies = self.request(message, conn, timeout_s)
        return replies[0].result_column.tolist() if replies else None

    def get(self, numbers, *, conn=1, timeout_s=1.0, check=True):
        """Statuses, with every HIT's bytes compared; None while there is no answer. Keeps the
        lease.
        """
        message = wire.Get(self.rid(), 0, b"".join(map(key, numbers)))
        replies = self.request(message, conn, timeout_s)
        if not replies:
            return None
        self.last_get = replies[0]
        return self.check_get(replies[0], numbers) if check else None

    def check_get(self, reply, numbers):
        generations = self.machine.core.slabs.generations
        for n, row in zip(numbers, reply.rows, strict=True):
            if row["status"] != wire.Lookup.HIT:
                continue
            length, at = int(row["length"]), int(row["offset"])
            if row["flags"] & wire.EntryFlag.INLINE:
                data = np.frombuffer(reply.inline, np.uint8)[at : at + length]
            else:
                assert generations[at // PAGE_BYTES] == row["generation"]
                data = self.arena[at : at + length]
            assert np.array_equal(data, payload(n, length)), f"wrong bytes for {n}"
        return reply.rows["status"].tolist()

    def release(self, conn=1, reply=None) -> None:
        lease = (reply or self.last_get).lease
        self.event(
            events.RequestArrived(conn, wire.Release(0, np.array([lease], "<u8").tobytes()), 0)
        )

    def read(self, numbers, conn=1):
        """Get and release."""
        statuses = self.get(numbers, conn=conn)
        self.release(conn)
        return statuses

    def exists(self, numbers, conn=1):
        message = wire.Exists(self.rid(), 0, b"".join(map(key, numbers)))
        return self.request(message, conn)[0].mask_column.tolist()

    def audit(self) -> None:
        wrong = self.machine.audit()
        assert not wrong, wrong
