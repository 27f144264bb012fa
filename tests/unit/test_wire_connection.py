"""Order of messages on a connection: hello first and once, request ids, replies, blame."""

from __future__ import annotations

import struct
from dataclasses import replace

import msgpack
import pytest

from ctxstore.errors import (
    AuthenticationError,
    LocalProtocolError,
    Overloaded,
    ProtocolError,
    RemoteProtocolError,
    VersionMismatch,
)
from ctxstore.limits import FRAME_BYTES_MAX, HELLO_BYTES_MAX, OUTSTANDING_REQUESTS_MAX
from ctxstore.wire.buffers import ReceiveBuffer
from ctxstore.wire.connection import ControlConnection, Phase, Side
from ctxstore.wire.messages import (
    RID_MAX,
    Capability,
    CountReply,
    Exists,
    Failure,
    Get,
    GetReply,
    MaskReply,
    Match,
    Message,
    Ping,
    PutReply,
    Release,
    StatReply,
    TextReply,
    Verify,
    VerifyReply,
    decode_message,
    encode_frame,
    error_from_failure,
    failure_from_error,
    pack_frame,
)
from tests.wire_samples import DATA_HELLO, ENTRY, GOLDEN, HELLO, HELLO_OK, KEY, PUT, open_pair


def fresh_server() -> ControlConnection:
    return ControlConnection(Side.SERVER)


def test_hello_opens_both_ends() -> None:
    client, server = ControlConnection(Side.CLIENT), fresh_server()
    assert server.receive(client.send(HELLO)) == [HELLO]
    assert (client.phase, server.phase) == (Phase.HELLO, Phase.HELLO)
    assert server.capabilities == Capability(0)
    assert client.receive(server.send(HELLO_OK)) == [HELLO_OK]
    assert (client.phase, server.phase) == (Phase.OPEN, Phase.OPEN)
    assert client.capabilities == server.capabilities == Capability.SHM | Capability.INLINE
    assert client.hello == server.hello == HELLO
    assert client.hello_ok == server.hello_ok == HELLO_OK


def test_unknown_capabilities_are_ignored() -> None:
    every_bit = replace(HELLO, capabilities=2**64 - 1)
    client, server = open_pair(every_bit, replace(HELLO_OK, capabilities=2**63 | 4))
    assert client.capabilities == server.capabilities == Capability.PUT_STREAM


@pytest.mark.parametrize("message", [m for m, _ in GOLDEN if m != HELLO and m != DATA_HELLO])
def test_nothing_comes_before_the_hello(message: Message) -> None:
    server = fresh_server()
    with pytest.raises(RemoteProtocolError):
        server.receive(encode_frame(message))
    assert server.phase is Phase.CLOSED
    client = ControlConnection(Side.CLIENT)
    with pytest.raises(LocalProtocolError):
        client.send(message)
    assert client.phase is Phase.START


def test_a_second_hello_is_refused() -> None:
    _, server = open_pair()
    with pytest.raises(RemoteProtocolError, match="second"):
        server.receive(encode_frame(HELLO))
    client = ControlConnection(Side.CLIENT)
    client.send(HELLO)
    with pytest.raises(LocalProtocolError, match="second"):
        client.send(HELLO)


def test_requests_wait_for_the_answer_to_the_hello() -> None:
    server = fresh_server()
    with pytest.raises(RemoteProtocolError, match="before the hello"):
        server.receive(encode_frame(HELLO) + encode_frame(Ping(rid=2)))


def test_a_refused_hello_ends_the_connection() -> None:
    client, server = ControlConnection(Side.CLIENT), fresh_server()
    server.receive(client.send(HELLO))
    (failure,) = client.receive(server.fail(AuthenticationError("no such token")))
    assert isinstance(failure, Failure)
    assert isinstance(error_from_failure(failure), AuthenticationError)
    assert (client.phase, server.phase) == (Phase.CLOSED, Phase.CLOSED)
    assert server.fail(AuthenticationError("again")) == b""


def test_a_failure_with_the_hello_s_id_refuses_it_too() -> None:
    client, server = ControlConnection(Side.CLIENT), fresh_server()
    server.receive(client.send(HELLO))
    client.receive(server.send(failure_from_error(HELLO.rid, Overloaded("too many connections"))))
    assert (client.phase, server.phase) == (Phase.CLOSED, Phase.CLOSED)


