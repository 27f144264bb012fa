"""Byte layouts of segments: header page, group header, footer trailer.

Owns magics, versions, checksums, packing and parsing; docs/disk-format.md shows the same tables.
It must not read files. Parsing never raises on what a disk may hold: it answers `Invalid`.
All integers are little endian; every structure starts on a 4 KiB page.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xxhash

from ctxstore.limits import GROUP_SHARDS_MAX, INLINE_BYTES_MAX, PAGE_BYTES, SHARD_BYTES_MAX
from ctxstore_daemon.engine.records import RECORD_DTYPE, RecordArray, RecordBatch, RecordFlag
from ctxstore_daemon.segments.buffers import aligned_zeros, round_up

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

FORMAT_VERSION: Final = 1

SEGMENT_MAGIC: Final = b"CTXSEGMT"
GROUP_MAGIC: Final = b"CTXGROUP"
FOOTER_MAGIC: Final = b"CTXFOOTR"

_SEGMENT: Final = struct.Struct("<8sHHI16sIIQqQ")
_GROUP: Final = struct.Struct("<8sHHIIIQQQIIQ")
_TRAILER: Final = struct.Struct("<8sHHIIIQQQQQQ")
_SEED: Final = struct.Struct("<QIIQ")

GROUP_FIXED_BYTES: Final = _GROUP.size
GROUP_RECORDS_MAX: Final = 4 * GROUP_SHARDS_MAX
"""Readers take more than a writer puts, so that a later writer may put more."""
GROUP_HEADER_BYTES_MAX: Final = round_up(
    GROUP_FIXED_BYTES + GROUP_RECORDS_MAX * (RECORD_DTYPE.itemsize + INLINE_BYTES_MAX)
)
FIRST_GROUP_OFFSET: Final = PAGE_BYTES


class Fault(Enum):
    """Why bytes are not what their place says."""

    SHORT = "shorter than its structure"
    MAGIC = "no magic"
    VERSION = "written by a newer format"
    CHECKSUM = "checksum does not fit"
    PLACE = "belongs to another segment"
    GENERATION = "belongs to another generation"
    FOREIGN = "belongs to another node"
    ORDER = "sequence out of order"
    BOUNDS = "a size or offset is out of bounds"
    SCHEMA = "not the expected table"


@dataclass(frozen=True, slots=True)
class Invalid:
    """Bytes that cannot be used."""

    fault: Fault
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.fault.value} ({self.detail})" if self.detail else self.fault.value


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """First page of a segment file."""

    segment: int
    node_id: bytes
    generation: int
    segment_bytes: int
    created_wall_ns: int


@dataclass(frozen=True, slots=True)
class GroupHeader:
    """Fixed part of a group. `total_bytes` counts header and extents, both whole pages."""

    count: int
    header_bytes: int
    inline_bytes: int
    total_bytes: int
    seq: int
    synced_seq: int
    segment: int
    generation: int
    checksum: int


@dataclass(frozen=True, slots=True)
class FooterTrailer:
    """Last page of a segment file: where the footer stands and what it must sum to."""

    segment: int
    generation: int
    count: int
    footer_offset: int
    footer_bytes: int
    first_seq: int
    last_seq: int
    footer_sum: int


def place_seed(secret: int, *, segment: int, generation: int, seq: int) -> int:
    """Checksum seed of a structure: valid nowhere else, at no other time, for no other node.

    `secret` is the identity's; 0 for the segment header, which must tell whose it is.
    """
    return xxhash.xxh3_64_intdigest(_SEED.pack(secret, segment, generation, seq))


def _bytes_view(data: Bytes) -> memoryview:
    return memoryview(data.data if isinstance(data, np.ndarray) else data).cast("B")


# ------------------------------------------------------------------------------ segment header


def pack_segment_header(header: SegmentHeader) -> npt.NDArray[np.uint8]:
    """One page, aligned for O_DIRECT."""
    page = aligned_zeros(PAGE_BYTES)
    _SEGMENT.pack_into(
        page.data,
        0,
        SEGMENT_MAGIC,
        FORMAT_VERSION,
        0,
        header.segment,
        header.node_id,
        header.generation,
        0,
        header.segment_bytes,
        header.created_wall_ns,
        0,
    )
    seed = place_seed(0, segment=header.segment, generation=header.generation, seq=0)
    _put_sum(page, _SEGMENT.size, xxhash.xxh3_64_intdigest(page.data, seed))
    return page


def parse_segment_header(page: Bytes, *, segment: int, node_id: bytes) -> SegmentHeader | Invalid:
    """The header of `segment` of node `node_id`, or why it is none."""
    view = _bytes_view(page)
    if len(view) < PAGE_BYTES:
        return Invalid(Fault.SHORT, f"{len(view)} bytes")
    magic, version, _, found, owner, generation, _, size, created, stored = _SEGMENT.unpack_from(
        view
    )
    if magic != SEGMENT_MAGIC:
        return Invalid(Fault.MAGIC)
    seed = place_seed(0, segment=found, generation=generation, seq=0)
    if _sum_without(view[:PAGE_BYTES], _SEGMENT.size, seed) != stored:
        return Invalid(Fault.CHECKSUM)
    if version > FORMAT_VERSION:
        return Invalid(Fault.VERSION, f"version {version}")
    if owner != node_id:
        return Invalid(Fault.FOREIGN, f"node {owner.hex()}")
    if found != segment:
        return Invalid(Fault.PLACE, f"segment {found}")
    if size % PAGE_BYTES or size < 4 * PAGE_BYTES or generation == 0:
        return Invalid(Fault.BOUNDS, f"segment of {size} bytes, generation {generation}")
    return SegmentHeader(found, owner, generation, size, created)


# ------------------------------------------------------------------------------ groups


def group_header_bytes(count: int, inline_bytes: int) -> int:
    """Whole pages that the header of a group takes."""
    return round_up(GROUP_FIXED_BYTES + count * RECORD_DTYPE.itemsize + inline_bytes)


def extent_bytes(length: int) -> int:
    """Whole pages that a payload takes in a segment."""
    return round_up(length)


def pack_group(batch: RecordBatch, header: GroupHeader, secret: int) -> npt.NDArray[np.uint8]:
    """Header pages of a group, aligned for O_DIRECT; `header.checksum` is computed here."""
    pages = aligned_zeros(header.header_bytes)
    _GROUP.pack_into(
        pages.data,
        0,
        GROUP_MAGIC,
        FORMAT_VERSION,
        0,
        header.count,
        header.header_bytes,
        header.inline_bytes,
        header.total_bytes,
        header.seq,
        header.synced_seq,
        header.segment,
        header.generation,
        0,
    )
    records_end = GROUP_FIXED_BYTES + header.count * RECORD_DTYPE.itemsize
    pages[GROUP_FIXED_BYTES:records_end] = np.ascontiguousarray(batch.records).view(np.uint8)
    inline = np.frombuffer(batch.inline, np.uint8)
    pages[records_end : records_end + len(inline)] = inline
    seed = place_seed(secret, segment=header.segment, generation=header.generation, seq=header.seq)
    _put_sum(pages, _GROUP.size, xxhash.xxh3_64_intdigest(pages.data, seed))
    return pages


def parse_group_header(
    data: Bytes, *, segment: int, generation: int, room_bytes: int
) -> GroupHeader | Invalid:
    """Fixed part of a group in `room_bytes`: bounds are checked, its checksum not yet."""
    view = _bytes_view(data)
    if len(view) < GROUP_FIXED_BYTES:
        return Invalid(Fault.SHORT, f"{len(view)} bytes")
    magic, version, _, *fields = _GROUP.unpack_from(view)
    if magic != GROUP_MAGIC:
        return Invalid(Fault.MAGIC)
    if version > FORMAT_VERSION:
        return Invalid(Fault.VERSION, f"version {version}")
    found = GroupHeader(*fields)
    if found.segment != segment:
        return Invalid(Fault.PLACE, f"segment {found.segment}")
    if found.generation != generation:
        return Invalid(Fault.GENERATION, f"generation {found.generation}")
    if not 0 < found.count <= GROUP_RECORDS_MAX:
        return Invalid(Fault.BOUNDS, f"{found.count} records")
    if found.inline_bytes > found.count * INLINE_BYTES_MAX:
        return Invalid(Fault.BOUNDS, f"{found.inline_bytes} inline bytes")
    if found.header_bytes != group_header_bytes(found.count, found.inline_bytes):
        return Invalid(Fault.BOUNDS, f"header of {found.header_bytes} bytes")
    if found.total_bytes % PAGE_BYTES or not found.header_bytes <= found.total_bytes <= room_bytes:
        return Invalid(Fault.BOUNDS, f"group of {found.total_bytes} bytes")
    if found.synced_seq >= found.seq:
        return Invalid(Fault.ORDER, f"{found.synced_seq} synced before {found.seq}")
    return found


def parse_group(
    data: Bytes, header: GroupHeader, *, offset: int, secret: int
) -> RecordBatch | Invalid:
    """Records and inline payloads (copied) of the group whose header pages are `data`.

    `offset` is where the group stands in its segment: extents must lie inside the group.
    """
    view = _bytes_view(data)
    if len(view) < header.header_bytes:
        return Invalid(Fault.SHORT, f"{len(view)} of {header.header_bytes} bytes")
    view = view[: header.header_bytes]
    seed = place_seed(secret, segment=header.segment, generation=header.generation, seq=header.seq)
    if _sum_without(view, _GROUP.size, seed) != header.checksum:
        return Invalid(Fault.CHECKSUM)
    records = np.frombuffer(view, RECORD_DTYPE, header.count, GROUP_FIXED_BYTES).copy()
    start = GROUP_FIXED_BYTES + header.count * RECORD_DTYPE.itemsize
    inline = bytes(view[start : start + header.inline_bytes])
    first = (offset + header.header_bytes) // PAGE_BYTES
    end = (offset + header.total_bytes) // PAGE_BYTES
    wrong = check_records(records, len(inline), first_page=first, end_page=end)
    return wrong if wrong is not None else RecordBatch(records, inline)


def inline_mask(records: RecordArray) -> npt.NDArray[np.bool_]:
    """Which records carry their payload inline."""
    mask: npt.NDArray[np.bool_] = (records["flags"] & int(RecordFlag.INLINE)) != 0
    return mask


def check_records(
    records: RecordArray, inline_bytes: int, *, first_page: int, end_page: int
) -> Invalid | None:
    """What is wrong with records whose extents must lie in pages [first_page, end_page)."""
    inline = inline_mask(records)
    lengths = records["length"].astype(np.int64)
    if int(lengths[inline].sum()) != inline_bytes or (lengths[inline] > INLINE_BYTES_MAX).any():
        return Invalid(Fault.BOUNDS, "inline lengths")
    outside = ~inline
    if (lengths[outside] > SHARD_BYTES_MAX).any() or (lengths[outside] == 0).any():
        return Invalid(Fault.BOUNDS, "shard length")
    pages = records["page"].astype(np.int64)[outside]
    ends = pages + -(-lengths[outside] // PAGE_BYTES)
    if (pages < first_page).any() or (ends > end_page).any():
        return Invalid(Fault.BOUNDS, "extent outside its group")
    return None


# ------------------------------------------------------------------------------ footer trailer


def pack_trailer(trailer: FooterTrailer, secret: int) -> npt.NDArray[np.uint8]:
    """One page, aligned for O_DIRECT."""
    page = aligned_zeros(PAGE_BYTES)
    _TRAILER.pack_into(
        page.data,
        0,
        FOOTER_MAGIC,
        FORMAT_VERSION,
        0,
        trailer.segment,
        trailer.generation,
        trailer.count,
        trailer.footer_offset,
        trailer.footer_bytes,
        trailer.first_seq,
        trailer.last_seq,
        trailer.footer_sum,
        0,
    )
    seed = _trailer_seed(trailer, secret)
    _put_sum(page, _TRAILER.size, xxhash.xxh3_64_intdigest(page.data, seed))
    return page


def parse_trailer(
    page: Bytes, *, segment: int, generation: int, file_bytes: int, secret: int
) -> FooterTrailer | Invalid:
    """The trailer of a segment file of `file_bytes`, or why it is none."""
    view = _bytes_view(page)
    if len(view) < PAGE_BYTES:
        return Invalid(Fault.SHORT, f"{len(view)} bytes")
    magic, version, _, *fields, stored = _TRAILER.unpack_from(view)
    if magic != FOOTER_MAGIC:
        return Invalid(Fault.MAGIC)
    if version > FORMAT_VERSION:
        return Invalid(Fault.VERSION, f"version {version}")
    found = FooterTrailer(*fields)
    if found.segment != segment:
        return Invalid(Fault.PLACE, f"segment {found.segment}")
    if found.generation != generation:
        return Invalid(Fault.GENERATION, f"generation {found.generation}")
    if _sum_without(view[:PAGE_BYTES], _TRAILER.size, _trailer_seed(found, secret)) != stored:
        return Invalid(Fault.CHECKSUM)
    end = found.footer_offset + found.footer_bytes
    if found.footer_offset < FIRST_GROUP_OFFSET or end > file_bytes - PAGE_BYTES:
        return Invalid(Fault.BOUNDS, f"footer at {found.footer_offset}+{found.footer_bytes}")
    if found.footer_offset % PAGE_BYTES or found.first_seq > found.last_seq:
        return Invalid(Fault.BOUNDS, "footer offset or sequences")
    return found


def _trailer_seed(trailer: FooterTrailer, secret: int) -> int:
    return place_seed(
        secret, segment=trailer.segment, generation=trailer.generation, seq=trailer.last_seq
    )


def footer_seed(trailer: FooterTrailer, secret: int) -> int:
    """Seed of the checksum over the footer's bytes; differs from the trailer's own."""
    return _trailer_seed(trailer, secret) ^ 1


# ------------------------------------------------------------------------------ checksums in place


def _put_sum(pages: npt.NDArray[np.uint8], fixed_bytes: int, value: int) -> None:
    """Store a checksum in the fixed part's last eight bytes, which were zero when it was taken."""
    struct.pack_into("<Q", pages.data, fixed_bytes - 8, value)


def _sum_without(view: memoryview, fixed_bytes: int, seed: int) -> int:
    """Checksum of a structure as if its own checksum field were zero."""
    digest: Any = xxhash.xxh3_64(seed=seed)
    digest.update(view[: fixed_bytes - 8])
    digest.update(bytes(8))
    digest.update(view[fixed_bytes:])
    value: int = digest.intdigest()
    return value
