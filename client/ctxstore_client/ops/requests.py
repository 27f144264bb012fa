"""What a plan may ask of its driver, and what a plan knows of a connection.

Owns the vocabulary between plans and drivers. It must not do any of it. A driver answers each
request by sending its result into the generator, or by throwing `TransportError`,
`DeadlineExceeded`, `ProtocolError` or a cancellation at the yield.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ctxstore.wire.messages import HelloOk, Message

ByteArray = npt.NDArray[np.uint8]
"""One-dimensional contiguous bytes."""


class Purpose(Enum):
    """What a connection is wanted for; the pool knows which kind serves it best."""

    CONTROL = "control"
    READ = "read"
    WRITE = "write"
    STREAM = "stream"
    """A data connection, also where memory is shared."""


class Arena(Protocol):
    """The daemon's arena, mapped read-only."""

    @property
    def data(self) -> ByteArray:
        """The whole arena; read-only."""
        ...

    @property
    def generations(self) -> npt.NDArray[np.uint32]:
        """Generation of the slot that starts on page i of the arena; changes under the reader."""
        ...


class Link(Protocol):
    """A connection lent to one operation. Plans read its state; only drivers use its socket."""

    @property
    def hello(self) -> HelloOk:
        """What the daemon said when the connection was made."""
        ...

    @property
    def arena(self) -> Arena | None:
        """The shared arena; None over TCP."""
        ...

    @property
    def staging(self) -> ByteArray | None:
        """Memory shared with the daemon, writable; None when this connection has none."""
        ...

    @property
    def streams(self) -> bool:
        """Whether this is a data connection (headers and payloads), not a control one."""
        ...

    @property
    def fresh(self) -> bool:
        """Whether this is the first operation on it: its failure is no stale connection's."""
        ...

    @property
    def settled(self) -> bool:
        """Whether every request was answered; never so for a data connection that met an error."""
        ...

    @property
    def alive(self) -> bool:
        """Whether a link that no operation uses still stands, as far as can be seen at once."""
        ...

    @property
    def closed(self) -> bool:
        """Whether this side has closed it."""
        ...

    @property
    def parked(self) -> dict[int, Message]:
        """Replies that arrived before their turn, by request id."""
        ...

    def next_rid(self) -> int:
        """A request id that is not in use on this connection."""
        ...

    def encode(self, message: Message) -> bytes:
        """A control frame. Raises LocalProtocolError; TransportError on a connection that ended."""
        ...

    def defer(self, frame: bytes) -> None:
        """Keep a one-way frame, to ride with the next send on this connection."""
        ...


class Acquire(NamedTuple):
    """Lend a connection -> Link, waiting while all are in use.

    Raises TransportError where none can be made.
    """

    purpose: Purpose
    staging_bytes: int = 0
    """Staging the connection must have, when it has any (WRITE)."""
    exactly: Link | None = None
    """This very connection, once its present user is done (staged puts)."""
    spare: bool = False
    """Only if one is free or can be made at once; else the answer is None."""


class Send(NamedTuple):
    """Send bytes, after whatever was deferred on the link."""

    link: Link
    frame: bytes


class SendBuffers(NamedTuple):
    """Send buffers one after the other, on a data connection."""

    link: Link
    buffers: Sequence[bytes | ByteArray]


class Receive(NamedTuple):
    """The next message of a control connection -> Message."""

    link: Link


class ReceiveInto(NamedTuple):
    """Fill the target from a data connection."""

    link: Link
    target: ByteArray


class Copy(NamedTuple):
    """Copy sources to targets, pair by pair; never given up half way through a pair."""

    targets: Sequence[ByteArray]
    sources: Sequence[ByteArray]


class Checksum(NamedTuple):
    """xxh3-64 of each payload under its seed -> list[int]."""

    payloads: Sequence[ByteArray]
    seeds: Sequence[int]


class Parallel(NamedTuple):
    """Run plans side by side -> their results, in order. When it raises, all of them are over."""

    plans: Sequence[Generator[Any, Any, Any]]


Request = Acquire | Send | SendBuffers | Receive | ReceiveInto | Copy | Checksum | Parallel

T = TypeVar("T")
Plan = Generator[Request, Any, T]


class Deadline:
    """When an operation must be over, on the clock it was made with. Immutable."""

    __slots__ = ("_at", "_clock", "timeout_s")

    def __init__(self, clock: Callable[[], float], timeout_s: float) -> None:
        self._clock = clock
        self.timeout_s = timeout_s
        """What the caller granted."""
        self._at = clock() + timeout_s

    def remaining_s(self) -> float:
        """Seconds left; negative when it has passed."""
        return self._at - self._clock()


class BufferPool(Protocol):
    """Local memory that was touched before, for views and staging without shared memory."""

    def take(self, size: int) -> ByteArray:
        """At least `size` bytes. Raises Overloaded."""
        ...

    def give_back(self, buffer: ByteArray) -> None:
        """The buffer will be handed to somebody else."""
        ...

    def forget(self, buffer: ByteArray) -> None:
        """The caller kept a reference to the buffer: it is not handed out again."""
        ...


class LinkPool(Protocol):
    """Where links go back to. All calls return at once and may be made from any thread."""

    @property
    def buffers(self) -> BufferPool:
        """The pool of local memory."""
        ...

    @property
    def process(self) -> int:
        """Id of the process that this is; another one means a fork."""
        ...

    def give_back(self, link: Link) -> None:
        """The operation is over and the link is in step with its peer."""
        ...

    def hold(self, link: Link) -> None:
        """Set a lent link apart; operations get it by `Acquire.exactly` only."""
        ...

    def end_hold(self, link: Link) -> None:
        """The link serves anybody again."""
        ...

    def count(self, name: str, more: int = 1) -> None:
        """Add to a counter that `stats` shows."""
        ...

    def discard(self, link: Link) -> None:
        """Shut down and close the link: afterwards nothing is received through it."""
        ...


class Context(NamedTuple):
    """What every plan of one operation shares."""

    pool: LinkPool
    deadline: Deadline
