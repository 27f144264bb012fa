"""Reading one segment back: header, footer, or the walk over its group headers.

Owns what can be said of a single file. It must not write, and must not compare segments: `recovery`
does. The walk stops at the first invalid group header and never looks for the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash

from ctxstore.limits import KIB, PAGE_BYTES
from ctxstore_daemon.engine.records import RECORD_DTYPE, U64, RecordArray, RecordBatch
from ctxstore_daemon.segments.buffers import aligned_empty, round_up
from ctxstore_daemon.segments.footer import decode_footer
from ctxstore_daemon.segments.format import (
    FIRST_GROUP_OFFSET,
    GROUP_HEADER_BYTES_MAX,
    Fault,
    FooterTrailer,
    GroupHeader,
    Invalid,
    SegmentHeader,
    footer_seed,
    parse_group,
    parse_group_header,
    parse_segment_header,
    parse_trailer,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from ctxstore.seams import DiskFile
    from ctxstore_daemon.segments.identity import Identity

_WINDOW_BYTES: Final = 256 * KIB
"""Read at once while walking: many small groups, or the header of one large one."""


class Finding(Enum):
    """What a segment file turned out to be."""

    DATA = "data"
    EMPTY = "no group"
    BLANK = "no valid header"
    FOREIGN = "of another node or a newer format"
    STALE = "an older image than the meta log knows"


@dataclass(frozen=True, slots=True)
class GroupFound:
    """One group of a walk; its records are [first, first + count) of the segment's."""

    header: GroupHeader
    offset: int
    first: int


@dataclass(slots=True)
class SegmentScan:
    """All that one file says. `tail` is where the next group would stand."""

    segment: int
    finding: Finding
    reason: str = ""
    generation: int = 0
    file_bytes: int = 0
    batch: RecordBatch = field(default_factory=lambda: RecordBatch(np.zeros(0, RECORD_DTYPE)))
    group_seq: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    first_seq: int = 0
    last_seq: int = 0
    synced_seq: int = 0
    tail: int = FIRST_GROUP_OFFSET
    footer_used: bool = False
    footer_fault: Invalid | None = None
    stop: Invalid | None = None
    groups: list[GroupFound] = field(default_factory=list)

    @property
    def footer_damaged(self) -> bool:
        """Whether there was a footer for this generation and it cannot be used."""
        fault = self.footer_fault.fault if self.footer_fault is not None else Fault.MAGIC
        return fault not in (Fault.MAGIC, Fault.GENERATION, Fault.SHORT)


async def scan_segment(
    file: DiskFile, segment: int, *, identity: Identity, generation: int | None, limit: int | None
) -> SegmentScan:
    """Read a segment. `generation` is the meta log's, `limit` the tail at which it was retired."""
    size = await file.size()
    page = aligned_empty(PAGE_BYTES)
    count = await file.preadv([page], 0) if size >= PAGE_BYTES else 0
    header = parse_segment_header(page[:count], segment=segment, node_id=identity.node_id)
    scan = SegmentScan(segment, Finding.DATA, file_bytes=size)
    if isinstance(header, SegmentHeader):
        scan.generation = header.generation
    else:
        scan.finding, scan.reason = Finding.BLANK, str(header)
        if header.fault in (Fault.FOREIGN, Fault.VERSION):
            scan.finding = Finding.FOREIGN
        elif generation is not None:
            # The meta log knows the generation too, and groups are seeded with it: a damaged page
            # costs nothing but itself.
            await _read_groups(file, scan, identity, limit, generation=generation)
        return scan
    if generation is not None and header.generation < generation:
        scan.finding = Finding.STALE
        scan.reason = f"generation {header.generation}, the meta log has {generation}"
        return scan
    await _read_groups(file, scan, identity, limit, generation=header.generation)
    if not scan.last_seq:
        scan.finding = Finding.EMPTY
        scan.reason = str(scan.stop or "")
    return scan


async def _read_groups(
    file: DiskFile, scan: SegmentScan, identity: Identity, limit: int | None, *, generation: int
) -> None:
    scan.generation = generation
    await _read_footer(file, scan, identity.segment_bytes, identity.secret)
    if not scan.footer_used:
        await walk_groups(file, scan, identity=identity, limit=limit)
    if scan.last_seq:
        scan.finding = Finding.DATA


