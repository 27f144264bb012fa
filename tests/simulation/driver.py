"""The client's real plans on the virtual clock: links over the simulated network, and their driver.

Owns waiting, deadlines and lending of links, as the blocking driver and the pool do in a real
process. Every decision of an operation is made by the plans in `ctxstore_client.ops`.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from ctxstore import checksum
from ctxstore.errors import ClosedError, CtxStoreError, DeadlineExceeded, TransportError
from ctxstore.wire import messages as wire
from ctxstore.wire.connection import ControlConnection, Phase, Side
from ctxstore_client.links import LinkKind
from ctxstore_client.memory import LocalBuffers
from ctxstore_client.ops.requests import (
    Acquire,
    Checksum,
    Context,
    Copy,
    Deadline,
    Link,
    Parallel,
    Plan,
    Purpose,
    Receive,
    ReceiveInto,
    Request,
    Send,
    SendBuffers,
)

if TYPE_CHECKING:
    from ctxstore.testing.network import SimEnd
    from ctxstore_client.ops.requests import ByteArray
    from ctxstore_daemon.tiers.memory import ArenaMemory

T = TypeVar("T")

LINKS_MAX = {LinkKind.READER: 4, LinkKind.WRITER: 2, LinkKind.CONTROL: 2, LinkKind.STREAM: 3}
STAGING_BYTES = 512 * 1024
DIAL_S_MAX = 2.0
SILENCE_CHECKED_S = 0.4
"""A request with less time left gives the node too little to answer over a slow network."""


class Machine(Protocol):
    """The machine a client dials: both connect and what comes beside the bytes of a hello."""

    def connect(self, *, stream: bool, local: bool) -> SimEnd:
        """A connection. Raises ConnectionRefusedError."""
        ...

    def descriptors(self, end: SimEnd) -> tuple[ArenaMemory, ByteArray | None]:
        """What SCM_RIGHTS would have brought to this end: arena and staging."""
        ...


class SimArena:
    """The daemon's arena as a client maps it: the same bytes, read-only."""

    __slots__ = ("data", "generations")

    def __init__(self, memory: ArenaMemory) -> None:
        self.data = memory.data.view()
        self.data.flags.writeable = False
        self.generations = memory.generations.view()
        self.generations.flags.writeable = False


class SimLink:
    """See `ctxstore_client.ops.requests.Link`."""

    def __init__(self, end: SimEnd, kind: LinkKind) -> None:
        self.end = end
        self.kind = kind
        self.wire = ControlConnection(Side.CLIENT)
        self.arena: SimArena | None = None
        self.staging: ByteArray | None = None
        self.parked: dict[int, wire.Message] = {}
        self.deferred: list[bytes] = []
        self.uses = 0
        self.inbox: deque[wire.Message] = deque()
        self.raw = bytearray()
        self.error: CtxStoreError | None = None
        self.wanted_staging = 0
        self.faulted = False
        """Whether the network harmed this connection: then nobody is to blame for silence."""
        self._closed = False
        self._news: asyncio.Future[None] | None = None
        end.on_data = self._arrived
        end.on_closed = self._lost

    @property
    def hello(self) -> wire.HelloOk:
        assert self.wire.hello_ok is not None, "only links that have said hello are lent"
        return self.wire.hello_ok

    @property
    def streams(self) -> bool:
        return self.kind is LinkKind.STREAM

    @property
    def fresh(self) -> bool:
        return self.uses <= 1

    @property
    def settled(self) -> bool:
        return not self.streams and not self.wire.outstanding

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def alive(self) -> bool:
        return not self.end.closed and not self.inbox and self.error is None

    def next_rid(self) -> int:
        return self.wire.next_rid()

    def encode(self, message: wire.Message) -> bytes:
        if self.wire.phase is Phase.CLOSED:
            raise TransportError("the node has ended this connection")
        return self.wire.send(message)

    def defer(self, frame: bytes) -> None:
        self.deferred.append(frame)

    def take_deferred(self) -> bytes:
        frames = b"".join(self.deferred)
        self.deferred.clear()
        return frames

    def close(self) -> None:
        self._closed = True
        self.end.close()

    def _arrived(self, data: bytes) -> None:
        if self.streams and self.wire.hello_ok is not None:
            self.raw += data
        else:
            try:
                self.inbox.extend(self.wire.receive(data))
                if self.streams and self.wire.hello_ok is not None:
                    self.raw += self.wire.take_rest_copy()
            except CtxStoreError as error:
                self.error = error
        self._wake()

    def _lost(self) -> None:
        self._wake()

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def wait_news(self) -> None:
        """Return when something has arrived or the connection is gone."""
        self._news = asyncio.get_running_loop().create_future()
        try:
            await self._news
        finally:
            self._news = None


