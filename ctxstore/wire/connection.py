"""The order of messages on one connection, for both sides, without a socket.

Owns hello first and once, request ids and their bound, and which reply may answer which request. It
must not act on messages. The owner moves bytes, keeps time (HELLO_TIMEOUT_S) and closes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, get_args

import numpy as np

from ctxstore.errors import (
    CtxStoreError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
)
from ctxstore.limits import FRAME_BYTES_MAX, HELLO_BYTES_MAX, OUTSTANDING_REQUESTS_MAX
from ctxstore.wire import control
from ctxstore.wire.buffers import ReceiveBuffer
from ctxstore.wire.codec import decode_message, encode_frame
from ctxstore.wire.columns import (
    CAPABILITIES_KNOWN,
    RID_MAX,
    STAT_DTYPE,
    VERSION_MAX,
    VERSION_MIN,
    Capability,
    Column,
    EntryFlag,
    Role,
    column_bytes,
)
from ctxstore.wire.control import Failure, Hello, HelloOk, Message, OneWay, Reply


class Side(Enum):
    """Which end of the connection this is."""

    CLIENT = "client"
    SERVER = "server"


class Phase(Enum):
    """How far a connection has come. OPEN carries control frames, DATA raw data headers."""

    START = "start"
    HELLO = "hello"
    OPEN = "open"
    DATA = "data"
    CLOSED = "closed"


_REPLIES: Final[dict[type[Message], type[Reply]]] = {
    control.Get: control.GetReply,
    control.Put: control.PutReply,
    control.Exists: control.MaskReply,
    control.Match: control.CountReply,
    control.Stat: control.StatReply,
    control.Prefetch: control.CountReply,
    control.Hold: control.MaskReply,
    control.Touch: control.MaskReply,
    control.Remove: control.MaskReply,
    control.Flush: control.CountReply,
    control.Explain: control.TextReply,
    control.Stats: control.TextReply,
    control.Ping: control.CountReply,
    control.Verify: control.VerifyReply,
}
# Looked up by type: isinstance against a union costs more than decoding a small message.
_SERVER_MESSAGES: Final = frozenset(get_args(Reply))
_ONE_WAY: Final = frozenset(get_args(OneWay))
_ENDED: Final = (Phase.CLOSED, Phase.DATA)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A request that awaits its reply; `keys` is 0 where no keys were sent."""

    reply: type[Reply]
    keys: int


