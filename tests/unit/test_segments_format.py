"""Byte layouts: golden vectors, and that no input makes a parser do anything but say why."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ctxstore_daemon.engine.records import META_DTYPE, RECORD_DTYPE, MetaKind, RecordBatch
from ctxstore_daemon.segments.footer import decode_footer, encode_footer, footer_bytes_max
from ctxstore_daemon.segments.format import (
    Fault,
    FooterTrailer,
    GroupHeader,
    Invalid,
    SegmentHeader,
    group_header_bytes,
    pack_group,
    pack_segment_header,
    pack_trailer,
    parse_group,
    parse_group_header,
    parse_segment_header,
    parse_trailer,
    place_seed,
)
from ctxstore_daemon.segments.identity import Identity, format_identity, parse_identity
from ctxstore_daemon.segments.metaformat import (
    FRAME_BYTES,
    MetaHeader,
    pack_frames,
    pack_meta_header,
    parse_frames,
    parse_meta_header,
)

NODE = bytes(range(16))
SECRET = 0x1122334455667788
IDENTITY = Identity(NODE, "lab", 2 << 20, 0xABCDEF)


def _batch() -> RecordBatch:
    records = np.zeros(3, RECORD_DTYPE)
    records["key"] = np.arange(48, dtype=np.uint8).reshape(3, 16)
    records["ns_id"], records["incarnation"] = 5, 6
    records["birth"] = [100, 101, 102]
    records["checksum"] = [7, 8, 9]
    records["written_at_ns"], records["ttl_ms"] = 1_700_000_000_000_000_000, 60_000
    records["length"] = [5000, 3, 4096]
    records["page"] = [2, 0, 4]
    records["depth"], records["cost_s"], records["priority"] = 11, 0.5, -2
    records["flags"] = [0, 1, 0]
    return RecordBatch(records, b"abc")


def _group(offset: int = 4096) -> tuple[GroupHeader, np.ndarray]:
    header = GroupHeader(3, 4096, 3, 4096 * 4, 900, 899, 12, 34, 0)
    assert offset == 4096
    return header, pack_group(_batch(), header, SECRET)


def _trailer() -> FooterTrailer:
    return FooterTrailer(12, 34, 3, 4096 * 5, 4096 * 6, 900, 950, 0x77)


def test_golden_segment_header() -> None:
    page = pack_segment_header(SegmentHeader(12, NODE, 34, 2 << 20, 1_700_000_000))
    assert page[:64].tobytes().hex() == (
        "4354585345474d54" "0100" "0000" "0c000000" "000102030405060708090a0b0c0d0e0f"
        "22000000" "00000000" "0000200000000000" "00f1536500000000" "024f5a2ac8ed7470"
    )  # fmt: skip
    assert not page[64:].any()


def test_golden_group_header() -> None:
    _, pages = _group()
    assert pages[:64].tobytes().hex() == (
        "43545847524f5550" "0100" "0000" "03000000" "00100000" "03000000" "0040000000000000"
        "8403000000000000" "8303000000000000" "0c000000" "22000000" "32ae28bcf816e2b5"
    )  # fmt: skip
    assert pages[64:152].tobytes().hex() == (
        "000102030405060708090a0b0c0d0e0f" "0500000000000000" "0600000000000000"
        "6400000000000000" "0700000000000000" "00002a36fe9c9717" "60ea000000000000" "88130000"
        "02000000" "0b000000" "0000003f" "feff" "0000" "00000000"
    )  # fmt: skip
    assert pages[64 + 3 * 88 : 64 + 3 * 88 + 4].tobytes() == b"abc\0"


def test_golden_trailer() -> None:
    page = pack_trailer(_trailer(), SECRET)
    assert page[:72].tobytes().hex() == (
        "435458464f4f5452" "0100" "0000" "0c000000" "22000000" "03000000" "0050000000000000"
        "0060000000000000" "8403000000000000" "b603000000000000" "7700000000000000"
        "da3c870fdecc033e"
    )  # fmt: skip


def test_golden_meta_log() -> None:
    header = pack_meta_header(MetaHeader(3, NODE, 1), SECRET)
    assert len(header) == FRAME_BYTES == 104
    assert header.hex() == (
        "4354584d4554414c" "0100" "0000" "03000000" "000102030405060708090a0b0c0d0e0f"
        "0100000000000000" + "00" * 56 + "18e5146de3800c67"
    )  # fmt: skip
    records = np.zeros(1, META_DTYPE)
    records["kind"], records["key"] = int(MetaKind.TOMBSTONE), np.arange(16)
    records["ns_id"], records["seq"], records["at_wall_ns"] = 5, 77, 1_700_000_000_000_000_000
    frame = pack_frames(records, first_index=2, synced=1, number=3, secret=SECRET)
    assert frame.hex() == (
        "01000000" "00000000" "00000000" "00000000" "0500000000000000" "0000000000000000"
        "000102030405060708090a0b0c0d0e0f" "0000000000000000" "4d00000000000000"
        "00002a36fe9c9717" "0000000000000000" "0200000000000000" "0100000000000000"
        "105542f6dc921d9a"
    )  # fmt: skip


def test_golden_identity() -> None:
    assert format_identity(IDENTITY) == (
        b"ctxstore-data-format: 1\n"
        b"node: 000102030405060708090a0b0c0d0e0f\n"
        b"cluster: lab\n"
        b"segment-bytes: 2097152\n"
        b"salt: 0000000000abcdef\n"
        b"checksum: 083d746c7296cbdc\n"
    )
    assert parse_identity(format_identity(IDENTITY)) == IDENTITY


def test_seeds_follow_their_written_form() -> None:
    expected = xxhash.xxh3_64_intdigest(struct.pack("<QIIQ", SECRET, 12, 34, 900))
    assert place_seed(SECRET, segment=12, generation=34, seq=900) == expected
    secret = xxhash.xxh3_64_intdigest(NODE, 0xABCDEF)
    assert IDENTITY.secret == secret


def test_headers_come_back() -> None:
    segment = SegmentHeader(12, NODE, 34, 2 << 20, 99)
    assert parse_segment_header(pack_segment_header(segment), segment=12, node_id=NODE) == segment
    _, pages = _group()
    found = parse_group_header(pages, segment=12, generation=34, room_bytes=4096 * 4)
    assert isinstance(found, GroupHeader)
    batch = parse_group(pages, found, offset=4096, secret=SECRET)
    assert isinstance(batch, RecordBatch)
    assert (batch.records == _batch().records).all()
    assert batch.inline == b"abc"
    page = pack_trailer(_trailer(), SECRET)
    assert _parse_trailer(page) == _trailer()


def _parse_trailer(page: np.ndarray, **other: int) -> FooterTrailer | Invalid:
    place = {"segment": 12, "generation": 34, "file_bytes": 2 << 20, "secret": SECRET} | other
    return parse_trailer(page, **place)


def _parse_group(pages: np.ndarray, secret: int = SECRET) -> RecordBatch | Invalid:
    found = parse_group_header(pages, segment=12, generation=34, room_bytes=4096 * 4)
    if isinstance(found, Invalid):
        return found
    return parse_group(pages, found, offset=4096, secret=secret)


def test_every_flipped_byte_of_a_header_is_noticed() -> None:
    segment = pack_segment_header(SegmentHeader(12, NODE, 34, 2 << 20, 99))
    _, group = _group()
    trailer = pack_trailer(_trailer(), SECRET)
    for pages in (segment, group, trailer):
        for offset in [*range(420), 1000, 4095]:
            pages[offset] ^= 0x10
            results = [
                parse_segment_header(pages, segment=12, node_id=NODE),
                _parse_group(pages),
                _parse_trailer(pages),
            ]
            assert all(isinstance(result, Invalid) for result in results), offset
            pages[offset] ^= 0x10


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"segment": 13}, Fault.PLACE),
        ({"generation": 35}, Fault.GENERATION),
        ({"secret": SECRET + 1}, Fault.CHECKSUM),
        ({"file_bytes": 4096 * 11}, Fault.BOUNDS),
    ],
)
def test_a_trailer_belongs_to_one_place(change: dict[str, int], fault: Fault) -> None:
    found = _parse_trailer(pack_trailer(_trailer(), SECRET), **change)
    assert isinstance(found, Invalid)
    assert found.fault is fault


def test_a_group_belongs_to_one_place() -> None:
    _, pages = _group()
    other = parse_group_header(pages, segment=12, generation=35, room_bytes=4096 * 4)
    assert isinstance(other, Invalid)
    assert other.fault is Fault.GENERATION
    other = parse_group_header(pages, segment=1, generation=34, room_bytes=4096 * 4)
    assert isinstance(other, Invalid)
    assert other.fault is Fault.PLACE
    other = parse_group_header(pages, segment=12, generation=34, room_bytes=4096 * 3)
    assert isinstance(other, Invalid)
    assert other.fault is Fault.BOUNDS
    found = _parse_group(pages, secret=SECRET ^ 1)
    assert isinstance(found, Invalid)
    assert found.fault is Fault.CHECKSUM


def test_extents_must_lie_in_their_group() -> None:
    batch = _batch()
    batch.records["page"][2] = 5  # one page of payload from page 5 on: outside
    header = GroupHeader(3, 4096, 3, 4096 * 4, 900, 899, 12, 34, 0)
    found = _parse_group(pack_group(batch, header, SECRET))
    assert isinstance(found, Invalid)
    assert found.fault is Fault.BOUNDS


def test_other_nodes_and_newer_formats_are_told_apart() -> None:
    page = pack_segment_header(SegmentHeader(12, NODE, 34, 2 << 20, 99))
    found = parse_segment_header(page, segment=12, node_id=bytes(16))
    assert isinstance(found, Invalid)
    assert found.fault is Fault.FOREIGN
    page[8] = 2
    page[56:64] = 0
    seed = place_seed(0, segment=12, generation=34, seq=0)
    page[56:64] = np.frombuffer(struct.pack("<Q", xxhash.xxh3_64_intdigest(page.data, seed)), "u1")
    found = parse_segment_header(page, segment=12, node_id=NODE)
    assert isinstance(found, Invalid)
    assert found.fault is Fault.VERSION


@given(st.binary(max_size=300), st.sampled_from([b"CTXSEGMT", b"CTXGROUP", b"CTXFOOTR", b""]))
def test_garbage_is_answered_with_a_reason(data: bytes, magic: bytes) -> None:
    for size in (len(data), 4096):
        page = np.frombuffer((magic + b"\1\0\0\0" + data).ljust(size, b"\0"), np.uint8).copy()
        assert isinstance(parse_segment_header(page, segment=12, node_id=NODE), Invalid)
        assert isinstance(_parse_trailer(page), Invalid)
        assert isinstance(_parse_group(page), Invalid)
    assert isinstance(parse_identity(data), Invalid)
    assert isinstance(parse_meta_header(data, number=1, secret=SECRET), Invalid)
    assert not len(parse_frames(np.frombuffer(data, np.uint8), number=1, secret=SECRET).records)


def _footer(count: int, inline_each: int) -> tuple[RecordBatch, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count)
    records = np.zeros(count, RECORD_DTYPE)
    records["key"] = rng.integers(0, 256, (count, 16))
    records["flags"] = np.arange(count) % 2
    records["length"] = np.where(records["flags"] == 1, inline_each, 4096)
    records["page"] = np.where(records["flags"] == 1, 0, 1 + np.arange(count))
    records["cost_s"] = np.nan
    inline = rng.bytes(int((records["flags"] == 1).sum()) * inline_each)
    batch = RecordBatch(records, inline)
    seqs = np.arange(1, count + 1, dtype=np.uint64)
    return batch, seqs, encode_footer(batch, seqs)


@pytest.mark.parametrize(("count", "inline"), [(0, 0), (1, 9), (2, 0), (1000, 1024), (5001, 3)])
def test_footers_come_back_and_stay_in_their_bound(count: int, inline: int) -> None:
    batch, seqs, pages = _footer(count, inline)
    assert len(pages) <= footer_bytes_max(count, len(batch.inline))
    trailer = FooterTrailer(12, 34, count, 4096 * (count + 1), len(pages), 1, max(1, count), 0)
    decoded = decode_footer(pages, trailer)
    assert not isinstance(decoded, Invalid)
    assert decoded[0].records.tobytes() == batch.records.tobytes()
    assert decoded[0].inline == batch.inline
    assert (decoded[1] == seqs).all()


def test_footers_that_break_the_rules_are_refused() -> None:
    batch, seqs, pages = _footer(10, 5)
    good = FooterTrailer(12, 34, 10, 4096 * 11, len(pages), 1, 10, 0)
    assert not isinstance(decode_footer(pages, good), Invalid)
    wrong_count = FooterTrailer(12, 34, 11, 4096 * 11, len(pages), 1, 10, 0)
    beyond = FooterTrailer(12, 34, 10, 4096 * 5, len(pages), 1, 10, 0)
    too_late = FooterTrailer(12, 34, 10, 4096 * 11, len(pages), 1, 9, 0)
    for trailer in (wrong_count, beyond, too_late):
        assert isinstance(decode_footer(pages, trailer), Invalid)
    assert isinstance(decode_footer(encode_footer(batch, seqs[::-1].copy()), good), Invalid)
    for offset in range(0, len(pages), 7):
        damaged = pages.copy()
        damaged[offset : offset + 3] ^= 0xFF
        decode_footer(damaged, good)  # whatever it answers, it answers


def test_group_headers_are_whole_pages() -> None:
    assert group_header_bytes(1, 0) == 4096
    assert group_header_bytes(45, 72) == 4096
    assert group_header_bytes(45, 73) == 8192
