"""One node, put together from its configuration and the seams of the machine it runs on.

Owns the order of start and stop. It has no sockets, threads or clock of its own, so the same node
runs in a daemon and on a virtual clock: connections come in as `Greeting`s or through `connect`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from ctxstore import __version__, checksum, limits
from ctxstore.config import DaemonConfig, NamespaceDurability
from ctxstore.errors import ClosedError
from ctxstore.wire import messages as wire
from ctxstore_daemon.engine import events
from ctxstore_daemon.engine.machine import Machine
from ctxstore_daemon.engine.settings import EngineSettings, NamespaceSettings
from ctxstore_daemon.executor import Executor
from ctxstore_daemon.segments.identity import open_identity
from ctxstore_daemon.segments.store import SegmentStore
from ctxstore_daemon.server.session import (
    Greeting,
    NamespaceFacts,
    NodeFacts,
    Outlet,
    PlainConnection,
    ServerState,
)
from ctxstore_daemon.server.shm import StagingBudgetState, StagingGrant
from ctxstore_daemon.telemetry.health import HealthFacts
from ctxstore_daemon.telemetry.log import event_log

if TYPE_CHECKING:
    from collections.abc import Callable

    from ctxstore.seams import Clock, Disk, Mover, Rng
    from ctxstore_daemon.segments.geometry import Geometry
    from ctxstore_daemon.segments.identity import Identity
    from ctxstore_daemon.tiers.memory import ArenaMemory

STOP_RESERVE: Final = 0.2
"""Part of the stop deadline kept for syncing and footers."""

NOTES_SHOWN_MAX: Final = 20
"""Findings of the recovery in the statistics, which must fit one reply; the log has them all."""

_log = event_log(__name__)


class NodePhase(Enum):
    """How far a node's life has come."""

    NEW = "new"
    RECOVERING = "recovering"
    SERVING = "serving"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Seams:
    """The machine a node runs on. `token_bytes` makes secrets of a given length."""

    clock: Clock
    disk: Disk
    mover: Mover
    arena: ArenaMemory
    rng: Rng
    token_bytes: Callable[[int], bytes]
    about_arena: Callable[[], dict[str, Any]] = dict
    """More figures of the arena for the statistics: which pages were obtained."""
    about_disk: Callable[[], dict[str, Any]] = dict
    """Figures of the disk for the statistics: which I/O engine was obtained."""


