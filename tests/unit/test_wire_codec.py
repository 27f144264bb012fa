"""Control messages: golden frames, and every bound of every field on both ways."""

from __future__ import annotations

import math
import struct
from dataclasses import fields, replace
from typing import Any, get_args

import msgpack
import numpy as np
import pytest

from ctxstore.errors import (
    AuthenticationError,
    CtxStoreError,
    LocalProtocolError,
    Overloaded,
    ProtocolError,
    RemoteProtocolError,
    UnknownNamespace,
    VersionMismatch,
)
from ctxstore.limits import (
    BATCH_KEYS_MAX,
    FAILURE_TEXT_BYTES_MAX,
    FRAME_BYTES_MAX,
    HELLO_BYTES_MAX,
    INLINE_BYTES_MAX,
    NAME_BYTES_MAX,
    REQUEST_TIMEOUT_S_MAX,
    SHARD_BYTES_MAX,
    TEXT_BYTES_MAX,
    TOKEN_BYTES_MAX,
)
from ctxstore.wire.messages import (
    ENTRY_DTYPE,
    RID_MAX,
    STAT_DTYPE,
    CountReply,
    Durability,
    Exists,
    Failure,
    Flush,
    Get,
    GetReply,
    Hello,
    HelloOk,
    Hold,
    MaskReply,
    Message,
    Op,
    Ping,
    Prefetch,
    Put,
    PutReply,
    Release,
    Report,
    Role,
    StatReply,
    TextReply,
    VerifyReply,
    decode_message,
    encode_frame,
    encode_payload,
    error_from_failure,
    failure_from_error,
)
from tests.wire_samples import DATA_HELLO, ENTRY, GOLDEN, HELLO, HELLO_OK, KEY, PUT

NAN_COST = struct.pack("<f", math.nan)


def raw(message: Message, /, **changes: object) -> bytes:
    """A payload with fields replaced and no check made, as a broken or hostile peer would send."""
    names = [field.name for field in fields(message)]
    assert set(changes) <= set(names)
    return bytes(
        msgpack.packb(
            [int(message.op), *(changes.get(name, getattr(message, name)) for name in names)]
        )
    )


@pytest.mark.parametrize(("message", "frame"), GOLDEN, ids=lambda value: type(value).__name__)
def test_golden_frames(message: Message, frame: str) -> None:
    assert encode_frame(message).hex(" ") == bytes.fromhex(frame).hex(" ")
    decoded = decode_message(bytes.fromhex(frame)[4:])
    assert decoded == message
    assert type(decoded) is type(message)


def test_every_message_and_op_has_a_golden_frame() -> None:
    assert {type(message) for message, _ in GOLDEN} == set(get_args(Message))
    assert {message.op for message, _ in GOLDEN} == set(Op)


def test_row_types_have_their_documented_size() -> None:
    assert ENTRY_DTYPE.itemsize == ENTRY.size == 32
    assert STAT_DTYPE.itemsize == 16


def test_columns_are_views_of_the_message_bytes() -> None:
    count = 3
    put = replace(
        PUT,
        keys=KEY * count,
        lengths=np.array([1, 2, 3], "<u4").tobytes(),
        offsets=np.array([0, 4096, 8192], "<u8").tobytes(),
        priority=np.array([-1, 0, 7], "<i2").tobytes(),
    )
    got = decode_message(encode_payload(put))
    assert isinstance(got, Put)
    assert got.count == count
    assert got.key_rows.shape == (count, 16)
    assert got.key_rows[2].tobytes() == KEY
    assert got.length_column.tolist() == [1, 2, 3]
    assert got.offset_column.tolist() == [0, 4096, 8192]
    assert got.ttl_ms_column.tolist() == [1000]
    assert got.priority_column.tolist() == [-1, 0, 7]
    assert got.depth_column.tolist() == [3]
    assert got.cost_column.tolist() == [0.5]
    assert np.shares_memory(got.length_column, np.frombuffer(got.lengths, np.uint8))


def test_views_of_wider_items_are_sent_as_their_bytes() -> None:
    keys = np.frombuffer(KEY * 2, np.uint8).reshape(2, 16)
    got = decode_message(encode_payload(Get(rid=1, timeout_us=0, keys=keys.data)))
    assert isinstance(got, Get)
    assert got.keys == KEY * 2
    leases = np.array([5, 6], "<u8")
    released = decode_message(encode_payload(Release(rid=0, leases=leases.data)))
    assert isinstance(released, Release)
    assert released.lease_column.tolist() == [5, 6]


