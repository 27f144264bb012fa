"""The executor between a scripted machine and scripted storage: errors, order, timers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from ctxstore.errors import DeviceError, OutOfSpace
from ctxstore.testing.clock import SimClock
from ctxstore.testing.loop import run
from ctxstore.testing.mover import InlineMover
from ctxstore_daemon.engine import events
from ctxstore_daemon.engine.records import META_DTYPE, RECORD_DTYPE, RecordBatch
from ctxstore_daemon.executor import Executor
from ctxstore_daemon.tiers.memory import HeapArena

if TYPE_CHECKING:
    from collections.abc import Callable

    from ctxstore.seams import Now

NONE = np.zeros(0, np.int64)


@dataclass
class ScriptedMachine:
    """Answers each kind of event with the instructions laid down for it; remembers all events."""

    answers: dict[type, list[events.Instruction]] = field(default_factory=dict)
    seen: list[events.Event] = field(default_factory=list)
    wakeup_ns: int | None = None
    quiescent: bool = True

    def handle(self, event: events.Event, now: Now) -> list[events.Instruction]:
        self.seen.append(event)
        if isinstance(event, events.Tick):
            self.wakeup_ns = None
        return self.answers.get(type(event), [])

    def next_wakeup_ns(self) -> int | None:
        return self.wakeup_ns

    def stats(self) -> Any:
        return type("Stats", (), {"disk_ok": True})

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.seen if isinstance(event, kind)]


class ScriptedStore:
    """Raises what is laid down, in order; afterwards all goes well."""

    def __init__(self) -> None:
        self.raising: list[Exception] = []
        self.appends: list[tuple[int, bool]] = []
        self.free = 5

    def counts(self) -> tuple[int, int]:
        return self.free, 8

    async def write_group(self, order: events.WriteGroup, arena: object) -> events.GroupDone:
        await self._go()
        return events.GroupDone(order.group_id, 1, 1, order.seq, np.zeros(0, np.uint32))

    async def recycle(self, segment: int) -> None:
        await self._go()

    async def reserve_meta(self, count: int) -> None:
        await self._go()

    async def append_meta(self, records: Any, sync: bool, reserved: int = 0) -> None:
        await self._go()
        self.appends.append((len(records), sync))

    async def _go(self) -> None:
        await asyncio.sleep(0.01)
        if self.raising:
            raise self.raising.pop(0)


def _scenario(
    body: Callable[[Executor, ScriptedMachine, ScriptedStore], Any],
) -> tuple[ScriptedMachine, ScriptedStore]:
    machine, store = ScriptedMachine(), ScriptedStore()

    async def main() -> None:
        executor = Executor(
            cast("Any", machine),
            store=cast("Any", store),
            mover=InlineMover(),
            clock=SimClock(asyncio.get_running_loop()),
            arena=HeapArena(2 * 1024 * 1024),
        )
        runner = asyncio.create_task(executor.run())
        await executor.begin([])
        await body(executor, machine, store)
        executor.end()
        await runner

    run(main())
    return machine, store


def _group(group_id: int) -> events.WriteGroup:
    batch = RecordBatch(np.zeros(0, RECORD_DTYPE))
    return events.WriteGroup(group_id, group_id, batch, NONE, NONE)


def _append(meta_id: int, *, sync: bool = False, count: int = 1) -> events.AppendMeta:
    return events.AppendMeta(meta_id, np.zeros(count, META_DTYPE), sync)


@pytest.mark.parametrize(
    ("error", "full"), [(OutOfSpace("full"), True), (DeviceError("EIO"), False)]
)
def test_a_failed_group_is_told_and_the_next_one_written(error: Exception, full: bool) -> None:
    async def body(executor: Executor, machine: ScriptedMachine, store: ScriptedStore) -> None:
        store.raising = [error]
        machine.answers[events.Stopping] = [_group(1), _group(2)]
        executor.submit(events.Stopping())
        await asyncio.sleep(1)

    machine, _ = _scenario(body)
    (failed,) = machine.of(events.GroupFailed)
    assert (failed.group_id, failed.full, failed.reason) == (1, full, str(error))
    assert [done.group_id for done in machine.of(events.GroupDone)] == [2]


def test_a_disk_that_was_full_is_asked_again() -> None:
    async def body(executor: Executor, machine: ScriptedMachine, store: ScriptedStore) -> None:
        store.raising = [OutOfSpace("full")]
        store.free = 0
        machine.answers[events.Stopping] = [_group(1)]
        executor.submit(events.Stopping())
        await asyncio.sleep(15)
        assert machine.of(events.SegmentsChanged)[-1].free == 0
        store.free = 3
        await asyncio.sleep(15)
        assert machine.of(events.SegmentsChanged)[-1].free == 3

    _scenario(body)


def test_a_recycle_waits_for_room_in_the_log_and_a_device_error_loses_the_segment() -> None:
    async def body(executor: Executor, machine: ScriptedMachine, store: ScriptedStore) -> None:
        store.raising = [OutOfSpace("log"), OutOfSpace("log")]
        machine.answers[events.Stopping] = [events.RecycleSegment(4)]
        executor.submit(events.Stopping())
        await asyncio.sleep(10)
        assert [done.segment for done in machine.of(events.SegmentRecycled)] == [4]
        store.raising = [DeviceError("EIO")]
        executor.submit(events.Stopping())
        await asyncio.sleep(1)
        assert [lost.segment for lost in machine.of(events.SegmentLost)] == [4]

    _scenario(body)


def test_nobody_waits_at_the_end_for_a_recycle_that_finds_no_room() -> None:
    async def body(executor: Executor, machine: ScriptedMachine, store: ScriptedStore) -> None:
        store.raising = [OutOfSpace("log")] * 1000
        machine.answers[events.SegmentLost] = [events.RecycleSegment(4)]
        executor.submit(events.SegmentLost(1, ""))
        async with asyncio.timeout(5):
            await executor.drain()

    _scenario(body)


def test_appends_share_a_write_and_each_is_answered() -> None:
    async def body(executor: Executor, machine: ScriptedMachine, store: ScriptedStore) -> None:
        machine.answers[events.Stopping] = [_append(1), _append(2, sync=True), _append(3, count=5)]
        executor.submit(events.Stopping())
        await asyncio.sleep(1)

    machine, store = _scenario(body)
    assert [(done.meta_id, done.ok) for done in machine.of(events.MetaDone)] == [
        (1, True),
        (2, True),
        (3, True),
    ]
    assert store.appends == [(7, True)]


def test_a_full_log_takes_what_fits() -> None:
    async def body(executor: Executor, machine: ScriptedMachine, store: ScriptedStore) -> None:
        # The three together, then the second one alone.
        store.raising = [OutOfSpace("log")]
        machine.answers[events.Stopping] = [_append(1), _append(2), _append(3)]
        executor.submit(events.Stopping())
        await asyncio.sleep(1)
        store.raising = [DeviceError("EIO")]
        executor.submit(events.Stopping())
        await asyncio.sleep(1)

    machine, store = _scenario(body)
    assert [done.ok for done in machine.of(events.MetaDone)] == [True] * 3 + [False] * 3
    assert store.appends == [(1, False)] * 3


def test_ticks_come_when_they_are_due() -> None:
    async def body(executor: Executor, machine: ScriptedMachine, store: ScriptedStore) -> None:
        loop = asyncio.get_running_loop()
        machine.wakeup_ns = round((loop.time() + 2) * 1e9)
        executor.submit(events.ConnClosed(1))
        machine.wakeup_ns = round((loop.time() + 1) * 1e9)  # sooner: the timer is set anew
        executor.submit(events.ConnClosed(1))
        await asyncio.sleep(0.99)
        assert not machine.of(events.Tick)
        await asyncio.sleep(0.02)
        assert len(machine.of(events.Tick)) == 1
        await asyncio.sleep(5)
        assert len(machine.of(events.Tick)) == 1

    _scenario(body)


def test_events_of_a_sink_wait_for_their_turn() -> None:
    async def body(executor: Executor, machine: ScriptedMachine, store: ScriptedStore) -> None:
        class Sink:
            def deliver(self, message: object) -> None:
                executor.submit(events.ConnClosed(2))

            def end(self, reason: str) -> None:
                executor.submit(events.ConnClosed(3))

        executor.open_control(1, Sink(), None)
        reply = events.Reply(1, cast("Any", object()))
        machine.answers[events.Stopping] = [reply, events.CloseConn(1, "x"), reply]
        executor.submit(events.Stopping())

    machine, _ = _scenario(body)
    assert [event.conn for event in machine.of(events.ConnClosed)] == [2, 3, 2]


def test_after_the_end_nothing_reaches_the_machine_and_staging_still_goes() -> None:
    ended: list[Executor] = []

    async def body(executor: Executor, machine: ScriptedMachine, store: ScriptedStore) -> None:
        executor.open_control(7, cast("Any", object()), np.zeros(4096, np.uint8))
        ended.append(executor)

    machine, _ = _scenario(body)
    before = len(machine.seen)
    gone: list[int] = []
    ended[0].close_conn(7, when_idle=lambda: gone.append(7))
    ended[0].submit(events.Stopping())
    assert len(machine.seen) == before
    assert gone == [7]
