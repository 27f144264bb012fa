"""The wire under random cuts, random garbage, truncation and flipped bytes."""

from __future__ import annotations

import contextlib
import itertools
import struct
from typing import TYPE_CHECKING

import msgpack
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from ctxstore.errors import ProtocolError, RemoteProtocolError
from ctxstore.limits import SHARD_BYTES_MAX
from ctxstore.wire.buffers import ReceiveBuffer
from ctxstore.wire.connection import ControlConnection, Phase, Side
from ctxstore.wire.messages import (
    DATA_ENTRY_DTYPE,
    CountReply,
    DataHeader,
    Durability,
    Exists,
    Get,
    Message,
    Op,
    Put,
    decode_message,
    encode_frame,
    encode_payload,
    pack_frame,
    pack_get_reply,
    pack_header,
    unpack_entries,
    unpack_header,
    unpack_put_meta,
)
from tests.wire_samples import GOLDEN, HELLO, HELLO_OK, open_pair

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLES = [message for message, _ in GOLDEN]


def cut(data: bytes, places: list[int]) -> Iterator[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    for start, end in itertools.pairwise(edges):
        yield data[start:end]


cuts = st.lists(st.integers(0, 10_000), max_size=40)


@given(payloads=st.lists(st.binary(min_size=1, max_size=200), max_size=20), places=cuts)
def test_frames_come_out_whole_however_they_were_cut(
    payloads: list[bytes], places: list[int]
) -> None:
    buffer = ReceiveBuffer()
    got: list[bytes] = []
    for piece in cut(b"".join(pack_frame(payload) for payload in payloads), places):
        buffer.feed(piece)
        while (payload := buffer.next_frame()) is not None:
            with payload:
                got.append(bytes(payload))
    assert got == payloads
    assert len(buffer) == 0
    assert buffer.missing_bytes() == 4


@given(payloads=st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=10))
def test_reading_what_is_missing_never_reads_past_a_frame(payloads: list[bytes]) -> None:
    data = b"".join(pack_frame(payload) for payload in payloads)
    buffer = ReceiveBuffer()
    got: list[bytes] = []
    at = 0
    while len(got) < len(payloads):
        wanted = buffer.missing_bytes()
        buffer.feed(data[at : at + wanted])
        at += wanted
        payload = buffer.next_frame()
        if payload is not None:
            with payload:
                got.append(bytes(payload))
            assert len(buffer) == 0
    assert got == payloads
    assert at == len(data)


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=20), places=cuts)
def test_a_conversation_survives_any_cuts(counts: list[int], places: list[int]) -> None:
    client, server = ControlConnection(Side.CLIENT), ControlConnection(Side.SERVER)
    for piece in cut(client.send(HELLO), places):
        server.receive(piece)
    for piece in cut(server.send(HELLO_OK), places):
        client.receive(piece)
    requests = [Exists(client.next_rid(), count, bytes(16 * count)) for count in counts]
    seen: list[Message] = []
    for piece in cut(b"".join(client.send(request) for request in requests), places):
        seen += server.receive(piece)
    assert seen == requests
    assert server.outstanding == len(requests)


@given(garbage=st.binary(max_size=300), places=cuts, opened=st.booleans())
def test_garbage_ends_in_a_protocol_error_or_waits_for_more(
    garbage: bytes, places: list[int], opened: bool
) -> None:
    server = open_pair()[1] if opened else ControlConnection(Side.SERVER)
    try:
        for piece in cut(garbage, places):
            server.receive(piece)
    except ProtocolError as error:
        assert server.phase is Phase.CLOSED
        frame = server.fail(error)  # the reason can always be told
        assert decode_message(frame[4:]).op is Op.FAILURE
    else:
        assert server.buffered_bytes <= len(garbage)


@given(payload=st.binary(max_size=300))
def test_decoding_garbage_raises_nothing_else(payload: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode_message(payload)


_scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=64)
)
_ops = st.sampled_from([int(op) for op in Op])


@given(op=_ops, fields=st.lists(_scalars | st.lists(_scalars, max_size=3), max_size=20))
def test_well_formed_nonsense_raises_nothing_else(op: int, fields: list[object]) -> None:
    with contextlib.suppress(ProtocolError):
        decode_message(msgpack.packb([op, *fields]))


@given(
    sample=st.sampled_from(SAMPLES),
    replacement=_scalars | st.lists(_scalars, max_size=3),
    place=st.integers(1, 30),
)
@example(sample=HELLO, replacement=b"S" * 16, place=12)
def test_one_wrong_field_gives_a_message_or_a_protocol_error(
    sample: Message, replacement: object, place: int
) -> None:
    values = msgpack.unpackb(encode_payload(sample))
    values[1 + place % (len(values) - 1)] = replacement
    try:
        message = decode_message(msgpack.packb(values))
    except ProtocolError:
        return
    assert decode_message(encode_payload(message)) == message