def test_a_view_with_holes_is_refused() -> None:
    keys = np.zeros((4, 16), np.uint8)[::2]
    with pytest.raises(LocalProtocolError, match=r"GET\.keys"):
        encode_payload(Get(rid=1, timeout_us=0, keys=keys.data))


def test_longer_deadlines_are_cut() -> None:
    got = decode_message(raw(Flush(rid=1, timeout_us=0), timeout_us=2**64 - 1))
    assert got == Flush(rid=1, timeout_us=int(REQUEST_TIMEOUT_S_MAX * 1_000_000))


def test_enums_come_back_as_enums() -> None:
    put = decode_message(encode_payload(PUT))
    assert isinstance(put, Put)
    assert put.durability is Durability.GROUP
    hello = decode_message(encode_payload(DATA_HELLO))
    assert isinstance(hello, Hello)
    assert hello.role is Role.DATA


def test_secrets_stay_out_of_texts() -> None:
    shown = repr(replace(HELLO, token="hush")) + repr(DATA_HELLO) + repr(HELLO_OK)
    assert "hush" not in shown
    assert "SSSS" not in shown


KEYS_MAX = bytes(16 * BATCH_KEYS_MAX)


@pytest.mark.parametrize(
    "message",
    [
        Exists(rid=RID_MAX, timeout_us=0, keys=KEYS_MAX),
        MaskReply(rid=1, mask=bytes(BATCH_KEYS_MAX)),
        PutReply(rid=1, results=bytes([5]) * BATCH_KEYS_MAX),
        StatReply(rid=1, entries=bytes(16 * BATCH_KEYS_MAX)),
        GetReply(rid=1, lease=2**64 - 1, entries=bytes(32 * BATCH_KEYS_MAX)),
        Release(rid=0, leases=bytes(8 * BATCH_KEYS_MAX)),
        Report(rid=0, keys=KEYS_MAX, sums=bytes(8 * BATCH_KEYS_MAX)),
        TextReply(rid=1, text="x" * TEXT_BYTES_MAX),
        Failure(rid=1, code=1, message="x" * FAILURE_TEXT_BYTES_MAX),
        CountReply(rid=1, count=2**64 - 1),
        replace(
            PUT,
            keys=KEYS_MAX,
            lengths=np.full(BATCH_KEYS_MAX, SHARD_BYTES_MAX, "<u4").tobytes(),
            offsets=np.full(BATCH_KEYS_MAX, 2**47, "<u8").tobytes(),
            ttl_ms=np.full(BATCH_KEYS_MAX, 10**12, "<u8").tobytes(),
            priority=np.full(BATCH_KEYS_MAX, -(2**15), "<i2").tobytes(),
            depth=np.full(BATCH_KEYS_MAX, 2**32 - 1, "<u4").tobytes(),
            cost=np.full(BATCH_KEYS_MAX, 1e6, "<f4").tobytes(),
        ),
        replace(PUT, offsets=b"", ttl_ms=bytes(8), cost=NAN_COST),
        replace(
            HELLO,
            cluster_id="c" * NAME_BYTES_MAX,
            namespace="n" * NAME_BYTES_MAX,
            client="p" * NAME_BYTES_MAX,
            token="t" * TOKEN_BYTES_MAX,
            capabilities=2**64 - 1,
        ),
    ],
    ids=lambda message: type(message).__name__,
)
def test_the_largest_messages_pass(message: Message) -> None:
    frame = encode_frame(message)
    assert len(frame) <= FRAME_BYTES_MAX
    if isinstance(message, Hello | Failure):
        assert len(frame) <= HELLO_BYTES_MAX
    assert decode_message(memoryview(frame)[4:]) == message


def _column(dtype: str, *values: float) -> bytes:
    return np.array(values, dtype).tobytes()


GET = Get(rid=1, timeout_us=0, keys=KEY)
GET_REPLY = GetReply(rid=1, lease=0, entries=ENTRY.pack(0, 0, 1, 0, 0, 0))
INLINE = GetReply(rid=1, lease=0, entries=ENTRY.pack(0, 0, 2, 0, 0, 1), inline=b"hi")
PUT2 = replace(PUT, keys=KEY * 2, lengths=_column("<u4", 1, 2), offsets=b"")

