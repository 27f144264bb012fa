"""Off-line check of a whole data directory: every header, footer, group and payload.

Owns the difference between damage and what a crash may leave. It writes nothing; the caller holds
the directory's lock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from ctxstore import checksum
from ctxstore.errors import DataDirError, StorageError
from ctxstore.limits import PAGE_BYTES
from ctxstore_daemon.engine.events import ReadExtents, ReadStatus
from ctxstore_daemon.segments.files import SegmentFiles, segment_name, segment_of
from ctxstore_daemon.segments.format import inline_mask
from ctxstore_daemon.segments.identity import Identity, load_identity
from ctxstore_daemon.segments.metareader import read_meta_log
from ctxstore_daemon.segments.reader import ExtentReader
from ctxstore_daemon.segments.recovery import MetaView, quarantined_mask, record_seed
from ctxstore_daemon.segments.scan import Finding, SegmentScan, scan_segment, walk_groups

if TYPE_CHECKING:
    import numpy.typing as npt

    from ctxstore.seams import Disk, Mover
    from ctxstore_daemon.engine.records import RecordArray

_DROPPED: Final = "removals may be lost, so the next start will drop all shards"

_EXTENTS_AT_ONCE: Final = 64
"""Extents checked between two progress reports: at most a few segments' worth of scratch memory."""


class DamageKind(Enum):
    """What does not fit."""

    SEGMENT = "segment header"
    FOOTER = "footer"
    GROUP = "group header"
    SHARD = "shard"
    META_LOG = "meta log"
    UNREADABLE = "unreadable file"


@dataclass(frozen=True, slots=True)
class Damage:
    """One finding. `offset` in bytes from the start of the file; `key` hexadecimal, for shards."""

    kind: DamageKind
    file: str
    detail: str
    offset: int = 0
    key: str = ""