async def _read_footer(file: DiskFile, scan: SegmentScan, segment_bytes: int, secret: int) -> None:
    if scan.file_bytes < segment_bytes:
        scan.footer_fault = Invalid(Fault.SHORT, f"{scan.file_bytes} of {segment_bytes} bytes")
        return
    page = aligned_empty(PAGE_BYTES)
    await file.preadv([page], segment_bytes - PAGE_BYTES)
    trailer = parse_trailer(
        page,
        segment=scan.segment,
        generation=scan.generation,
        file_bytes=segment_bytes,
        secret=secret,
    )
    if not isinstance(trailer, FooterTrailer):
        scan.footer_fault = trailer
        return
    pages = aligned_empty(trailer.footer_bytes)
    count = await file.preadv([pages], trailer.footer_offset)
    if (
        count < len(pages)
        or xxhash.xxh3_64_intdigest(pages.data, footer_seed(trailer, secret)) != trailer.footer_sum
    ):
        scan.footer_fault = Invalid(Fault.CHECKSUM, "footer")
        return
    decoded = decode_footer(pages, trailer)
    if isinstance(decoded, Invalid):
        scan.footer_fault = decoded
        return
    scan.batch, scan.group_seq = decoded
    scan.first_seq, scan.last_seq = trailer.first_seq, trailer.last_seq
    scan.synced_seq = trailer.last_seq
    scan.tail = trailer.footer_offset
    scan.footer_used = True


class _Window:
    """A piece of the file in memory, moved forward as the walk goes."""

    def __init__(self, file: DiskFile, file_bytes: int) -> None:
        self._file = file
        self._file_bytes = file_bytes // PAGE_BYTES * PAGE_BYTES
        self._buffer = aligned_empty(_WINDOW_BYTES)
        self._start = 0
        self._count = 0

    async def get(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        """Up to `size` bytes at `offset`, fewer at the file's end; valid until the next call."""
        size = max(0, min(size, self._file_bytes - offset))
        if not self._start <= offset <= offset + size <= self._start + self._count:
            wanted = round_up(max(size, min(_WINDOW_BYTES, self._file_bytes - offset)))
            if wanted > len(self._buffer):
                self._buffer = aligned_empty(wanted)
            self._start = offset
            self._count = await self._file.preadv([self._buffer[:wanted]], offset)
        begin = offset - self._start
        return self._buffer[begin : begin + size]


async def walk_groups(
    file: DiskFile, scan: SegmentScan, *, identity: Identity, limit: int | None
) -> None:
    """Collect the groups of `scan` from their headers, up to `limit` bytes into the file."""
    window = _Window(file, scan.file_bytes)
    end = scan.file_bytes if limit is None else min(limit, scan.file_bytes)
    parts: list[RecordBatch] = []
    offset = FIRST_GROUP_OFFSET
    count = 0
    while True:
        group = await _next_group(window, scan, offset=offset, end=end, secret=identity.secret)
        if isinstance(group, Invalid):
            scan.stop = group
            break
        header, batch = group
        parts.append(batch)
        scan.groups.append(GroupFound(header, offset, count))
        scan.first_seq = scan.first_seq or header.seq
        scan.last_seq = header.seq
        scan.synced_seq = max(scan.synced_seq, header.synced_seq)
        count += header.count
        offset += header.total_bytes
    scan.tail = offset
    if parts:
        records: RecordArray = np.concatenate([part.records for part in parts])
        scan.batch = RecordBatch(records, b"".join(part.inline for part in parts))
        counts = [group.header.count for group in scan.groups]
        seqs = np.array([group.header.seq for group in scan.groups], np.uint64)
        scan.group_seq = np.repeat(seqs, counts)


async def _next_group(
    window: _Window, scan: SegmentScan, *, offset: int, end: int, secret: int
) -> tuple[GroupHeader, RecordBatch] | Invalid:
    first = await window.get(offset, PAGE_BYTES)
    header = parse_group_header(
        first, segment=scan.segment, generation=scan.generation, room_bytes=end - offset
    )
    if isinstance(header, Invalid):
        return header
    if header.header_bytes > GROUP_HEADER_BYTES_MAX:
        return Invalid(Fault.BOUNDS, f"header of {header.header_bytes} bytes")
    if header.seq <= scan.last_seq:
        return Invalid(Fault.ORDER, f"sequence {header.seq} after {scan.last_seq}")
    pages = await window.get(offset, header.header_bytes)
    batch = parse_group(pages, header, offset=offset, secret=secret)
    return batch if isinstance(batch, Invalid) else (header, batch)
