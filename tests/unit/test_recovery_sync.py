"""What a killed process left in the page cache becomes durable before a restart builds on it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from ctxstore.limits import KIB
from ctxstore.testing import loop as sim_loop
from ctxstore.testing.disk import CrashKind, SimDisk, SimFile
from tests.segment_world import World

if TYPE_CHECKING:
    from ctxstore_daemon.engine.records import Recovered

FILLERS = {"resumed": [4 * KIB], "too full to be resumed": [200 * KIB] * 4}


def keys_of(recovered: Recovered) -> set[bytes]:
    return {key.tobytes() for image in recovered.images for key in image.batch.records["key"]}


async def killed_before_its_sync(seed: int, filler: list[int]) -> tuple[World, set[bytes]]:
    """A world whose process died between write and sync of a group, and that group's keys."""
    world = World(seed=seed, disk=SimDisk(seed))
    await world.open()
    for size in filler:
        await world.write([size])
    shards = world.shards([90 * KIB, 100])
    order = world.order(shards)

    async def never(self: SimFile) -> None:
        await asyncio.Event().wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimFile, "fdatasync", never)
        writing = asyncio.ensure_future(world.store.write_group(order, world.arena))
        await asyncio.sleep(0.1)
        world.crash(CrashKind.KILL)
        writing.cancel()
        await asyncio.wait([writing])
    return world, {shard.key for shard in shards}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("filler", FILLERS.values(), ids=FILLERS)
def test_a_group_found_in_the_page_cache_survives_the_next_loss_of_power(
    seed: int, filler: list[int]
) -> None:
    async def main() -> None:
        world, keys = await killed_before_its_sync(seed, filler)
        first = await world.open()
        assert keys <= keys_of(first), "a kill leaves the page cache as it is"
        assert all(image.sealed for image in first.images) == (len(filler) > 1)
        world.crash(CrashKind.POWER)
        assert keys <= keys_of(await world.open())

    sim_loop.run(main())