def test_a_client_of_the_future_learns_what_both_speak() -> None:
    server = fresh_server()
    with pytest.raises(VersionMismatch) as caught:
        server.receive(pack_frame(msgpack.packb([1, 1, 7, 9, "a layout of its own"])))
    client = ControlConnection(Side.CLIENT)
    client.send(HELLO)
    (failure,) = client.receive(server.fail(caught.value))
    assert isinstance(failure, Failure)
    error = error_from_failure(failure)
    assert isinstance(error, VersionMismatch)
    assert "1 to 1" in str(error)
    assert "7 to 9" in str(error)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (replace(HELLO_OK, rid=2), "does not answer"),
        (CountReply(rid=1, count=0), "does not answer"),
        (replace(HELLO_OK, staging_bytes=HELLO.staging_bytes + 1), "staging"),
    ],
    ids=["other id", "other message", "more staging"],
)
def test_wrong_answers_to_a_hello(answer: Message, reason: str) -> None:
    client, server = ControlConnection(Side.CLIENT), fresh_server()
    server.receive(client.send(HELLO))
    with pytest.raises(LocalProtocolError, match=reason):
        server.send(answer)
    with pytest.raises(RemoteProtocolError, match=reason):
        client.receive(encode_frame(answer))


def test_an_answer_may_not_choose_a_version_that_was_not_offered() -> None:
    client = ControlConnection(Side.CLIENT)
    client.send(replace(HELLO, version_min=2, version_max=2))
    with pytest.raises(RemoteProtocolError, match="not offered"):
        client.receive(encode_frame(HELLO_OK))


def test_a_data_hello_turns_the_connection_to_raw_bytes() -> None:
    client, server = ControlConnection(Side.CLIENT), fresh_server()
    server.receive(client.send(DATA_HELLO))
    answer = server.send(replace(HELLO_OK, staging_bytes=0))
    assert client.receive(answer + b"raw bytes") == [replace(HELLO_OK, staging_bytes=0)]
    assert (client.phase, server.phase) == (Phase.DATA, Phase.DATA)
    assert client.take_rest_copy() == b"raw bytes"
    assert client.take_rest_copy() == b""
    with pytest.raises(LocalProtocolError):
        client.receive(b"more")
    with pytest.raises(LocalProtocolError):
        client.send(Ping(rid=5))


def test_replies_may_come_out_of_order() -> None:
    client, server = open_pair()
    first, second = client.next_rid(), client.next_rid()
    server.receive(client.send(Ping(rid=first)))
    server.receive(client.send(Match(rid=second, timeout_us=0, keys=KEY)))
    assert client.outstanding == server.outstanding == 2
    client.receive(server.send(CountReply(rid=second, count=1)))
    client.receive(server.send(CountReply(rid=first, count=0)))
    assert client.outstanding == server.outstanding == 0


def test_one_way_messages_await_nothing() -> None:
    client, server = open_pair()
    release = Release(rid=0, leases=struct.pack("<Q", 5))
    for _ in range(3 * OUTSTANDING_REQUESTS_MAX):
        assert server.receive(client.send(release)) == [release]
    assert client.outstanding == server.outstanding == 0


def test_outstanding_requests_are_bounded() -> None:
    client, server = open_pair()
    for _ in range(OUTSTANDING_REQUESTS_MAX):
        server.receive(client.send(Ping(rid=client.next_rid())))
    one_more = Ping(rid=client.next_rid())
    with pytest.raises(LocalProtocolError, match="at once"):
        client.send(one_more)
    client.receive(server.send(CountReply(rid=2, count=0)))
    client.send(one_more)
    server.receive(encode_frame(one_more))
    with pytest.raises(RemoteProtocolError, match="at once"):
        server.receive(encode_frame(Ping(rid=1000)))


def test_request_ids_are_not_reused_while_outstanding() -> None:
    client, server = open_pair()
    server.receive(client.send(Ping(rid=1)))
    with pytest.raises(LocalProtocolError, match="in use"):
        client.send(Ping(rid=1))
    assert client.next_rid() == 2
    client._last_rid = RID_MAX  # as after four thousand million requests
    assert client.next_rid() == 2
    with pytest.raises(RemoteProtocolError, match="in use"):
        server.receive(encode_frame(Ping(rid=1)))


def test_a_reply_without_request_is_refused() -> None:
    client, server = open_pair()
    with pytest.raises(LocalProtocolError, match="no request"):
        server.send(CountReply(rid=1, count=0))
    with pytest.raises(RemoteProtocolError, match="no request"):
        client.receive(encode_frame(CountReply(rid=1, count=0)))


GET2 = Get(rid=4, timeout_us=0, keys=KEY * 2)
EXISTS2 = Exists(rid=4, timeout_us=0, keys=KEY * 2)
MATCH2 = Match(rid=4, timeout_us=0, keys=KEY * 2)
ROW = ENTRY.pack(0, 0, 1, 0, 0, 0)