class ControlConnection:
    """One connection's protocol state. Not thread-safe; one owner at a time.

    Client: send(Hello), receive until HelloOk or Failure, then requests. Server: receive a Hello,
    check it, send(HelloOk) or fail(error). A RemoteProtocolError (or VersionMismatch) out of
    `receive` ends the connection: the server sends what `fail` returns, both close. A
    LocalProtocolError out of `send` leaves everything as it was.
    """

    __slots__ = (
        "_buffer",
        "_failed",
        "_last_rid",
        "_pending",
        "hello",
        "hello_ok",
        "phase",
        "side",
    )

    def __init__(self, side: Side) -> None:
        self.side = side
        self.phase = Phase.START
        self.hello: Hello | None = None
        """The hello sent or received."""
        self.hello_ok: HelloOk | None = None
        """Its answer, once sent or received."""
        self._buffer = ReceiveBuffer()
        self._pending: dict[int, _Pending] = {}
        self._last_rid = 0
        self._failed = False

    @property
    def capabilities(self) -> Capability:
        """What both sides can do; nothing before the hello was answered."""
        if self.hello is None or self.hello_ok is None:
            return Capability(0)
        return CAPABILITIES_KNOWN & Capability(
            self.hello.capabilities & self.hello_ok.capabilities & CAPABILITIES_KNOWN
        )

    @property
    def outstanding(self) -> int:
        """Requests that await their reply, the hello not counted."""
        return len(self._pending)

    @property
    def buffered_bytes(self) -> int:
        """Bytes received that do not make a whole frame yet."""
        return len(self._buffer)

    def next_rid(self) -> int:
        """A request id that no outstanding request has."""
        while True:
            self._last_rid = self._last_rid % RID_MAX + 1
            if self._last_rid not in self._pending:
                return self._last_rid

    def missing_bytes(self) -> int:
        """How many bytes to read for the next length prefix or frame; raises like `receive`."""
        return self._buffer.missing_bytes(limit=self._frame_limit())

    def receive(self, data: Column) -> list[Message]:
        """Messages completed by these bytes, in order; the list may be empty. `data` is copied.

        Raises RemoteProtocolError (messages before the offence in the same bytes are dropped with
        the connection), VersionMismatch, and LocalProtocolError when called after the end or on a
        connection that has turned to raw data.
        """
        if self._ended():
            raise LocalProtocolError(f"receive on a connection in phase {self.phase.value}")
        self._buffer.feed(data)
        messages: list[Message] = []
        try:
            # What follows the answer to a DATA hello is not frames: it stays for take_rest_copy.
            while not self._ended():
                payload = self._buffer.next_frame(limit=self._frame_limit())
                if payload is None:
                    break
                with payload:
                    message = decode_message(payload)
                self._accept(message)
                messages.append(message)
        except ProtocolError:
            self.phase = Phase.CLOSED
            raise
        return messages

    def receive_eof(self) -> None:
        """The peer has closed. Raises RemoteProtocolError when it did so inside a frame."""
        cut = self.phase is not Phase.DATA and len(self._buffer) > 0
        self.phase = Phase.CLOSED
        if cut:
            raise RemoteProtocolError(
                f"connection ended {len(self._buffer)} bytes into an unfinished frame"
            )

    def take_rest_copy(self) -> bytes:
        """Raw bytes that came behind the answer to a DATA hello; the buffer gives them up."""
        return self._buffer.take_rest_copy()

    def send(self, message: Message) -> bytes:
        """The frame to write. Raises LocalProtocolError where the message is not allowed now."""
        if self._ended():
            raise LocalProtocolError(f"send on a connection in phase {self.phase.value}")
        if self.side is Side.CLIENT:
            self._check_client_message(message, LocalProtocolError)
        else:
            self._check_server_message(message, LocalProtocolError)
        frame = encode_frame(message)
        self._note(message)
        return frame

    def fail(self, error: CtxStoreError) -> bytes:
        """Server: the last frame, why the connection closes. Empty when one was sent before."""
        if self.side is not Side.SERVER:
            raise LocalProtocolError("only a server announces failures")
        if self._failed:
            return b""
        self._failed = True
        self.phase = Phase.CLOSED
        return encode_frame(control.failure_from_error(0, error))

    def _ended(self) -> bool:
        """No further control frame may come or go."""
        return self.phase in _ENDED

    def _frame_limit(self) -> int:
        return FRAME_BYTES_MAX if self.phase is Phase.OPEN else HELLO_BYTES_MAX

    def _accept(self, message: Message) -> None:
        if self.side is Side.SERVER:
            self._check_client_message(message, RemoteProtocolError)
        else:
            self._check_server_message(message, RemoteProtocolError)
            if isinstance(message, control.GetReply):
                self._check_inside_arena(message)
        self._note(message)

    def _check_client_message(self, message: Message, error: type[ProtocolError]) -> None:
        """Hello first and once; then requests with fresh ids, not too many at once."""
        if isinstance(message, Hello):
            if self.phase is not Phase.START:
                raise error("HELLO: a second one")
            return
        if type(message) in _SERVER_MESSAGES:
            raise error(f"{message.op.name} is for the other side to send")
        if self.phase is not Phase.OPEN:
            raise error(f"{message.op.name} before the hello was answered")
        if type(message) in _ONE_WAY:
            return
        if message.rid in self._pending:
            raise error(f"{message.op.name}: request id {message.rid} is in use")
        if len(self._pending) >= OUTSTANDING_REQUESTS_MAX:
            raise error(f"{message.op.name}: more than {OUTSTANDING_REQUESTS_MAX} requests at once")

    def _check_server_message(self, message: Message, error: type[ProtocolError]) -> None:
        """HelloOk answers the hello, replies answer outstanding requests, failures anything."""
        if type(message) not in _SERVER_MESSAGES:
            raise error(f"{message.op.name} is for the other side to send")
        if isinstance(message, Failure) and message.rid == 0:
            return
        if self.phase is Phase.HELLO:
            self._check_hello_answer(message, error)
            return
        pending = self._pending.get(message.rid)
        if pending is None:
            raise error(f"{message.op.name} answers no request ({message.rid})")
        if isinstance(message, Failure):
            return
        if type(message) is not pending.reply:
            raise error(f"{message.op.name} where {pending.reply.op.name} was due")
        rows = _reply_rows(message)
        if rows is not None and rows != pending.keys:
            raise error(f"{message.op.name}: {rows} rows for {pending.keys} keys")
        if isinstance(message, control.CountReply) and 0 < pending.keys < message.count:
            raise error(f"{message.op.name}: counts {message.count} of {pending.keys} keys")

    def _check_hello_answer(self, message: Message, error: type[ProtocolError]) -> None:
        assert self.hello is not None, "the phase says that a hello was seen"
        if message.rid != self.hello.rid or not isinstance(message, (HelloOk, Failure)):
            raise error(f"{message.op.name} does not answer the hello")
        if isinstance(message, HelloOk):
            lowest = max(self.hello.version_min, VERSION_MIN)
            highest = min(self.hello.version_max, VERSION_MAX)
            if not lowest <= message.version <= highest:
                raise error(f"HELLO_OK.version: {message.version} was not offered")
            if message.staging_bytes > self.hello.staging_bytes:
                raise error("HELLO_OK.staging_bytes: more than was asked for")

    def _check_inside_arena(self, reply: control.GetReply) -> None:
        """No row may point outside the mapping: a short numpy slice would go unnoticed."""
        assert self.hello_ok is not None, "replies are only accepted after the hello"
        arena_bytes = self.hello_ok.arena_bytes
        rows = reply.rows
        if column_bytes(reply.inline):
            rows = rows[rows["flags"] != EntryFlag.INLINE]
            if not len(rows):
                return
        offsets = rows["offset"]
        if (
            np.maximum.reduce(offsets) > arena_bytes
            or np.maximum.reduce(offsets + rows["length"]) > arena_bytes
        ):
            raise RemoteProtocolError("GET_REPLY.entries: a row outside the arena")

    def _note(self, message: Message) -> None:
        """Follow a message that was checked, in either direction."""
        reply = _REPLIES.get(type(message))
        if reply is not None:
            self._pending[message.rid] = _Pending(reply, _request_keys(message))
        elif isinstance(message, Hello):
            self.hello = message
            self.phase = Phase.HELLO
        elif isinstance(message, HelloOk):
            assert self.hello is not None, "the phase says that a hello was seen"
            self.hello_ok = message
            self.phase = Phase.DATA if self.hello.role is Role.DATA else Phase.OPEN
        elif isinstance(message, Failure):
            self._pending.pop(message.rid, None)
            if message.rid == 0 or self.phase is Phase.HELLO:
                self._failed = True
                self.phase = Phase.CLOSED
        elif not isinstance(message, control.VerifyReply) or message.done:
            # One-way messages have rid 0, which is never pending.
            self._pending.pop(message.rid, None)


def _request_keys(message: Message) -> int:
    if isinstance(message, (control.KeysRequest, control.Put)):
        return message.count
    return 0


def _reply_rows(message: Message) -> int | None:
    """Rows of a reply that has one per key, else None."""
    if isinstance(message, control.GetReply):
        return len(message.rows)
    if isinstance(message, control.PutReply):
        return column_bytes(message.results)
    if isinstance(message, control.MaskReply):
        return column_bytes(message.mask)
    if isinstance(message, control.StatReply):
        return column_bytes(message.entries) // STAT_DTYPE.itemsize
    return None