BAD_FIELDS: list[tuple[Message, str, object]] = [
    (Ping(rid=1), "rid", 0),
    (Ping(rid=1), "rid", RID_MAX + 1),
    (Ping(rid=1), "rid", -1),
    (Ping(rid=1), "rid", True),
    (Ping(rid=1), "rid", 1.0),
    (Ping(rid=1), "rid", "1"),
    (Ping(rid=1), "rid", None),
    (GET, "timeout_us", -1),
    (GET, "timeout_us", 0.5),
    (GET, "timeout_us", False),
    (GET, "keys", b""),
    (GET, "keys", KEY[:15]),
    (GET, "keys", KEY + b"x"),
    (GET, "keys", "x" * 16),
    (GET, "keys", None),
    (GET, "keys", KEYS_MAX + KEY),
    (Prefetch(rid=1, timeout_us=0, keys=KEY, by_us=0), "by_us", -1),
    (Hold(rid=1, timeout_us=0, keys=KEY, ttl_ms=1), "ttl_ms", 2**63),
    (Release(rid=0, leases=bytes(8)), "rid", 1),
    (Release(rid=0, leases=bytes(8)), "leases", b""),
    (Release(rid=0, leases=bytes(8)), "leases", bytes(12)),
    (Release(rid=0, leases=bytes(8)), "leases", bytes(8 * BATCH_KEYS_MAX + 8)),
    (Report(rid=0, keys=KEY, sums=bytes(8)), "rid", 7),
    (Report(rid=0, keys=KEY, sums=bytes(8)), "sums", bytes(16)),
    (Report(rid=0, keys=KEY, sums=bytes(8)), "sums", bytes(9)),
    (PUT, "durability", 3),
    (PUT, "durability", "group"),
    (PUT, "lengths", b""),
    (PUT, "lengths", bytes(8)),
    (PUT, "lengths", _column("<u4", SHARD_BYTES_MAX + 1)),
    (PUT, "lengths", _column("<u4", 2**32 - 1)),
    (PUT, "lengths", 300),
    (PUT, "offsets", bytes(4)),
    (PUT, "ttl_ms", b""),
    (PUT, "ttl_ms", bytes(16)),
    (PUT, "ttl_ms", _column("<u8", 2**63)),
    (PUT, "priority", bytes(4)),
    (PUT, "depth", bytes(2)),
    (PUT, "cost", _column("<f4", -1)),
    (PUT, "cost", _column("<f4", math.inf)),
    (PUT, "cost", _column("<f4", -math.inf)),
    (PUT, "cost", _column("<f4", 1.1e6)),
    (PUT, "cost", b""),
    (PUT2, "cost", _column("<f4", math.nan, -1)),
    (PUT2, "lengths", _column("<u4", 0, SHARD_BYTES_MAX + 1)),
    (PUT2, "ttl_ms", _column("<u8", 0, 0, 0)),
    (GET_REPLY, "lease", -1),
    (GET_REPLY, "entries", b""),
    (GET_REPLY, "entries", bytes(33)),
    (GET_REPLY, "entries", ENTRY.pack(0, 0, 1, 0, 5, 0)),
    (GET_REPLY, "entries", ENTRY.pack(0, 0, 1, 0, 0, 2)),
    (GET_REPLY, "entries", ENTRY.pack(0, 0, SHARD_BYTES_MAX + 1, 0, 0, 0)),
    (GET_REPLY, "entries", bytes(32 * BATCH_KEYS_MAX + 32)),
    (GET_REPLY, "inline", b"nobody asked"),
    (INLINE, "entries", ENTRY.pack(0, 0, 3, 0, 0, 1)),
    (INLINE, "entries", ENTRY.pack(1, 0, 2, 0, 0, 1)),
    (INLINE, "entries", ENTRY.pack(2**64 - 1, 0, 2, 0, 0, 1)),
    (INLINE, "inline", b"h"),
    (INLINE, "inline", None),
    (PutReply(rid=1, results=b"\0"), "results", b"\x06"),
    (PutReply(rid=1, results=b"\0"), "results", b"\xff"),
    (PutReply(rid=1, results=b"\0"), "results", b""),
    (MaskReply(rid=1, mask=b"\0"), "mask", b"\x02"),
    (MaskReply(rid=1, mask=b"\0"), "mask", bytes(BATCH_KEYS_MAX + 1)),
    (StatReply(rid=1, entries=bytes(16)), "entries", bytes(15)),
    (StatReply(rid=1, entries=bytes(16)), "entries", bytes(12) + b"\x04" + bytes(3)),
    (TextReply(rid=1, text=""), "text", "x" * (TEXT_BYTES_MAX + 1)),
    (TextReply(rid=1, text=""), "text", b"bytes"),
    (Failure(rid=1, code=1, message=""), "message", "x" * (FAILURE_TEXT_BYTES_MAX + 1)),
    (Failure(rid=1, code=1, message=""), "code", 2**16),
    (Failure(rid=1, code=1, message=""), "retry_after_ms", 2**40),
    (CountReply(rid=1, count=0), "count", -1),
    (GOLDEN[-1][0], "done", 1),
    (GOLDEN[-1][0], "total", None),
    (HELLO, "rid", 0),
    (HELLO, "version_max", 0),
    (HELLO, "role", 2),
    (HELLO, "role", -1),
    (HELLO, "cluster_id", "c" * (NAME_BYTES_MAX + 1)),
    (HELLO, "cluster_id", "\N{GREEK SMALL LETTER ALPHA}" * NAME_BYTES_MAX),
    (HELLO, "namespace", "line\nbreak"),
    (HELLO, "namespace", None),
    (HELLO, "token", "t" * (TOKEN_BYTES_MAX + 1)),
    (HELLO, "client", "nul\0"),
    (HELLO, "capabilities", -1),
    (HELLO, "shm", 1),
    (HELLO, "staging_bytes", 2**48),
    (HELLO, "session", b"S" * 16),
    (HELLO, "session", b"short"),
    (HELLO, "session", ""),
    (DATA_HELLO, "session", b""),
    (HELLO_OK, "version", 0),
    (HELLO_OK, "version", 2),
    (HELLO_OK, "node_id", b"N" * 15),
    (HELLO_OK, "boot_id", b""),
    (HELLO_OK, "session", b"S" * 17),
    (HELLO_OK, "ns_id", -1),
    (HELLO_OK, "arena_bytes", 2**63),
    (HELLO_OK, "staging_bytes", 2**63),
    (HELLO_OK, "shard_bytes_max", 0),
    (HELLO_OK, "shard_bytes_max", SHARD_BYTES_MAX + 1),
    (HELLO_OK, "lease_s_max", 0.0),
    (HELLO_OK, "lease_s_max", math.nan),
    (HELLO_OK, "lease_s_max", math.inf),
    (HELLO_OK, "lease_s_max", 60),
    (HELLO_OK, "batch_keys_max", 0),
    (HELLO_OK, "batch_keys_max", BATCH_KEYS_MAX + 1),
    (HELLO_OK, "unix_path", "/" * (NAME_BYTES_MAX + 1)),
]


