"""Fails the n-th call of the disk, for every n, in one fixed course of events.

Owns that course. After each fault the node may lose what the fault hit and nothing else, must not
show anything wrong, and must work again once it is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from ctxstore.errors import StorageError
from ctxstore.limits import MIB
from ctxstore.testing import loop as sim_loop
from ctxstore.testing.checkers import HistoryViolation, Level
from ctxstore.testing.disk import CrashKind
from ctxstore.testing.faults import MUTATING, FaultKind, FaultPlan, Op, PowerLoss
from ctxstore.wire.messages import PutResult
from tests.simulation.clients import Habits
from tests.simulation.profiles import PROFILES
from tests.simulation.scenario import LIMIT_S, NAMESPACES, Scenario, segment_of

if TYPE_CHECKING:
    from tests.simulation.clients import Client

pytestmark = pytest.mark.sim

COURSE = replace(
    PROFILES[0],
    name="nth-fault",
    habits=Habits(timeouts_s=(3.0,)),
    arena_bytes=8 * MIB,
    disk_bytes=14 * MIB,
    reclaim=True,
    read_faults=True,
    write_faults=True,
    full=True,
)

OPS = {
    FaultKind.EIO: tuple(Op),
    FaultKind.ENOSPC: (Op.ALLOCATE, Op.WRITE),
    FaultKind.POWER: tuple(sorted(MUTATING, key=lambda op: op.value)),
}

STRIDE_IN_TEST = 7
"""`make test` takes every seventh call; with CTXSTORE_SIM_SEEDS of 100 or more, all are taken."""


class NthFault(FaultPlan):
    """A plan with one fault, told to the course when it strikes; it goes on over restarts."""

    def __init__(self, course: Course) -> None:
        super().__init__()
        self._course = course

    def draw(self, op: Op, name: str) -> BaseException | None:
        error = super().draw(op, name)
        if error is not None:
            self._course.struck(f"{op.value} of {name}", name, error)
        return error

    def heal(self) -> None:
        """The one fault stays planned."""


class Course(Scenario):
    """What happens, in order, whatever goes wrong."""

    def __init__(self, kind: FaultKind, nth: int) -> None:
        super().__init__(7, COURSE)
        self.hit = ""
        self.plan = NthFault(self)
        if nth:
            self.plan.fail_nth(kind, nth, *OPS[kind])
        self._reviving: asyncio.Future[None] | None = None
        self._dark = asyncio.Event()
        """The power went while the node was starting."""

    def struck(self, what: str, name: str, error: BaseException) -> None:
        """The fault happened."""
        self.hit = what
        if name.startswith("segment-"):
            self.watch.damage_segment(segment_of(name))
        if isinstance(error, PowerLoss):
            if self.host.node is None:
                self._dark.set()
            else:
                self._reviving = asyncio.ensure_future(self._power_cycle())

    async def _power_cycle(self) -> None:
        await self._end_process(clean=False)
        await self._start()

    async def _start(self) -> None:
        """Start; a start that meets the fault is tried once more, as an operator would."""
        self.host.disk.faults = self.plan
        starting = asyncio.ensure_future(super()._start())
        dark = asyncio.ensure_future(self._dark.wait())
        await asyncio.wait([starting, dark], return_when=asyncio.FIRST_COMPLETED)
        dark.cancel()
        if self._dark.is_set():
            self._dark.clear()
            await self._die_starting(starting)
        else:
            try:
                await starting
                return
            except StorageError:
                self.watch.note("start failed")
        self.host.disk.faults = self.plan
        await super()._start()

    async def _die_starting(self, starting: asyncio.Future[None]) -> None:
        starting.cancel()
        await asyncio.wait([starting])
        with contextlib.suppress(BaseException):
            starting.result()
        await self._end_process(clean=False, kind=CrashKind.POWER)

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        if not (isinstance(error, BaseException) and power_lost(error)):
            super()._on_loop_error(loop, context)

    async def _work(self) -> None:
        self.world.node_steady = False
        client = self._make_client(remote=False, namespace=NAMESPACES[0])
        await self._fill(client)
        await self._stop_and_go(clean=False, kind=CrashKind.POWER)
        await self._ask_for_all(client)
        await self._change(client)
        await self._stop_and_go(clean=True)
        await self._ask_for_all(client)
        await self._stop_and_go(clean=False, kind=CrashKind.KILL)
        self.world.node_steady = True
        await self._settle_accounts("at the end")
        await self._show_progress()
        await self._check_leaks()
        client.pool.close()
        await self._stop_and_go(clean=True)
        await self._settle_accounts("after a last stop")
        await self._end_process(clean=False, kind=CrashKind.KILL)

    async def _stop_and_go(self, *, clean: bool, kind: CrashKind = CrashKind.KILL) -> None:
        if self._reviving is not None:
            await self._reviving
            self._reviving = None
        try:
            await self._end_process(clean=clean, kind=kind)
        except BaseException as error:
            if not power_lost(error):
                raise
            await self._end_process(clean=False, kind=CrashKind.POWER)
        await self._start()

    async def _fill(self, client: Client) -> None:
        keys = self.world.keys
        await client.put_batch(keys[0:3], [9000, 40_000, 500], 0, Level.GROUP)
        await client.put_batch(keys[3:6], [70_000, 1, 5000], 60_000, Level.MEMORY)
        await client.flush()
        for first in range(6, 14, 2):
            await client.put_batch(keys[first : first + 2], [250_000] * 2, 0, Level.GROUP)
        await client.remove_keys(keys[0:1])
        await client.hold_keys(keys[1:2], 5000)
        await client.touch_keys(keys[3:4], 90_000)

    async def _change(self, client: Client) -> None:
        keys = self.world.keys
        await client.put_batch(keys[0:1], [1234], 0, Level.GROUP)
        await client.remove_keys(keys[5:7])
        await client.put_batch(keys[14:16], [100_000, 20], 0, Level.MEMORY)

    async def _ask_for_all(self, client: Client) -> None:
        for first in range(0, 16, 4):
            await client.get_batch(self.world.keys[first : first + 4])


def power_lost(error: BaseException) -> bool:
    """Whether the loss of power is what this error is about."""
    if isinstance(error, BaseExceptionGroup):
        return any(power_lost(each) for each in error.exceptions)
    return isinstance(error, PowerLoss)


def play(kind: FaultKind, nth: int) -> Course:
    """One course with the n-th call failing; 0: none."""

    async def main() -> Course:
        course = Course(kind, nth)
        await course.run()
        return course

    return sim_loop.run(main(), limit_s=LIMIT_S)


def _numbers(kind: FaultKind) -> list[int]:
    counts = play(kind, 0).plan.counts
    calls = sum(counts[op] for op in OPS[kind])
    assert calls > 10, "the course hardly touches the disk"
    thorough = int(os.environ.get("CTXSTORE_SIM_SEEDS", "20")) >= 100
    return list(range(1, calls + 1, 1 if thorough else STRIDE_IN_TEST))


@pytest.mark.parametrize("kind", OPS, ids=lambda kind: kind.name)
def test_any_single_fault_of_the_disk_is_survived(kind: FaultKind) -> None:
    struck = 0
    for nth in _numbers(kind):
        try:
            course = play(kind, nth)
        except BaseException as error:
            error.add_note(f"with {kind.name} in call {nth}")
            raise
        struck += bool(course.hit)

    assert struck > 5


def test_the_course_without_faults_loses_nothing() -> None:
    course = play(FaultKind.EIO, 0)

    assert not course.hit
    assert course.checker.duties_checked > 30
    assert course.world.results["put:COMMITTED"] > 15


def test_a_put_that_met_a_failed_sync_is_not_called_stored() -> None:
    """The first sync of a group, found by name: the put is refused, and says so."""
    answers: list[PutResult] = []

    class FailingSync(Course):
        async def _work(self) -> None:
            self.plan.fail_nth(
                FaultKind.EIO, 1, Op.SYNC, names=lambda name: name.startswith("segment-")
            )
            client = self._make_client(remote=False, namespace=NAMESPACES[0])
            results = await client.put_batch(self.world.keys[:1], [9000], 0, Level.GROUP)
            answers.extend(results or ())
            client.pool.close()
            await self._end_process(clean=True)

    async def main() -> str:
        course = FailingSync(FaultKind.EIO, 0)
        await course.run()
        return course.hit

    hit = sim_loop.run(main(), limit_s=LIMIT_S)

    assert hit.startswith("fdatasync of segment-")
    if answers == [PutResult.COMMITTED]:
        raise HistoryViolation("a put was acknowledged over a failed sync")
