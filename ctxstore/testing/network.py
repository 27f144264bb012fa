"""A network on the virtual clock: connections with delay, random cuts of the stream, and faults.

Owns bytes on their way and what happens to them: delay, clog, cut, half-open. It must not look into
them. All calls and callbacks are made on the loop's thread; the same seed gives the same run.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from random import Random


@dataclass(frozen=True, slots=True)
class NetworkProfile:
    """How a healthy network behaves. Times in seconds."""

    delay_s_min: float = 20e-6
    delay_s_max: float = 500e-6
    pieces_max: int = 3
    """A write arrives in up to this many pieces, cut anywhere."""


class ConnectionState(Enum):
    """What a connection does with bytes."""

    OPEN = "open"
    HALF_OPEN = "half-open"
    """Bytes and closes vanish in both directions, and neither end is told."""
    CUT = "cut"


class SimEnd:
    """One end of a connection.

    Set `on_data` and `on_closed` before the loop runs again. `on_closed` is called at most once,
    when the peer has closed or the connection was cut, never after this end's own `close`.
    """

    __slots__ = ("_arrivals", "_timer", "closed", "connection", "on_closed", "on_data", "peer")

    def __init__(self, connection: SimConnection) -> None:
        self.connection = connection
        self._arrivals: deque[tuple[float, bytes | None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.closed = False
        """By either end, as far as this end knows."""
        self.on_data: Callable[[bytes], None] = _ignore
        self.on_closed: Callable[[], None] = _nothing
        self.peer: SimEnd = self

    def write(self, data: bytes) -> None:
        """Send bytes; they are lost when the connection is closed or broken."""
        if not self.closed and data:
            self.connection.carry(self.peer, data)

    def close(self) -> None:
        """Close after what was written. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._arrivals.clear()
        self.connection.carry(self.peer, None)
        self.connection.note_closed()

    def deliver_at(self, when: float, data: bytes | None) -> None:
        """For the connection: `data` (None = the end) arrives then, behind all sent before."""
        if self.closed:
            return
        if self._arrivals:
            when = max(when, self._arrivals[-1][0])
        self._arrivals.append((when, data))
        if self._timer is None:
            self._wait(when)

    def hurry(self) -> None:
        """For the connection: the clog is gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._wait(self.connection.loop.time())

    def drop_arrivals(self) -> None:
        """For the connection: what is on its way never arrives."""
        self._arrivals.clear()

    def break_off(self) -> None:
        """For the connection: it was cut."""
        self._arrivals.clear()
        if not self.closed:
            self.closed = True
            self.on_closed()

    def _wait(self, when: float) -> None:
        self._timer = self.connection.loop.call_at(when, self._arrive)

    def _arrive(self) -> None:
        self._timer = None
        now = self.connection.loop.time()
        clear_at = self.connection.clogged_until_s
        while self._arrivals and not self.closed:
            when = max(self._arrivals[0][0], clear_at)
            if when > now:
                self._wait(when)
                return
            _, data = self._arrivals.popleft()
            if data is None:
                self.closed = True
                self._arrivals.clear()
                self.connection.note_closed()
                self.on_closed()
            else:
                self.on_data(data)


class SimConnection:
    """Two ends and what lies between them."""

    __slots__ = ("_network", "client", "clogged_until_s", "loop", "server", "state")

    def __init__(self, network: SimNetwork) -> None:
        self._network = network
        self.loop = network.loop
        self.clogged_until_s = 0.0
        self.state = ConnectionState.OPEN
        self.client = SimEnd(self)
        self.server = SimEnd(self)
        self.client.peer = self.server
        self.server.peer = self.client

    def carry(self, target: SimEnd, data: bytes | None) -> None:
        """Bring bytes (None = the end) to the other end, later and in pieces."""
        if self.state is not ConnectionState.OPEN:
            return
        when = self.loop.time() + self._network.draw_delay_s()
        if data is None:
            target.deliver_at(when, None)
            return
        for piece in self._network.cut_pieces(data):
            target.deliver_at(when, piece)
            when += self._network.draw_delay_s() / 4

    def cut(self) -> None:
        """Break the connection: both ends learn of it at once, what is on its way is lost."""
        if self.state is not ConnectionState.CUT:
            self.state = ConnectionState.CUT
            self._network.forget(self)
            self.client.break_off()
            self.server.break_off()

    def clog(self, seconds: float) -> None:
        """Nothing arrives for so long; then everything does, in order."""
        self.clogged_until_s = max(self.clogged_until_s, self.loop.time() + seconds)

    def unclog(self) -> None:
        """End a clog now."""
        self.clogged_until_s = 0.0
        self.client.hurry()
        self.server.hurry()

    def half_open(self) -> None:
        """From now on bytes and closes vanish and nobody is told, until the network is healed."""
        if self.state is ConnectionState.OPEN:
            self.state = ConnectionState.HALF_OPEN
            self.client.drop_arrivals()
            self.server.drop_arrivals()

    def note_closed(self) -> None:
        """For the ends: one of them has closed."""
        if self.client.closed and self.server.closed:
            self._network.forget(self)


class SimNetwork:
    """Makes connections, and breaks them."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        rng: Random,
        profile: NetworkProfile | None = None,
    ) -> None:
        self.loop = loop
        self.profile = profile or NetworkProfile()
        self._rng = rng
        self._open: dict[SimConnection, None] = {}

    @property
    def connections(self) -> list[SimConnection]:
        """Those that at least one end has not closed, oldest first."""
        return list(self._open)

    def connect(self, accept: Callable[[SimEnd], None]) -> SimEnd:
        """The client's end of a new connection; `accept` is given the server's end."""
        connection = SimConnection(self)
        self._open[connection] = None
        accept(connection.server)
        return connection.client

    def cut_all(self) -> None:
        """Break every connection, as the death of the listening process does."""
        for connection in self.connections:
            connection.cut()

    def heal(self) -> None:
        """No clog any more; half-open connections end, as keepalive would find out."""
        for connection in self.connections:
            connection.unclog()
            if connection.state is ConnectionState.HALF_OPEN:
                connection.cut()

    def draw_delay_s(self) -> float:
        """Time of flight of one piece."""
        return self._rng.uniform(self.profile.delay_s_min, self.profile.delay_s_max)

    def cut_pieces(self, data: bytes) -> list[bytes]:
        """One write as it arrives."""
        count = self._rng.randint(1, self.profile.pieces_max)
        if count == 1 or len(data) < count:
            return [data]
        marks = sorted(self._rng.randrange(1, len(data)) for _ in range(count - 1))
        edges = [0, *marks, len(data)]
        pairs = itertools.pairwise(edges)
        return [data[start:stop] for start, stop in pairs if stop > start]

    def forget(self, connection: SimConnection) -> None:
        """For connections: this one is over."""
        self._open.pop(connection, None)


def _ignore(_data: bytes) -> None:
    """Nobody listens at this end yet."""


def _nothing() -> None:
    """Nobody cares about the close yet."""
