"""The segments and the meta log of one node behind one facade.

Owns which segment is open, free, sealed or retired, and the order of writes between files. It must
not decide what is kept or reclaimed: the engine does. All methods run on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore.errors import DataDirError, DeviceError, OutOfSpace, StorageError
from ctxstore.limits import PAGE_BYTES
from ctxstore_daemon.engine.events import GroupDone, ReadExtents, Statuses, WriteGroup
from ctxstore_daemon.engine.records import (
    META_DTYPE,
    MetaKind,
    RecordArray,
    RecordBatch,
    Recovered,
    SegmentImage,
)
from ctxstore_daemon.segments.files import SegmentFiles, segment_name
from ctxstore_daemon.segments.format import SegmentHeader
from ctxstore_daemon.segments.metaformat import Horizon
from ctxstore_daemon.segments.metalog import MetaLog
from ctxstore_daemon.segments.reader import ExtentReader
from ctxstore_daemon.segments.recovery import Findings, MetaView, recover
from ctxstore_daemon.segments.scan import Finding, SegmentScan
from ctxstore_daemon.segments.writer import (
    GroupPlan,
    OpenSegmentState,
    SegmentWriter,
    payload_slices,
    write_segment_header,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from ctxstore.seams import ByteBuffer, Clock, Disk, Mover
    from ctxstore_daemon.segments.geometry import Geometry
    from ctxstore_daemon.segments.identity import Identity
    from ctxstore_daemon.segments.metareader import MetaFound

_LOG: Final = logging.getLogger(__name__)

_UNBORN_RETRY_NS: Final = 10_000_000_000
"""After the file system refused room for a new segment, it is asked again after this time."""

_LOST_RESERVATION: Final = 1 << 32
"""Where the reservation of sequence numbers is lost, this many are skipped."""


class SegmentPhase(Enum):
    """Life of a segment number."""

    UNBORN = "no file yet"
    DIRTY = "file without data, needs a header of a new generation"
    FREE = "synced header of a generation that has no data"
    OPEN = "takes groups"
    SEALED = "full, or of an earlier run"
    RECYCLING = "header being rewritten"
    RETIRED = "a write or sync failed: read only, for ever"
    FOREIGN = "not ours: never touched"


@dataclass(slots=True)
class SegmentState:
    """One segment number. Changed only in this file."""

    segment: int
    phase: SegmentPhase
    generation: int = 0
    first_seq: int = 0
    last_seq: int = 0


@dataclass(slots=True)
class StoreState:
    """Counters since start, for metrics; `notes` are findings of the start for a person."""

    groups: int = 0
    group_bytes: int = 0
    groups_failed: int = 0
    extents_read: int = 0
    segments_recycled: int = 0
    segments_retired: int = 0
    notes: list[str] = field(default_factory=list)


class SegmentStore:
    """Order: `open`, then the other methods from any task, `close` last.

    One group is written at a time; a second caller waits. Extents may be read and records appended
    meanwhile. A cancelled call may have taken effect.
    """

    def __init__(
        self, disk: Disk, *, identity: Identity, geometry: Geometry, clock: Clock, mover: Mover
    ) -> None:
        self._disk = disk
        self._identity = identity
        self._geometry = geometry
        self._clock = clock
        self._files = SegmentFiles(disk)
        self._reader = ExtentReader(self._files, mover, self._readable_generation)
        self._segments: dict[int, SegmentState] = {}
        self._writer: SegmentWriter | None = None
        self._last_seq = 0
        self._write_lock = asyncio.Lock()
        self._unborn_blocked_until_ns = 0
        self._state = StoreState()
        self._meta: MetaLog

    @classmethod
    async def open(
        cls, disk: Disk, *, identity: Identity, geometry: Geometry, clock: Clock, mover: Mover
    ) -> tuple[SegmentStore, Recovered]:
        """Recover the directory and make it writable. Raises StorageError."""
        store = cls(disk, identity=identity, geometry=geometry, clock=clock, mover=mover)
        try:
            recovered = await store._recover(mover)
        except BaseException:
            await store._files.close()
            raise
        return store, recovered

    @property
    def geometry(self) -> Geometry:
        """Sizes of this directory."""
        return self._geometry

    @property
    def state(self) -> StoreState:
        """Counters, to be read."""
        return self._state

    def counts(self) -> tuple[int, int]:
        """(segments that can be opened now, segments that are not retired or foreign)."""
        free = usable = 0
        unborn = self._clock.now().mono_ns >= self._unborn_blocked_until_ns
        for state in self._segments.values():
            if state.phase in (SegmentPhase.RETIRED, SegmentPhase.FOREIGN):
                continue
            usable += 1
            free += state.phase in (SegmentPhase.FREE, SegmentPhase.DIRTY)
            free += state.phase is SegmentPhase.UNBORN and unborn
        return free, usable

    # -------------------------------------------------------------------------- groups

    async def write_group(self, order: WriteGroup, arena: npt.NDArray[np.uint8]) -> GroupDone:
        """Append and sync one group straight from the arena.

        Raises OutOfSpace (no segment can be opened, or the group is too large) or DeviceError (the
        segment is retired). Nothing of a failed group counts; it is never tried again here.
        """
        plan = GroupPlan.of(order.batch)
        payloads = payload_slices(arena, plan, order.slot_offsets)
        async with self._write_lock:
            try:
                writer = await self._writer_for(plan)
                pages = await self._append(writer, plan, payloads, seq=order.seq)
            except StorageError:
                self._state.groups_failed += 1
                raise
            self._state.groups += 1
            self._state.group_bytes += plan.total_bytes
            return GroupDone(
                order.group_id, writer.state.segment, writer.state.generation, order.seq, pages
            )

    async def _append(
        self,
        writer: SegmentWriter,
        plan: GroupPlan,
        payloads: list[ByteBuffer],
        *,
        seq: int,
    ) -> npt.NDArray[np.uint32]:
        segment = writer.state.segment
        try:
            async with self._files.with_file(segment) as file:
                pages = await writer.append(
                    file, plan, payloads, seq=seq, synced_seq=self._last_seq
                )
        except OutOfSpace:
            # The file system has no room after all. The segment is good up to its tail.
            await self._seal_open()
            raise
        except StorageError as error:
            await self._retire(segment, str(error))
            raise
        except BaseException:
            # Cancelled: the write may still be running, so nothing may be written over it.
            self._writer = None
            self._segments[segment].phase = SegmentPhase.SEALED
            raise
        state = self._segments[segment]
        state.first_seq = state.first_seq or seq
        state.last_seq = self._last_seq = seq
        return pages

    async def _writer_for(self, plan: GroupPlan) -> SegmentWriter:
        if plan.total_bytes > self._geometry.group_bytes_max:
            raise OutOfSpace(
                f"a group of {plan.total_bytes} bytes, at most {self._geometry.group_bytes_max}"
            )
        if self._writer is not None and not self._writer.fits(plan):
            await self._seal_open()
        if self._writer is None:
            self._writer = await self._open_next()
        return self._writer

    async def _seal_open(self) -> None:
        """Write the open segment's footer; without it recovery walks the group headers."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        segment = writer.state.segment
        self._segments[segment].phase = SegmentPhase.SEALED
        try:
            async with self._files.with_file(segment) as file:
                await writer.seal(file)
        except OutOfSpace as error:
            _LOG.warning("footer_skipped segment=%d reason=%s", segment, error)
        except StorageError as error:
            self._writer = writer
            await self._retire(segment, str(error))

    async def _retire(self, segment: int, reason: str) -> None:
        """Never write to this segment again: what a failed write or sync left is not known."""
        state = self._segments[segment]
        state.phase = SegmentPhase.RETIRED
        self._state.segments_retired += 1
        _LOG.error("segment_retired segment=%d reason=%s", segment, reason)
        tail = PAGE_BYTES
        if self._writer is not None and self._writer.state.segment == segment:
            tail = self._writer.state.tail
            self._writer = None
        row = _meta_row(MetaKind.RETIRED, state, seq=self._last_seq)
        row["page"] = tail // PAGE_BYTES
        try:
            await self._meta.append(row, sync=True, vital=True)
        except StorageError as error:
            _LOG.error("segment_retired_unrecorded segment=%d reason=%s", segment, error)

    # -------------------------------------------------------------------------- segments

    async def _open_next(self) -> SegmentWriter:
        """Open a free segment; one with a file before one without."""
        order = (SegmentPhase.FREE, SegmentPhase.DIRTY, SegmentPhase.UNBORN)
        for phase in order:
            if (
                phase is SegmentPhase.UNBORN
                and self._clock.now().mono_ns < self._unborn_blocked_until_ns
            ):
                break
            candidates = [s for s in self._segments.values() if s.phase is phase]
            if not candidates:
                continue
            state = min(candidates, key=lambda s: s.segment)
            if phase is not SegmentPhase.FREE:
                await self._renew(state)
            state.phase = SegmentPhase.OPEN
            opened = OpenSegmentState(state.segment, state.generation, self._geometry.segment_bytes)
            return SegmentWriter(opened, self._identity)
        raise OutOfSpace("no free segment: all hold data that is still wanted")

    async def recycle(self, segment: int) -> None:
        """Make a sealed segment free under a new generation, durable on return.

        Its data is gone from the first moment. Raises DeviceError (the segment is retired) or, when
        the meta log is full, OutOfSpace (nothing was done: call again later).
        """
        state = self._segments[segment]
        if state.phase is SegmentPhase.RETIRED:
            raise DeviceError(f"segment {segment} is retired: its disk space is not trusted")
        assert state.phase is SegmentPhase.SEALED, f"segment {segment} is {state.phase.value}"
        try:
            await self._renew(state)
        except OutOfSpace:
            if state.phase is SegmentPhase.SEALED:
                raise
            # Only its file could not be made whole: it is free, and made anew when there is room.
        self._state.segments_recycled += 1

    async def _renew(self, state: SegmentState) -> None:
        """Generation + 1: recorded in the meta log, then written and synced in the header."""
        before, state.phase = state.phase, SegmentPhase.RECYCLING
        name = segment_name(state.segment)
        row = _meta_row(MetaKind.GENERATION, state, seq=self._last_seq)
        row["generation"] += 1
        try:
            await self._meta.append(row, sync=True, vital=True)
        except BaseException:
            state.phase = before
            raise
        state.generation += 1
        try:
            # Also where there should be a file already: it may be cut short or deleted.
            await self._files.forget(state.segment)
            await self._disk.allocate(name, self._geometry.segment_bytes)
            await self._disk.sync_dir()
            header = SegmentHeader(
                segment=state.segment,
                node_id=self._identity.node_id,
                generation=state.generation,
                segment_bytes=self._geometry.segment_bytes,
                created_wall_ns=self._clock.now().wall_ns,
            )
            async with self._files.with_file(state.segment) as file:
                await write_segment_header(file, header)
        except OutOfSpace:
            # What was allocated would count against the cap and serve nobody; the data is gone.
            await self._files.forget(state.segment)
            await self._disk.remove(name)
            state.phase = SegmentPhase.UNBORN
            self._unborn_blocked_until_ns = self._clock.now().mono_ns + _UNBORN_RETRY_NS
            raise
        except StorageError as error:
            await self._retire(state.segment, str(error))
            raise
        state.phase = SegmentPhase.FREE
        state.first_seq = state.last_seq = 0

    # -------------------------------------------------------------------------- reads, meta, end

    async def read_extents(self, order: ReadExtents, arena: npt.NDArray[np.uint8]) -> Statuses:
        """Read and verify extents; a ReadStatus each, in order. Raises nothing for disk faults."""
        self._state.extents_read += len(order.segments)
        return await self._reader.read(order, arena)

    async def append_meta(self, records: RecordArray, sync: bool) -> None:
        """Append META_DTYPE records; with `sync` durable on return. See `MetaLog.append`."""
        await self._meta.append(records, sync=sync)

    async def close(self) -> None:
        """Write the footer, sync the meta log, close all files. No other call may be running."""
        async with self._write_lock:
            try:
                await self._seal_open()
                await self._meta.close()
            finally:
                await self._files.close()

    def _readable_generation(self, segment: int) -> int | None:
        state = self._segments.get(segment)
        if state is None or state.phase not in (
            SegmentPhase.OPEN,
            SegmentPhase.SEALED,
            SegmentPhase.RETIRED,
        ):
            return None
        return state.generation

    def _horizon(self) -> Horizon:
        """Nothing readable, now or after the group in flight, is older than `oldest_seq`."""
        firsts = [s.first_seq for s in self._segments.values() if s.first_seq]
        return Horizon(min([*firsts, self._last_seq + 1]), self._clock.now().wall_ns)

    # -------------------------------------------------------------------------- start

    async def _recover(self, mover: Mover) -> Recovered:
        self._meta, meta = await MetaLog.open(
            self._disk,
            identity=self._identity,
            file_bytes_max=self._geometry.meta_file_bytes_max,
        )
        view = MetaView.of(meta.records)
        found = await recover(
            self._disk, self._files, identity=self._identity, meta=view, mover=mover
        )
        self._note(meta, found)
        # A generation is recorded before its first data: data without a record is a lost record.
        unknown = [
            segment_name(scan.segment)
            for scan in found.scans
            if scan.last_seq and scan.generation > view.generations.get(scan.segment, 0)
        ]
        trusted = meta.lost == 0 and not unknown
        if not trusted:
            self._note_text("removals may be lost with the meta log: all stored shards are dropped")
        for scan in found.scans:
            self._enter(scan, view, trusted=trusted)
        for segment, reason in found.unreadable.items():
            # Perhaps it can be read next time: no tombstone may be forgotten until then.
            self._segments[segment] = SegmentState(
                segment, SegmentPhase.RETIRED, view.generations.get(segment, 0), first_seq=1
            )
            self._note_text(f"{segment_name(segment)} cannot be read: {reason}")
        await self._fit_cap()
        self._last_seq = max((s.last_seq for s in self._segments.values()), default=0)
        for segment in range(self._geometry.segments + len(self._segments)):
            if len(self._segments) >= self._geometry.segments:
                break
            self._segments.setdefault(
                segment,
                SegmentState(segment, SegmentPhase.UNBORN, view.generations.get(segment, 0)),
            )
        images = self._images(found)
        await self._meta.start(
            self._horizon, extra=np.concatenate([found.damaged, self._outdate(found)])
        )
        open_image = await self._resume(found, images)
        records = np.concatenate([meta.records, found.damaged])
        floor = _seq_floor(found.scans, meta.records, trusted=trusted)
        return Recovered(tuple(open_image), records, floor)

    def _enter(self, scan: SegmentScan, view: MetaView, *, trusted: bool) -> None:
        known = view.generations.get(scan.segment, 0)
        state = SegmentState(scan.segment, SegmentPhase.DIRTY, max(known, scan.generation))
        if scan.finding is Finding.FOREIGN:
            state.phase = SegmentPhase.FOREIGN
        elif scan.finding is Finding.DATA and trusted:
            retired = scan.segment in view.retired
            state.phase = SegmentPhase.RETIRED if retired else SegmentPhase.SEALED
            state.first_seq, state.last_seq = scan.first_seq, scan.last_seq
        elif scan.segment in view.retired and scan.finding is not Finding.STALE:
            state.phase = SegmentPhase.RETIRED
        self._segments[scan.segment] = state

    def _outdate(self, found: Findings) -> RecordArray:
        """Generation records for segments dropped now that might be read next time."""
        rows = [np.zeros(0, META_DTYPE)]
        for scan in found.scans:
            state = self._segments.get(scan.segment)
            if state is None or state.phase is not SegmentPhase.DIRTY:
                continue
            if scan.finding is Finding.DATA or (scan.finding is Finding.BLANK and state.generation):
                state.generation += 1
                rows.append(_meta_row(MetaKind.GENERATION, state, seq=self._last_seq))
        return np.concatenate(rows)

    async def _fit_cap(self) -> None:
        """A smaller cap than last time: files go, those without data and the oldest first."""
        order = sorted(
            (s for s in self._segments.values() if s.phase is not SegmentPhase.FOREIGN),
            key=lambda s: (s.last_seq, -s.segment),
        )
        surplus = len(self._segments) - self._geometry.segments
        for state in order[: max(0, surplus)]:
            await self._files.forget(state.segment)
            await self._disk.remove(segment_name(state.segment))
            del self._segments[state.segment]
            self._note_text(f"{segment_name(state.segment)} deleted to fit the disk cap")
        if len(self._segments) > self._geometry.segments:
            raise DataDirError(
                "the data directory is full of segments of other nodes; move them elsewhere"
            )

    def _images(self, found: Findings) -> list[SegmentImage]:
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
            if scan.segment in self._segments and self._segments[scan.segment].first_seq
        ]
        return sorted(images, key=lambda image: image.first_seq)

    async def _resume(self, found: Findings, images: list[SegmentImage]) -> list[SegmentImage]:
        """Go on filling the newest segment if it has room, else every restart wastes one."""
        newest = max(images, key=lambda image: image.last_seq, default=None)
        if newest is None or self._segments[newest.segment].phase is not SegmentPhase.SEALED:
            return images
        scan = next(scan for scan in found.scans if scan.segment == newest.segment)
        writer = SegmentWriter(_open_state(scan, self._geometry.segment_bytes), self._identity)
        # A segment with a damaged header is read, but better not relied upon for more.
        whole = scan.file_bytes >= self._geometry.segment_bytes and not scan.reason
        if not whole or not writer.fits(GroupPlan.of(RecordBatch(newest.batch.records[:1]))):
            return images
        try:
            async with self._files.with_file(newest.segment) as file:
                # The last group may be complete and not durable; it is about to be relied upon.
                await file.fdatasync()
        except StorageError as error:
            self._writer = writer
            await self._retire(newest.segment, str(error))
            return images
        self._writer = writer
        self._segments[newest.segment].phase = SegmentPhase.OPEN
        return [_with_open(image) if image is newest else image for image in images]

    def _note(self, meta: MetaFound, found: Findings) -> None:
        for file, text in (*meta.damaged, *meta.torn):
            self._note_text(f"{file}: {text}")
        if meta.lost:
            self._note_text(f"meta log: {meta.lost} records are lost")
        for scan in found.scans:
            name = segment_name(scan.segment)
            if scan.finding in (Finding.FOREIGN, Finding.STALE, Finding.BLANK):
                self._note_text(f"{name} is not used: {scan.reason}")
            elif scan.finding is Finding.DATA and scan.reason:
                self._note_text(f"{name} has a damaged header: {scan.reason}")
            if scan.finding is Finding.DATA and scan.footer_damaged:
                self._note_text(f"{name} has a damaged footer: {scan.footer_fault}")
        if len(found.damaged):
            self._note_text(f"{len(found.damaged)} shards of the last group are torn")

    def _note_text(self, text: str) -> None:
        _LOG.warning("recovery %s", text)
        self._state.notes.append(text)


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
        footer_current=scan.footer_used,
        # Also a footer that cannot be used is cleared away before the next group.
        trailer_stale=True,
    )


def _with_open(image: SegmentImage) -> SegmentImage:
    return SegmentImage(
        segment=image.segment,
        generation=image.generation,
        first_seq=image.first_seq,
        last_seq=image.last_seq,
        batch=image.batch,
        group_seq=image.group_seq,
        sealed=False,
    )


def _meta_row(kind: MetaKind, state: SegmentState, *, seq: int) -> RecordArray:
    row: RecordArray = np.zeros(1, META_DTYPE)
    row["kind"] = int(kind)
    row["segment"] = state.segment
    row["generation"] = state.generation
    row["seq"] = seq
    return row


def _seq_floor(scans: list[SegmentScan], meta: RecordArray, *, trusted: bool) -> int:
    """Above every number that a group, a birth or a record ever used."""
    top = max((scan.last_seq for scan in scans), default=0)
    for scan in scans:
        if len(scan.batch.records):
            top = max(top, int(scan.batch.records["birth"].max()))
    if len(meta):
        top = max(top, int(meta["seq"].max()), int(meta["birth"].max()))
    return top + 1 if trusted else top + _LOST_RESERVATION