class SimPool:
    """See `ctxstore_client.ops.requests.LinkPool`; one client process."""

    def __init__(self, machine: Machine, *, namespace: str, shared: bool) -> None:
        self.namespace = namespace
        self.shared = shared
        self.buffers = LocalBuffers()
        self.process = 1
        self.links: dict[SimLink, None] = {}
        self._machine = machine
        self._idle: dict[LinkKind, list[SimLink]] = {kind: [] for kind in LinkKind}
        self._counts = dict.fromkeys(LinkKind, 0)
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._anchor: SimLink | None = None
        self.counters: Counter[str] = Counter()
        self._lent: dict[SimLink, None] = {}
        self._held: dict[SimLink, None] = {}

    def count(self, name: str, more: int = 1) -> None:
        self.counters[name] += more

    def hold(self, link: Link) -> None:
        self._lent.pop(_link(link), None)
        self._held[_link(link)] = None
        self._wake()

    def end_hold(self, link: Link) -> None:
        self._held.pop(_link(link), None)
        if link not in self._lent:
            self.give_back(link)

    def give_back(self, link: Link) -> None:
        link = _link(link)
        self._lent.pop(link, None)
        if link not in self.links:
            return
        if link in self._held:
            self._wake()
            return
        if link.end.closed or link.error is not None or link.inbox or link.parked:
            self.discard(link)
            return
        self._idle[link.kind].append(link)
        asyncio.get_running_loop().call_later(0.02, self._send_deferred, link)
        self._wake()

    def _send_deferred(self, link: SimLink) -> None:
        """Releases that found nothing to ride with go alone."""
        if link in self._idle[link.kind] and link.deferred:
            link.end.write(link.take_deferred())

    def discard(self, link: Link) -> None:
        link = _link(link)
        link.close()
        self._lent.pop(link, None)
        self._held.pop(link, None)
        if link in self.links:
            del self.links[link]
            self._counts[link.kind] -= 1
            if link in self._idle[link.kind]:
                self._idle[link.kind].remove(link)
        self._wake()

    def _wake(self) -> None:
        waiters = list(self._waiters)
        self._waiters.clear()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def close(self) -> None:
        """Close every connection, as the end of a process does."""
        for link in list(self.links):
            self.discard(link)
        if self._anchor is not None:
            self._anchor.close()
            self._anchor = None

    async def acquire(self, want: Acquire, deadline: Deadline) -> SimLink | None:
        """An idle link that still lives, or a new one."""
        if want.exactly is not None:
            return await self._acquire_exactly(_link(want.exactly), deadline)
        kind = self._kind_for(want.purpose)
        while True:
            link = self._take_idle(kind, want.staging_bytes)
            if link is None and self._counts[kind] < LINKS_MAX[kind]:
                link = await self._dial(kind, want.staging_bytes, deadline)
            if link is not None:
                return self._lend(link)
            if want.spare:
                return None
            await self._wait_for_change(deadline)

    async def _acquire_exactly(self, link: SimLink, deadline: Deadline) -> SimLink:
        while link in self._lent:
            await self._wait_for_change(deadline)
        if link not in self._held:
            raise TransportError("the connection that holds this staging is closed")
        return self._lend(link)

    def _lend(self, link: SimLink) -> SimLink:
        link.uses += 1
        self._lent[link] = None
        return link

    async def _wait_for_change(self, deadline: Deadline) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await within(deadline, waiter)

    def _kind_for(self, purpose: Purpose) -> LinkKind:
        if purpose is Purpose.STREAM:
            return LinkKind.STREAM
        if self.shared:
            return LinkKind.WRITER if purpose is Purpose.WRITE else LinkKind.READER
        return LinkKind.CONTROL if purpose is Purpose.CONTROL else LinkKind.STREAM

    def _take_idle(self, kind: LinkKind, staging_bytes: int) -> SimLink | None:
        for link in reversed(self._idle[kind].copy()):
            if not link.alive:
                self.discard(link)
                continue
            granted = link.hello.staging_bytes
            if kind is LinkKind.WRITER and granted < min(staging_bytes, link.wanted_staging):
                continue
            self._idle[kind].remove(link)
            return link
        if kind is LinkKind.WRITER and self._idle[kind]:
            self.discard(self._idle[kind][0])
        return None

    async def _dial(self, kind: LinkKind, staging_bytes: int, deadline: Deadline) -> SimLink:
        self._counts[kind] += 1
        link: SimLink | None = None
        try:
            session = b""
            if kind is LinkKind.STREAM:
                session = (await self._anchor_link(deadline)).hello.session
            link = self._open(kind)
            wanted = max(staging_bytes, STAGING_BYTES) if kind is LinkKind.WRITER else 0
            link.wanted_staging = wanted
            await self._greet(link, deadline, staging_bytes=wanted, session=session)
        except BaseException:
            self._counts[kind] -= 1
            if link is not None:
                link.close()
            raise
        self.links[link] = None
        return link

    def _open(self, kind: LinkKind) -> SimLink:
        try:
            end = self._machine.connect(stream=kind is LinkKind.STREAM, local=self.shared)
        except ConnectionRefusedError as error:
            raise TransportError(str(error)) from error
        return SimLink(end, kind)

    async def _anchor_link(self, deadline: Deadline) -> SimLink:
        """The control connection whose session data connections join."""
        if self._anchor is None or not self._anchor.alive:
            anchor = self._open(LinkKind.CONTROL)
            try:
                await self._greet(anchor, deadline)
            except BaseException:
                anchor.close()
                raise
            self._anchor = anchor
        return self._anchor

    async def _greet(
        self, link: SimLink, deadline: Deadline, *, staging_bytes: int = 0, session: bytes = b""
    ) -> None:
        hello = wire.Hello(
            rid=link.next_rid(),
            version_min=wire.VERSION_MIN,
            version_max=wire.VERSION_MAX,
            role=wire.Role.DATA if session else wire.Role.CONTROL,
            cluster_id="",
            namespace=self.namespace,
            token="",
            client="simulated",
            capabilities=int(wire.CAPABILITIES_KNOWN),
            shm=self.shared,
            staging_bytes=staging_bytes,
            session=session,
        )
        link.end.write(link.encode(hello))
        limit = min(deadline.remaining_s(), DIAL_S_MAX)
        try:
            async with asyncio.timeout(limit):
                message = await next_message(link)
        except TimeoutError as error:
            if deadline.remaining_s() > 0:
                raise TransportError("no answer to the hello") from error
            raise DeadlineExceeded("no answer to the hello in time") from error
        if isinstance(message, wire.Failure):
            refusal = wire.error_from_failure(message)
            if refusal.retryable or isinstance(refusal, ClosedError):
                raise TransportError(str(refusal))
            raise refusal
        assert isinstance(message, wire.HelloOk), "the protocol core lets nothing else through"
        if message.arena_bytes:
            memory, staging = self._machine.descriptors(link.end)
            link.arena = SimArena(memory)
            assert len(memory.data) == message.arena_bytes, "the arena that the hello told of"
            assert (0 if staging is None else len(staging)) == message.staging_bytes
            link.staging = staging