class Node:
    """A node between `start` and `stop`, on the running loop.

    Call order: construct, `await start()`, connections, `await stop(...)`; `wait_failed` beside
    them. A start that raised or was cancelled needs no stop. All calls on the loop's thread.
    """

    def __init__(self, config: DaemonConfig, seams: Seams) -> None:
        self.config = config
        self.phase = NodePhase.NEW
        self._seams = seams
        self._store: SegmentStore | None = None
        self._executor: Executor | None = None
        self._runner: asyncio.Task[None] | None = None
        self._server: ServerState | None = None
        self._started_ns = 0

    @property
    def server(self) -> ServerState:
        """What connections need; there from `start` on."""
        assert self._server is not None, "the node has not been started"
        return self._server

    @property
    def executor(self) -> Executor:
        """Events of the outside go in here; there from `start` on."""
        assert self._executor is not None, "the node has not been started"
        return self._executor

    @property
    def machine(self) -> Machine:
        """The engine, for questions only."""
        return self.executor.machine

    @property
    def node_id(self) -> bytes:
        """16 bytes, drawn at the first start of the data directory."""
        return self.server.facts.node_id

    async def start(self) -> None:
        """Recover what the disk holds and begin to serve.

        Raises DataDirError, ConfigError or another StorageError when the directory cannot be used.
        """
        assert self.phase is NodePhase.NEW, "a node is started once"
        self.phase = NodePhase.RECOVERING
        seams, config = self._seams, self.config
        identity, geometry = await open_identity(
            seams.disk,
            cluster_id=config.node.cluster_id,
            disk_bytes=config.disk.cap_bytes,
            rng=seams.rng,
        )
        began = seams.clock.now()
        store, recovered = await SegmentStore.open(
            seams.disk,
            identity=identity,
            geometry=geometry,
            clock=seams.clock,
            mover=seams.mover,
        )
        self._store = store
        try:
            settings = engine_settings(config, geometry)
            machine = Machine(settings, generations=seams.arena.generations)
            orders = machine.load(recovered, seams.clock.now())
            executor = Executor(
                machine, store=store, mover=seams.mover, clock=seams.clock, arena=seams.arena
            )
            self._executor = executor
            self._server = self._make_server(identity, settings, executor)
            self._runner = asyncio.create_task(executor.run(), name="executor")
            await self._begin(executor, orders)
            executor.submit(events.ArenaGrew(seams.arena.populated_bytes))
            executor.report_segments()
        except BaseException:
            await self._abandon()
            raise
        self._started_ns = seams.clock.now().mono_ns
        took_s = (self._started_ns - began.mono_ns) / 1e9
        _log.info("node_started", node=self.node_id, recovery_s=took_s)
        self.phase = NodePhase.SERVING

    async def _begin(self, executor: Executor, orders: list[events.Instruction]) -> None:
        """Carry out what loading ordered; an executor that ends over it ends the start."""
        assert self._runner is not None, "the executor runs first"
        beginning = asyncio.create_task(executor.begin(orders), name="begin")
        try:
            both = {beginning, self._runner}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if self._runner.done():
                self._runner.result()
            await beginning
        finally:
            beginning.cancel()

    def greet(self, *, local: bool) -> Greeting:
        """The hello of a connection that has just been accepted."""
        return Greeting(self.server, local=local)

    def connect(
        self, outlet: Outlet, *, shm: Callable[[int], StagingGrant] | None = None
    ) -> PlainConnection:
        """A control connection whose bytes come from anywhere; see `PlainConnection`."""
        return PlainConnection(self.server, outlet, shm=shm)

    def arena_grew(self) -> None:
        """More of the arena is populated."""
        if self.phase is NodePhase.SERVING:
            self.executor.submit(events.ArenaGrew(self._seams.arena.populated_bytes))

    async def wait_failed(self) -> None:
        """Return when the node has been stopped; raise what ended it otherwise."""
        assert self._runner is not None, "the node has not been started"
        await asyncio.shield(self._runner)

    async def stop(self, deadline_s: float) -> None:
        """End within about `deadline_s`: what is in flight ends or fails, then sync and footers.

        Idempotent. What was committed with durability `memory` and is not written by then is lost,
        as it would be in a crash.
        """
        if self.phase is not NodePhase.SERVING:
            return
        self.phase = NodePhase.STOPPING
        executor, server = self.executor, self.server
        server.accepting = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s * (1 - STOP_RESERVE)):
                await executor.drain()
        for session in list(server.sessions.values()):
            session.fail(ClosedError("this node is shutting down"))
        await self._abandon(deadline_s * STOP_RESERVE)
        self.phase = NodePhase.STOPPED
        _log.info("node_stopped", node=self.node_id)

    async def _abandon(self, deadline_s: float = 0.0) -> None:
        """End the tasks and close the store."""
        if self._executor is not None and self._runner is not None:
            self._executor.end()
            await asyncio.wait([self._runner], timeout=deadline_s)
            self._runner.cancel()
            await asyncio.wait([self._runner])
        if self._store is not None:
            await self._store.close()

    def _make_server(
        self, identity: Identity, settings: EngineSettings, executor: Executor
    ) -> ServerState:
        config, seams = self.config, self._seams
        facts = NodeFacts(
            node_id=identity.node_id,
            boot_id=seams.token_bytes(wire.ID_BYTES),
            cluster_id=identity.cluster_id,
            arena_bytes=settings.arena_bytes,
            shard_bytes_max=settings.shard_bytes_max,
            lease_bytes_max=config.lease_connection_bytes_max,
            lease_s_max=config.limits.lease_s_max,
            batch_keys_max=limits.BATCH_KEYS_MAX,
        )
        namespaces = {
            namespace.name: NamespaceFacts(index, namespace.ns_id, namespace.incarnation)
            for index, namespace in enumerate(settings.namespaces)
        }
        server = ServerState(
            facts,
            namespaces,
            executor=executor,
            clock=seams.clock,
            staging=StagingBudgetState(
                config.staging_bytes_max, connection_bytes_max=config.staging_connection_bytes
            ),
            token_bytes=seams.token_bytes,
            connections_max=config.limits.connections_max,
        )
        server.on_stats = self.stats_text
        return server

    def stats(self) -> dict[str, Any]:
        """Figures of the node as plain numbers and texts; few before it is started."""
        arena = self._seams.arena
        figures: dict[str, Any] = {
            "phase": self.phase.value,
            "arena": {"populated_bytes": arena.populated_bytes} | self._seams.about_arena(),
            "disk": self._seams.about_disk(),
        }
        if self._server is None or self._store is None:
            return figures
        server = self._server
        up_ns = self._seams.clock.now().mono_ns - self._started_ns
        figures["node"] = {
            "id": server.facts.node_id.hex(),
            "boot_id": server.facts.boot_id.hex(),
            "cluster_id": server.facts.cluster_id,
            "version": __version__,
            "uptime_s": up_ns / 1e9,
            "shard_bytes_max": server.facts.shard_bytes_max,
            "memory_cap_bytes": self.config.memory.cap_bytes,
            "disk_cap_bytes": self.config.disk.cap_bytes,
            "recovery_notes": self._store.state.notes[:NOTES_SHOWN_MAX],
        }
        figures["engine"] = asdict(self.machine.stats())
        figures["server"] = server.figures()
        return figures

    def stats_text(self) -> str:
        """`stats` as JSON."""
        return json.dumps(self.stats(), separators=(",", ":"))

    def health(self) -> HealthFacts:
        """What probes want to know."""
        free, usable = (0, 0) if self._store is None else self._store.counts()
        return HealthFacts(
            phase=self.phase.value,
            serving=self.phase is NodePhase.SERVING,
            failed=self._executor is not None and self._executor.failure is not None,
            segments_usable=usable,
            segments_free=free,
            arena_populated_bytes=self._seams.arena.populated_bytes,
            arena_bytes=self._seams.arena.bytes_total,
        )


