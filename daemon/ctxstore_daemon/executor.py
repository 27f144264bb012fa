"""Carries out what the engine decides and tells it what came of it.

Owns running instructions: replies, copies, reads, group writes, meta appends, timers. It must not
decide anything: an error of the outside becomes an event, an error of ours ends the node.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from ctxstore.errors import OutOfSpace, StorageError
from ctxstore.seams import CopyJob
from ctxstore_daemon.engine import events

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    import numpy.typing as npt

    from ctxstore.seams import Clock, Mover, Now
    from ctxstore.wire import messages as wire
    from ctxstore_daemon.engine.machine import Machine
    from ctxstore_daemon.segments.store import SegmentStore
    from ctxstore_daemon.tiers.memory import ArenaMemory

META_BATCH_MAX: Final = 256
"""Meta appends that share one write and one sync."""

RECYCLE_RETRY_S: Final = 1.0

REPORT_AFTER_FULL_S: Final = 10.5
"""A little more than the store waits before it asks a full file system for room again."""

TIMER_SLACK_S: Final = 0.0005
"""Event loops round timers to milliseconds: a timer that fires early would only fire again."""

StreamInstruction = events.SendShards | events.OfferPut | events.PutFinished


class ControlSink(Protocol):
    """Where replies to one control connection go. Neither call may call back into the executor."""

    def deliver(self, message: wire.Reply) -> None:
        """Send one reply; when the connection is gone, nothing happens."""
        ...

    def end(self, reason: str) -> None:
        """Tell the client why, and close."""
        ...


class StreamSink(Protocol):
    """Where the engine's answers to one data connection go; calls do not block."""

    def deliver(self, instruction: StreamInstruction) -> None:
        """Hand over the answer to the request that the connection waits on."""
        ...

    def end(self, reason: str) -> None:
        """Shut the connection down."""
        ...


class _CopiesState:
    """Copies out of one connection's staging, which must outlive them."""

    __slots__ = ("closed", "running", "staging", "when_idle")

    def __init__(self, staging: npt.NDArray[np.uint8]) -> None:
        self.staging = staging
        self.running = 0
        self.closed = False
        self.when_idle: Callable[[], None] | None = None