async def next_message(link: SimLink) -> wire.Message:
    """The next message of a link. Raises TransportError when it is gone."""
    while not link.inbox:
        if link.error is not None:
            raise link.error
        if link.end.closed:
            raise TransportError("the node closed the connection")
        await link.wait_news()
    return link.inbox.popleft()


async def within(deadline: Deadline, awaitable: Any) -> Any:
    """Wait, but not beyond the deadline. Raises DeadlineExceeded."""
    remaining = deadline.remaining_s()
    if remaining <= 0:
        raise DeadlineExceeded("the deadline has passed")
    try:
        async with asyncio.timeout(remaining):
            return await awaitable
    except TimeoutError as error:
        raise DeadlineExceeded("the deadline passed") from error


@dataclass(slots=True)
class OperationState:
    """What happened to one operation on its way, besides its result."""

    disturbed: bool = False
    """The driver raised something into the plan: its result is no claim of the node."""
    declined: bool = False
    """The node answered a request with a Failure."""
    raised: str = ""
    """What the caller got instead of a result."""
    links: list[SimLink] = field(default_factory=list)
    silent: str = ""
    """The node gave no answer although nothing kept it from doing so."""

    @property
    def clean(self) -> bool:
        """Whether the result is what the node said: nothing broke, and its leases held so long."""
        ended = any(link.end.closed or link.end.peer.closed for link in self.links)
        return not self.disturbed and not self.declined and not ended