@pytest.mark.parametrize(
    ("request_message", "reply"),
    [
        (GET2, PutReply(rid=4, results=b"\0\0")),
        (GET2, GetReply(rid=4, lease=0, entries=ROW)),
        (GET2, GetReply(rid=4, lease=0, entries=ROW * 3)),
        (EXISTS2, MaskReply(rid=4, mask=b"\0")),
        (EXISTS2, CountReply(rid=4, count=1)),
        (MATCH2, CountReply(rid=4, count=3)),
        (replace(PUT, rid=4), PutReply(rid=4, results=b"\0\0")),
        (Ping(rid=4), TextReply(rid=4, text="pong")),
        (GET2, StatReply(rid=4, entries=bytes(32))),
        (GET2, HELLO_OK),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_reply_must_fit_its_request(request_message: Message, reply: Message) -> None:
    client, server = open_pair()
    server.receive(client.send(request_message))
    with pytest.raises(LocalProtocolError):
        server.send(reply)
    assert server.outstanding == 1  # nothing happened
    with pytest.raises(RemoteProtocolError):
        client.receive(encode_frame(reply))


@pytest.mark.parametrize(
    "row",
    [
        ENTRY.pack(HELLO_OK.arena_bytes - 1, 0, 2, 0, 0, 0),
        ENTRY.pack(2**64 - 1, 0, 2, 0, 0, 0),
        ENTRY.pack(HELLO_OK.arena_bytes + 1, 0, 0, 0, 1, 0),
    ],
)
def test_a_row_outside_the_arena_is_refused(row: bytes) -> None:
    client, server = open_pair()
    server.receive(client.send(GET2))
    with pytest.raises(RemoteProtocolError, match="arena"):
        client.receive(encode_frame(GetReply(rid=4, lease=1, entries=ROW + row)))


def test_rows_up_to_the_end_of_the_arena_and_inline_rows_pass() -> None:
    client, server = open_pair()
    end = HELLO_OK.arena_bytes
    inline = ENTRY.pack(0, 7, 2, 0, 0, 1)
    for entries, payload in (
        (ENTRY.pack(end - 2, 0, 2, 0, 0, 0) + inline, b"hi"),
        (inline + inline, b"hi"),
    ):
        server.receive(client.send(GET2))
        reply = GetReply(rid=4, lease=1, entries=entries, inline=payload)
        assert client.receive(server.send(reply)) == [reply]


def test_without_arena_no_row_may_point_into_it() -> None:
    client, server = open_pair(HELLO, replace(HELLO_OK, arena_bytes=0))
    server.receive(client.send(replace(GET2, keys=KEY)))
    with pytest.raises(RemoteProtocolError, match="arena"):
        client.receive(encode_frame(GetReply(rid=4, lease=1, entries=ROW)))


def test_verify_is_answered_until_done() -> None:
    client, server = open_pair()
    server.receive(client.send(Verify(rid=3, timeout_us=0, bytes_per_s=0)))
    part = VerifyReply(
        rid=3, done=False, shards=1, checked_bytes=1, damaged=0, unreadable=0, total=2
    )
    for _ in range(3):
        assert client.receive(server.send(part)) == [part]
        assert client.outstanding == server.outstanding == 1
    client.receive(server.send(replace(part, done=True)))
    assert client.outstanding == server.outstanding == 0


def test_a_failure_answers_any_request_and_keeps_the_connection() -> None:
    client, server = open_pair()
    server.receive(client.send(GET2))
    client.receive(server.send(failure_from_error(4, Overloaded("full"))))
    assert client.outstanding == 0
    assert client.phase is Phase.OPEN
    assert server.receive(client.send(Ping(rid=5))) == [Ping(rid=5)]


def test_a_failure_of_the_connection_ends_it() -> None:
    client, server = open_pair()
    server.receive(client.send(GET2))
    (failure,) = client.receive(server.fail(ProtocolError("shutting down")))
    assert isinstance(failure, Failure)
    assert client.phase is Phase.CLOSED
    with pytest.raises(LocalProtocolError):
        client.send(Ping(rid=9))
    with pytest.raises(LocalProtocolError):
        client.receive(b"")


def test_only_servers_announce_failures() -> None:
    client, server = open_pair()
    with pytest.raises(LocalProtocolError):
        client.fail(ProtocolError("no"))
    with pytest.raises(LocalProtocolError, match="other side"):
        client.send(Failure(rid=1, code=1, message=""))
    with pytest.raises(RemoteProtocolError, match="other side"):
        server.receive(encode_frame(Failure(rid=1, code=1, message="")))


def test_servers_send_no_requests() -> None:
    client, server = open_pair()
    with pytest.raises(LocalProtocolError, match="other side"):
        server.send(Ping(rid=1))
    with pytest.raises(RemoteProtocolError, match="other side"):
        client.receive(encode_frame(Ping(rid=1)))


def test_a_local_error_changes_nothing() -> None:
    client, server = open_pair()
    with pytest.raises(LocalProtocolError):
        client.send(Get(rid=1, timeout_us=0, keys=b"short"))
    assert client.outstanding == 0
    assert server.receive(client.send(Ping(rid=1))) == [Ping(rid=1)]


CLAIMS = [
    struct.pack("<I", 0),
    struct.pack("<I", FRAME_BYTES_MAX + 1),
    struct.pack("<I", 2**32 - 1),
    struct.pack("<Q", 2**63),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: bytes(claim).hex())
def test_absurd_lengths_are_refused_at_once(claim: bytes) -> None:
    for connection in (fresh_server(), *open_pair()):
        with pytest.raises(RemoteProtocolError, match="announces"):
            connection.receive(claim)
        assert connection.phase is Phase.CLOSED
        assert connection.buffered_bytes <= len(claim)


def test_before_the_hello_frames_are_small() -> None:
    at_limit, above = struct.pack("<I", HELLO_BYTES_MAX), struct.pack("<I", HELLO_BYTES_MAX + 1)
    assert fresh_server().receive(at_limit) == []
    for connection in (fresh_server(), ControlConnection(Side.CLIENT)):
        with pytest.raises(RemoteProtocolError, match="announces"):
            connection.receive(above)
    _, server = open_pair()
    assert server.receive(above) == []


def test_the_end_inside_a_frame_is_the_peer_s_fault() -> None:
    frame = encode_frame(HELLO)
    for cut in range(1, len(frame)):
        server = fresh_server()
        assert server.receive(frame[:cut]) == []
        with pytest.raises(RemoteProtocolError, match="unfinished"):
            server.receive_eof()
    _, server = open_pair()
    server.receive_eof()
    assert server.phase is Phase.CLOSED


def test_missing_bytes_lets_a_reader_ask_for_exactly_one_frame() -> None:
    server = fresh_server()
    frame = encode_frame(HELLO)
    assert server.missing_bytes() == 4
    assert server.receive(frame[:3]) == []
    assert server.missing_bytes() == 1
    assert server.receive(frame[3:10]) == []
    assert server.missing_bytes() == len(frame) - 10
    assert server.receive(frame[10:]) == [HELLO]
    assert server.missing_bytes() == 4


def test_buffer_memory_follows_what_came_not_what_was_announced() -> None:
    buffer = ReceiveBuffer()
    buffer.feed(struct.pack("<I", FRAME_BYTES_MAX))
    assert buffer.next_frame() is None
    assert len(buffer) == 4
    assert buffer._data.__sizeof__() < 1024


def test_buffer_gives_memory_back_after_large_frames() -> None:
    buffer = ReceiveBuffer()
    buffer.feed(pack_frame(bytes(FRAME_BYTES_MAX)))
    payload = buffer.next_frame()
    assert payload is not None
    assert len(payload) == FRAME_BYTES_MAX
    payload.release()
    buffer.feed(pack_frame(b"x"))
    assert bytes(buffer.next_frame() or b"") == b"x"
    assert buffer._data.__sizeof__() < FRAME_BYTES_MAX // 2


def test_many_frames_in_small_cuts_take_linear_time() -> None:
    """A full frame in tiny cuts, then 100,000 frames in one piece: quadratic code would hang."""
    buffer = ReceiveBuffer()
    frame = pack_frame(bytes(FRAME_BYTES_MAX))
    for start in range(0, len(frame), 64):
        buffer.feed(frame[start : start + 64])
    payload = buffer.next_frame()
    assert payload is not None
    payload.release()
    buffer.feed(pack_frame(b"ab") * 100_000)
    taken = 0
    while (payload := buffer.next_frame()) is not None:
        payload.release()
        taken += 1
        if taken % 100 == 0:
            buffer.feed(b"")
    assert taken == 100_000


def test_decoded_messages_share_no_memory_with_the_connection() -> None:
    client, server = open_pair()
    data = bytearray(client.send(GET2))
    (message,) = server.receive(memoryview(data))
    data[:] = bytes(len(data))
    server.receive(b"")
    assert message == GET2
    assert decode_message(encode_frame(GET2)[4:]) == GET2
