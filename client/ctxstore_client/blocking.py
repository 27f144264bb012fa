"""The blocking driver: executes plans on the caller's thread with blocking sockets.

Owns how to wait with a deadline, cancellation from another thread, and threads for plans that run
side by side. It must not know what a plan is for.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from ctxstore.checksum import checksum
from ctxstore.errors import CtxStoreError, DeadlineExceeded, TransportError
from ctxstore_client.links import SocketLink
from ctxstore_client.ops.requests import (
    Acquire,
    ByteArray,
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
    from collections.abc import Callable, Sequence

T = TypeVar("T")

PARALLEL_THREADS: Final = 8
DIAL_THREADS: Final = 8
"""For the connections of tickets: a cancelled one does not wait for an answer to its hello."""

GATHER_BYTES_MAX: Final = 64 * 1024
"""Buffers up to this together go by one system call; larger ones are faster one by one."""

ARMED_SHARE: Final = 0.98
ARMED_SLACK_S: Final = 0.005
"""A socket keeps its time-out while it is this close to what is left: a system call saved."""

_TIMEVAL: Final = struct.Struct("@ll")


class CancelState:
    """Lets one thread end the operation of another; the operation then times out at once."""

    __slots__ = ("_lock", "_sockets", "_wakers", "cancelled")

    def __init__(self) -> None:
        self.cancelled = False
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._wakers: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """Wake whoever waits on a socket or for a connection; returns at once."""
        with self._lock:
            self.cancelled = True
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            for wake in self._wakers:
                wake()

    def watch(self, sock: socket.socket) -> None:
        """A thread is about to wait on this socket: `cancel` shuts it down."""
        with self._lock:
            self._sockets.append(sock)

    def unwatch(self, sock: socket.socket) -> None:
        """The wait is over."""
        with self._lock:
            if sock in self._sockets:
                self._sockets.remove(sock)

    def on_cancel(self, wake: Callable[[], None]) -> None:
        """Also call this when cancelled; at once if that has happened."""
        with self._lock:
            self._wakers.append(wake)
            if self.cancelled:
                wake()


class _ThreadsState:
    """Threads started when there is work; a forked child begins with none."""

    __slots__ = ("_count", "_lock", "_made", "_name", "_pool")

    def __init__(self, pool: Pool, count: int, name: str) -> None:
        self._pool = pool
        self._count = count
        self._name = name
        self._lock = threading.Lock()
        self._made: tuple[int, ThreadPoolExecutor] | None = None

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run it on one of the threads."""
        with self._lock:
            if self._made is None or self._made[0] != self._pool.process:
                self._made = (self._pool.process, ThreadPoolExecutor(self._count, self._name))
            executor = self._made[1]
        return executor.submit(work, *arguments)

    def close(self) -> None:
        """Wait for what runs, and end the threads."""
        with self._lock:
            made, self._made = self._made, None
        if made is not None and made[0] == self._pool.process:
            made[1].shutdown()


