"""Operations that go on in the background: tickets, and the bounded threads that work them off.

Owns when a ticket's buffers may be touched again: once `wait` returned or `cancel` did. It must not
know what an operation does.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from ctxstore.errors import ClosedError, DeadlineExceeded, ForkedError, Overloaded
from ctxstore_client.blocking import CancelState

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

WORKERS: Final = 4
"""Threads of one store that work off tickets, started when there is work."""

TICKETS_MAX: Final = 1024
"""Tickets that may wait; one more is Overloaded."""


class _Phase(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    OVER = "over"


class Ticket(Generic[T]):
    """An operation in the background. Any thread of the process that submitted it may use it.

    The caller's buffers belong to the operation until `wait` returned its result, `done` is True,
    or `cancel` returned.
    """

    def __init__(self, work: Callable[[CancelState], T], if_cancelled: Callable[[], T]) -> None:
        self._work = work
        self._if_cancelled = if_cancelled
        self._cancel = CancelState()
        self._lock = threading.Lock()
        self._phase = _Phase.WAITING
        self._over = threading.Event()
        self._process = os.getpid()
        self._result: T | None = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether the result is there; never waits."""
        self._check_process()
        return self._over.is_set()

    def wait(self, timeout_s: float | None = None) -> Any:
        """The operation's result, with the errors that the plain method raises.

        Raises DeadlineExceeded when it is not over within `timeout_s` (None: its own deadline ends
        it); the operation then goes on. A cancelled operation answers TIMEOUT for what it left.
        """
        self._check_process()
        if not self._over.wait(timeout_s):
            raise DeadlineExceeded(f"not done within {timeout_s} s; the operation goes on")
        if self._error is not None:
            raise self._error
        return self._result

    def cancel(self) -> bool:
        """End the operation; when this returns its buffers are not touched any more.

        False when it was over already. Waits for a copy in progress, never for the daemon, also
        while a connection to it is being made.
        """
        self._check_process()
        with self._lock:
            if self._phase is _Phase.OVER:
                return False
            if self._phase is _Phase.WAITING:
                self._finish(self._if_cancelled(), None)
                return True
        self._cancel.cancel()
        self._over.wait()
        return True

    def run(self) -> None:
        """Work it off on this thread, unless it was cancelled before."""
        with self._lock:
            if self._phase is not _Phase.WAITING:
                return
            self._phase = _Phase.RUNNING
        result: T | None = None
        problem: BaseException | None = None
        try:
            result = self._work(self._cancel)
        except BaseException as error:  # noqa: BLE001 - raised again by wait
            problem = error
        with self._lock:
            self._finish(result, problem)

    def _finish(self, result: T | None, error: BaseException | None) -> None:
        self._phase = _Phase.OVER
        self._result = result
        self._error = error
        # Buffers are not kept alive by a ticket that somebody keeps.
        del self._work, self._if_cancelled
        self._over.set()

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise ForkedError("the operation runs in the parent process")


class Workers:
    """Threads that work tickets off in order. Thread-safe; a forked child begins with none."""

    def __init__(self) -> None:
        self._begin()
        self._closed = False

    def _begin(self) -> None:
        self._process = os.getpid()
        self._condition = threading.Condition()
        self._waiting: deque[Ticket[Any]] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = 0

    def submit(self, ticket: Ticket[Any]) -> None:
        """Raises Overloaded when too many wait, ClosedError after `stop`."""
        if self._process != os.getpid():
            self._begin()
        with self._condition:
            if self._closed:
                raise ClosedError("the store is closed")
            if len(self._waiting) >= TICKETS_MAX:
                raise Overloaded(f"{TICKETS_MAX} operations wait already")
            self._waiting.append(ticket)
            if self._idle < len(self._waiting) and len(self._threads) < WORKERS:
                name = f"ctxstore-worker-{len(self._threads)}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
            self._condition.notify()

    def _work(self) -> None:
        while True:
            with self._condition:
                self._idle += 1
                while not self._waiting and not self._closed:
                    self._condition.wait()
                self._idle -= 1
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
            ticket.run()
            del ticket

    def stop(self) -> None:
        """Cancel what waits and take no more; what runs goes on."""
        if self._process != os.getpid():
            self._begin()
        with self._condition:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._condition.notify_all()
        for ticket in waiting:
            ticket.cancel()

    def join(self) -> None:
        """After `stop`: wait until what runs is over and the threads are gone."""
        for thread in self._threads:
            thread.join()