@pytest.mark.parametrize(
    ("message", "field", "value"),
    BAD_FIELDS,
    ids=[f"{message.op.name}.{field}-{n}" for n, (message, field, _) in enumerate(BAD_FIELDS)],
)
def test_each_bound_is_kept_both_ways(message: Message, field: str, value: Any) -> None:
    decode_message(raw(message))  # without the change it is fine
    # msgpack itself refuses texts above the largest of all fields.
    with pytest.raises(RemoteProtocolError, match=rf"{message.op.name}|max_str_len"):
        decode_message(raw(message, **{field: value}))
    with pytest.raises(LocalProtocolError, match=message.op.name):
        encode_frame(replace(message, **{field: value}))


def test_the_text_of_a_violation_names_message_and_field() -> None:
    with pytest.raises(RemoteProtocolError, match=r"^EXISTS\.keys: 15 bytes of keys"):
        decode_message(raw(Exists(rid=1, timeout_us=0, keys=KEY), keys=KEY[:15]))


def test_empty_shards_are_legal() -> None:
    put = replace(PUT, lengths=bytes(4))
    assert decode_message(encode_payload(put)) == put
    reply = GetReply(1, 0, ENTRY.pack(0, 7, 0, 0, 0, 1))
    assert decode_message(encode_payload(reply)) == reply


