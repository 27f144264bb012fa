"""The asyncio driver: executes plans on an event loop.

Owns how to wait without blocking the loop, what runs in threads, and what cancellation has to wait
for. The plans are those of the sync face; nothing here knows what they are for.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from ctxstore import limits
from ctxstore.checksum import checksum
from ctxstore.errors import (
    DeadlineExceeded,
    TransportError,
)
from ctxstore_client.blocking import as_view
from ctxstore_client.links import SocketLink
from ctxstore_client.ops.requests import (
    Acquire,
    Checksum,
    Context,
    Copy,
    Deadline,
    Link,
    Parallel,
    Plan,
    Receive,
    ReceiveInto,
    Request,
    Send,
    SendBuffers,
)
from ctxstore_client.pool import Permit, Pool, Resolve

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence


T = TypeVar("T")

THREADS: Final = 4
"""For connecting, and for copies and checksums that would hold up the loop."""

ON_LOOP_BYTES_MAX: Final = 1 * limits.MIB
"""Copies up to this are done on the loop: a hop to a thread takes longer."""

SUM_ON_LOOP_BYTES_MAX: Final = 8 * limits.MIB
"""Checksums run at tens of GB/s, so more of them fit into the same time."""


class AsyncDriver:
    """Runs plans on the loop of the caller. Every call must come from that one loop."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._threads = ThreadPoolExecutor(THREADS, "ctxstore-aio")

    @property
    def pool(self) -> Pool:
        """Where connections come from."""
        return self._pool

    def context(self, timeout_s: float) -> Context:
        """A deadline for one operation, from now on."""
        return Context(self._pool, Deadline(monotonic, timeout_s))

    async def run(self, plan: Plan[T], context: Context) -> T:
        """Execute a plan. Cancelled: the plan ends first, then the cancellation goes on."""
        execution = _AsyncExecution(self, context.deadline)
        answer: Any = None
        error: BaseException | None = None
        while True:
            try:
                request = plan.send(answer) if error is None else plan.throw(error)
            except StopIteration as done:
                result: T = done.value
                return result
            answer, error = None, None
            try:
                answer = await execution.do(request)
            except BaseException as raised:  # noqa: BLE001 - the plan decides, and raises again
                error = raised

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run in a thread; returns or raises, also a cancellation, only when the thread is out."""
        running = asyncio.get_running_loop().run_in_executor(self._threads, work)
        cancelled: asyncio.CancelledError | None = None
        while not running.done():
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            running.exception()  # so that nobody complains that it was never looked at
            raise cancelled
        return running.result()

    def dial_in_thread(self, permit: Permit, timeout_s: float) -> asyncio.Future[SocketLink | None]:
        """Connect in a thread."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._threads, self._pool.dial, permit, timeout_s)

    async def close(self) -> None:
        """End the threads, after the pool was closed."""
        await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)


