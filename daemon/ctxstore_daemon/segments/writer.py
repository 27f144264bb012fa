"""Writing one segment: header, groups, footer.

Owns the order of writes and syncs inside a segment and where the next group stands. It must not
choose segments, retry a failed sync, or decide what happens after a fault: the store does.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash

from ctxstore.limits import MIB, PAGE_BYTES
from ctxstore_daemon.engine.records import RECORD_DTYPE, U64, RecordArray, RecordBatch
from ctxstore_daemon.segments.buffers import aligned_zeros
from ctxstore_daemon.segments.footer import encode_footer, footer_bytes_max
from ctxstore_daemon.segments.format import (
    FIRST_GROUP_OFFSET,
    FooterTrailer,
    GroupHeader,
    SegmentHeader,
    footer_seed,
    group_header_bytes,
    inline_mask,
    pack_group,
    pack_segment_header,
    pack_trailer,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from ctxstore.seams import ByteBuffer, DiskFile
    from ctxstore_daemon.segments.identity import Identity

_LOG: Final = logging.getLogger(__name__)

FOOTER_INLINE_BYTES_MAX: Final = 16 * MIB
"""Inline payloads kept in memory for a footer; a segment with more has none and is walked."""


async def write_segment_header(file: DiskFile, header: SegmentHeader) -> None:
    """Write and sync the first page; the segment is empty under its new generation afterwards."""
    await file.pwritev([pack_segment_header(header)], 0)
    await file.fdatasync()


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Sizes of a group before its place is known. `extents` are whole-page bytes, 0 for inline."""

    batch: RecordBatch
    header_bytes: int
    extents: npt.NDArray[np.int64]

    @classmethod
    def of(cls, batch: RecordBatch) -> GroupPlan:
        """Measure a batch."""
        lengths = batch.records["length"].astype(np.int64)
        extents = -(-lengths // PAGE_BYTES) * PAGE_BYTES
        extents[inline_mask(batch.records)] = 0
        header_bytes = group_header_bytes(len(batch.records), len(batch.inline))
        return cls(batch, header_bytes, extents)

    @property
    def total_bytes(self) -> int:
        """Header and extents."""
        return self.header_bytes + int(self.extents.sum())


@dataclass(slots=True)
class OpenSegmentState:
    """The segment that takes groups. Changed only by `SegmentWriter`."""

    segment: int
    generation: int
    segment_bytes: int
    tail: int = FIRST_GROUP_OFFSET
    first_seq: int = 0
    last_seq: int = 0
    records: list[RecordArray] = field(default_factory=list)
    group_seq: list[U64] = field(default_factory=list)
    inline: list[bytes] = field(default_factory=list)
    count: int = 0
    inline_bytes: int = 0
    footer_off: bool = False  # too many inline bytes to keep for one
    footer_current: bool = False  # the footer on the disk describes all groups
    trailer_stale: bool = False  # a footer of an earlier stop must go before the next group


class SegmentWriter:
    """One caller at a time. After any raised error the segment must not be appended to."""

    def __init__(self, state: OpenSegmentState, identity: Identity) -> None:
        self._state = state
        self._identity = identity

    @property
    def state(self) -> OpenSegmentState:
        """Place and sequences, to be read."""
        return self._state

    def fits(self, plan: GroupPlan) -> bool:
        """Whether the group leaves room for the footer."""
        state = self._state
        inline_bytes = state.inline_bytes + len(plan.batch.inline)
        footer = footer_bytes_max(state.count + len(plan.batch.records), inline_bytes)
        if state.footer_off or inline_bytes > FOOTER_INLINE_BYTES_MAX:
            footer = 0
        end = state.tail + plan.total_bytes + footer + PAGE_BYTES
        return end <= state.segment_bytes

    async def append(
        self,
        file: DiskFile,
        plan: GroupPlan,
        payloads: list[ByteBuffer],
        *,
        seq: int,
        synced_seq: int,
    ) -> npt.NDArray[np.uint32]:
        """Write and sync a group; returns the page of each record's extent (0 for inline).

        `payloads` are the extents' bytes in record order. Raises StorageError: then nothing of the
        group counts.
        """
        state = self._state
        assert self.fits(plan), "a group is only appended where it fits"
        assert seq > max(state.last_seq, synced_seq), "sequences grow"
        records = np.array(plan.batch.records, RECORD_DTYPE)
        starts = state.tail + plan.header_bytes + np.cumsum(plan.extents) - plan.extents
        pages = np.where(plan.extents > 0, starts // PAGE_BYTES, 0).astype(np.uint32)
        records["page"] = pages
        header = GroupHeader(
            count=len(records),
            header_bytes=plan.header_bytes,
            inline_bytes=len(plan.batch.inline),
            total_bytes=plan.total_bytes,
            seq=seq,
            synced_seq=synced_seq,
            segment=state.segment,
            generation=state.generation,
            checksum=0,
        )
        batch = RecordBatch(records, plan.batch.inline)
        packed = pack_group(batch, header, self._identity.secret)
        await self._drop_trailer(file)
        state.footer_current = False
        await file.pwritev([packed, *payloads], state.tail)
        await file.fdatasync()
        self._remember(batch, seq)
        state.count += len(records)
        state.inline_bytes += len(plan.batch.inline)
        state.tail += plan.total_bytes
        state.first_seq = state.first_seq or seq
        state.last_seq = seq
        return pages

    def _remember(self, batch: RecordBatch, seq: int) -> None:
        """Keep what the footer will say, unless it would keep too much memory busy."""
        state = self._state
        if state.inline_bytes + len(batch.inline) > FOOTER_INLINE_BYTES_MAX:
            state.footer_off = True
        if state.footer_off:
            state.records, state.group_seq, state.inline = [], [], []
            return
        state.records.append(batch.records)
        state.group_seq.append(np.full(len(batch.records), seq, np.uint64))
        state.inline.append(batch.inline)

    async def seal(self, file: DiskFile) -> None:
        """Write and sync the footer. Raises StorageError; the groups stand all the same."""
        state = self._state
        if state.footer_current or state.footer_off or not state.last_seq:
            return
        records = np.concatenate([np.zeros(0, RECORD_DTYPE), *state.records])
        group_seq = np.concatenate([np.zeros(0, np.uint64), *state.group_seq])
        batch = RecordBatch(records, b"".join(state.inline))
        pages = encode_footer(batch, group_seq)
        if state.tail + len(pages) + PAGE_BYTES > state.segment_bytes:
            _LOG.warning("footer_too_large segment=%d bytes=%d", state.segment, len(pages))
            return
        trailer = FooterTrailer(
            segment=state.segment,
            generation=state.generation,
            count=len(records),
            footer_offset=state.tail,
            footer_bytes=len(pages),
            first_seq=state.first_seq,
            last_seq=state.last_seq,
            footer_sum=0,
        )
        value = xxhash.xxh3_64_intdigest(pages.data, footer_seed(trailer, self._identity.secret))
        page = pack_trailer(replace(trailer, footer_sum=value), self._identity.secret)
        await file.pwritev([pages], state.tail)
        # First the footer, then the page that points to it: only damage makes it unusable.
        await file.fdatasync()
        await file.pwritev([page], state.segment_bytes - PAGE_BYTES)
        await file.fdatasync()
        state.footer_current = True
        state.trailer_stale = True

    async def _drop_trailer(self, file: DiskFile) -> None:
        """A footer of an earlier stop goes first: only damage may leave an unusable one behind."""
        state = self._state
        if not state.trailer_stale:
            return
        await file.pwritev([aligned_zeros(PAGE_BYTES)], state.segment_bytes - PAGE_BYTES)
        await file.fdatasync()
        state.trailer_stale = False


def payload_slices(
    arena: npt.NDArray[np.uint8], batch: RecordBatch, slot_offsets: npt.NDArray[np.int64]
) -> list[ByteBuffer]:
    """The extents' bytes, straight from the arena; neighbours in memory become one slice."""
    plan = GroupPlan.of(batch)
    slices: list[ByteBuffer] = []
    begin = end = -1
    for offset, size in zip(slot_offsets.tolist(), plan.extents.tolist(), strict=True):
        if not size:
            continue
        if offset != end:
            if end > begin:
                slices.append(arena[begin:end])
            begin = offset
        end = offset + size
    if end > begin:
        slices.append(arena[begin:end])
    return slices