def test_inline_shards_have_a_length_limit() -> None:
    size = INLINE_BYTES_MAX
    fits = GetReply(1, 0, ENTRY.pack(0, 0, size, 0, 0, 1), bytes(size))
    assert decode_message(encode_payload(fits)) == fits
    with pytest.raises(RemoteProtocolError, match="inline"):
        decode_message(
            raw(fits, entries=ENTRY.pack(0, 0, size + 1, 0, 0, 1), inline=bytes(size + 1))
        )


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x90",
        b"\x80",
        b"\xc0",
        b"\x01",
        b"\x91\xa1x",
        b"\x91\xc3",
        b"\x92\x63\x01",  # op 99
        b"\x92\xff\x01",  # op -1
        b"\x92\xcf\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x92\x1d",  # ends early
        b"\x92\x1d\x01\x01",  # bytes behind the message
        b"\x91\x1d",  # PING without rid
        b"\x93\x1d\x01\x01",  # PING with a field too many
        b"\x94\x10\x01\x00\xc6\xff\xff\xff\xff",  # bytes of 4 GiB
        b"\xdd\xff\xff\xff\xff",  # array of 2^32 elements
        b"\xdc\x00\x21" + b"\x01" * 33,  # array above the limit
        b"\x92\x1d\xdf\xff\xff\xff\xff",  # map of 2^32 pairs
        b"\x92\x1d\x81\x01\x01",
        b"\x92\x1d\x80",
        b"\x92\x1d\x91\x01",  # nested array
        b"\x92\x1d\xd6\xff\x00\x00\x00\x00",  # timestamp extension
        b"\x92\x1d\xc7\x00\x05",  # empty extension
        b"\x92\x1d\xc1",  # never used in msgpack
        b"\x93\x45\x01\xa2\xff\xfe",  # text that is no UTF-8
        b"\x93\x45\x01\xa3\xed\xa0\x80",  # lone surrogate in UTF-8
        b"\x91" * 2000,
        b"\x91" * 400 + b"\x01",
    ],
    ids=lambda payload: bytes(payload[:12]).hex(),
)
def test_malformed_payloads(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_message(payload)


def test_nested_arrays_do_not_blow_up_in_memory() -> None:
    """A full frame of nested arrays would cost 60 times its size if it were unpacked first."""
    leaf = b"\xdc\x00\x20" + b"\x90" * 32
    middle = b"\xdc\x00\x20" + leaf * 32
    with pytest.raises(RemoteProtocolError, match="nested"):
        decode_message(b"\xdc\x00\x20" + middle * 32)


def test_encoding_something_else_is_a_local_error() -> None:
    with pytest.raises(LocalProtocolError, match="not a message"):
        encode_payload(object())  # type: ignore[arg-type]


def test_text_with_a_lone_surrogate_is_a_local_error() -> None:
    with pytest.raises(LocalProtocolError, match="surrogate"):
        encode_frame(TextReply(rid=1, text="\ud800"))


def test_a_hello_of_the_future_names_both_version_ranges() -> None:
    future = msgpack.packb([1, 1, 2, 9, "other", 5])
    with pytest.raises(VersionMismatch, match=r"1 to 1.* 2 to 9"):
        decode_message(future)
    with pytest.raises(VersionMismatch):
        decode_message(raw(HELLO, version_min=0, version_max=0))


def test_a_hello_that_also_speaks_later_versions_may_be_longer() -> None:
    longer = [*msgpack.unpackb(encode_payload(HELLO)), "new", 17]
    assert decode_message(msgpack.packb(longer)) == HELLO
    answer = [*msgpack.unpackb(encode_payload(HELLO_OK)), b"new"]
    assert decode_message(msgpack.packb(answer)) == HELLO_OK


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_a_hello_cut_short(cut: int) -> None:
    values = msgpack.unpackb(encode_payload(HELLO))
    with pytest.raises(RemoteProtocolError, match="HELLO"):
        decode_message(msgpack.packb(values[:-cut] if cut != 5 else values[:3]))


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("full", retry_after_s=0.25),
        AuthenticationError("who are you"),
        UnknownNamespace("no such namespace"),
        RemoteProtocolError("garbage"),
        VersionMismatch("1 and 2"),
        CtxStoreError("plain"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel_as_themselves(error: CtxStoreError) -> None:
    failure = decode_message(encode_payload(failure_from_error(3, error)))
    assert isinstance(failure, Failure)
    back = error_from_failure(failure)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.retryable == error.retryable
    if isinstance(error, Overloaded):
        assert isinstance(back, Overloaded)
        assert back.retry_after_s == error.retry_after_s


def test_an_unknown_error_code_is_a_plain_error() -> None:
    back = error_from_failure(Failure(rid=1, code=999, message="new kind"))
    assert type(back) is CtxStoreError
    assert "999" in str(back)


@pytest.mark.parametrize(
    "text", ["x" * 100_000, "\N{SNOWMAN}" * 5000, "\ud800" * 10], ids=["long", "wide", "lone"]
)
def test_any_error_text_can_be_sent(text: str) -> None:
    failure = decode_message(encode_payload(failure_from_error(0, ProtocolError(text))))
    assert isinstance(failure, Failure)
    assert len(failure.message.encode()) <= FAILURE_TEXT_BYTES_MAX


def test_an_endless_retry_is_cut() -> None:
    failure = failure_from_error(1, Overloaded("full", retry_after_s=1e9))
    assert decode_message(encode_payload(failure)) == failure
    assert failure_from_error(1, Overloaded("full", retry_after_s=0)).retry_after_ms == 1


def test_samples_are_of_the_kinds_they_claim() -> None:
    assert isinstance(HELLO_OK, HelloOk)
    assert isinstance(GOLDEN[-1][0], VerifyReply)