@given(sample=st.sampled_from(SAMPLES), place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_raises_nothing_else(sample: Message, place: int, bit: int) -> None:
    payload = bytearray(encode_payload(sample))
    payload[place % len(payload)] ^= 1 << bit
    with contextlib.suppress(ProtocolError):
        decode_message(bytes(payload))


@given(sample=st.sampled_from(SAMPLES), place=st.integers(0, 10_000))
def test_a_truncated_payload_is_an_error(sample: Message, place: int) -> None:
    payload = encode_payload(sample)
    shorter = payload[: place % len(payload)]
    try:
        decode_message(shorter)
    except RemoteProtocolError:
        return
    raise AssertionError("a truncated message was accepted")


@given(sample=st.sampled_from(SAMPLES), place=st.integers(1, 10_000))
def test_a_truncated_frame_waits_and_then_fails_at_the_end(sample: Message, place: int) -> None:
    server = open_pair()[1]
    frame = encode_frame(sample)
    server.receive(frame[: 1 + place % (len(frame) - 1)])
    try:
        server.receive_eof()
    except RemoteProtocolError:
        return
    raise AssertionError("the end inside a frame went unnoticed")


@given(claim=st.integers(8 * 1024 * 1024 + 1, 2**32 - 1), rest=st.binary(max_size=20))
@example(claim=2**31, rest=b"\x80")
def test_a_frame_that_claims_too_much_is_refused_before_it_comes(claim: int, rest: bytes) -> None:
    client, server = open_pair()
    for connection in (client, server):
        try:
            connection.receive(struct.pack("<I", claim) + rest)
        except RemoteProtocolError:
            continue
        raise AssertionError("an absurd length was believed")


def _column(dtype: str, values: list[int]) -> bytes:
    return np.array(values, dtype).tobytes()


@st.composite
def puts(draw: st.DrawFn) -> Put:
    count = draw(st.integers(1, 20))

    def one_or_all(strategy: st.SearchStrategy[int], dtype: str) -> bytes:
        size = draw(st.sampled_from([1, count]))
        return _column(dtype, draw(st.lists(strategy, min_size=size, max_size=size)))

    costs = draw(
        st.lists(
            st.floats(0, 1e6, width=32) | st.just(float("nan")), min_size=count, max_size=count
        )
    )
    lengths = draw(st.lists(st.integers(0, SHARD_BYTES_MAX), min_size=count, max_size=count))
    return Put(
        rid=draw(st.integers(1, 2**32 - 1)),
        timeout_us=draw(st.integers(0, 600_000_000)),
        durability=draw(st.sampled_from(Durability)),
        keys=draw(st.binary(min_size=16 * count, max_size=16 * count)),
        lengths=_column("<u4", lengths),
        offsets=draw(st.sampled_from([b"", bytes(8 * count)])),
        ttl_ms=one_or_all(st.integers(0, 10**12), "<u8"),
        priority=one_or_all(st.integers(-(2**15), 2**15 - 1), "<i2"),
        depth=one_or_all(st.integers(0, 2**32 - 1), "<u4"),
        cost=np.array(costs, "<f4").tobytes(),
    )


@given(put=puts())
def test_puts_round_trip(put: Put) -> None:
    assert decode_message(encode_payload(put)) == put


@given(count=st.integers(1, 500), timeout_us=st.integers(0, 600_000_000), data=st.data())
def test_gets_round_trip(count: int, timeout_us: int, data: st.DataObject) -> None:
    keys = data.draw(st.binary(min_size=16 * count, max_size=16 * count))
    get = Get(rid=1, timeout_us=timeout_us, keys=keys)
    got = decode_message(encode_frame(get)[4:])
    assert got == get
    assert isinstance(got, Get)
    assert got.key_rows.tobytes() == keys


@given(data=st.binary(min_size=32, max_size=32))
def test_random_headers_raise_nothing_else(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        unpack_header(data)


@given(
    op=st.integers(0, 8),
    flags=st.integers(0, 3),
    rid=st.integers(0, 2**64 - 1),
    count=st.integers(0, 2**32 - 1) | st.integers(0, 3),
    meta_bytes=st.integers(0, 2**32 - 1) | st.integers(0, 100),
    body_bytes=st.integers(0, 2**64 - 1) | st.integers(0, 100),
)
def test_an_accepted_header_is_one_we_would_send(
    op: int, flags: int, rid: int, count: int, meta_bytes: int, body_bytes: int
) -> None:
    data = struct.pack("<IBBHQIIQ", 0x44585443, 1, op, flags, rid, count, meta_bytes, body_bytes)
    try:
        header = unpack_header(data)
    except RemoteProtocolError:
        return
    assert pack_header(header) == data


entry_rows = st.lists(
    st.tuples(
        st.integers(0, SHARD_BYTES_MAX),
        st.integers(0, 4),
        st.just(0),
        st.integers(0, 2**64 - 1),
    ),
    min_size=1,
    max_size=50,
)


@given(values=entry_rows, slack=st.integers(-1, 1))
def test_entries_are_accepted_exactly_when_they_fit(
    values: list[tuple[int, int, int, int]], slack: int
) -> None:
    entries = np.array(values, DATA_ENTRY_DTYPE)
    packed = pack_get_reply(1, entries)
    header, meta = unpack_header(packed[:32]), packed[32:]
    capacities = np.maximum(entries["length"].astype(np.int64) + slack, 0).astype("<u4")
    hits = entries["status"] == 0
    fits = bool((entries["length"][hits] <= capacities[hits]).all())
    try:
        got = unpack_entries(header, meta, capacities)
    except RemoteProtocolError:
        assert not fits
    else:
        assert fits
        assert (got == entries).all()


@given(meta=st.binary(min_size=20, max_size=200), count=st.integers(1, 10))
def test_garbage_put_offers_raise_nothing_else(meta: bytes, count: int) -> None:
    with contextlib.suppress(RemoteProtocolError):
        header = unpack_header(
            struct.pack("<IBBHQIIQ", 0x44585443, 1, 3, 0, 1, count, len(meta), 0)
        )
        assert isinstance(header, DataHeader)
        unpack_put_meta(header, meta)


@given(count=st.integers(0, 2**64 - 1))
def test_counts_round_trip(count: int) -> None:
    assert decode_message(encode_payload(CountReply(1, count))) == CountReply(1, count)