class Executor:
    """Runs one machine on the running loop.

    Call order: construct, `run` as a task until the node ends, `submit` events from the loop's
    thread only. `submit` carries out everything that needs no waiting before it returns; the
    rest runs in tasks owned by `run`. Cancelling `run` cancels them; buffers that disk and mover
    still use stay alive until those are closed.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        store: SegmentStore,
        mover: Mover,
        clock: Clock,
        arena: ArenaMemory,
    ) -> None:
        self.machine = machine
        self.failure: BaseException | None = None
        """What ended the node, if our own code did."""
        self._store = store
        self._mover = mover
        self._clock = clock
        self._arena = arena.data
        self._controls: dict[int, ControlSink] = {}
        self._streams: dict[int, StreamSink] = {}
        self._copies: dict[int, _CopiesState] = {}
        self._waiting: deque[events.Event] = deque()
        self._handling = False
        self._drained: asyncio.Event | None = None
        self._running = 0
        """Tasks that carry out an instruction now."""
        self._over = False
        """After `run`: late events of threads and transports change nothing any more."""
        self._groups: asyncio.Queue[events.WriteGroup] = asyncio.Queue()
        self._appends: asyncio.Queue[events.AppendMeta] = asyncio.Queue()
        self._tasks: asyncio.TaskGroup | None = None
        self._started = asyncio.Event()
        self._ended = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0
        self._report: asyncio.TimerHandle | None = None
        self._counts = (-1, -1)
        self._actions: dict[type, Callable[..., None]] = {
            events.Reply: self._reply,
            events.CloseConn: self._close_conn,
            events.CopyIn: self._copy_in,
            events.ReadExtents: lambda i: self._spawn(self._read(i)),
            events.WriteGroup: lambda i: self._groups.put_nowait(i),
            events.RecycleSegment: lambda i: self._spawn(self._recycle(i)),
            events.AppendMeta: lambda i: self._appends.put_nowait(i),
            events.ReserveMeta: lambda i: self._spawn(self._reserve(i)),
            events.SendShards: self._stream,
            events.OfferPut: self._stream,
            events.PutFinished: self._stream,
        }

    async def run(self) -> None:
        """Own the tasks until `end` or a failure of our own code, raised as an ExceptionGroup."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                self._started.set()
                workers = [tasks.create_task(self._write_groups())]
                workers.append(tasks.create_task(self._append_metas()))
                await self._ended.wait()
                if self.failure is not None:
                    raise self.failure  # cancels the tasks
                for worker in workers:
                    worker.cancel()
        finally:
            self._over = True
            self._note_drained()
            self._tasks = None
            for timer in (self._timer, self._report):
                if timer is not None:
                    timer.cancel()

    async def drain(self) -> None:
        """Take no new requests and wait until what is in flight is through and data is on disk.

        Cancel it when that takes too long.
        """
        self._drained = asyncio.Event()
        self.submit(events.Stopping())
        self._note_drained()
        await self._drained.wait()

    def _note_drained(self) -> None:
        if self._drained is None:
            return
        over = self._over or self._ended.is_set()
        # With a disk that has failed nothing more is going to be written.
        written = self.machine.quiescent or not self.machine.stats().disk_ok
        if over or (written and not self._running):
            self._drained.set()

    def end(self) -> None:
        """Let `run` return when the tasks that run now are through."""
        self._ended.set()

    async def begin(self, instructions: list[events.Instruction]) -> None:
        """Carry out what loading ordered, and return when it is through; before any `submit`."""
        await self._started.wait()
        for instruction in instructions:
            self._actions[type(instruction)](instruction)
        await self._appends.join()
        await self._groups.join()

    def submit(self, event: events.Event, now: Now | None = None) -> None:
        """Have the machine handle an event and start what it orders.

        `now` saves a reading of the clock where the caller has just made one.
        """
        if self._over:
            return
        if self._handling:  # a sink called back: keep the order of events
            self._waiting.append(event)
            return
        self._handling = True
        try:
            if now is None:
                now = self._clock.now()
            self._handle(event, now)
            while self._waiting:
                self._handle(self._waiting.popleft(), now)
            self._set_timer(now)
            self._note_drained()
        except BaseException as error:
            # The state may be half changed: the node must end and start again from disk.
            self.failure = error
            self._ended.set()
            raise
        finally:
            self._handling = False

    def _handle(self, event: events.Event, now: Now) -> None:
        for instruction in self.machine.handle(event, now):
            self._actions[type(instruction)](instruction)

    # ------------------------------------------------------------------------- connections

    def open_control(
        self, conn: int, sink: ControlSink, staging: npt.NDArray[np.uint8] | None
    ) -> None:
        """Route replies of `conn` to `sink`, its copies to `staging`."""
        self._controls[conn] = sink
        if staging is not None:
            self._copies[conn] = _CopiesState(staging)

    def open_stream(self, conn: int, sink: StreamSink) -> None:
        """Route answers of data connection `conn` to `sink`."""
        self._streams[conn] = sink

    def close_conn(self, conn: int, *, when_idle: Callable[[], None] | None = None) -> None:
        """The connection is gone. `when_idle` is called once no copy reads its staging."""
        self._controls.pop(conn, None)
        self._streams.pop(conn, None)
        copies = self._copies.get(conn)
        if copies is not None:
            copies.when_idle = when_idle
            copies.closed = True
        self.submit(events.ConnClosed(conn))
        if copies is not None and not copies.running:
            self._drop_staging(conn, copies)

    def _drop_staging(self, conn: int, copies: _CopiesState) -> None:
        del self._copies[conn]
        copies.staging = np.zeros(0, np.uint8)
        if copies.when_idle is not None:
            copies.when_idle()

    def _reply(self, instruction: events.Reply) -> None:
        sink = self._controls.get(instruction.conn)
        if sink is not None:
            sink.deliver(instruction.message)

    def _close_conn(self, instruction: events.CloseConn) -> None:
        sink = self._controls.get(instruction.conn) or self._streams.get(instruction.conn)
        if sink is not None:
            sink.end(instruction.reason)

    def _stream(self, instruction: StreamInstruction) -> None:
        sink = self._streams.get(instruction.conn)
        if sink is not None:
            sink.deliver(instruction)
        else:
            self.decline(instruction)

    def decline(self, instruction: StreamInstruction) -> None:
        """Nobody will act on this answer any more: give its pins and slots back."""
        conn, rid = instruction.conn, instruction.rid
        if isinstance(instruction, events.SendShards):
            self.submit(events.StreamGetDone(conn, rid))
        elif isinstance(instruction, events.OfferPut) and len(instruction.lengths):
            count = len(instruction.lengths)
            nothing = np.zeros(count, np.bool_)
            self.submit(events.PayloadDone(conn, rid, nothing, np.zeros(count, np.uint64)))

    # ------------------------------------------------------------------------- bytes

    def _copy_in(self, instruction: events.CopyIn) -> None:
        if instruction.conn < 0:
            self._spawn(self._hash(instruction))
            return
        copies = self._copies[instruction.conn]
        # Counted from here on, not from the task's first step: the connection may close before.
        copies.running += 1
        self._spawn(self._copy(instruction, copies))

    async def _hash(self, instruction: events.CopyIn) -> None:
        jobs = self._copy_jobs(instruction, None, np.zeros(0, np.uint8))
        sums = await self._mover.copy_in(jobs)
        self.submit(events.CopyDone(instruction.copy_id, np.array(sums, np.uint64)))

    async def _copy(self, instruction: events.CopyIn, copies: _CopiesState) -> None:
        inlined = instruction.slot_offsets < 0
        inline = np.empty(int(instruction.lengths[inlined].sum(dtype=np.int64)), np.uint8)
        jobs = self._copy_jobs(instruction, copies.staging, inline)
        sums = await self._mover.copy_in(jobs)
        copies.running -= 1
        self.submit(
            events.CopyDone(instruction.copy_id, np.array(sums, np.uint64), inline.tobytes())
        )
        if not copies.running and copies.closed:
            self._drop_staging(instruction.conn, copies)

    def _copy_jobs(
        self,
        instruction: events.CopyIn,
        staging: npt.NDArray[np.uint8] | None,
        inline: npt.NDArray[np.uint8],
    ) -> list[CopyJob]:
        """One job per item; inline ones go one after another into `inline`."""
        arena = self._arena
        jobs: list[CopyJob] = []
        at = 0
        for source, slot, slot_bytes, length, seed in zip(
            instruction.staging_offsets.tolist(),
            instruction.slot_offsets.tolist(),
            instruction.slot_bytes.tolist(),
            instruction.lengths.tolist(),
            instruction.seeds.tolist(),
            strict=True,
        ):
            if slot < 0:
                target = inline[at : at + length]
                at += length
            else:
                target = arena[slot : slot + slot_bytes]
            origin = None if staging is None else staging[source : source + length]
            jobs.append(CopyJob(source=origin, slot=target, length=length, seed=seed))
        return jobs

    async def _read(self, instruction: events.ReadExtents) -> None:
        statuses = await self._store.read_extents(instruction, self._arena)
        self.submit(events.ReadsDone(instruction.read_id, statuses))

    async def _write_groups(self) -> None:
        while True:
            instruction = await self._groups.get()
            try:
                done: events.Event = await self._store.write_group(instruction, self._arena)
            except OutOfSpace as error:
                done = events.GroupFailed(instruction.group_id, full=True, reason=str(error))
                self._report_later()
            except StorageError as error:
                done = events.GroupFailed(instruction.group_id, full=False, reason=str(error))
            self._groups.task_done()
            # First what is free: the next group must not take what a reclaim needs now.
            self.report_segments()
            self.submit(done)

    async def _recycle(self, instruction: events.RecycleSegment) -> None:
        segment = instruction.segment
        while not self._ended.is_set():
            try:
                await self._store.recycle(segment)
            except OutOfSpace:
                # The meta log is full until its next checkpoint; the segment itself is fine.
                await self._pause(RECYCLE_RETRY_S)
            except StorageError as error:
                self.submit(events.SegmentLost(segment, str(error)))
                break
            else:
                self.submit(events.SegmentRecycled(segment))
                break
        self.report_segments()

    async def _pause(self, delay_s: float) -> None:
        """Let time pass, unless the node ends; nobody who drains waits for this task meanwhile."""
        self._running -= 1
        self._note_drained()
        try:
            async with asyncio.timeout(delay_s):
                await self._ended.wait()
        except TimeoutError:
            return
        finally:
            self._running += 1

    async def _append_metas(self) -> None:
        while True:
            batch = [await self._appends.get()]
            while len(batch) < META_BATCH_MAX and not self._appends.empty():
                batch.append(self._appends.get_nowait())
            try:
                ok = await self._append(batch)
                done = [events.MetaDone(append.meta_id, ok) for append in batch]
            except OutOfSpace:
                # Too much together may still be little enough one by one.
                done = [await self._append_alone(append) for append in batch]
            for answer in done:
                self._appends.task_done()
                self.submit(answer)

    async def _append(self, batch: list[events.AppendMeta]) -> bool:
        """Whether they are in the log; all share one write. Raises OutOfSpace."""
        records = batch[0].records
        if len(batch) > 1:
            records = np.concatenate([append.records for append in batch])
        sync = any(append.sync for append in batch)
        reserved = sum(append.reserved for append in batch)
        try:
            await self._store.append_meta(records, sync, reserved)
        except OutOfSpace:
            raise
        except StorageError:
            return False
        return True

    async def _append_alone(self, append: events.AppendMeta) -> events.MetaDone:
        try:
            return events.MetaDone(append.meta_id, await self._append([append]))
        except OutOfSpace:
            return events.MetaDone(append.meta_id, ok=False, full=True)

    async def _reserve(self, instruction: events.ReserveMeta) -> None:
        try:
            await self._store.reserve_meta(instruction.count)
        except StorageError as error:
            full = isinstance(error, OutOfSpace)
            self.submit(events.MetaDone(instruction.meta_id, ok=False, full=full))
        else:
            self.submit(events.MetaDone(instruction.meta_id, ok=True))

    def _report_later(self) -> None:
        """The store tries a full file system again after a while, of which no event tells."""
        if self._report is None:
            loop = asyncio.get_running_loop()
            self._report = loop.call_later(REPORT_AFTER_FULL_S, self._report_again)

    def _report_again(self) -> None:
        self._report = None
        self.report_segments()
        if self._counts[0] == 0:
            self._report_later()

    def report_segments(self) -> None:
        """Tell the machine how many segments are free, if that has changed."""
        counts = self._store.counts()
        if counts != self._counts:
            self._counts = counts
            free, usable = counts
            self.submit(events.SegmentsChanged(free, usable))

    # ------------------------------------------------------------------------- time

    def _set_timer(self, now: Now) -> None:
        wakeup_ns = self.machine.next_wakeup_ns()
        if wakeup_ns is None:
            return
        if self._timer is not None:
            if self._timer_ns <= wakeup_ns:
                return
            self._timer.cancel()
        delay_s = max(0, wakeup_ns - now.mono_ns) / 1e9 + TIMER_SLACK_S
        self._timer_ns = wakeup_ns
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.submit(events.Tick())

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        assert self._tasks is not None, "instructions before run() or after its end"
        self._running += 1
        self._tasks.create_task(work).add_done_callback(self._ran)

    def _ran(self, task: asyncio.Task[None]) -> None:
        self._running -= 1
        self._note_drained()
