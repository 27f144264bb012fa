"""From what recovery found to the state a store starts with.

Owns the decisions of a start: which segments count, which are dropped, which go to keep the cap,
where writing goes on. Pure; the store carries them out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore.errors import DataDirError
from ctxstore_daemon.engine.records import (
    META_DTYPE,
    MetaKind,
    RecordArray,
    RecordBatch,
    SegmentImage,
)
from ctxstore_daemon.segments.files import segment_name
from ctxstore_daemon.segments.scan import Finding, SegmentScan
from ctxstore_daemon.segments.states import SegmentPhase, SegmentState, meta_row
from ctxstore_daemon.segments.writer import (
    FOOTER_INLINE_BYTES_MAX,
    GroupPlan,
    OpenSegmentState,
    SegmentWriter,
)

if TYPE_CHECKING:
    from ctxstore_daemon.segments.geometry import Geometry
    from ctxstore_daemon.segments.identity import Identity
    from ctxstore_daemon.segments.metareader import MetaFound
    from ctxstore_daemon.segments.recovery import Findings, MetaView

_LOST_RESERVATION: Final = 1 << 32
"""Where the reservation of sequence numbers is lost, this many are skipped."""


@dataclass(slots=True)
class StartState:
    """What to start with. `extra` records must be durable before anything is served."""

    segments: dict[int, SegmentState] = field(default_factory=dict)
    images: list[SegmentImage] = field(default_factory=list)
    surplus: list[int] = field(default_factory=list)  # files to delete
    extra: RecordArray = field(default_factory=lambda: np.zeros(0, META_DTYPE))
    writer: SegmentWriter | None = None  # of the segment to go on with, once it is synced
    last_seq: int = 0
    seq_floor: int = 1
    notes: list[str] = field(default_factory=list)


def plan_start(
    meta: MetaFound, view: MetaView, found: Findings, *, identity: Identity, geometry: Geometry
) -> StartState:
    """Decide. Raises DataDirError when segments of other nodes fill the cap."""
    start = StartState()
    _note_findings(start, meta, found)
    # A generation is recorded before its first data: data without a record is a lost record.
    unknown = any(
        scan.last_seq and scan.generation > view.generations.get(scan.segment, 0)
        for scan in found.scans
    )
    trusted = meta.lost == 0 and not unknown
    if not trusted:
        start.notes.append("removals may be lost with the meta log: all stored shards are dropped")
    for scan in found.scans:
        start.segments[scan.segment] = _entered(scan, view, trusted=trusted)
    for segment, reason in found.unreadable.items():
        # Perhaps it can be read next time: no tombstone may be forgotten until then.
        start.segments[segment] = SegmentState(
            segment, SegmentPhase.RETIRED, view.generations.get(segment, 0), first_seq=1
        )
        start.notes.append(f"{segment_name(segment)} cannot be read: {reason}")
    _fit_cap(start, geometry)
    start.last_seq = max((state.last_seq for state in start.segments.values()), default=0)
    _add_unborn(start, view, geometry)
    start.images = _images(start, found)
    start.extra = np.concatenate([found.damaged, *_outdated(start, found)])
    start.writer = _resumed(start, found, identity, geometry)
    start.seq_floor = _seq_floor(found.scans, meta.records, trusted=trusted)
    return start


def _note_findings(start: StartState, meta: MetaFound, found: Findings) -> None:
    start.notes += [f"{file}: {text}" for file, text in (*meta.damaged, *meta.torn)]
    if meta.lost:
        start.notes.append(f"meta log: {meta.lost} records are lost")
    for scan in found.scans:
        name = segment_name(scan.segment)
        if scan.finding in (Finding.FOREIGN, Finding.STALE, Finding.BLANK):
            start.notes.append(f"{name} is not used: {scan.reason}")
        elif scan.finding is Finding.DATA and scan.reason:
            start.notes.append(f"{name} has a damaged header: {scan.reason}")
        if scan.finding is Finding.DATA and scan.footer_damaged:
            start.notes.append(f"{name} has a damaged footer: {scan.footer_fault}")
    if len(found.damaged):
        start.notes.append(f"{len(found.damaged)} shards of the last group are torn")


def _entered(scan: SegmentScan, view: MetaView, *, trusted: bool) -> SegmentState:
    known = view.generations.get(scan.segment, 0)
    state = SegmentState(scan.segment, SegmentPhase.DIRTY, max(known, scan.generation))
    if scan.finding is Finding.FOREIGN:
        state.phase = SegmentPhase.FOREIGN
    elif not trusted:
        return state
    elif scan.finding is Finding.DATA:
        retired = scan.segment in view.retired
        state.phase = SegmentPhase.RETIRED if retired else SegmentPhase.SEALED
        state.first_seq, state.last_seq = scan.first_seq, scan.last_seq
    elif scan.segment in view.retired and scan.finding is not Finding.STALE:
        state.phase = SegmentPhase.RETIRED
    return state


def _fit_cap(start: StartState, geometry: Geometry) -> None:
    """A smaller cap than last time: files go, those without data and the oldest first."""
    order = sorted(
        (s for s in start.segments.values() if s.phase is not SegmentPhase.FOREIGN),
        key=lambda s: (s.last_seq, -s.segment),
    )
    for state in order[: max(0, len(start.segments) - geometry.segments)]:
        start.surplus.append(state.segment)
        del start.segments[state.segment]
        start.notes.append(f"{segment_name(state.segment)} is deleted to fit the disk cap")
    if len(start.segments) > geometry.segments:
        raise DataDirError(
            "the data directory is full of segments of other nodes; move them elsewhere"
        )


def _add_unborn(start: StartState, view: MetaView, geometry: Geometry) -> None:
    number = 0
    while len(start.segments) < geometry.segments:
        if number not in start.segments:
            generation = view.generations.get(number, 0)
            start.segments[number] = SegmentState(number, SegmentPhase.UNBORN, generation)
        number += 1


def _images(start: StartState, found: Findings) -> list[SegmentImage]:
    images = [
        SegmentImage(
            segment=scan.segment,
            generation=scan.generation,
            first_seq=scan.first_seq,
            last_seq=scan.last_seq,
            batch=scan.batch,
            group_seq=scan.group_seq,
            sealed=True,
        )
        for scan in found.scans
        if scan.segment in start.segments and start.segments[scan.segment].last_seq
    ]
    return sorted(images, key=lambda image: image.first_seq)


def _outdated(start: StartState, found: Findings) -> list[RecordArray]:
    """Generation records for segments dropped now that might be read next time."""
    rows: list[RecordArray] = []
    for scan in found.scans:
        state = start.segments.get(scan.segment)
        if state is None or state.phase is not SegmentPhase.DIRTY:
            continue
        if scan.finding is Finding.DATA or (scan.finding is Finding.BLANK and state.generation):
            state.generation += 1
            rows.append(meta_row(MetaKind.GENERATION, state, seq=start.last_seq))
    return rows


def _resumed(
    start: StartState, found: Findings, identity: Identity, geometry: Geometry
) -> SegmentWriter | None:
    """Go on filling the newest segment if it has room, else every restart wastes one."""
    newest = max(start.images, key=lambda image: image.last_seq, default=None)
    if newest is None or start.segments[newest.segment].phase is not SegmentPhase.SEALED:
        return None
    scan = next(scan for scan in found.scans if scan.segment == newest.segment)
    writer = SegmentWriter(_open_state(scan, geometry.segment_bytes), identity)
    # A segment with a damaged header is read, but better not relied upon for more.
    whole = scan.file_bytes >= geometry.segment_bytes and not scan.reason
    if not whole or not writer.fits(GroupPlan.of(RecordBatch(newest.batch.records[:1]))):
        return None
    return writer


def _open_state(scan: SegmentScan, segment_bytes: int) -> OpenSegmentState:
    return OpenSegmentState(
        segment=scan.segment,
        generation=scan.generation,
        segment_bytes=segment_bytes,
        tail=scan.tail,
        first_seq=scan.first_seq,
        last_seq=scan.last_seq,
        records=[scan.batch.records],
        group_seq=[scan.group_seq],
        inline=[scan.batch.inline],
        count=len(scan.batch.records),
        inline_bytes=len(scan.batch.inline),
        footer_off=len(scan.batch.inline) > FOOTER_INLINE_BYTES_MAX,
        footer_current=scan.footer_used,
        # Also a footer that cannot be used is cleared away before the next group.
        trailer_stale=True,
    )


def _seq_floor(scans: list[SegmentScan], meta: RecordArray, *, trusted: bool) -> int:
    """Above every number that a group, a birth or a record ever used."""
    top = max((scan.last_seq for scan in scans), default=0)
    for scan in scans:
        if len(scan.batch.records):
            top = max(top, int(scan.batch.records["birth"].max()))
    if len(meta):
        top = max(top, int(meta["seq"].max()), int(meta["birth"].max()))
    return top + 1 if trusted else top + _LOST_RESERVATION