class _AsyncExecution:
    """One run of one plan."""

    __slots__ = ("_deadline", "_driver", "_loop", "_pool")

    def __init__(self, driver: AsyncDriver, deadline: Deadline) -> None:
        self._driver = driver
        self._pool = driver.pool
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()

    async def do(self, request: Request) -> Any:
        """Execute one request and return its answer."""
        return await _HANDLERS[type(request)](self, request)

    async def acquire(self, want: Acquire) -> SocketLink | None:
        """A link of the pool, dialled in a thread if need be."""
        self._remaining_s("a connection")  # else a good link would be taken only to be dropped
        woken: asyncio.Event | None = None
        searched = False
        while True:
            wake = None
            if woken is not None and not want.spare:
                woken.clear()
                wake = self._waker(woken)
            found = self._pool.checkout(want, wake)
            if isinstance(found, SocketLink):
                return found
            if isinstance(found, Permit):
                found.searched = searched
                searched = searched or isinstance(found, Resolve)
                link = await self._dial(found)
                if link is not None:
                    return link
            elif want.spare:
                return None
            elif woken is None:
                woken = asyncio.Event()
            else:
                try:
                    async with asyncio.timeout(self._remaining_s("a free connection")):
                        await woken.wait()
                except TimeoutError as error:
                    raise DeadlineExceeded("no connection became free in time") from error

    def _waker(self, woken: asyncio.Event) -> Callable[[], None]:
        def wake() -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(woken.set)

        return wake

    async def _dial(self, permit: Permit) -> SocketLink | None:
        try:
            remaining = self._remaining_s("a connection")
            dialing = self._driver.dial_in_thread(permit, remaining)
        except BaseException:
            self._pool.give_up(permit)
            raise
        try:
            # All threads may be busy: the dial's own limit runs only once it has one.
            async with asyncio.timeout(remaining):
                return await asyncio.shield(dialing)
        except BaseException as error:
            dialing.add_done_callback(lambda done: self._keep_for_others(done, permit))
            if isinstance(error, TimeoutError) and not isinstance(error, DeadlineExceeded):
                raise DeadlineExceeded("no connection was made in time") from error
            raise

    def _keep_for_others(self, dialing: asyncio.Future[SocketLink | None], permit: Permit) -> None:
        """The connection that nobody waits for any more serves the next operation."""
        if dialing.cancelled():
            self._pool.give_up(permit)  # unless dialling had begun
        elif dialing.exception() is None:
            link = dialing.result()
            if link is not None:
                self._pool.give_back(link)

    async def send(self, request: Send) -> None:
        """Send a frame behind what was deferred."""
        link = _socket_link(request.link)
        frame = link.take_deferred() + request.frame if link.deferred else request.frame
        await self._send_all(link, memoryview(frame))

    async def send_buffers(self, request: SendBuffers) -> None:
        """Send payloads straight from where they lie."""
        link = _socket_link(request.link)
        for buffer in request.buffers:
            await self._send_all(link, as_view(buffer))

    async def _send_all(self, link: SocketLink, data: memoryview) -> None:
        try:
            # Most frames fit the socket at once; then nothing has to be armed.
            sent = link.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise TransportError(f"connection lost: {error}") from error
        if sent < data.nbytes:
            await self._waiting(self._loop.sock_sendall(link.sock, data[sent:]))

    async def receive(self, request: Receive) -> Any:
        """The next message, read from the socket if none is there yet."""
        link = _socket_link(request.link)
        while not link.inbox:
            count = await self._waiting(self._loop.sock_recv_into(link.sock, link.scratch))
            if not count:
                link.wire.receive_eof()
                raise TransportError("the daemon closed the connection")
            link.inbox.extend(link.wire.receive(memoryview(link.scratch)[:count]))
        return link.inbox.popleft()

    async def receive_into(self, request: ReceiveInto) -> None:
        """Fill the target, on the loop's own thread: once cancelled it is not written to."""
        link = _socket_link(request.link)
        rest = request.target.data
        while rest.nbytes:
            count = await self._waiting(self._loop.sock_recv_into(link.sock, rest))
            if not count:
                raise TransportError("the daemon closed the data connection")
            rest = rest[count:]

    async def copy(self, request: Copy) -> None:
        """Copy on the loop what is small, in a thread what is not."""

        def work() -> None:
            for target, source in zip(request.targets, request.sources, strict=True):
                np.copyto(target, source)

        if sum(target.nbytes for target in request.targets) <= ON_LOOP_BYTES_MAX:
            work()
        else:
            await self._driver.in_thread(work)

    async def sum(self, request: Checksum) -> list[int]:
        """Checksums, in a thread where they take long."""

        def work() -> list[int]:
            pairs = zip(request.payloads, request.seeds, strict=True)
            return [checksum(payload, seed) for payload, seed in pairs]

        if sum(payload.nbytes for payload in request.payloads) <= SUM_ON_LOOP_BYTES_MAX:
            return work()
        return await self._driver.in_thread(work)

    async def parallel(self, request: Parallel) -> list[Any]:
        """Run plans as tasks; when it raises, all of them are over."""
        context = Context(self._pool, self._deadline)
        tasks = [asyncio.ensure_future(self._driver.run(plan, context)) for plan in request.plans]
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await all_over(tasks)
            raise
        problems = [error for task in tasks if (error := task.exception()) is not None]
        if problems:
            raise problems[0]
        return [task.result() for task in tasks]

    def _remaining_s(self, what: str) -> float:
        remaining = self._deadline.remaining_s()
        if remaining <= 0:
            raise DeadlineExceeded(f"the deadline passed while waiting for {what}")
        return remaining

    async def _waiting(self, call: Awaitable[T]) -> T:
        """Wait for a socket until the deadline, and translate its errors."""
        try:
            async with asyncio.timeout(max(0.0, self._deadline.remaining_s())):
                return await call
        except TimeoutError as error:
            self._pool.blame(self._deadline.timeout_s)
            raise DeadlineExceeded("the daemon did not answer in time") from error
        except OSError as error:
            raise TransportError(f"connection lost: {error}") from error


async def all_over(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Wait for cancelled tasks, whatever else is asked of this one meanwhile."""
    again: asyncio.CancelledError | None = None
    while any(not task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError as error:
            again = error
    for task in tasks:
        if not task.cancelled():
            task.exception()  # so that nobody complains that it was never looked at
    if again is not None:
        raise again


def _socket_link(link: Link) -> SocketLink:
    assert isinstance(link, SocketLink), "links come from the pool of this driver"
    return link


_HANDLERS: Final[dict[type[Any], Callable[[_AsyncExecution, Any], Awaitable[Any]]]] = {
    Acquire: _AsyncExecution.acquire,
    Send: _AsyncExecution.send,
    SendBuffers: _AsyncExecution.send_buffers,
    Receive: _AsyncExecution.receive,
    ReceiveInto: _AsyncExecution.receive_into,
    Copy: _AsyncExecution.copy,
    Checksum: _AsyncExecution.sum,
    Parallel: _AsyncExecution.parallel,
}