class BlockingDriver:
    """Runs plans. Any number of threads may call `run` at once."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._threads = _ThreadsState(pool, PARALLEL_THREADS, "ctxstore-stream")
        self._dialers = _ThreadsState(pool, DIAL_THREADS, "ctxstore-dial")

    @property
    def pool(self) -> Pool:
        """Where connections come from."""
        return self._pool

    def context(self, timeout_s: float) -> Context:
        """A deadline for one operation, from now on."""
        return Context(self._pool, Deadline(monotonic, timeout_s))

    def run(self, plan: Plan[T], context: Context, cancel: CancelState | None = None) -> T:
        """Execute a plan; returns or raises what it does, and leaves nothing running."""
        execution = _Execution(self, context.deadline, cancel)
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
                answer = execution.do(request)
            except BaseException as raised:  # noqa: BLE001 - the plan decides, and raises again
                error = raised

    def run_many(
        self, plans: Sequence[Plan[Any]], context_deadline: Deadline, cancel: CancelState | None
    ) -> list[Any]:
        """Run plans side by side, the first on this thread; all are over when this returns."""
        context = Context(self._pool, context_deadline)
        futures: list[tuple[Future[Any], Plan[Any]]] = [
            (self._threads.submit(self.run, plan, context, cancel), plan) for plan in plans[1:]
        ]
        problem: BaseException | None = None
        results: list[Any] = []
        try:
            results.append(self.run(plans[0], context, cancel))
        except BaseException as error:  # noqa: BLE001 - raised once the others are over
            problem = error
        for future, plan in futures:
            try:
                # A plan that no thread has begun yet is quicker done here.
                begun = not future.cancel()
                results.append(future.result() if begun else self.run(plan, context, cancel))
            except BaseException as error:  # noqa: BLE001 - raised once the others are over
                problem = problem or error
        if problem is not None:
            raise problem
        return results

    def dial_apart(self, permit: Permit, timeout_s: float) -> Future[SocketLink | None]:
        """Connect on another thread."""
        return self._dialers.submit(self._pool.dial, permit, timeout_s)

    def close(self) -> None:
        """End the threads, after the pool was closed."""
        self._threads.close()
        self._dialers.close()


class _Execution:
    """One run of one plan."""

    __slots__ = ("_cancel", "_deadline", "_driver", "_pool")

    def __init__(
        self, driver: BlockingDriver, deadline: Deadline, cancel: CancelState | None
    ) -> None:
        self._driver = driver
        self._pool = driver.pool
        self._deadline = deadline
        self._cancel = cancel

    @property
    def cancellable(self) -> bool:
        """Whether another thread may end this."""
        return self._cancel is not None

    def do(self, request: Request) -> Any:
        """Execute one request and return its answer."""
        if self._cancel is not None and self._cancel.cancelled:
            raise DeadlineExceeded("the operation was cancelled")
        return _HANDLERS[type(request)](self, request)

    def acquire(self, want: Acquire) -> SocketLink | None:
        """A link of the pool, dialled here if need be."""
        self._remaining_s("a connection")  # else a good link would be taken only to be dropped
        woken: threading.Event | None = None
        searched = False
        while True:
            if woken is not None:
                woken.clear()
            found = self._pool.checkout(want, None if woken is None or want.spare else woken.set)
            if isinstance(found, SocketLink):
                return found
            if isinstance(found, Permit):
                found.searched = searched
                searched = searched or isinstance(found, Resolve)
                link = self._dial(found)
                if link is not None:
                    return link
            elif want.spare:
                return None
            elif woken is None:
                woken = threading.Event()
                if self._cancel is not None:
                    self._cancel.on_cancel(woken.set)
            elif not woken.wait(self._remaining_s("a free connection")):
                raise DeadlineExceeded("no connection became free in time")
            if self._cancel is not None and self._cancel.cancelled:
                raise DeadlineExceeded("the operation was cancelled")

    def _dial(self, permit: Permit) -> SocketLink | None:
        try:
            remaining = self._remaining_s("a connection")
            if self._cancel is None:
                return self._pool.dial(permit, remaining)
            dialing = self._driver.dial_apart(permit, remaining)
        except BaseException:
            self._pool.give_up(permit)  # unless dialling had begun
            raise
        over = threading.Event()
        dialing.add_done_callback(lambda _: over.set())
        self._cancel.on_cancel(over.set)
        over.wait(remaining)
        if dialing.done():
            return dialing.result()
        dialing.cancel()
        dialing.add_done_callback(lambda done: self._keep_for_others(done, permit))
        why = "was cancelled" if self._cancel.cancelled else "got no connection in time"
        raise DeadlineExceeded(f"the operation {why}")

    def _keep_for_others(self, dialing: Future[SocketLink | None], permit: Permit) -> None:
        """The connection that nobody waits for any more serves the next operation."""
        if dialing.cancelled():
            self._pool.give_up(permit)
        elif dialing.exception() is None:
            link = dialing.result()
            if link is not None:
                self._pool.give_back(link)

    def send(self, request: Send) -> None:
        """Send a frame behind what was deferred."""
        link = _socket_link(request.link)
        frame = link.take_deferred() + request.frame if link.deferred else request.frame
        self._send_all(link, memoryview(frame))

    def send_buffers(self, request: SendBuffers) -> None:
        """Send payloads straight from where they lie."""
        link = _socket_link(request.link)
        views = [as_view(buffer) for buffer in request.buffers]
        if sum(view.nbytes for view in views) <= GATHER_BYTES_MAX:
            views = self._send_gathered(link, views)
        for view in views:
            self._send_all(link, view)

    def _send_gathered(self, link: SocketLink, views: list[memoryview]) -> list[memoryview]:
        """Send small buffers by one call; returns what it left over."""
        with self._waiting(link, socket.SO_SNDTIMEO):
            sent = link.sock.sendmsg(views)
        for index, view in enumerate(views):
            if sent < view.nbytes:
                return [view[sent:], *views[index + 1 :]]
            sent -= view.nbytes
        return []

    def receive(self, request: Receive) -> Any:
        """The next message, read from the socket if none is there yet."""
        link = _socket_link(request.link)
        while not link.inbox:
            count = self._receive_some(link, link.scratch, 0)
            if not count:
                link.wire.receive_eof()
                raise TransportError("the daemon closed the connection")
            link.inbox.extend(link.wire.receive(memoryview(link.scratch)[:count]))
        return link.inbox.popleft()

    def receive_into(self, request: ReceiveInto) -> None:
        """Fill the target; nothing is written to it after this returned or raised."""
        link = _socket_link(request.link)
        rest = request.target.data
        while rest.nbytes:
            count = self._receive_some(link, rest, socket.MSG_WAITALL)
            if not count:
                raise TransportError("the daemon closed the data connection")
            rest = rest[count:]

    def copy(self, request: Copy) -> None:
        """Copy without the GIL."""
        for target, source in zip(request.targets, request.sources, strict=True):
            np.copyto(target, source)

    def sum(self, request: Checksum) -> list[int]:
        """Checksums without the GIL."""
        return [
            checksum(payload, seed)
            for payload, seed in zip(request.payloads, request.seeds, strict=True)
        ]

    def parallel(self, request: Parallel) -> list[Any]:
        """Run plans side by side."""
        return self._driver.run_many(request.plans, self._deadline, self._cancel)

    def _remaining_s(self, what: str) -> float:
        remaining = self._deadline.remaining_s()
        if remaining <= 0:
            raise DeadlineExceeded(f"the deadline passed while waiting for {what}")
        return remaining

    def _send_all(self, link: SocketLink, rest: memoryview) -> None:
        while rest.nbytes:
            with self._waiting(link, socket.SO_SNDTIMEO):
                sent = link.sock.send(rest)
            rest = rest[sent:]

    def _receive_some(self, link: SocketLink, target: bytearray | memoryview, flags: int) -> int:
        with self._waiting(link, socket.SO_RCVTIMEO):
            return link.sock.recv_into(target, 0, flags)

    def _waiting(self, link: SocketLink, option: int) -> _Waiting:
        return _Waiting(self, link, option)

    def enter_wait(self, link: SocketLink, option: int) -> None:
        """Let the kernel end the coming call at the deadline: cheaper than a poll before each."""
        remaining = self._remaining_s("the daemon")
        armed = link.armed_s.get(option, 0.0)
        if not remaining * ARMED_SHARE <= armed <= remaining + ARMED_SLACK_S:
            whole = int(remaining)
            micros = int((remaining - whole) * 1e6)
            # A zero time-out would mean none at all.
            value = _TIMEVAL.pack(whole, max(micros, 1))
            link.sock.setsockopt(socket.SOL_SOCKET, option, value)
            link.armed_s[option] = remaining
        if self._cancel is not None:
            self._cancel.watch(link.sock)
            if self._cancel.cancelled:
                self._cancel.unwatch(link.sock)
                raise DeadlineExceeded("the operation was cancelled")

    def leave_wait(self, link: SocketLink, error: BaseException | None) -> None:
        """Translate what a socket call raised."""
        cancel = self._cancel
        if cancel is not None:
            cancel.unwatch(link.sock)
            if cancel.cancelled:
                raise DeadlineExceeded("the operation was cancelled") from error
        if isinstance(error, BlockingIOError):
            self._pool.blame(self._deadline.timeout_s)
            raise DeadlineExceeded("the daemon did not answer in time") from error
        if isinstance(error, OSError) and not isinstance(error, CtxStoreError):
            raise TransportError(f"connection lost: {error}") from error


class _Waiting:
    """Around one call of a socket that may wait."""

    __slots__ = ("_execution", "_link", "_option")

    def __init__(self, execution: _Execution, link: SocketLink, option: int) -> None:
        self._execution = execution
        self._link = link
        self._option = option

    def __enter__(self) -> None:
        try:
            self._execution.enter_wait(self._link, self._option)
        except OSError as error:
            if isinstance(error, CtxStoreError):
                raise
            raise TransportError(f"connection lost: {error}") from error

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None or self._execution.cancellable:
            self._execution.leave_wait(self._link, error)


def as_view(buffer: bytes | ByteArray) -> memoryview:
    """The buffer's bytes for a socket."""
    return memoryview(buffer) if isinstance(buffer, bytes) else buffer.data


def _socket_link(link: Link) -> SocketLink:
    assert isinstance(link, SocketLink), "links come from the pool of this driver"
    return link


_HANDLERS: Final[dict[type[Any], Callable[[_Execution, Any], Any]]] = {
    Acquire: _Execution.acquire,
    Send: _Execution.send,
    SendBuffers: _Execution.send_buffers,
    Receive: _Execution.receive,
    ReceiveInto: _Execution.receive_into,
    Copy: _Execution.copy,
    Checksum: _Execution.sum,
    Parallel: _Execution.parallel,
}
