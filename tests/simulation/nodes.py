"""One simulated machine: its disk and clock live on, its node process is started, killed, stopped.

Owns what listeners, data threads and the process do in a real daemon, on the virtual clock. All
that it serves comes from the real node: sessions, executor, engine, segments.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from ctxstore import limits
from ctxstore.config import DaemonConfig
from ctxstore.testing.mover import InlineMover
from ctxstore_daemon import node as node_module
from ctxstore_daemon.node import Node, Seams
from ctxstore_daemon.server.shm import StagingGrant
from ctxstore_daemon.tiers.memory import HeapArena
from tests.simulation.streams import SimStream
from tests.simulation.watch import DeviceWatch, WatchedMachine

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    import numpy.typing as npt

    from ctxstore.testing.clock import SimClock
    from ctxstore.testing.disk import CrashKind, SimDisk
    from ctxstore.testing.network import SimEnd, SimNetwork


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig(DaemonConfig):
    """A configuration with a memory so small that it is always full."""

    sim_arena_bytes: int = 8 * limits.MIB
    sim_staging_bytes: int = 4 * limits.MIB

    @property
    def arena_bytes(self) -> int:
        return self.sim_arena_bytes

    @property
    def staging_bytes_max(self) -> int:
        return self.sim_staging_bytes


class SimHost:
    """A machine that clients connect to. Implements `tests.simulation.driver.Machine`."""

    def __init__(
        self,
        config: SimConfig,
        *,
        disk: SimDisk,
        clock: SimClock,
        network: SimNetwork,
        watch: DeviceWatch,
        rng: Random,
    ) -> None:
        self.config = config
        self.disk = disk
        self.clock = clock
        self.network = network
        self.watch = watch
        self.machine_class: type[WatchedMachine] = WatchedMachine
        self.mover_delay_s = 0.0
        self.damage_chance = 0.01
        """How often a payload of a put over a data connection is damaged on its way."""
        self.node: Node | None = None
        self.starts = 0
        self.failure: BaseException | None = None
        """What ended a node that nobody had killed or stopped."""
        self.broken = asyncio.Event()
        watch.disk_bytes = lambda: (self.disk.total_bytes(), config.disk.cap_bytes)
        self._rng = rng
        self._arena = HeapArena(limits.HUGE_PAGE_BYTES)
        self._staging: dict[SimEnd, npt.NDArray[np.uint8] | None] = {}
        self._ends: dict[SimEnd, None] = {}
        self._streams: dict[SimStream, None] = {}

    # ------------------------------------------------------------------------- process

    async def start(self) -> None:
        """Start the node process on what the disk holds. Raises what the node's start raises."""
        assert self.node is None, "one process at a time"
        self._arena = HeapArena(self.config.arena_bytes)
        self.watch.begin_node(self._arena.generations)
        seams = Seams(
            clock=self.clock,
            disk=self.disk,
            mover=InlineMover(delay_s=self.mover_delay_s),
            arena=self._arena,
            rng=self._rng,
            token_bytes=self._rng.randbytes,
        )
        node = Node(self.config, seams)

        def make_machine(settings: Any, **rest: Any) -> WatchedMachine:
            machine = self.machine_class(settings, **rest)
            machine.watch = self.watch
            return machine

        with mock.patch.object(node_module, "Machine", make_machine):
            await node.start()
        self.node = node
        self.starts += 1
        assert node._runner is not None, "a node that has started runs"
        node._runner.add_done_callback(lambda runner: self._ended(node, runner))

    def fail(self, error: BaseException) -> None:
        """Something broke that must not."""
        if self.failure is None:
            self.failure = error
        self.broken.set()

    def _ended(self, node: Node, runner: asyncio.Task[None]) -> None:
        if self.node is node:
            error = None if runner.cancelled() else runner.exception()
            self.fail(error or RuntimeError("the node ended by itself"))

    async def kill(self, kind: CrashKind) -> None:
        """SIGKILL or loss of power: the process runs no more, the disk is what it left."""
        node, self.node = self.node, None
        self._hang_up()
        old, self.disk = self.disk, self.disk.crash(kind)
        assert old.dead, "the dead process must not reach the new disk"
        if node is not None:
            await _bury(node)

    async def stop(self, deadline_s: float = 5.0) -> None:
        """SIGTERM."""
        node, self.node = self.node, None
        assert node is not None, "no process runs"
        streams = list(self._streams)
        for stream in streams:
            stream.end("stopping")
        await node.stop(deadline_s)
        self._hang_up()

    def _hang_up(self) -> None:
        """The kernel closes what a dead process had open."""
        for stream in list(self._streams):
            stream.forget()
        for end in list(self._ends):
            end.on_data = _ignore
            end.on_closed = _nothing
        self._ends.clear()
        self._streams.clear()
        self.network.cut_all()

    # ------------------------------------------------------------------------- connections

    def connect(self, *, stream: bool, local: bool) -> SimEnd:
        """See `Machine.connect` of the driver."""
        if self.node is None:
            raise ConnectionRefusedError("nobody listens")
        if stream:
            return self.network.connect(self._accept_stream)
        return self.network.connect(self._accept_local if local else self._accept_remote)

    def descriptors(self, end: SimEnd) -> tuple[HeapArena, npt.NDArray[np.uint8] | None]:
        """See `Machine.descriptors` of the driver."""
        return self._arena, self._staging.get(end.peer)

    def _accept_local(self, end: SimEnd) -> None:
        self._accept_control(end, lambda size: self._grant(end, size))

    def _accept_remote(self, end: SimEnd) -> None:
        self._accept_control(end, None)

    def _accept_control(self, end: SimEnd, shm: Callable[[int], StagingGrant] | None) -> None:
        assert self.node is not None, "connect() saw to that"
        outlet = _EndOutlet(end)
        connection = self.node.connect(outlet, shm=shm)
        self._ends[end] = None

        def closed() -> None:
            self._ends.pop(end, None)
            self._staging.pop(end, None)
            connection.closed()

        outlet.on_ended = closed
        end.on_data = connection.receive
        end.on_closed = closed

    def _grant(self, end: SimEnd, size: int) -> StagingGrant:
        data = np.zeros(size, np.uint8)
        self._staging[end] = data

        def release(then: Callable[[], None]) -> None:
            # As if unmapped: a copy that still runs would spread these.
            data[:] = 0xDD
            then()

        return StagingGrant(data, release)

    def _accept_stream(self, end: SimEnd) -> None:
        assert self.node is not None, "connect() saw to that"
        stream = SimStream(
            self.node,
            end,
            arena=self._arena.data,
            clock=self.clock,
            on_over=self._stream_over,
            rng=self._rng,
            damage_chance=self.damage_chance,
        )
        self._streams[stream] = None
        self._ends[end] = None

    def _stream_over(self, stream: SimStream) -> None:
        self._streams.pop(stream, None)
        self._ends.pop(stream.end_point, None)


async def _bury(node: Node) -> None:
    """Cancel every task of a node whose process is gone; whatever they still raise is moot."""
    runner = node._runner
    executor = node._executor
    if executor is not None and executor._timer is not None:
        executor._timer.cancel()
    if runner is not None:
        runner.cancel()
        await asyncio.wait([runner])
        with contextlib.suppress(BaseException):
            runner.result()


class _EndOutlet:
    """`Outlet` of a control connection."""

    def __init__(self, end: SimEnd) -> None:
        self._end = end
        self.on_ended: Callable[[], None] = _nothing

    def write(self, frame: bytes) -> None:
        self._end.write(frame)

    def end(self) -> None:
        if not self._end.closed:
            self._end.close()
            asyncio.get_running_loop().call_soon(self.on_ended)


def _ignore(_data: bytes) -> None:
    """A dead process hears nothing."""


def _nothing() -> None:
    """A dead process does nothing."""
