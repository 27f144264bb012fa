"""Loss of power at every write and sync of a history, and every single fault of the disk.

The real writer and the real recovery run; the disk loses, keeps and tears unsynced sectors.
Whatever was acknowledged must be there, nothing may be wrong, nothing removed may come back.
"""

from __future__ import annotations

import os
import random

import pytest

from ctxstore.errors import DeviceError, OutOfSpace, StorageError
from ctxstore.limits import KIB
from ctxstore.testing.disk import CrashKind, DiskProfile, SimDisk
from ctxstore.testing.faults import MUTATING, FaultKind, Op, PowerLoss
from ctxstore.testing.loop import run
from ctxstore.testing.mover import InlineMover
from ctxstore_daemon.segments.verifier import verify_directory
from tests.segment_world import World

SEEDS = range(int(os.environ.get("CTXSTORE_SEGMENT_SEEDS", "12")))
OPS = (Op.ALLOCATE, Op.OPEN, Op.READ, Op.REMOVE, Op.RENAME, Op.SYNC, Op.SYNC_DIR, Op.WRITE)


def _world(seed: int) -> World:
    rng = random.Random(f"disk {seed}")
    profile = DiskProfile(delay_s_min=1e-5, delay_s_max=1e-3, sector_bytes=rng.choice((512, 4096)))
    return World(seed=seed, disk=SimDisk(seed, profile=profile))


async def _history(world: World, steps: int, rng: random.Random) -> None:
    """Groups of all sizes, removals, recycles, clean restarts."""
    for _ in range(steps):
        free, _usable = world.store.counts()
        action = rng.random()
        if free <= 1:
            await _recycle_oldest(world)
        if action < 0.70:
            sizes = [
                rng.choice((1, 600, 1024, 4096, 9000, 40_000)) for _ in range(rng.randint(1, 9))
            ]
            if rng.random() < 0.2:
                sizes = [60 * KIB] * 5
            await world.write(sizes)
        elif action < 0.88 and world.acked:
            await _remove_some(world, rng)
        elif action < 0.94:
            await _recycle_oldest(world)
        else:
            await world.reopen()
            await world.check()


async def _remove_some(world: World, rng: random.Random) -> None:
    key = rng.choice(sorted(world.acked))
    # From the call on the removal may be durable, from its return on it must be.
    shard = world.acked.pop(key)
    for shards in world.groups.values():
        if shard in shards:
            shards.remove(shard)
    await world.remove(key)


async def _recycle_oldest(world: World) -> None:
    open_segment = max(world.groups, key=lambda s: _last_birth(world, s), default=None)
    sealed = [s for s in world.groups if s != open_segment and world.groups[s]]
    if sealed:
        oldest = min(sealed, key=lambda s: world.groups[s][0].birth)
        world.forget(oldest)
        await world.store.recycle(oldest)


def _last_birth(world: World, segment: int) -> int:
    return max((shard.birth for shard in world.groups[segment]), default=0)


async def _assert_undamaged(world: World) -> None:
    """What a crash leaves is no damage, and off-line verification knows it."""
    if "IDENTITY" in world.disk.file_names():
        report = await verify_directory(world.disk, mover=InlineMover())
        assert report.ok, report.damages


async def _count_calls(seed: int, steps: int) -> int:
    world = _world(seed)
    await world.open()
    await _history(world, steps, random.Random(seed))
    await world.store.close()
    return sum(world.disk.faults.counts[op] for op in MUTATING)


async def _crash_at(seed: int, steps: int, nth: int) -> None:
    world = _world(seed)
    world.disk.faults.fail_nth(FaultKind.POWER, nth, *MUTATING)
    rng = random.Random(seed)
    try:
        await world.open()
        await _history(world, steps, rng)
        await world.store.close()
    except* PowerLoss:
        pass
    for again in range(3):
        world.crash(CrashKind.KILL if again == 2 else CrashKind.POWER)
        await _assert_undamaged(world)
        await world.open()
        await world.check()
        assert world.damaged == 0, "recovery gave a shard that is torn"
        await world.write([5000, 100])


@pytest.mark.parametrize("seed", SEEDS)
def test_power_lost_at_every_call(seed: int) -> None:
    steps = 25
    calls = run(_count_calls(seed, steps))
    rng = random.Random(f"points {seed}")
    for nth in sorted(rng.sample(range(1, calls + 1), min(calls, 12))):
        try:
            run(_crash_at(seed, steps, nth))
        except BaseException as error:
            error.add_note(f"replay: seed={seed} steps={steps} nth={nth}")
            raise


def test_power_lost_at_every_single_call_of_a_short_history() -> None:
    calls = run(_count_calls(1000, 6))
    for nth in range(1, calls + 1):
        try:
            run(_crash_at(1000, 6, nth))
        except BaseException as error:
            error.add_note(f"replay: seed=1000 steps=6 nth={nth}")
            raise


async def _fault_at(seed: int, kind: FaultKind, op: Op, nth: int) -> bool:
    """One call fails; True if the history came so far. Errors are fine, wrong answers not."""
    world = _world(seed)
    world.disk.faults.fail_nth(kind, nth, op)
    rng = random.Random(seed)
    opened = False
    while not opened:
        try:
            await world.open()
            opened = True
        except StorageError:
            pass
    for _ in range(12):
        try:
            await _history(world, 1, rng)
        except (DeviceError, OutOfSpace):
            # Clean restarts of the history may have failed half-way.
            world.crash(CrashKind.KILL)
            world.disk.faults.heal()
            await world.open()
    reached = world.disk.faults.counts[op] >= nth
    world.crash(rng.choice(list(CrashKind)))
    await world.open()
    # A read error costs the shards of a segment for this run, so no promise about those.
    await world.check(lost_ok=op in (Op.READ, Op.OPEN))
    await world.write([5000])
    return reached


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", [FaultKind.EIO, FaultKind.ENOSPC])
def test_every_nth_call_failing(op: Op, kind: FaultKind) -> None:
    nth, reached = 1, True
    while reached and nth <= 40:
        try:
            reached = run(_fault_at(nth, kind, op, nth))
        except BaseException as error:
            error.add_note(f"replay: kind={kind} op={op} nth={nth}")
            raise
        nth += 1
