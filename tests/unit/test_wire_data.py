"""Data connections: golden headers, and a bound on every number before anyone acts on it."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest

from ctxstore.errors import LocalProtocolError, Overloaded, RemoteProtocolError
from ctxstore.limits import (
    BATCH_KEYS_MAX,
    FRAME_BYTES_MAX,
    REQUEST_TIMEOUT_S_MAX,
    SHARD_BYTES_MAX,
)
from ctxstore.wire.messages import (
    DATA_ENTRY_DTYPE,
    DATA_HEADER_BYTES,
    RESEND,
    RID_MAX,
    WANTED,
    DataFlag,
    DataHeader,
    DataOp,
    Failure,
    Get,
    Lookup,
    PutResult,
    RowArray,
    U8Array,
    U32Array,
    VerdictPhase,
    encode_payload,
    error_from_failure,
    failure_from_error,
    pack_failure,
    pack_get,
    pack_get_reply,
    pack_header,
    pack_put,
    pack_sum,
    pack_verdicts,
    unpack_entries,
    unpack_failure,
    unpack_get_meta,
    unpack_header,
    unpack_put_meta,
    unpack_sum,
    unpack_verdicts,
)
from tests.wire_samples import KEY, PUT

OFFER = replace(PUT, offsets=b"")
HEADER = struct.Struct("<IBBHQIIQ")
MAGIC = 0x44585443


def u32(*values: int) -> U32Array:
    return np.array(values, "<u4")


def u8(*values: int) -> U8Array:
    return np.array(values, "u1")


def rows(*values: tuple[int, int, int, int]) -> RowArray:
    return np.array(list(values), DATA_ENTRY_DTYPE)


def split(data: bytes) -> tuple[DataHeader, memoryview]:
    return unpack_header(data[:DATA_HEADER_BYTES]), memoryview(data)[DATA_HEADER_BYTES:]


GOLDEN = {
    "get": (
        pack_get(7, KEY, u32(4096).data, timeout_us=5_000_000, exact=True),
        "43545844 01 01 0100 0700000000000000 01000000 1c000000 0000000000000000"
        "404b4c0000000000 000102030405060708090a0b0c0d0e0f 00100000",
    ),
    "get reply": (
        pack_get_reply(7, rows((300, 0, 0, 0xABCD), (5000, 2, 0, 0))),
        "43545844 01 02 0000 0700000000000000 02000000 20000000 2c01000000000000"
        "2c010000 0000 0000 cdab000000000000 88130000 0200 0000 0000000000000000",
    ),
    "put": (
        pack_put(OFFER),
        "43545844 01 03 0000 0800000000000000 01000000 39000000 0000000000000000"
        "9b 12 08 01 02 c410 000102030405060708090a0b0c0d0e0f c404 2c010000 c400"
        "c408 e803000000000000 c402 ffff c404 03000000 c404 0000003f",
    ),
    "offer": (
        pack_verdicts(DataOp.OFFER, 8, u8(WANTED, PutResult.EXISTS)),
        "43545844 01 04 0000 0800000000000000 02000000 02000000 0000000000000000 ff 01",
    ),
    "result": (
        pack_verdicts(DataOp.RESULT, 8, u8(RESEND, PutResult.EXISTS)),
        "43545844 01 05 0000 0800000000000000 02000000 02000000 0000000000000000 fe 01",
    ),
    "failure": (
        pack_failure(Failure(rid=8, code=32, message="full", retry_after_ms=50)),
        "43545844 01 06 0000 0800000000000000 00000000 0a000000 0000000000000000"
        "95 03 08 20 a466756c6c 32",
    ),
    "sum": (pack_sum(2**64 - 2), "feffffffffffffff"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name: str) -> None:
    packed, wanted = GOLDEN[name]
    assert packed.hex(" ") == bytes.fromhex(wanted).hex(" ")


def test_sizes() -> None:
    assert DATA_HEADER_BYTES == HEADER.size == 32
    assert DATA_ENTRY_DTYPE.itemsize == 16


def test_get_round_trip_is_a_view() -> None:
    header, meta = split(pack_get(7, KEY * 3, u32(1, 2, 3).data, timeout_us=10))
    assert header.flags == 0
    get = unpack_get_meta(header, meta)
    assert get.timeout_us == 10
    assert get.key_rows.shape == (3, 16)
    assert get.keys == KEY * 3
    assert get.capacity_column.tolist() == [1, 2, 3]
    assert np.shares_memory(get.capacity_column, np.frombuffer(meta, np.uint8))


def test_deadlines_of_a_get_are_cut() -> None:
    longest = int(REQUEST_TIMEOUT_S_MAX * 1_000_000)
    for timeout_us, wanted in ((2**80, longest), (-5, 0)):
        header, meta = split(pack_get(7, KEY, u32(1).data, timeout_us=timeout_us))
        assert unpack_get_meta(header, meta).timeout_us == wanted
    hostile = struct.pack("<Q", 2**64 - 1) + bytes(meta[8:])
    assert unpack_get_meta(header, hostile).timeout_us == longest


@pytest.mark.parametrize(("keys", "count"), [(KEY[:-1], 1), (KEY * 2, 1), (KEY, 2), (b"", 0)])
def test_a_get_has_one_capacity_per_key(keys: bytes, count: int) -> None:
    with pytest.raises(LocalProtocolError):
        pack_get(7, keys, bytes(4 * count), timeout_us=0)


def test_get_reply_round_trip() -> None:
    sent = rows((300, Lookup.HIT, 0, 5), (9000, Lookup.TOO_SMALL, 0, 0), (0, Lookup.MISS, 0, 0))
    header, meta = split(pack_get_reply(7, sent))
    assert header.body_bytes == 300
    got = unpack_entries(header, meta, u32(300, 4096, 1))
    assert (got == sent).all()
    assert np.shares_memory(got, np.frombuffer(meta, np.uint8))


def test_the_body_of_the_largest_reply_is_summed_without_overflow() -> None:
    entries = np.zeros(BATCH_KEYS_MAX, DATA_ENTRY_DTYPE)
    entries["length"] = SHARD_BYTES_MAX
    header, meta = split(pack_get_reply(RID_MAX, entries))
    assert header.body_bytes == SHARD_BYTES_MAX * BATCH_KEYS_MAX
    unpack_entries(header, meta, np.full(BATCH_KEYS_MAX, SHARD_BYTES_MAX, "<u4"), exact=True)


@pytest.mark.parametrize(
    ("row", "capacity", "exact"),
    [
        ((301, 0, 0, 0), 300, False),
        ((299, 0, 0, 0), 300, True),
        ((SHARD_BYTES_MAX + 1, 0, 0, 0), 2**32 - 1, False),
        ((0, 5, 0, 0), 300, False),
        ((0, 2**16 - 1, 0, 0), 300, False),
        ((300, 0, 1, 0), 300, False),
        ((SHARD_BYTES_MAX + 1, 2, 0, 0), 300, False),
    ],
    ids=["too long", "not exact", "above limit", "status", "status 16", "flags", "miss length"],
)
def test_entries_that_would_harm_the_receiver(
    row: tuple[int, int, int, int], capacity: int, exact: bool
) -> None:
    body = row[0] if row[1] == Lookup.HIT else 0
    header = DataHeader(DataOp.GET_REPLY, 7, 1, 16, min(body, SHARD_BYTES_MAX))
    with pytest.raises(RemoteProtocolError):
        unpack_entries(header, rows(row).tobytes(), u32(capacity), exact=exact)


def test_entries_must_answer_the_request_and_its_body() -> None:
    sent = rows((300, 0, 0, 5))
    header, meta = split(pack_get_reply(7, sent))
    with pytest.raises(RemoteProtocolError, match="1 entries for 2 keys"):
        unpack_entries(header, meta, u32(300, 300))
    with pytest.raises(RemoteProtocolError, match="add up"):
        unpack_entries(replace(header, body_bytes=299), meta, u32(300))
    with pytest.raises(RemoteProtocolError, match="meta"):
        unpack_entries(header, meta[:-1], u32(300))
    with pytest.raises(LocalProtocolError):
        pack_get_reply(7, rows())
    with pytest.raises(LocalProtocolError):
        pack_get_reply(7, rows((1, 9, 0, 0)))


def test_put_offer_round_trip() -> None:
    header, meta = split(pack_put(OFFER))
    assert unpack_put_meta(header, meta) == OFFER


def test_put_offers_that_contradict_their_header() -> None:
    header, meta = split(pack_put(OFFER))
    with pytest.raises(LocalProtocolError, match="offsets"):
        pack_put(PUT)
    for wrong in (replace(header, rid=9), replace(header, count=2)):
        with pytest.raises(RemoteProtocolError, match="belong"):
            unpack_put_meta(wrong, meta)
    staged = encode_payload(PUT)
    with pytest.raises(RemoteProtocolError, match="offsets"):
        unpack_put_meta(replace(header, meta_bytes=len(staged)), staged)
    other = encode_payload(Get(rid=8, timeout_us=0, keys=KEY))
    with pytest.raises(RemoteProtocolError, match="belong"):
        unpack_put_meta(replace(header, meta_bytes=len(other)), other)
    with pytest.raises(RemoteProtocolError, match="malformed"):
        unpack_put_meta(header, b"\xc1" * header.meta_bytes)


@pytest.mark.parametrize(
    ("op", "phase", "allowed"),
    [
        (DataOp.OFFER, VerdictPhase.OFFER, {*PutResult, WANTED}),
        (DataOp.RESULT, VerdictPhase.RESULT, {*PutResult, RESEND}),
        (DataOp.RESULT, VerdictPhase.LAST, {*PutResult}),
    ],
)
def test_verdicts_by_phase(op: DataOp, phase: VerdictPhase, allowed: set[int]) -> None:
    for value in range(256):
        header, meta = split(pack_verdicts(op, 8, u8(0, value)))
        if value in allowed:
            assert unpack_verdicts(header, meta, count=2, phase=phase).tolist() == [0, value]
        else:
            with pytest.raises(RemoteProtocolError, match=f"verdict {value} "):
                unpack_verdicts(header, meta, count=2, phase=phase)


def test_verdicts_answer_every_key_in_their_own_phase() -> None:
    header, meta = split(pack_verdicts(DataOp.OFFER, 8, u8(0)))
    with pytest.raises(RemoteProtocolError, match="1 verdicts for 2"):
        unpack_verdicts(header, meta, count=2, phase=VerdictPhase.OFFER)
    with pytest.raises(RemoteProtocolError, match="RESULT was due"):
        unpack_verdicts(header, meta, count=1, phase=VerdictPhase.LAST)
    with pytest.raises(LocalProtocolError):
        pack_verdicts(DataOp.PUT, 8, u8(0))


def test_failures_travel_as_errors() -> None:
    header, meta = split(pack_failure(failure_from_error(8, Overloaded("x" * 10_000))))
    failure = unpack_failure(header, meta)
    assert isinstance(error_from_failure(failure), Overloaded)
    with pytest.raises(RemoteProtocolError, match="belong"):
        unpack_failure(replace(header, rid=9), meta)
    other = encode_payload(Get(rid=8, timeout_us=0, keys=KEY))
    with pytest.raises(RemoteProtocolError, match="belong"):
        unpack_failure(replace(header, meta_bytes=len(other)), other)


def test_sums() -> None:
    assert unpack_sum(pack_sum(2**64 - 1)) == 2**64 - 1
    for length in (0, 7, 9):
        with pytest.raises(RemoteProtocolError):
            unpack_sum(bytes(length))


GOOD = [
    DataHeader(DataOp.GET, RID_MAX, 2, 48, 0, DataFlag.EXACT),
    DataHeader(DataOp.GET_REPLY, 1, 2, 32, 2 * SHARD_BYTES_MAX),
    DataHeader(DataOp.PUT, 1, 2, FRAME_BYTES_MAX),
    DataHeader(DataOp.OFFER, 1, BATCH_KEYS_MAX, BATCH_KEYS_MAX),
    DataHeader(DataOp.RESULT, 1, 1, 1),
    DataHeader(DataOp.FAILURE, 0, 0, 5),
]


@pytest.mark.parametrize("header", GOOD, ids=lambda header: header.op.name)
def test_headers_at_their_limits_round_trip(header: DataHeader) -> None:
    assert unpack_header(pack_header(header)) == header


def _raw(
    header: DataHeader, *, magic: int = MAGIC, version: int = 1, op: int | None = None
) -> bytes:
    return HEADER.pack(
        magic,
        version,
        header.op if op is None else op,
        header.flags,
        header.rid,
        header.count,
        header.meta_bytes,
        header.body_bytes,
    )


BAD = [
    replace(GOOD[0], rid=0),
    replace(GOOD[0], rid=RID_MAX + 1),
    replace(GOOD[0], rid=2**63),
    replace(GOOD[0], count=0, meta_bytes=8),
    replace(GOOD[0], count=BATCH_KEYS_MAX + 1, meta_bytes=8 + 20 * (BATCH_KEYS_MAX + 1)),
    replace(GOOD[0], count=2**32 - 1, meta_bytes=2**32 - 1),
    replace(GOOD[0], meta_bytes=47),
    replace(GOOD[0], meta_bytes=49),
    replace(GOOD[0], body_bytes=1),
    replace(GOOD[0], body_bytes=2**63),
    replace(GOOD[0], flags=2),
    replace(GOOD[0], flags=0xFFFF),
    replace(GOOD[1], flags=1),
    replace(GOOD[1], meta_bytes=31),
    replace(GOOD[1], body_bytes=2 * SHARD_BYTES_MAX + 1),
    replace(GOOD[1], body_bytes=2**63),
    replace(GOOD[2], meta_bytes=FRAME_BYTES_MAX + 1),
    replace(GOOD[2], meta_bytes=2**32 - 1),
    replace(GOOD[2], meta_bytes=39),
    replace(GOOD[2], body_bytes=2**63),
    replace(GOOD[3], count=BATCH_KEYS_MAX + 1, meta_bytes=BATCH_KEYS_MAX + 1),
    replace(GOOD[3], meta_bytes=1),
    replace(GOOD[4], body_bytes=1),
    replace(GOOD[5], count=1),
    replace(GOOD[5], meta_bytes=0),
    replace(GOOD[5], meta_bytes=2**20),
    replace(GOOD[5], body_bytes=1),
]


@pytest.mark.parametrize("header", BAD, ids=[f"{h.op.name}-{n}" for n, h in enumerate(BAD)])
def test_headers_beyond_their_limits(header: DataHeader) -> None:
    with pytest.raises(RemoteProtocolError, match=header.op.name):
        unpack_header(_raw(header))
    with pytest.raises(LocalProtocolError, match=header.op.name):
        pack_header(header)


def test_headers_of_something_else() -> None:
    unpack_header(_raw(GOOD[0]))
    with pytest.raises(RemoteProtocolError, match="magic"):
        unpack_header(_raw(GOOD[0], magic=MAGIC + 1))
    with pytest.raises(RemoteProtocolError, match="version 2"):
        unpack_header(_raw(GOOD[0], version=2))
    for op in (0, 7, 255):
        with pytest.raises(RemoteProtocolError, match=f"op {op}"):
            unpack_header(_raw(GOOD[0], op=op))
    for length in (0, 31, 33):
        with pytest.raises(RemoteProtocolError, match="bytes"):
            unpack_header(bytes(length))