def engine_settings(config: DaemonConfig, geometry: Geometry) -> EngineSettings:
    """What the engine has to know of the configuration and of the directory's geometry."""
    durabilities = {
        NamespaceDurability.MEMORY: wire.Durability.MEMORY,
        NamespaceDurability.GROUP: wire.Durability.GROUP,
    }
    namespaces = tuple(
        NamespaceSettings(
            name=namespace.name,
            ns_id=checksum.namespace_id(namespace.name),
            durability=durabilities[namespace.durability],
            quota_bytes=namespace.quota_bytes,
        )
        for namespace in config.namespaces
    )
    return EngineSettings(
        namespaces=namespaces,
        arena_bytes=config.arena_bytes,
        inline_bytes_max=config.inline_bytes_max,
        entries_max=config.limits.entries_max,
        shard_bytes_max=min(config.shard_bytes_max, geometry.shard_bytes_max),
        disk_bytes=geometry.segments * geometry.segment_bytes,
        segment_bytes=geometry.segment_bytes,
        flush_interval_s=config.durability.flush_interval_s,
        lease_s_max=config.limits.lease_s_max,
        dirty_fraction=config.write_behind_bytes_max / config.arena_bytes,
        group_shards_max=config.durability.group_shards_max,
        group_bytes_max=min(config.group_bytes_max, geometry.group_bytes_max),
    )
