"""The engine against a model, over random requests, completions in any order, faults and crashes.

Every step ends with the engine's own audit. The roomy engine never has to evict, so what it says
can be compared with a dict; the tight one has to evict, wait and reclaim, and must keep its
promises meanwhile.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ctxstore import checksum
from ctxstore.limits import MIB
from ctxstore.wire import messages as wire
from ctxstore.wire.messages import WANTED, Durability, Lookup, PutResult
from ctxstore_daemon.engine import events
from tests.unit.engine_shell import MS, FakeShell, S, key, payload

LENGTHS = (0, 300, 1024, 1025, 4096, 5000, 70_000, 300_000, 600_000, 1_100_000)
KEYS = 24
STORED = (PutResult.COMMITTED, PutResult.EXISTS)

numbers = st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=6)
conns = st.integers(1, 3)
timeouts = st.sampled_from((0.0, 0.05, 1.0, 30.0))


def length_of(n: int) -> int:
    return LENGTHS[n % len(LENGTHS)]


class EngineStory(RuleBasedStateMachine):
    """Instructions wait until a rule carries one out, so completions come in any order."""

    options: ClassVar[dict[str, Any]] = {}
    strict = False

    @initialize()
    def start(self) -> None:
        self.shell = FakeShell(auto=False, **self.options)
        self.shell.drain()
        self.conns_made = 0
        self.open: dict[int, int] = {}
        self.asked: dict[tuple[int, int], tuple[str, list[int], bool]] = {}
        self.leases: list[tuple[int, wire.GetReply, list[int]]] = []
        self.sent: list[tuple[int, int, list[int]]] = []
        self.offered: dict[tuple[int, int], list[int]] = {}
        self.durable: set[int] = set()
        self.gone: set[int] = set()
        self.maybe: set[int] = set()
        self.racing: dict[tuple[int, int], set[int]] = {}
        """Removal under way to keys that puts at the same time may bring back."""

    # ---------------------------------------------------------------- requests

    def connect(self, conn: int) -> int:
        if conn not in self.open:
            self.conns_made += 1
            fresh = 1000 + self.conns_made
            self.shell.connect(fresh, ns=0, staging=4 * MIB)
            self.open[conn] = fresh
        return self.open[conn]

    def ask(self, conn: int, kind: str, keys: list[int], message, timeout_s: float) -> None:
        group = kind == "put" and message.durability == Durability.GROUP
        self.asked[conn, message.rid] = (kind, keys, group)
        deadline = self.shell.now_ns + int(timeout_s * S)
        self.shell.event(events.RequestArrived(conn, message, deadline))

    @rule(
        conn=conns, keys=numbers, group=st.booleans(), timeout_s=timeouts,
        priority=st.integers(-1, 1),
    )  # fmt: skip
    def put(self, conn, keys, group, timeout_s, priority) -> None:
        conn = self.connect(conn)
        durability = Durability.GROUP if group else Durability.MEMORY
        message = self.shell.make_put(
            keys, lengths=[length_of(n) for n in keys], durability=durability, priority=priority
        )
        if self.busy_staging(conn):
            return
        self.shell.stage(conn, keys, message)
        self.putting(keys)
        self.ask(conn, "put", keys, message, timeout_s)

    def putting(self, keys) -> None:
        """From now on these may be there again, whatever removals are under way."""
        self.maybe.update(keys)
        for racing in self.racing.values():
            racing.update(keys)

    @rule(
        keys=st.lists(st.integers(0, KEYS - 1), min_size=4, max_size=12), group=st.booleans(),
        ttl_ms=st.sampled_from((0, 0, 0, 500)),
    )  # fmt: skip
    def fill(self, keys, group, ttl_ms) -> None:
        """A quick client without deadline trouble: room gets short, segments fill up."""
        self.carry_out_all()
        durability = Durability.GROUP if group else Durability.MEMORY
        for n in keys:
            conn = self.connect(0)
            message = self.shell.make_put(
                [n], lengths=[length_of(n)], durability=durability, ttl_ms=0 if group else ttl_ms
            )
            if self.busy_staging(conn):
                return
            self.shell.stage(conn, [n], message)
            self.putting([n])
            self.ask(conn, "put", [n], message, 1.0)
            self.carry_out_all()

    @rule(keys=st.lists(st.integers(0, KEYS - 1), min_size=4, max_size=12))
    def read(self, keys) -> None:
        """A quick client that gets and releases."""
        for n in keys:
            conn = self.connect(0)
            message = wire.Get(self.shell.rid(), 0, key(n))
            self.ask(conn, "get", [n], message, 1.0)
            self.carry_out_all()
            if self.leases and self.leases[-1][0] == conn:
                _, reply, names = self.leases.pop()
                self.shell.check_get(reply, names)
                self.shell.release(conn, reply)

    def busy_staging(self, conn: int) -> bool:
        return any(c == conn and kind == "put" for (c, _), (kind, _, _) in self.asked.items())

    @rule(conn=conns, keys=numbers, timeout_s=timeouts)
    def get(self, conn, keys, timeout_s) -> None:
        conn = self.connect(conn)
        message = wire.Get(self.shell.rid(), 0, b"".join(map(key, keys)))
        self.ask(conn, "get", keys, message, timeout_s)

    @rule(conn=conns, keys=numbers, timeout_s=timeouts)
    def remove(self, conn, keys, timeout_s) -> None:
        conn = self.connect(conn)
        message = wire.Remove(self.shell.rid(), 0, b"".join(map(key, keys)))
        self.durable.difference_update(keys)
        self.racing[conn, message.rid] = {
            n for kind, names, _ in self.asked.values() if kind in PUTS for n in names
        }
        self.ask(conn, "remove", keys, message, timeout_s)

    @rule(conn=conns, keys=numbers, ttl_ms=st.sampled_from((0, 50, 60_000)))
    def hold(self, conn, keys, ttl_ms) -> None:
        conn = self.connect(conn)
        message = wire.Hold(self.shell.rid(), 0, b"".join(map(key, keys)), ttl_ms)
        self.ask(conn, "hold", keys, message, 1.0)

    @rule(conn=conns, keys=numbers)
    def prefetch(self, conn, keys) -> None:
        conn = self.connect(conn)
        message = wire.Prefetch(self.shell.rid(), 0, b"".join(map(key, keys)), 0)
        self.ask(conn, "prefetch", keys, message, 1.0)

    @rule(conn=conns, timeout_s=timeouts)
    def flush(self, conn, timeout_s) -> None:
        conn = self.connect(conn)
        self.ask(conn, "flush", [], wire.Flush(self.shell.rid(), 0), timeout_s)

    @rule(conn=conns, ttl_ms=st.sampled_from((0, 700, 60_000)), keys=numbers)
    def touch(self, conn, keys, ttl_ms) -> None:
        conn = self.connect(conn)
        message = wire.Touch(self.shell.rid(), 0, b"".join(map(key, keys)), ttl_ms)
        self.ask(conn, "touch", keys, message, 1.0)

    @rule(conn=conns)
    def verify(self, conn) -> None:
        conn = self.connect(conn)
        self.ask(conn, "verify", [], wire.Verify(self.shell.rid(), 1_000_000, 0), 1.0)

    @rule(conn=conns, keys=numbers)
    def report(self, conn, keys) -> None:
        conn = self.connect(conn)
        index = self.shell.machine.core.index
        sums = np.array([index.checksum[index.find(0, key(n))] for n in keys], np.uint64)
        message = wire.Report(0, b"".join(map(key, keys)), sums.tobytes())
        self.shell.event(events.RequestArrived(conn, message, 0))

    # ---------------------------------------------------------------- data connections

    @rule(conn=conns, keys=numbers, group=st.booleans(), timeout_s=timeouts)
    def stream_put(self, conn, keys, group, timeout_s) -> None:
        conn = self.connect(conn)
        durability = Durability.GROUP if group else Durability.MEMORY
        message = self.shell.make_put(
            keys, lengths=[length_of(n) for n in keys], offsets=[], durability=durability
        )
        self.putting(keys)
        self.asked[conn, message.rid] = ("offer", keys, group)
        deadline = self.shell.now_ns + int(timeout_s * S)
        self.shell.event(events.StreamPutArrived(conn, message, deadline))

    @precondition(lambda self: self.offered)
    @rule(data=st.data())
    def payload_done(self, data) -> None:
        conn, rid = data.draw(st.sampled_from(sorted(self.offered)))
        keys = self.offered.pop((conn, rid))
        offer = self.shell.offers[conn, rid]
        wanted = [n for n, v in zip(keys, offer.verdicts.tolist(), strict=True) if v == WANTED]
        dead = conn not in self.open.values()
        ok = [not dead and data.draw(st.booleans()) for _ in wanted]
        sums, inline = [], b""
        for n, at, length, seed in zip(
            wanted, offer.slot_offsets.tolist(), offer.lengths.tolist(), offer.seeds.tolist(),
            strict=True,
        ):  # fmt: skip
            bytes_ = payload(n, length)
            if at < 0:
                inline += bytes_.tobytes()
            else:
                self.shell.arena[at : at + length] = bytes_
            sums.append(checksum.checksum(bytes_, seed))
        self.shell.event(
            events.PayloadDone(conn, rid, np.array(ok, bool), np.array(sums, np.uint64), inline)
        )

    @rule(conn=conns, keys=numbers, timeout_s=timeouts)
    def stream_get(self, conn, keys, timeout_s) -> None:
        conn = self.connect(conn)
        rid = self.shell.rid()
        self.asked[conn, rid] = ("stream get", keys, False)
        deadline = self.shell.now_ns + int(timeout_s * S)
        capacities = np.full(len(keys), 600_000, np.uint32)
        packed = b"".join(map(key, keys))
        self.shell.event(events.StreamGetArrived(conn, rid, packed, capacities, False, deadline))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def stream_get_done(self, data) -> None:
        conn, rid, keys = self.sent.pop(data.draw(st.integers(0, len(self.sent) - 1)))
        self.check_send(self.shell.sends[conn, rid], keys)
        self.shell.event(events.StreamGetDone(conn, rid))

    def check_send(self, sent, keys) -> None:
        for i, n in enumerate(keys):
            if sent.entries["status"][i] != Lookup.HIT:
                continue
            length = int(sent.entries["length"][i])
            if sent.slot_offsets[i] >= 0:
                found = self.shell.arena[sent.slot_offsets[i] :][:length]
            else:
                found = np.frombuffer(sent.inline, np.uint8)[sent.inline_offsets[i] :][:length]
            assert np.array_equal(found, payload(n, length_of(n)))

    # ---------------------------------------------------------------- the outside

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data) -> None:
        conn, reply, keys = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.shell.check_get(reply, keys)
        if conn in self.open.values():
            self.shell.release(conn, reply)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def disconnect(self, data) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        conn = self.open.pop(name)
        self.leases = [lease for lease in self.leases if lease[0] != conn]
        # What was sent or offered on a data connection is still waited for by its thread.
        kept = ("offer", "stream get")
        for at in [at for at in self.asked if at[0] == conn and self.asked[at][0] not in kept]:
            del self.asked[at]
        self.shell.disconnect(conn)

    @precondition(lambda self: self.shell.pending)
    @rule(data=st.data())
    def carry_out(self, data) -> None:
        pending = self.shell.pending
        at = data.draw(st.integers(0, len(pending) - 1))
        instruction = pending[at]
        del pending[at]
        self.shell.step(instruction)

    @rule()
    def carry_out_all(self) -> None:
        self.shell.drain()
        self.answers()
        self.books_agree()

    @rule(ms=st.sampled_from((1, 60, 700, 3000)))
    def advance(self, ms) -> None:
        self.shell.now_ns += ms * MS
        self.shell.wall_ns += ms * MS
        self.shell.event(events.Tick())

    @rule(fault=st.sampled_from(("", "", "full", "device")))
    def disk_fault(self, fault) -> None:
        if fault == "device" and len(self.shell.retired) > 2:
            fault = ""
        self.shell.group_fault = "" if self.strict else fault

    @rule(luck=st.integers(0, 4))
    def crash(self, luck) -> None:
        """The process dies: what was not carried out never happens."""
        if luck:
            return
        before = self.shell
        self.shell = before.restart(auto=False, **self.options)
        self.shell._rid = before._rid
        self.shell.drain()
        self.open, self.asked, self.leases, self.sent, self.offered = {}, {}, [], [], {}
        self.racing = {}
        here = self.here()
        if self.strict:
            missing = self.durable - here
            assert not missing, f"acknowledged as durable, but gone: {missing}"
        back = (self.gone - self.maybe) & here
        assert not back, f"removed, but back: {back}"

    def here(self) -> set[int]:
        index = self.shell.machine.core.index
        rows = [(n, index.find(0, key(n))) for n in range(KEYS)]
        return {n for n, row in rows if row and index.flags[row] & 1}

    # ---------------------------------------------------------------- answers

    @invariant()
    def answers(self) -> None:
        shell = self.shell
        for at, replies in list(shell.replies.items()):
            assert at in self.asked or at[0] not in self.open.values(), "answered twice"
            if at in self.asked:
                self.answer(at, replies)
            if at not in self.asked:
                del shell.replies[at]
        for at, offer in shell.offers.items():
            if at in self.asked and self.asked[at][0] == "offer":
                keys = self.asked[at][1]
                if len(offer.lengths):
                    self.asked[at] = ("payload", keys, self.asked[at][2])
                    self.offered[at] = keys
                else:
                    self.put_results(keys, offer.verdicts.tolist(), self.asked.pop(at)[2])
        for at, results in list(shell.finished.items()):
            del shell.finished[at]
            if at in self.asked:
                _, keys, group = self.asked.pop(at)
                self.put_results(keys, results.tolist(), group)
        for at, sent in shell.sends.items():
            if at in self.asked:
                keys = self.asked.pop(at)[1]
                self.check_send(sent, keys)
                self.sent.append((*at, keys))

    def answer(self, at, replies) -> None:
        kind, keys, group = self.asked[at]
        last = replies[-1]
        if isinstance(last, wire.VerifyReply):
            assert last.damaged == 0
            if not last.done:
                return
        else:
            assert len(replies) == 1
        del self.asked[at]
        if isinstance(last, wire.Failure):
            assert kind in ("remove", "hold", "touch", "flush"), last
            self.racing.pop(at, None)
        elif kind == "get":
            self.shell.check_get(last, keys)
            self.leases.append((at[0], last, keys))
        elif kind == "put":
            self.put_results(keys, last.result_column.tolist(), group)
        elif kind == "remove":
            racing = self.racing.pop(at)
            self.gone.update(set(keys) - racing)
            self.maybe.difference_update(set(keys) - racing)
            self.durable.difference_update(keys)

    def put_results(self, keys, results, group) -> None:
        removing = {n for k, names, _ in self.asked.values() if k == "remove" for n in names}
        for n, result in zip(keys, results, strict=True):
            assert result in list(PutResult)
            if result in STORED:
                self.gone.discard(n)
                if group and n not in removing:
                    self.durable.add(n)

    @invariant()
    def books_agree(self) -> None:
        wrong = self.shell.machine.audit()
        assert not wrong, wrong

    def teardown(self) -> None:
        if not hasattr(self, "shell"):
            return
        shell = self.shell
        shell.group_fault = ""
        for conn, reply, keys in self.leases:
            shell.check_get(reply, keys)
            shell.release(conn, reply)
        for _ in range(40):
            shell.drain()
            self.answers()
            for conn, rid, keys in self.sent:
                self.check_send(shell.sends[conn, rid], keys)
                shell.event(events.StreamGetDone(conn, rid))
            self.sent = []
            for (conn, rid), _keys in sorted(self.offered.items()):
                count = len(shell.offers[conn, rid].lengths)
                none = np.zeros(count, np.bool_)
                inline = b"\0" * int(shell.offers[conn, rid].lengths.sum())
                shell.event(events.PayloadDone(conn, rid, none, np.zeros(count, np.uint64), inline))
            self.offered = {}
            self.advance(1000)
        waiting = {at: ask for at, ask in self.asked.items() if at[0] in self.open.values()}
        assert not waiting, f"never answered: {waiting}"
        for conn in list(self.open.values()):
            shell.disconnect(conn)
        shell.drain()
        self.books_agree()
        core = shell.machine.core
        machine = shell.machine
        held = (machine.puts.offers, machine.gets.streams, machine.loads.reads)
        assert not core.slabs.pins.any(), f"a pin is left: {held}"
        assert shell.machine.quiescent
        owned = int(np.count_nonzero(core.index.slot))
        assert owned == sum(slab.used for slab in core.slabs.slabs()), "a slot is left"


PUTS = ("put", "offer", "payload")


class RoomyEngine(EngineStory):
    options: ClassVar = {"arena_bytes": 34 * MIB, "disk_bytes": 64 * MIB, "segment_bytes": 8 * MIB}
    strict = True


class TightEngine(EngineStory):
    options: ClassVar = {
        "arena_bytes": 6 * MIB,
        "disk_bytes": 8 * 1536 * 1024,
        "segment_bytes": 1536 * 1024,
        "reclaim_free_min": 4,
        "shard_bytes_max": MIB,
        "entries_max": 16,
        "group_bytes_max": 768 * 1024,
    }


class DisklessEngine(EngineStory):
    options: ClassVar = {
        "arena_bytes": 6 * MIB,
        "disk_bytes": 0,
        "shard_bytes_max": MIB,
        "entries_max": 16,
    }


FEW = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
for _story in (RoomyEngine, TightEngine, DisklessEngine):
    _story.TestCase.settings = FEW

TestRoomyEngine = RoomyEngine.TestCase
TestTightEngine = TightEngine.TestCase
TestDisklessEngine = DisklessEngine.TestCase
