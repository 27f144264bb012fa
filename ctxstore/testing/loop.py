"""An asyncio event loop on a virtual clock.

Owns time: it jumps to the next timer when nothing is ready, so hours pass in milliseconds and a
run depends on its seeds alone. It does no real I/O and refuses threads. A run in which nothing
can ever happen again is reported as a deadlock instead of hanging.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    import contextvars

T = TypeVar("T")

START_S: Final = 1000.0
"""Virtual time at the start: not zero, so that forgotten initial values show."""

_SPINS_MAX: Final = 1_000_000
"""Turns of the loop without time passing after which a run counts as a livelock."""

_Coroutine = Coroutine[Any, Any, T] | Generator[Any, None, T]


class SimDeadlock(AssertionError):
    """Nothing is ready and no timer is set, but the awaited task is not done."""


class SimLivelock(AssertionError):
    """The loop turns for ever without time passing, or time passed beyond the limit of the run."""


class _SimTask(asyncio.Task[T]):
    """A task whose hash is its serial number: sets of tasks iterate alike in every run."""

    serial: int

    def __hash__(self) -> int:
        return self.serial


class _SimFuture(asyncio.Future[Any]):
    """A future whose hash is its serial number."""

    serial: int

    def __hash__(self) -> int:
        return self.serial


class _Selector:
    """Stands where the loop waits for I/O: here waiting is a jump of the clock."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop
        self._spins = 0

    def select(self, timeout: float | None) -> list[Any]:
        """Return at once; `timeout` seconds of virtual time have passed."""
        if timeout is None:
            raise SimDeadlock(_waiting_tasks(self._loop))
        if timeout > 0:
            self._loop.advance(timeout)
            self._spins = 0
        else:
            self._spins += 1
            if self._spins > _SPINS_MAX:
                raise SimLivelock(f"{_SPINS_MAX} turns at {self._loop.time()} s")
        return []


def _waiting_tasks(loop: asyncio.AbstractEventLoop) -> str:
    lines = [
        f"{task.get_name()}: {getattr(task.get_coro(), '__qualname__', '?')}"
        for task in asyncio.all_tasks(loop)
        if not task.done()
    ]
    return "nothing can happen any more; waiting:\n" + "\n".join(sorted(lines))


class SimLoop(asyncio.BaseEventLoop):
    """Use it through `run`. `limit_s` bounds the virtual time of a run."""

    def __init__(self, *, limit_s: float = 30 * 24 * 3600.0) -> None:
        super().__init__()
        self._now_s = START_S
        self._limit_s = START_S + limit_s
        self._serials = itertools.count(1)
        # The base class waits in this attribute's `select`.
        self._selector = _Selector(self)
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let time pass; called by the loop when it would wait."""
        self._now_s += seconds
        if self._now_s > self._limit_s:
            raise SimLivelock(f"the run's limit of virtual time is passed: {self._now_s} s")

    def create_future(self) -> asyncio.Future[Any]:
        """A future that hashes by age."""
        future = _SimFuture(loop=self)
        future.serial = next(self._serials)
        return future

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Refused: a thread runs in real time."""
        raise RuntimeError("no threads on a virtual clock")

    def _make_task(
        self,
        loop: asyncio.AbstractEventLoop,
        coro: _Coroutine[T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[T]:
        # The serial is needed by the base class's constructor, which enters the task into a set.
        task: _SimTask[T] = _SimTask.__new__(_SimTask)
        task.serial = next(self._serials)
        task.__init__(coro, loop=loop, name=name, context=context)  # type: ignore[misc]
        return task

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps outside the loop's own thread."""


def run(main: Coroutine[Any, Any, T], *, limit_s: float = 30 * 24 * 3600.0) -> T:
    """Run a coroutine to its end on a fresh SimLoop; all its tasks are cancelled afterwards.

    Raises SimDeadlock or SimLivelock where a real loop would hang.
    """
    with asyncio.Runner(loop_factory=lambda: SimLoop(limit_s=limit_s)) as runner:
        return runner.run(main)
