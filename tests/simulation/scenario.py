"""One seeded run: a machine, its clients, faults while they work, then peace and a final account.

Owns the course of a run and who breaks what when. Everything random comes from the seed, and every
verdict from the checkers; a run that returns has kept every promise.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from ctxstore.checksum import namespace_id
from ctxstore.config.sections import (
    DiskConfig,
    DurabilityConfig,
    LimitsConfig,
    MemoryConfig,
    NamespaceConfig,
    NamespaceDurability,
)
from ctxstore.testing import loop as sim_loop
from ctxstore.testing.checkers import HistoryChecker, HistoryViolation, Level
from ctxstore.testing.clock import SimClock
from ctxstore.testing.disk import CrashKind, DiskProfile, SimDisk
from ctxstore.testing.faults import FaultKind, FaultPlan, Op
from ctxstore.testing.network import SimNetwork
from ctxstore.wire.messages import Lookup, PutResult
from tests.simulation.clients import Client, World
from tests.simulation.driver import SimPool
from tests.simulation.nodes import SimConfig, SimHost
from tests.simulation.profiles import Profile, profile_of
from tests.simulation.watch import DeviceWatch, WatchedMachine

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

NAMESPACES = ("default", "durable")
LIMIT_S = 600.0
"""Virtual time in which a run must be over."""
CALM_TIMEOUT_S = 20.0
"""Deadline of operations once the faults have stopped."""


@dataclass(slots=True)
class Report:
    """What a run did."""

    seed: int
    profile: str
    digest: int = 0
    operations: int = 0
    observations: int = 0
    duties: int = 0
    events: int = 0
    starts: int = 0
    reclaims: int = 0
    faults: int = 0
    """Reads, groups and segments that failed or were found damaged."""
    virtual_s: float = 0.0
    results: dict[str, int] = field(default_factory=dict)


class Scenario:
    """One run. `disk_class` and `machine_class` may be broken ones, to see that it shows."""

    def __init__(
        self,
        seed: int,
        profile: Profile,
        *,
        machine_class: type[WatchedMachine] = WatchedMachine,
        disk_class: type[SimDisk] = SimDisk,
    ) -> None:
        self.seed = seed
        self.profile = profile
        self.rng = Random(seed)
        loop = asyncio.get_running_loop()
        self.clock = SimClock(loop)
        self.network = SimNetwork(loop, Random(self.rng.getrandbits(64)))
        self.watch = DeviceWatch({namespace_id(name): name for name in NAMESPACES})
        self.watch.expected = profile.expected()
        self.checker = HistoryChecker(self.watch)
        disk_profile = DiskProfile(
            delay_s_min=30e-6,
            delay_s_max=profile.disk_delay_s,
            sector_bytes=self.rng.choice((512, 4096)),
            capacity_bytes=profile.disk_capacity_bytes,
        )
        self.host = SimHost(
            config_of(profile),
            disk=disk_class(self.rng.getrandbits(63), profile=disk_profile),
            clock=self.clock,
            network=self.network,
            watch=self.watch,
            rng=Random(self.rng.getrandbits(64)),
        )
        self.host.machine_class = machine_class
        self.host.mover_delay_s = profile.mover_delay_s
        self.world = World(rng=self.rng, checker=self.checker, watch=self.watch, keys=profile.keys)
        self._clients: dict[asyncio.Task[None], Client] = {}
        self._named = 0
        self._jumped = False
        self._disk_busy = asyncio.Lock()
        self._over = asyncio.Event()
        """The clients are done: no more faults."""

    # ------------------------------------------------------------------------- the course

    async def run(self) -> Report:
        """Everything, from the first start to the last account."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_loop_error)
        began_s = loop.time()
        await self._start()
        work = asyncio.ensure_future(self._work())
        broken = asyncio.ensure_future(self.host.broken.wait())
        await asyncio.wait([work, broken], return_when=asyncio.FIRST_COMPLETED)
        if self.host.failure is not None:
            work.cancel()
            await asyncio.wait([work])
            raise self.host.failure
        broken.cancel()
        await work
        return Report(
            seed=self.seed,
            profile=self.profile.name,
            digest=self.watch.digest.intdigest(),
            operations=self.world.operations,
            observations=self.checker.observations,
            duties=self.checker.duties_checked,
            events=self.watch.events,
            starts=self.host.starts,
            reclaims=self.watch.reclaims,
            faults=self.watch.faults_seen,
            virtual_s=loop.time() - began_s,
            results=dict(sorted(self.world.results.items())),
        )

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        del loop
        error = context.get("exception")
        self.host.fail(error or RuntimeError(context["message"]))

    async def _work(self) -> None:
        actors = [asyncio.ensure_future(actor) for actor in self._actors()]
        for number in range(self.profile.clients):
            self._spawn_client(self.profile.steps, remote=self._draw_remote(number))
        try:
            while self._clients:
                done, _ = await asyncio.wait(
                    [*self._clients, *actors], return_when=asyncio.FIRST_COMPLETED
                )
                for task in sorted(done, key=lambda task: task.get_name()):
                    self._clients.pop(task, None)
                    if not task.cancelled():
                        task.result()
        finally:
            self._over.set()
            for task in self._clients:
                task.cancel()
            # Faults are not broken off half way: a process that was being stopped is stopped.
            await asyncio.gather(*actors, *self._clients, return_exceptions=True)
        for actor in actors:
            actor.result()
        await self._make_peace()
        await self._settle_accounts("after the faults")
        await self._show_progress()
        await self._end_process(clean=False)
        await self._start()
        await self._settle_accounts("after a last crash")
        await self._end_process(clean=True)
        await self._start()
        await self._settle_accounts("after a clean restart")
        await self._check_leaks()
        await self._end_process(clean=True)

    def _draw_remote(self, number: int) -> bool:
        return number < self.profile.clients * self.profile.remote_share

    def _spawn_client(self, steps: int, *, remote: bool) -> None:
        client = self._make_client(remote=remote)
        task = asyncio.get_running_loop().create_task(client.run(steps), name=client.name)
        self._clients[task] = client

    def _make_client(self, *, remote: bool, namespace: str | None = None) -> Client:
        self._named += 1
        namespace = namespace or self.rng.choice(NAMESPACES)
        pool = SimPool(self.host, namespace=namespace, shared=not remote)
        return Client(self.world, pool, self.profile.habits, name=f"client-{self._named:03d}")

    # ------------------------------------------------------------------------- the process

    async def _start(self) -> None:
        await self.host.start()
        self.checker.node_started(self._now_ns(), clock_jumped=self._jumped)
        self.watch.note("started", self._now_ns())

    async def _end_process(self, *, clean: bool, kind: CrashKind | None = None) -> None:
        self.world.node_steady = False
        self.host.disk.faults.heal()
        if clean:
            await self.host.stop(3.0)
        else:
            drawn = self.rng.choice((CrashKind.POWER, CrashKind.KILL))
            await self.host.kill(kind or drawn)
        self.watch.note("ended", clean, self._now_ns())
        self.checker.node_died(self._now_ns(), clean=clean and not self.watch.faults_seen)

    async def _kill_now_and_then(self) -> None:
        profile = self.profile
        while await self._pause(profile.kill_every_s):
            async with self._disk_busy:
                await self._end_process(clean=self.rng.random() < profile.stop_share)
                self.host.disk.faults.heal()
                await asyncio.sleep(self.rng.uniform(0, 0.3))
                if self.rng.random() < 0.2:
                    await self._die_in_recovery()
                await self._start()
                self.world.node_steady = True

    async def _die_in_recovery(self) -> None:
        """The machine fails again while it reads what the last failure left."""
        starting = asyncio.ensure_future(self.host.start())
        await asyncio.wait([starting], timeout=self.rng.uniform(0, 0.02))
        await self.host.kill(self.rng.choice((CrashKind.POWER, CrashKind.KILL)))
        starting.cancel()
        await asyncio.wait([starting])
        with contextlib.suppress(BaseException):
            starting.result()
        if self.host.node is not None:
            await self.host.kill(CrashKind.KILL)
        self.checker.node_died(self._now_ns(), clean=False)

    # ------------------------------------------------------------------------- faults

    def _actors(self) -> list[Coroutine[Any, Any, None]]:
        profile = self.profile
        chosen = (
            (profile.kill_every_s, self._kill_now_and_then),
            (profile.client_death_every_s, self._kill_clients),
            (profile.network_fault_every_s, self._break_network),
            (profile.disk_slow_every_s, self._slow_disk),
            (profile.eio_every_s, self._fail_disk),
            (profile.damage_every_s, self._damage_disk),
            (profile.clock_jump_every_s, self._jump_clock),
        )
        return [actor() for rate, actor in chosen if rate]

    async def _pause(self, mean_s: float) -> bool:
        """Wait; whether faults are still wanted."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.rng.uniform(0.2, 1.8) * mean_s):
                await self._over.wait()
        return not self._over.is_set()

    async def _kill_clients(self) -> None:
        while await self._pause(self.profile.client_death_every_s):
            if not self._clients:
                return
            task = self.rng.choice(list(self._clients))
            client = self._clients[task]
            if self.rng.random() < 0.2:
                for link in list(client.pool.links):
                    link.faulted = True
                    link.end.connection.half_open()
            task.cancel()
            self.watch.note("client died", client.name)
            self._spawn_client(self.profile.steps // 3, remote=not client.pool.shared)

    async def _break_network(self) -> None:
        while await self._pause(self.profile.network_fault_every_s):
            links = [link for client in self._clients.values() for link in client.pool.links]
            if not links:
                continue
            link = self.rng.choice(links)
            link.faulted = True
            connection = link.end.connection
            what = self.rng.randrange(3)
            self.watch.note("network", what)
            if what == 0:
                connection.cut()
            elif what == 1:
                connection.clog(self.rng.choice((0.05, 0.5, 3.0)))
            else:
                connection.half_open()

    async def _slow_disk(self) -> None:
        while await self._pause(self.profile.disk_slow_every_s):
            async with self._disk_busy:
                self.host.disk.faults.slow_down(self.rng.choice((0.01, 0.1, 1.0)))
            await asyncio.sleep(self.rng.uniform(0.05, 0.6))
            self.host.disk.faults.heal()

    async def _fail_disk(self) -> None:
        while await self._pause(self.profile.eio_every_s):
            if self.host.node is None:
                continue  # what a fault during recovery costs is the nth-fault tests' business
            op = self.rng.choice((Op.READ, Op.READ, Op.WRITE, Op.SYNC))
            chance = self.rng.choice((0.05, 0.3, 1.0))
            self.watch.note("eio", op.value, chance)
            faults = self.host.disk.faults
            faults.seed = self.rng.getrandbits(32)
            faults.fail_by_chance(FaultKind.EIO, chance, op, names=_is_segment)
            await asyncio.sleep(self.rng.uniform(0.02, 0.3))
            faults.heal()

    async def _jump_clock(self) -> None:
        while await self._pause(self.profile.clock_jump_every_s):
            seconds = self.rng.choice((-86_400.0, -3.0, -0.5, 0.5, 3.0, 86_400.0))
            self._jumped = True
            self.clock.jump_wall(seconds)
            self.watch.note("clock", seconds)

    async def _damage_disk(self) -> None:
        while await self._pause(self.profile.damage_every_s):
            if self.host.node is None:
                continue
            damage = self.rng.choice((self._flip_payload, self._flip_anywhere, self._misdirect))
            damage()

    def _flip_payload(self) -> None:
        places = [place for place in self.watch.places() if place[2] > 0]
        if not places:
            return
        place = self.rng.choice(places)
        name = f"segment-{place[0]:06d}.ctx"
        if name in self.host.disk.file_names():
            self.watch.damage(place)
            self.host.disk.flip_bit(name, place[2] * 4096, bit=self.rng.randrange(8))
            self.watch.note("flip payload", place)

    def _flip_anywhere(self) -> None:
        """Segments anywhere; of the meta log one copy, the other one is what it has two for."""
        disk = self.host.disk
        names = [name for name in disk.file_names() if _is_segment(name) or _is_first_log(name)]
        if not names:
            return
        name = self.rng.choice(names)
        size = len(disk.read_bytes(name))
        if not size:
            return
        if _is_segment(name):
            self.watch.damage_segment(segment_of(name))
        offset = self.rng.randrange(size if self.rng.random() < 0.5 else min(size, 16_384))
        disk.flip_bit(name, offset, bit=self.rng.randrange(8))
        self.watch.note("flip", name, offset)

    def _misdirect(self) -> None:
        faults = self.host.disk.faults
        if isinstance(faults, _TellingFaults):
            return
        telling = _TellingFaults(on_shift=self._misdirected)
        telling.misdirect_nth(
            self.rng.randint(1, 4),
            self.rng.choice((-4096, -8192, -65_536)),
            names=lambda name: _is_segment(name) or _is_first_log(name),
        )
        self.host.disk.faults = telling

    def _misdirected(self, name: str) -> None:
        self.watch.note("misdirected", name)
        if _is_segment(name):
            self.watch.damage_segment(segment_of(name))

    # ------------------------------------------------------------------------- the account

    async def _make_peace(self) -> None:
        """No more faults; what was broken off is noticed."""
        self.network.heal()
        self.host.damage_chance = 0.0
        self.host.disk.faults = FaultPlan()
        if self.host.node is None:
            await self._start()
        await asyncio.sleep(8.0)
        self.world.node_steady = True

    async def _settle_accounts(self, when: str) -> None:
        """Ask for everything that was ever named, by all means, and compare."""
        self.watch.note(when)
        for namespace in NAMESPACES:
            for remote in (False, True):
                client = self._make_client(remote=remote, namespace=namespace)
                keys = [s.key for s in self.checker.known() if s.namespace == namespace]
                for first in range(0, len(keys), 8):
                    await self._look_at(client, keys[first : first + 8], when)
                for _ in range(2):
                    await client.exists()
                client.pool.close()

    async def _look_at(self, client: Client, keys: list[bytes], when: str) -> None:
        """Get keys; alone, no key may be put off by a node that has nothing else to do."""
        later = (Lookup.TIMEOUT, Lookup.OVERLOADED)
        results = await client.get_batch(keys, timeout_s=CALM_TIMEOUT_S)
        for key, result in zip(keys, results, strict=True):
            if result in later:
                (alone,) = await client.get_batch([key], timeout_s=CALM_TIMEOUT_S)
                if alone in later:
                    raise HistoryViolation(f"{when}: a quiet node answered {alone.name}")

    async def _show_progress(self) -> None:
        """New shards are stored, found and flushed again."""
        machine = self.host.node.machine if self.host.node is not None else None
        assert machine is not None, "the node runs"
        for remote in (False, True):
            client = self._make_client(remote=remote)
            keys = [self.rng.randbytes(16) for _ in range(4)]
            lengths = [10, 3000, 70_000, 1024]
            usable = machine.stats().segments_usable >= 4 and not self.profile.full
            level = Level.GROUP if usable else Level.MEMORY
            results = await client.put_batch(keys, lengths, 0, level, timeout_s=CALM_TIMEOUT_S)
            if results != [PutResult.COMMITTED] * 4:
                raise HistoryViolation(f"no progress: new shards were answered {results}")
            found = await client.get_batch(keys, timeout_s=CALM_TIMEOUT_S)
            if usable and Lookup.MISS in found:
                raise HistoryViolation(f"no progress: new shards were looked up as {found}")
            if usable and not self.watch.faults_seen and not await client.flush():
                raise HistoryViolation("no progress: flush failed")
            client.pool.close()

    async def _check_leaks(self) -> None:
        """Nobody is connected and nothing is under way: then nothing may be kept."""
        await asyncio.sleep(self.profile.lease_s_max + 5.0)
        node = self.host.node
        assert node is not None, "the node runs"
        self.watch.audit(node.machine)
        self.watch.check_caps(node.machine)
        stats = node.machine.stats()
        kept = {
            "connections": stats.connections,
            "leases": stats.leases,
            "leased bytes": stats.leased_bytes,
            "waiting puts": stats.waiting_puts,
            "waiting gets": stats.waiting_gets,
            "loads": stats.loading,
            "dirty shards": stats.dirty_shards,
            "staging bytes": node.server.staging.used_bytes,
            "sessions": len(node.server.sessions) + len(node.server.streams),
            "arena users": len(self.watch.left()),
        }
        leaked = {what: count for what, count in kept.items() if count}
        if leaked:
            raise HistoryViolation(f"left behind at rest: {leaked} {self.watch.left()[:4]}")

    def _now_ns(self) -> int:
        return round(asyncio.get_running_loop().time() * 1e9)


class _TellingFaults(FaultPlan):
    """Says which file a misdirected write was meant for."""

    def __init__(self, *, on_shift: Callable[[str], None]) -> None:
        super().__init__()
        self._on_shift = on_shift

    def landing(self, name: str, offset: int, size: int) -> int:
        where = super().landing(name, offset, size)
        if where != offset:
            self._on_shift(name)
        return where


def config_of(profile: Profile) -> SimConfig:
    """The node's configuration."""
    return SimConfig(
        memory=MemoryConfig(cap_bytes=profile.arena_bytes + 4 * 1024 * 1024),
        disk=DiskConfig(cap_bytes=profile.disk_bytes),
        durability=DurabilityConfig(flush_interval_s=0.3),
        limits=LimitsConfig(
            lease_s_max=profile.lease_s_max,
            lease_check_s=profile.lease_s_max / 4,
            entries_max=profile.entries_max,
        ),
        namespaces=(
            NamespaceConfig(name="default"),
            NamespaceConfig(name="durable", durability=NamespaceDurability.GROUP),
        ),
        sim_arena_bytes=profile.arena_bytes,
    )


def simulate(
    seed: int,
    profile: Profile | None = None,
    *,
    machine_class: type[WatchedMachine] = WatchedMachine,
    disk_class: type[SimDisk] = SimDisk,
) -> Report:
    """Play one seed. Raises HistoryViolation, or whatever the node broke with."""

    async def main() -> Report:
        scenario = Scenario(
            seed, profile or profile_of(seed), machine_class=machine_class, disk_class=disk_class
        )
        return await scenario.run()

    return sim_loop.run(main(), limit_s=LIMIT_S)


def _is_segment(name: str) -> bool:
    return name.startswith("segment-")


def _is_first_log(name: str) -> bool:
    return name.startswith("meta-") and name.endswith(".log") and "mirror" not in name


def segment_of(name: str) -> int:
    """Number of the segment that a file holds."""
    return int(name.removeprefix("segment-").removesuffix(".ctx"))
