"""The connections of one store: lent to one operation at a time, bounded, replaced when they break.

Owns which connection an operation gets, reconnection with backoff, the circuit breaker, what a fork
means, and the end of idle connections. It never waits for an answer: drivers do. Thread-safe.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from dataclasses import dataclass, field
from random import random
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from ctxstore import limits
from ctxstore.errors import ClosedError, DeadlineExceeded, TransportError
from ctxstore_client.breaker import BreakerState, CircuitOpen
from ctxstore_client.dialing import Dialer, Route
from ctxstore_client.links import LinkKind, SocketLink
from ctxstore_client.memory import ArenaMap, LocalBuffers
from ctxstore_client.ops.requests import Acquire, Link, Purpose

if TYPE_CHECKING:
    from collections.abc import Callable

    from ctxstore_client.discovery import Target

LINKS_MAX: Final = {
    LinkKind.READER: 32,
    LinkKind.WRITER: 2,
    LinkKind.CONTROL: 8,
    LinkKind.STREAM: 16,
}
"""Connections of a kind that one store opens; an operation that needs one more waits for it."""

STAGING_BYTES: Final = 32 * limits.MIB
"""Staging a writer asks for, unless a single shard or allocation needs more."""

IDLE_S_MAX: Final = 60.0
"""A connection unused for so long is closed."""

PEEK_AFTER_S: Final = 0.02
"""A connection unused for so long is looked at before it is lent: its daemon may be gone."""

FLUSH_AFTER_S: Final = 0.02
"""Releases that found no send to ride with by then are sent alone."""

KEEPER_ROUNDS: Final = 50
"""Rounds without work after which the keeper sleeps: waking it costs its waker dearly."""

DIAL_S_MAX: Final = 2.0
"""Longest wait for a connection and its hello, however patient the caller is."""

BLAME_AFTER_S: Final = 0.5
"""A time-out counts against the node only when the caller gave it at least this long."""

_inherited: list[object] = []
"""Maps of a parent process. Dropping one here would unmap whatever lies there in this child."""


class Permit:
    """The right to open one connection, within the bound of its kind."""

    __slots__ = ("kind", "process", "searched", "spent", "staging_bytes")

    def __init__(self, kind: LinkKind, staging_bytes: int, process: int) -> None:
        self.kind = kind
        self.staging_bytes = staging_bytes
        self.process = process
        self.searched = False
        """Set by a driver whose search for the route has just succeeded."""
        self.spent = False
        """Whether `dial` began with it, or it was given up."""


class _StaleRoute(TransportError):
    """What was known of the way to the node is out of date; it has to be looked for again."""


class Resolve(Permit):
    """The right to find the route first, for one who does not know yet which kind serves."""


@dataclass(slots=True)
class PoolState:
    """Everything that a fork makes void."""

    process: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    dialing: threading.Lock = field(default_factory=threading.Lock)
    route: Route | None = None
    idle: dict[LinkKind, list[SocketLink]] = field(
        default_factory=lambda: {k: [] for k in LinkKind}
    )
    counts: Counter[LinkKind] = field(default_factory=Counter)
    links: set[SocketLink] = field(default_factory=set)
    lent: set[SocketLink] = field(default_factory=set)
    waiters: deque[Callable[[], None]] = field(default_factory=deque)
    arenas: dict[bytes, ArenaMap] = field(default_factory=dict)
    breaker: BreakerState = field(default_factory=lambda: BreakerState(random))
    buffers: LocalBuffers = field(default_factory=LocalBuffers)
    keeper: threading.Thread | None = None
    keeper_awake: bool = False
    wake: threading.Event = field(default_factory=threading.Event)


class Pool:
    """Hands out links; see `ops.requests.LinkPool` for giving them back.

    `checkout` and `dial` are for drivers: the first never waits, the second blocks for the time it
    is given.
    """

    def __init__(self, target: Target, *, nonblocking: bool = False) -> None:
        self._target = target
        self._nonblocking = nonblocking
        self._dialer = Dialer(target, arena_of=self._arena_of)
        self._state = PoolState()
        self._closed = False
        self._counting = threading.Lock()
        self.counters: Counter[str] = Counter()

    # ------------------------------------------------------------ lending

    @property
    def process(self) -> int:
        """The process this is."""
        return os.getpid()

    @property
    def buffers(self) -> LocalBuffers:
        """Local memory for views and staging over TCP."""
        return self._current().buffers

    @property
    def route(self) -> Route | None:
        """The way to the node, once one was found."""
        return self._current().route

    def checkout(
        self, want: Acquire, waiter: Callable[[], None] | None = None
    ) -> SocketLink | Permit | None:
        """A link, or the right to dial one, or None: `waiter` is called when to try again.

        Raises TransportError while the circuit is open, ClosedError after `close`.
        """
        state = self._current()
        with state.lock:
            if self._closed:
                raise ClosedError("the store is closed")
            if want.exactly is not None:
                return self._checkout_exactly(state, want.exactly, waiter)
            if state.route is None:
                self._check_breaker(state)
                return Resolve(LinkKind.CONTROL, want.staging_bytes, state.process)
            kind = _kind_for(want.purpose, state.route)
            link = self._take_idle(state, kind, want.staging_bytes)
            if link is not None:
                return self._lend(state, link)
            self._check_breaker(state)
            if state.counts[kind] < LINKS_MAX[kind]:
                state.counts[kind] += 1
                return Permit(kind, want.staging_bytes, state.process)
            if waiter is not None:
                state.waiters.append(waiter)
            return None

    def _checkout_exactly(
        self, state: PoolState, link: Link, waiter: Callable[[], None] | None
    ) -> SocketLink | None:
        assert isinstance(link, SocketLink), "links come from this pool"
        if link.closed or link not in state.links:
            raise TransportError("the connection that holds this staging is closed")
        if link in state.lent:
            if waiter is not None:
                state.waiters.append(waiter)
            return None
        return self._lend(state, link)

    def _lend(self, state: PoolState, link: SocketLink) -> SocketLink:
        link.uses += 1
        state.lent.add(link)
        return link

    def _take_idle(self, state: PoolState, kind: LinkKind, staging_bytes: int) -> SocketLink | None:
        """The link used last that is still good; those that are not are closed on the way."""
        idle = state.idle[kind]
        now = monotonic()
        for link in reversed(idle.copy()):
            if now - link.idle_since_s > PEEK_AFTER_S and not link.alive:
                idle.remove(link)
                self._drop(state, link)
                continue
            if kind is not LinkKind.WRITER or _suffices(link, staging_bytes):
                idle.remove(link)
                return link
        if kind is LinkKind.WRITER and idle and state.counts[kind] >= LINKS_MAX[kind]:
            # All are too small for this one: the oldest makes room for a larger one.
            self._drop(state, idle.pop(0))
        return None

    def _check_breaker(self, state: PoolState) -> None:
        try:
            state.breaker.check(monotonic())
        except CircuitOpen:
            self.count("refused_by_breaker")
            raise

    def hold(self, link: Link) -> None:
        """Set a lent link apart for an allocation: operations get it by `Acquire.exactly` only."""
        assert isinstance(link, SocketLink), "links come from this pool"
        link.held = True
        self.give_back(link)

    def end_hold(self, link: Link) -> None:
        """The allocation is over: the link serves anybody again."""
        assert isinstance(link, SocketLink), "links come from this pool"
        link.held = False
        if link not in self._state.lent:
            self.give_back(link)

    def give_back(self, link: Link) -> None:
        """The link may be lent again."""
        assert isinstance(link, SocketLink), "links come from this pool"
        state = self._state
        if link.process != os.getpid():
            return
        with state.lock:
            state.lent.discard(link)
            state.breaker.succeed()
            if link.closed or (link.held and link in state.links and not self._closed):
                pass
            elif self._closed or not _reusable(link) or link not in state.links:
                self._drop(state, link)
            else:
                link.idle_since_s = monotonic()
                state.idle[link.kind].append(link)
                if link.deferred and not state.keeper_awake:
                    state.keeper_awake = True
                    self._wake_keeper(state)
            waiters = self._take_waiters(state)
        for wake in waiters:
            wake()

    def discard(self, link: Link) -> None:
        """Close the link for good. Idempotent."""
        assert isinstance(link, SocketLink), "links come from this pool"
        state = self._state
        if link.process != os.getpid():
            return
        with state.lock:
            if link in state.links:
                self.count("discarded")
            state.lent.discard(link)
            self._drop(state, link)
            waiters = self._take_waiters(state)
        for wake in waiters:
            wake()

    def blame(self, waited_s: float) -> None:
        """An operation timed out after so long: a node that never answers counts as failing."""
        if waited_s >= BLAME_AFTER_S:
            state = self._current()
            with state.lock:
                self.count("timeouts")
                state.breaker.time_out(monotonic())

    def count(self, name: str, more: int = 1) -> None:
        """Add to a counter of `stats`."""
        with self._counting:
            self.counters[name] += more

    def _take_waiters(self, state: PoolState) -> list[Callable[[], None]]:
        waiters = list(state.waiters)
        state.waiters.clear()
        return waiters

    def _drop(self, state: PoolState, link: SocketLink) -> None:
        link.close()
        if link not in state.links:
            return
        state.links.discard(link)
        state.counts[link.kind] -= 1

    # ------------------------------------------------------------ connecting

    def give_up(self, permit: Permit) -> None:
        """`dial` will not be called: somebody else may connect. No effect once it was."""
        state = self._current()
        with state.lock:
            if permit.spent or permit.process != state.process:
                return
            permit.spent = True
            if not isinstance(permit, Resolve):
                state.counts[permit.kind] -= 1
            waiters = self._take_waiters(state)
        for wake in waiters:
            wake()

    def dial(self, permit: Permit, timeout_s: float) -> SocketLink | None:
        """Open what the permit allows; blocks. None: the route was found, check out again.

        Raises TransportError, DeadlineExceeded, and what the daemon answered to the hello.
        """
        state = self._current()
        if permit.process != state.process:
            raise TransportError("forked while connecting")
        with state.lock:
            if permit.spent:
                raise TransportError("the right to connect was given up")
            permit.spent = True
        limit_s = min(timeout_s, DIAL_S_MAX)
        try:
            if isinstance(permit, Resolve):
                self._find_route(state, limit_s)
                return None
            link = self._open(state, permit, limit_s)
        except BaseException as error:
            self._dial_failed(state, permit, error, limit_s)
            if isinstance(error, _StaleRoute) or self._is_worth_a_search(permit, error):
                return None
            if isinstance(error, DeadlineExceeded) and limit_s < timeout_s:
                raise TransportError(f"the node does not answer: {error}") from error
            raise
        return self._enter(state, link)

    def _enter(self, state: PoolState, link: SocketLink) -> SocketLink:
        with state.lock:
            state.breaker.succeed()
            self.count("connections")
            self._register(state, link)
            if self._closed:
                self._drop(state, link)
                raise TransportError("the store was closed while connecting")
            return self._lend(state, link)

    def _open(self, state: PoolState, permit: Permit, limit_s: float) -> SocketLink:
        route = state.route
        if route is None or not (route.shared or route.anchor.alive):
            # The session that data connections join ended with its connection.
            raise _StaleRoute("the node went away while connecting")
        if permit.kind is LinkKind.STREAM:
            session = self._session_of(state, route)
            return self._dialer.open_stream(route, session, timeout_s=limit_s)
        wanted = 0
        if permit.kind is LinkKind.WRITER:
            wanted = max(permit.staging_bytes, STAGING_BYTES)
        return self._dialer.open_link(route, permit.kind, staging_bytes=wanted, timeout_s=limit_s)

    def _session_of(self, state: PoolState, route: Route) -> bytes:
        """The session that a data connection joins: of any control connection that is open."""
        if not route.shared:
            return route.anchor.hello.session
        with state.lock:
            for link in state.links:
                if not link.streams and not link.closed:
                    return link.hello.session
        raise TransportError("no control connection is open")

    def _is_worth_a_search(self, permit: Permit, error: BaseException) -> bool:
        """Whether the node may be elsewhere by now: what was refused is a way found before."""
        if isinstance(permit, Resolve) or not isinstance(error, TransportError):
            return False
        return not permit.searched

    def _register(self, state: PoolState, link: SocketLink) -> None:
        # Drivers wait in their own ways; neither lets Python poll before each call.
        link.sock.settimeout(0.0 if self._nonblocking else None)
        state.links.add(link)
        # Connections to an earlier run of the daemon only keep its arena mapped.
        for links in state.idle.values():
            for other in [o for o in links if o.hello.boot_id != link.hello.boot_id]:
                links.remove(other)
                self._drop(state, other)

    def _find_route(self, state: PoolState, timeout_s: float) -> None:
        until = monotonic() + timeout_s
        if not state.dialing.acquire(timeout=max(0.0, timeout_s)):
            raise DeadlineExceeded("another thread is still looking for the node")
        try:
            if state.route is not None:
                return
            with state.lock:
                self._check_breaker(state)
            route = self._dialer.find_route(until - monotonic())
            with state.lock:
                state.breaker.succeed()
                self.count("routes")
                self._register(state, route.anchor)
                state.counts[route.anchor.kind] += 1
                if self._closed:
                    self._drop(state, route.anchor)
                    raise TransportError("the store was closed while connecting")
                state.route = route
                if route.shared:
                    route.anchor.idle_since_s = monotonic()
                    state.idle[route.anchor.kind].append(route.anchor)
        finally:
            state.dialing.release()

    def _dial_failed(
        self, state: PoolState, permit: Permit, error: BaseException, waited_s: float
    ) -> None:
        with state.lock:
            if not isinstance(permit, Resolve):
                state.counts[permit.kind] -= 1
            late = isinstance(error, DeadlineExceeded) and waited_s >= BLAME_AFTER_S / 5
            refused = isinstance(error, TransportError)
            if late or (refused and not isinstance(error, (CircuitOpen, _StaleRoute))):
                self.count("dial_failures")
                state.breaker.reason = str(error)
                state.breaker.fail(monotonic())
            if late or refused:
                self._forget_route(state)
            waiters = self._take_waiters(state)
        for wake in waiters:
            wake()

    def _forget_route(self, state: PoolState) -> None:
        """Look for the node again next time, from the first host on."""
        route, state.route = state.route, None
        if route is None:
            return
        for links in state.idle.values():
            for link in links:
                self._drop(state, link)
            links.clear()
        if not route.shared:
            self._drop(state, route.anchor)

    def _arena_of(self, boot_id: bytes, fd: int, size: int) -> ArenaMap:
        """The map of a daemon's arena, one for all connections to the same run of it."""
        state = self._state
        with state.lock:
            known = state.arenas.get(boot_id)
            if known is None or not known.acquire():
                state.arenas.clear()  # of earlier runs; their last users unmap them
                known = state.arenas[boot_id] = ArenaMap(fd, size)
            return known

    # ------------------------------------------------------------ upkeep

    def _wake_keeper(self, state: PoolState) -> None:
        if state.keeper is None and not self._closed:
            state.keeper = threading.Thread(
                target=self._keep, args=(state,), name="ctxstore-keeper", daemon=True
            )
            state.keeper.start()
        state.wake.set()

    def _keep(self, state: PoolState) -> None:
        """Send releases that found nothing to ride with; close what nobody used for long."""
        quiet_rounds = KEEPER_ROUNDS
        while True:
            dormant = quiet_rounds >= KEEPER_ROUNDS
            if dormant:
                with state.lock:
                    state.keeper_awake = bool(self._waiting_links(state))
                    dormant = not state.keeper_awake
            state.wake.wait(IDLE_S_MAX / 4 if dormant else FLUSH_AFTER_S)
            state.wake.clear()
            if self._closed:
                return
            if dormant:
                self._close_idle(state)
                quiet_rounds = 0
            quiet_rounds = 0 if self._flush_deferred(state) else quiet_rounds + 1

    def _waiting_links(self, state: PoolState) -> list[SocketLink]:
        return [link for links in state.idle.values() for link in links if link.deferred]

    def _flush_deferred(self, state: PoolState) -> bool:
        """Send what waits on idle links; True when there was any."""
        now = monotonic()
        with state.lock:
            waiting = self._waiting_links(state)
            for link in waiting:
                if now - link.idle_since_s >= FLUSH_AFTER_S:
                    try:
                        link.send_deferred()
                    except OSError:
                        state.idle[link.kind].remove(link)
                        self._drop(state, link)
            return bool(waiting)

    def _close_idle(self, state: PoolState) -> None:
        oldest = monotonic() - IDLE_S_MAX
        with state.lock:
            for links in state.idle.values():
                for link in [link for link in links if link.idle_since_s < oldest]:
                    links.remove(link)
                    self._drop(state, link)

    def _current(self) -> PoolState:
        """The state of this process: a forked child begins afresh."""
        state = self._state
        if state.process != os.getpid():
            state = self._after_fork(state)
        return state

    def _after_fork(self, old: PoolState) -> PoolState:
        # Locks of the parent may be held for ever here, so nothing of its state is used.
        self._state = PoolState()
        self._counting = threading.Lock()
        self._dialer = Dialer(self._target, arena_of=self._arena_of)
        _inherited.append(old)
        for link in list(old.links):
            link.abandon()
        return self._state

    def snapshot(self) -> dict[str, Any]:
        """Counters and connections, for `stats`."""
        state = self._current()
        with state.lock:
            return {
                "route": None if state.route is None else str(state.route.control),
                "shared_memory": state.route is not None and state.route.shared,
                "links": {kind.value: state.counts[kind] for kind in LinkKind},
                "lent": len(state.lent),
                "failures_in_a_row": state.breaker.failures,
                **self.counters,
            }

    def close(self) -> None:
        """Close every connection, also those in use: for their operations the node is gone."""
        state = self._current()
        with state.lock:
            if self._closed:
                return
            self._closed = True
            for link in list(state.links):
                if link in state.lent:
                    link.shut_down()  # who uses it closes it
                else:
                    self._drop(state, link)
            for links in state.idle.values():
                links.clear()
            state.arenas.clear()
            state.route = None
            waiters = self._take_waiters(state)
            keeper = state.keeper
        state.wake.set()
        for wake in waiters:
            wake()
        if keeper is not None:
            keeper.join()


def _kind_for(purpose: Purpose, route: Route) -> LinkKind:
    if purpose is Purpose.STREAM:
        return LinkKind.STREAM
    if route.shared:
        return LinkKind.WRITER if purpose is Purpose.WRITE else LinkKind.READER
    return LinkKind.CONTROL if purpose is Purpose.CONTROL else LinkKind.STREAM


def _suffices(link: SocketLink, staging_bytes: int) -> bool:
    """Large enough, or as large as the node grants anyway."""
    granted = link.hello.staging_bytes
    return granted >= staging_bytes or granted < link.asked_staging_bytes


def _reusable(link: SocketLink) -> bool:
    """In step with its peer; a writer that was granted nothing is asked for again later."""
    if link.streams:
        return True
    granted = link.kind is not LinkKind.WRITER or link.hello.staging_bytes > 0
    return granted and not link.wire.outstanding and not link.parked and not link.inbox
