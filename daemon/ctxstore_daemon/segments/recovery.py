"""What a start finds: every segment scanned, generations compared, the newest group verified.

Owns the rules of DESIGN's recovery over all segments of a node. It must not write: the
store acts on what stands in `Findings`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore import checksum
from ctxstore.errors import StorageError
from ctxstore.limits import PAGE_BYTES
from ctxstore.seams import CopyJob
from ctxstore_daemon.engine.records import META_DTYPE, MetaKind, RecordArray, RecordBatch
from ctxstore_daemon.segments.buffers import aligned_empty
from ctxstore_daemon.segments.files import segment_of
from ctxstore_daemon.segments.format import extent_bytes, inline_mask
from ctxstore_daemon.segments.scan import Finding, SegmentScan, scan_segment

if TYPE_CHECKING:
    import numpy.typing as npt

    from ctxstore.seams import Disk, Mover
    from ctxstore_daemon.segments.files import SegmentFiles
    from ctxstore_daemon.segments.identity import Identity

_SCANS_AT_ONCE: Final = 8
"""Segments read concurrently: enough to keep the device busy, few enough to bound memory."""


@dataclass(frozen=True, slots=True)
class MetaView:
    """What the meta log says of segments."""

    generations: dict[int, int]
    retired: dict[int, int]  # segment -> bytes up to which it was good
    quarantined: frozenset[tuple[int, int, int]]  # (segment, generation, page)

    @classmethod
    def of(cls, records: RecordArray) -> MetaView:
        """Latest generation of each segment, retirements and quarantines of that generation."""
        generations: dict[int, int] = {}
        kinds = records["kind"]
        for row in records[kinds == MetaKind.GENERATION]:
            segment = int(row["segment"])
            generations[segment] = max(generations.get(segment, 0), int(row["generation"]))
        retired = {
            int(row["segment"]): int(row["page"]) * PAGE_BYTES
            for row in records[kinds == MetaKind.RETIRED]
            if generations.get(int(row["segment"])) == int(row["generation"])
        }
        quarantined = frozenset(
            (int(row["segment"]), int(row["generation"]), int(row["page"]))
            for row in records[kinds == MetaKind.QUARANTINE]
        )
        return cls(generations, retired, quarantined)


@dataclass(slots=True)
class Findings:
    """Scans by segment, files that could not be read, copies found damaged."""

    scans: list[SegmentScan] = field(default_factory=list)
    unreadable: dict[int, str] = field(default_factory=dict)
    damaged: RecordArray = field(default_factory=lambda: np.zeros(0, META_DTYPE))
    unsynced: list[int] = field(default_factory=list)
    """Segments with groups that can be read and are not known to be durable."""


async def recover(
    disk: Disk, files: SegmentFiles, *, identity: Identity, meta: MetaView, mover: Mover
) -> Findings:
    """Scan all segment files; quarantined records and those torn at the end are left out."""
    found = Findings()
    gate = asyncio.Semaphore(_SCANS_AT_ONCE)

    async def scan(segment: int) -> None:
        async with gate:
            try:
                async with files.with_file(segment) as file:
                    found.scans.append(
                        await scan_segment(
                            file,
                            segment,
                            identity=identity,
                            generation=meta.generations.get(segment),
                            limit=meta.retired.get(segment),
                        )
                    )
            except StorageError as error:
                found.unreadable[segment] = str(error)

    names = await disk.listdir()
    segments = [s for s in map(segment_of, names) if s is not None]
    async with asyncio.TaskGroup() as group:
        for segment in segments:
            group.create_task(scan(segment))
    found.scans.sort(key=lambda scan: scan.segment)
    synced = max((scan.synced_seq for scan in found.scans), default=0)
    damaged: list[RecordArray] = []
    for each in found.scans:
        if each.finding is Finding.DATA:
            if (each.group_seq > np.uint64(synced)).any():
                found.unsynced.append(each.segment)
            damaged.append(await _verify_unsynced(files, each, synced=synced, mover=mover))
            _drop(each, quarantined_mask(each, meta.quarantined))
    if damaged:
        found.damaged = np.concatenate(damaged)
    return found


def quarantined_mask(
    scan: SegmentScan, quarantined: frozenset[tuple[int, int, int]]
) -> npt.NDArray[np.bool_]:
    """Which records of the segment have their extent in quarantine."""
    pages = [
        page
        for segment, generation, page in quarantined
        if (segment, generation) == (scan.segment, scan.generation)
    ]
    records = scan.batch.records
    if not pages:
        return np.zeros(len(records), np.bool_)
    return np.isin(records["page"], np.array(pages, np.uint32)) & ~inline_mask(records)


def _drop(scan: SegmentScan, mask: npt.NDArray[np.bool_]) -> None:
    """Leave out records that are not inline; inline bytes stay as they are."""
    if mask.any():
        scan.batch = RecordBatch(scan.batch.records[~mask], scan.batch.inline)
        scan.group_seq = scan.group_seq[~mask]


async def _verify_unsynced(
    files: SegmentFiles, scan: SegmentScan, *, synced: int, mover: Mover
) -> RecordArray:
    """Check extents of groups whose sync is not known to have ended; bad ones are dropped.

    Such a group was perhaps never acknowledged: its header can be on the disk without its extents.
    """
    suspects = np.flatnonzero(
        (scan.group_seq > np.uint64(synced)) & ~inline_mask(scan.batch.records)
    )
    if not len(suspects):
        return np.zeros(0, META_DTYPE)
    records = scan.batch.records
    bad = np.zeros(len(records), np.bool_)
    async with files.with_file(scan.segment) as file:
        for index in suspects:
            record = records[index]
            size = extent_bytes(int(record["length"]))
            scratch = aligned_empty(size)
            try:
                count = await file.preadv([scratch], int(record["page"]) * PAGE_BYTES)
            except StorageError:
                bad[index] = True
                continue
            job = CopyJob(None, scratch, int(record["length"]), record_seed(record))
            sums = await mover.copy_in([job])
            bad[index] = count < size or sums[0] != int(record["checksum"])
    rows = np.zeros(int(bad.sum()), META_DTYPE)
    rows["kind"] = MetaKind.QUARANTINE
    rows["segment"] = scan.segment
    rows["generation"] = scan.generation
    rows["page"] = records["page"][bad]
    rows["key"] = records["key"][bad]
    rows["ns_id"] = records["ns_id"][bad]
    rows["incarnation"] = records["incarnation"][bad]
    rows["birth"] = records["birth"][bad]
    _drop(scan, bad)
    return rows


def record_seed(record: np.void) -> int:
    """Checksum seed of one record's payload."""
    return checksum.seed(
        record["key"].tobytes(),
        ns_id=int(record["ns_id"]),
        incarnation=int(record["incarnation"]),
        length=int(record["length"]),
    )