class SimDriver:
    """Runs the plans of one client."""

    def __init__(self, pool: SimPool) -> None:
        self.pool = pool

    async def run(self, plan: Plan[T], context: Context, state: OperationState) -> T:
        """Execute a plan; returns or raises what it does. Cancelling it kills the client."""
        answer: Any = None
        problem: BaseException | None = None
        while True:
            try:
                request = plan.send(answer) if problem is None else plan.throw(problem)
            except StopIteration as done:
                result: T = done.value
                return result
            answer, problem = None, None
            try:
                answer = await self._do(request, context, state)
            except CtxStoreError as error:
                state.disturbed = True
                problem = error
            except asyncio.CancelledError as error:
                problem = error

    def context(self, timeout_s: float) -> Context:
        """A deadline for one operation, from now on."""
        loop = asyncio.get_running_loop()
        return Context(self.pool, Deadline(loop.time, timeout_s))

    async def _do(self, request: Request, context: Context, state: OperationState) -> Any:
        deadline = context.deadline
        match request:
            case Acquire():
                link = await self.pool.acquire(request, deadline)
                if link is not None:
                    state.links.append(link)
                return link
            case Send(link=link, frame=frame):
                self._send(link, (_link(link).take_deferred(), frame))
            case SendBuffers(link=link, buffers=buffers):
                self._send(link, buffers)
            case Receive(link=link):
                return await self._receive(_link(link), deadline, state)
            case ReceiveInto(link=link, target=target):
                await within(deadline, _receive_into(_link(link), target))
            case Copy(targets=targets, sources=sources):
                for target, source in zip(targets, sources, strict=True):
                    np.copyto(target, source)
            case Checksum(payloads=payloads, seeds=seeds):
                pairs = zip(payloads, seeds, strict=True)
                return [checksum.checksum(payload, seed) for payload, seed in pairs]
            case Parallel(plans=plans):
                return await self._parallel(plans, context, state)
        return None

    def _send(self, link: Link, buffers: Any) -> None:
        end = _link(link).end
        if end.closed:
            raise TransportError("the connection is gone")
        for buffer in buffers:
            end.write(bytes(buffer))

    async def _receive(
        self, link: SimLink, deadline: Deadline, state: OperationState
    ) -> wire.Message:
        patience_s = deadline.remaining_s()
        try:
            message: wire.Message = await within(deadline, next_message(link))
        except DeadlineExceeded:
            if not link.faulted and patience_s >= SILENCE_CHECKED_S:
                state.silent = f"a {link.kind.value} connection in good health"
            raise
        if isinstance(message, wire.Failure):
            state.declined = True
        return message

    async def _parallel(self, plans: Any, context: Context, state: OperationState) -> list[Any]:
        tasks = [asyncio.ensure_future(self.run(plan, context, state)) for plan in plans]
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            raise
        return [task.result() for task in tasks]


def _link(link: Link) -> SimLink:
    assert isinstance(link, SimLink), "links come from this pool"
    return link


async def _receive_into(link: SimLink, target: ByteArray) -> None:
    while len(link.raw) < target.nbytes:
        if link.end.closed:
            raise TransportError("the node closed the data connection")
        await link.wait_news()
    flat = target.reshape(-1).view(np.uint8)
    flat[:] = np.frombuffer(bytes(link.raw[: flat.size]), np.uint8)
    del link.raw[: flat.size]