@dataclass(slots=True)
class VerifyReport:
    """What was checked and what is wrong. `notes` are odd but no damage.

    `quarantined` shards are known to be damaged and are not counted again; `torn` ones stand in a
    group that was never acknowledged.
    """

    node_id: str = ""
    cluster_id: str = ""
    segments: int = 0
    groups: int = 0
    shards: int = 0
    shard_bytes: int = 0
    quarantined: int = 0
    torn: int = 0
    meta_records: int = 0
    damages: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No damage found."""
        return not self.damages


@dataclass(frozen=True, slots=True)
class VerifyProgress:
    """How far a verification has come, in bytes of shards."""

    done_bytes: int
    total_bytes: int


Progress: TypeAlias = Callable[[VerifyProgress], None]


async def verify_directory(
    disk: Disk, *, mover: Mover, progress: Progress | None = None
) -> VerifyReport:
    """Check everything. Raises DataDirError where there is no identity, or a damaged one."""
    identity = await load_identity(disk)
    if identity is None:
        raise DataDirError("this is no data directory: it has no IDENTITY file")
    report = VerifyReport(node_id=identity.node_id.hex(), cluster_id=identity.cluster_id)
    files = SegmentFiles(disk)
    try:
        view = await _check_meta(disk, identity, report)
        scans = await _check_headers(disk, files, identity, view, report)
        await _check_shards(files, scans, view, mover=mover, report=report, progress=progress)
    finally:
        await files.close()
    return report


async def _check_meta(disk: Disk, identity: Identity, report: VerifyReport) -> MetaView:
    found = await read_meta_log(disk, identity)
    report.meta_records = len(found.records)
    for file, text in found.damaged:
        report.damages.append(Damage(DamageKind.META_LOG, file, text))
    report.notes += [f"{file}: {text}" for file, text in found.torn]
    if found.lost:
        report.damages.append(
            Damage(
                DamageKind.META_LOG,
                "meta-*.log",
                f"{found.lost} records are in no copy: {_DROPPED}",
            )
        )
    return MetaView.of(found.records)


async def _check_headers(
    disk: Disk, files: SegmentFiles, identity: Identity, view: MetaView, report: VerifyReport
) -> list[SegmentScan]:
    scans: list[SegmentScan] = []
    names = await disk.listdir()
    missing = (name for name in map(segment_name, sorted(view.generations)) if name not in names)
    report.notes += [f"{name} is not there; it may have had no data yet" for name in missing]
    for name in names:
        segment = segment_of(name)
        if segment is None:
            continue
        report.segments += 1
        try:
            async with files.with_file(segment) as file:
                limit = view.retired.get(segment)
                scan = await scan_segment(
                    file,
                    segment,
                    identity=identity,
                    generation=view.generations.get(segment),
                    limit=limit,
                )
                _judge_scan(scan, name, view, report)
                if scan.finding is Finding.DATA and scan.file_bytes < identity.segment_bytes:
                    # A file gets its full size before its first data: no crash leaves this.
                    cut = f"cut to {scan.file_bytes} of {identity.segment_bytes} bytes"
                    report.damages.append(Damage(DamageKind.SEGMENT, name, cut))
                if scan.finding is Finding.DATA and scan.footer_used:
                    walked = _like(scan)
                    await walk_groups(file, walked, identity=identity, limit=limit)
                    _judge_walk(scan, walked, name, report)
        except StorageError as error:
            report.damages.append(Damage(DamageKind.UNREADABLE, name, str(error)))
            continue
        if scan.last_seq and scan.generation > view.generations.get(segment, 0):
            detail = f"no record names generation {scan.generation} of {name}: {_DROPPED}"
            report.damages.append(Damage(DamageKind.META_LOG, "meta-*.log", detail))
        report.groups += len(np.unique(scan.group_seq))
        if scan.finding is Finding.DATA:
            scans.append(scan)
    known = view.generations
    unknown = [segment_name(s.segment) for s in scans if s.generation > known.get(s.segment, 0)]
    if unknown:
        text = f"knows nothing of {unknown[0]}, which holds data: the next start drops all shards"
        report.damages.append(Damage(DamageKind.META_LOG, "meta-*.log", text))
    return scans


def _like(scan: SegmentScan) -> SegmentScan:
    return SegmentScan(
        scan.segment, scan.finding, generation=scan.generation, file_bytes=scan.file_bytes
    )


def _judge_scan(scan: SegmentScan, name: str, view: MetaView, report: VerifyReport) -> None:
    if scan.finding is Finding.FOREIGN or scan.finding is Finding.STALE:
        report.notes.append(f"{name} is not used: {scan.reason}")
    elif scan.reason and (scan.finding is Finding.DATA or scan.segment in view.generations):
        # A header that was being rewritten when the power went has no data behind it.
        if scan.finding is Finding.DATA:
            report.damages.append(Damage(DamageKind.SEGMENT, name, scan.reason))
        else:
            report.notes.append(f"{name} holds nothing: {scan.reason}")
    if scan.finding is Finding.DATA and scan.footer_damaged:
        report.damages.append(Damage(DamageKind.FOOTER, name, str(scan.footer_fault)))


def _judge_walk(scan: SegmentScan, walked: SegmentScan, name: str, report: VerifyReport) -> None:
    if walked.last_seq != scan.last_seq:
        detail = f"{walked.stop}; the footer stands in for what follows"
        report.damages.append(Damage(DamageKind.GROUP, name, detail, offset=walked.tail))


async def _check_shards(
    files: SegmentFiles,
    scans: list[SegmentScan],
    view: MetaView,
    *,
    mover: Mover,
    report: VerifyReport,
    progress: Progress | None,
) -> None:
    generations = {scan.segment: scan.generation for scan in scans}
    reader = ExtentReader(files, mover, generations.get)
    synced = max((scan.synced_seq for scan in scans), default=0)
    total = sum(int(scan.batch.records["length"].sum()) for scan in scans)
    done = 0
    for scan in scans:
        known = quarantined_mask(scan, view.quarantined)
        report.quarantined += int(known.sum())
        inline = inline_mask(scan.batch.records)
        _check_inline(scan, inline, report)
        for start in range(0, len(known), _EXTENTS_AT_ONCE):
            part = slice(start, start + _EXTENTS_AT_ONCE)
            records = scan.batch.records[part]
            wanted = ~known[part] & ~inline[part]
            statuses = await reader.read(_order(scan, records[wanted]), _NO_ARENA)
            unsynced = scan.group_seq[part][wanted] > np.uint64(synced)
            for row, status, torn in zip(records[wanted], statuses, unsynced, strict=True):
                _count_shard(row, int(status), scan.segment, bool(torn), report)
            done += int(records["length"].sum())
            if progress is not None:
                progress(VerifyProgress(done, total))


_NO_ARENA: Final = np.zeros(0, np.uint8)


def _count_shard(row: np.void, status: int, segment: int, torn: bool, report: VerifyReport) -> None:
    report.shards += 1
    report.shard_bytes += int(row["length"])
    if status == ReadStatus.OK:
        return
    if torn:
        report.torn += 1
        return
    what = "cannot be read" if status == ReadStatus.FAILED else "checksum does not fit"
    report.damages.append(
        Damage(
            DamageKind.SHARD,
            segment_name(segment),
            f"{int(row['length'])} bytes: {what}",
            offset=int(row["page"]) * PAGE_BYTES,
            key=row["key"].tobytes().hex(),
        )
    )


def _check_inline(scan: SegmentScan, mask: npt.NDArray[np.bool_], report: VerifyReport) -> None:
    at = 0
    for row in scan.batch.records[mask]:
        length = int(row["length"])
        value = checksum.checksum(scan.batch.inline[at : at + length], record_seed(row))
        at += length
        good = value == int(row["checksum"])
        status = ReadStatus.OK if good else ReadStatus.DAMAGED
        _count_shard(row, int(status), scan.segment, False, report)


def _order(scan: SegmentScan, records: RecordArray) -> ReadExtents:
    count = len(records)
    return ReadExtents(
        0,
        np.full(count, scan.segment, np.uint32),
        np.full(count, scan.generation, np.uint32),
        records["page"].astype(np.uint32),
        records["length"].astype(np.uint32),
        np.full(count, -1, np.int64),
        np.zeros(count, np.int64),
        np.fromiter((record_seed(row) for row in records), np.uint64, count),
        records["checksum"].astype(np.uint64),
    )
