"""Random damage to random histories: bits, cuts, deletions, old images, misdirected writes.

Shards may be lost, and a start may be refused with a reason; wrong bytes, a removed shard that is
back, or any other exception may never be seen.
"""

from __future__ import annotations

import os
import random

import pytest

from ctxstore.errors import StorageError
from ctxstore.limits import KIB
from ctxstore.testing.disk import SimDisk
from ctxstore.testing.loop import run
from ctxstore.testing.mover import InlineMover
from ctxstore_daemon.segments.verifier import verify_directory
from tests.segment_world import World

SEEDS = range(int(os.environ.get("CTXSTORE_SEGMENT_SEEDS", "12")) * 3)


async def _build(world: World, rng: random.Random) -> dict[str, bytes]:
    """A directory with full, recycled and open segments; returns earlier images of its files."""
    await world.open()
    old: dict[str, bytes] = {}
    for turn in range(rng.randint(3, 8)):
        for _ in range(rng.randint(1, 8)):
            done = await world.write([rng.choice((1, 700, 5000, 40 * KIB)) for _ in range(6)])
        for _ in range(rng.randint(0, 3)):
            key = rng.choice(sorted(world.acked))
            world.acked.pop(key)
            await world.remove(key)
        sealed = sorted(segment for segment in world.groups if segment != done.segment)
        if sealed and rng.random() < 0.5:
            world.forget(sealed[0])
            await world.store.recycle(sealed[0])
        if turn == 1:
            old = {name: world.disk.read_bytes(name) for name in world.disk.file_names()}
        if rng.random() < 0.3:
            await world.reopen()
    if rng.random() < 0.5:
        await world.store.close()
    return old


def _damage(disk: SimDisk, old: dict[str, bytes], rng: random.Random) -> str:
    names = [name for name in disk.file_names() if name != "IDENTITY"]
    name = rng.choice(names)
    size = len(disk.read_bytes(name))
    kind = rng.choice(["bit", "bits", "cut", "delete", "old image", "swap", "zeros"])
    if kind == "bit" and size:
        disk.flip_bit(name, rng.randrange(size), bit=rng.randrange(8))
    elif kind == "bits" and size:
        start = rng.randrange(size)
        for offset in range(start, min(size, start + rng.randrange(1, 2000))):
            disk.flip_bit(name, offset, bit=rng.randrange(8))
    elif kind == "cut":
        disk.cut(name, rng.randrange(size + 1))
    elif kind == "delete":
        disk.delete(name)
    elif kind == "old image" and name in old and name.startswith("segment-"):
        disk.put_bytes(name, old[name])
    elif kind == "swap" and name.startswith("segment-"):
        other = rng.choice([n for n in names if n.startswith("segment-")])
        disk.put_bytes(name, disk.read_bytes(other))
    elif kind == "zeros" and size:
        start = rng.randrange(size) // 4096 * 4096
        disk.put_bytes(name, disk.read_bytes(name)[:start] + bytes(size - start))
    return f"{kind} {name}"


async def _scene(seed: int) -> None:
    rng = random.Random(f"damage {seed}")
    world = World(seed=seed, disk=SimDisk(seed))
    old = await _build(world, rng)
    world.disk = world.disk.crash()
    done = [_damage(world.disk, old, rng) for _ in range(rng.randint(1, 4))]
    try:
        await verify_directory(world.disk, mover=InlineMover())
        for _ in range(2):
            await world.open()
            await world.check(lost_ok=True)
            world.damaged = 0
            await world.write([5000, 100, 40 * KIB])
            await world.store.close()
    except StorageError:
        pass
    except BaseException as error:
        error.add_note(f"replay: seed={seed} damage={done}")
        raise


@pytest.mark.parametrize("seed", SEEDS)
def test_damage_never_gives_wrong_bytes(seed: int) -> None:
    run(_scene(seed))


async def _misdirected(seed: int) -> None:
    rng = random.Random(f"misdirected {seed}")
    world = World(seed=seed, disk=SimDisk(seed))
    world.disk.faults.misdirect_nth(
        rng.randint(2, 20),
        rng.choice((-2, -1, 1, 2, 10)) * 4096,
        names=lambda name: name.startswith("segment-"),
    )
    await world.open()
    for _ in range(12):
        await world.write([rng.choice((1, 700, 5000, 40 * KIB)) for _ in range(6)])
    await world.store.close()
    await world.open()
    await world.check(lost_ok=True)
    await world.write([5000])
    await world.reopen()
    await world.check(lost_ok=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_misdirected_write_never_gives_wrong_bytes(seed: int) -> None:
    run(_misdirected(seed))
