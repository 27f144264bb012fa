"""The segments and the meta log of one node behind one facade.

Owns which segment is open, free, sealed or retired, and the order of writes between files. It must
not decide what is kept or reclaimed: the engine does. All methods run on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore.errors import DeviceError, OutOfSpace, StorageError
from ctxstore.limits import PAGE_BYTES
from ctxstore_daemon.engine.events import GroupDone, ReadExtents, Statuses, WriteGroup
from ctxstore_daemon.engine.records import MetaKind, RecordArray, RecordBatch, Recovered
from ctxstore_daemon.segments.files import SegmentFiles, segment_name
from ctxstore_daemon.segments.format import SegmentHeader
from ctxstore_daemon.segments.metaformat import Horizon
from ctxstore_daemon.segments.metalog import MetaLog
from ctxstore_daemon.segments.reader import ExtentReader
from ctxstore_daemon.segments.recovery import MetaView, recover
from ctxstore_daemon.segments.startup import plan_start
from ctxstore_daemon.segments.states import SegmentPhase, SegmentState, StoreState, meta_row
from ctxstore_daemon.segments.writer import (
    GroupPlan,
    OpenSegmentState,
    SegmentWriter,
    payload_slices,
    write_segment_header,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from ctxstore.seams import ByteBuffer, Clock, Disk, Mover
    from ctxstore_daemon.segments.geometry import Geometry
    from ctxstore_daemon.segments.identity import Identity

_LOG: Final = logging.getLogger(__name__)

_UNBORN_RETRY_NS: Final = 10_000_000_000
"""After the file system refused room for a new segment, it is asked again after this time."""


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
        payloads = payload_slices(arena, order.batch, order.slot_offsets)
        return await self.append_group(
            order.batch, payloads, group_id=order.group_id, seq=order.seq
        )

    async def append_group(
        self, batch: RecordBatch, payloads: list[ByteBuffer], *, group_id: int, seq: int
    ) -> GroupDone:
        """`write_group` from buffers of whole pages: the extents of `batch`, in record order."""
        plan = GroupPlan.of(batch)
        async with self._write_lock:
            try:
                writer = await self._writer_for(plan)
                pages = await self._append(writer, plan, payloads, seq=seq)
            except StorageError:
                self._state.groups_failed += 1
                raise
            self._state.groups += 1
            self._state.group_bytes += plan.total_bytes
            return GroupDone(group_id, writer.state.segment, writer.state.generation, seq, pages)

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
        empty = OpenSegmentState(0, 0, self._geometry.segment_bytes)
        if not SegmentWriter(empty, self._identity).fits(plan):
            raise OutOfSpace(f"a group of {plan.total_bytes} bytes fits no segment")
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
        row = meta_row(MetaKind.RETIRED, state, seq=self._last_seq)
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
        row = meta_row(MetaKind.GENERATION, state, seq=self._last_seq)
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

    async def read_into(
        self, order: ReadExtents, slots: Sequence[npt.NDArray[np.uint8]]
    ) -> Statuses:
        """`read_extents` into buffers of whole pages, one for each extent."""
        self._state.extents_read += len(order.segments)
        return await self._reader.read_into(order, slots)

    async def reserve_meta(self, count: int) -> None:
        """Keep room for records in the meta log. See `MetaLog.reserve`."""
        await self._meta.reserve(count)

    async def append_meta(self, records: RecordArray, sync: bool, reserved: int = 0) -> None:
        """Append META_DTYPE records; with `sync` durable on return. See `MetaLog.append`."""
        # Without numbers nothing works any more, and a reservation replaces the one before.
        vital = records["kind"] == MetaKind.SEQUENCE
        await self._meta.append(records[vital], sync=sync, vital=True)
        await self._meta.append(records[~vital], sync=sync, reserved=reserved)

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
        start = plan_start(meta, view, found, identity=self._identity, geometry=self._geometry)
        for text in start.notes:
            _LOG.warning("recovery %s", text)
        self._state.notes = start.notes
        self._segments, self._last_seq = start.segments, start.last_seq
        for segment in start.surplus:
            await self._files.forget(segment)
            await self._disk.remove(segment_name(segment))
        await self._meta.start(self._horizon, extra=start.extra)
        resuming = None if start.writer is None else start.writer.state.segment
        for segment in found.unsynced:
            if segment != resuming and segment in start.segments:
                try:
                    await self._sync_segment(segment)
                except StorageError as error:
                    _LOG.warning("segment_unsynced segment=%d reason=%s", segment, error)
        if start.writer is not None:
            await self._resume(start.writer)
        resumed = None if self._writer is None else self._writer.state.segment
        images = tuple(replace(image, sealed=image.segment != resumed) for image in start.images)
        return Recovered(images, np.concatenate([meta.records, found.damaged]), start.seq_floor)

    async def _resume(self, writer: SegmentWriter) -> None:
        """Go on with the segment that was open, if it can still be synced."""
        segment = writer.state.segment
        self._writer = writer
        try:
            await self._sync_segment(segment)
        except StorageError as error:
            await self._retire(segment, str(error))
        else:
            self._segments[segment].phase = SegmentPhase.OPEN

    async def _sync_segment(self, segment: int) -> None:
        """Make durable what recovery found: a process that was killed leaves its last group in the
        page cache, complete and readable, and the next loss of power takes it.
        """
        async with self._files.with_file(segment) as file:
            await file.fdatasync()
