"""The test doubles themselves: what they promise to the tests that lean on them."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest

from ctxstore import checksum
from ctxstore.errors import DeviceError, OutOfSpace
from ctxstore.seams import CopyJob
from ctxstore.testing.clock import SimClock
from ctxstore.testing.disk import CrashKind, DiskProfile, SimDisk
from ctxstore.testing.faults import MUTATING, FaultKind, Op, PowerLoss
from ctxstore.testing.loop import SimDeadlock, SimLivelock, run
from ctxstore.testing.mover import InlineMover

PAGE = np.full(4096, 7, np.uint8)


# ---------------------------------------------------------------------------- loop and clock


def test_time_jumps_and_order_holds() -> None:
    async def scene() -> list[tuple[str, float]]:
        loop = asyncio.get_running_loop()
        start = loop.time()
        seen: list[tuple[str, float]] = []

        async def note(name: str, delay: float) -> None:
            await asyncio.sleep(delay)
            seen.append((name, loop.time() - start))

        async with asyncio.TaskGroup() as group:
            group.create_task(note("late", 86_400))
            group.create_task(note("soon", 0.5))
            group.create_task(note("same", 0.5))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await asyncio.Event().wait()
        return seen

    assert run(scene()) == [("soon", 0.5), ("same", 0.5), ("late", 86_400.0)]


def test_a_deadlock_and_a_livelock_are_reported() -> None:
    async def stuck() -> None:
        await asyncio.Event().wait()

    with pytest.raises(SimDeadlock, match="stuck"):
        run(stuck())

    async def endless() -> None:
        for hour in itertools.count(1):
            await asyncio.sleep(3600 * hour)

    with pytest.raises(SimLivelock):
        run(endless(), limit_s=1e6)


def test_threads_are_refused() -> None:
    async def scene() -> None:
        with pytest.raises(RuntimeError, match="no threads"):
            await asyncio.to_thread(int)

    run(scene())


def test_sets_of_tasks_iterate_alike() -> None:
    async def scene() -> list[str]:
        tasks = {asyncio.create_task(asyncio.sleep(1), name=f"t{i}") for i in range(50)}
        done, _ = await asyncio.wait(tasks)
        return [task.get_name() for task in done]

    assert run(scene()) == run(scene())


def test_the_wall_clock_jumps_and_the_monotonic_one_does_not() -> None:
    clock = SimClock()
    before = clock.now()
    clock.jump_wall(-3600)
    after = clock.now()
    assert after.mono_ns == before.mono_ns
    assert after.wall_ns == before.wall_ns - 3600 * 10**9
    clock.skew_wall(2.0)
    clock.pass_time(10)
    later = clock.now()
    assert later.mono_ns - after.mono_ns == 10 * 10**9
    assert later.wall_ns - after.wall_ns == 20 * 10**9


def test_the_mover_copies_zeroes_and_hashes() -> None:
    async def scene() -> None:
        slot = np.full(4096, 0xFF, np.uint8)
        source = np.arange(100, dtype=np.uint8)
        sums = await InlineMover().copy_in([CopyJob(source, slot, 100, 5)])
        assert (slot[:100] == source).all()
        assert not slot[100:].any()
        assert sums == [checksum.checksum(source, 5)]
        assert await InlineMover().copy_in([CopyJob(None, slot, 100, 5)]) == sums

    run(scene())


# ---------------------------------------------------------------------------- disk


async def _two_pages(disk: SimDisk, *, sync_first: bool) -> None:
    file = await disk.open("f", create=True)
    await disk.sync_dir()
    await file.pwritev([PAGE], 0)
    if sync_first:
        await file.fdatasync()
    await file.pwritev([PAGE + 1], 0)
    await file.pwritev([PAGE + 2], 4096)


def test_synced_bytes_survive_and_unsynced_ones_come_sector_by_sector() -> None:
    outcomes: set[bytes] = set()
    torn = 0
    for seed in range(40):
        disk = SimDisk(seed)
        run(_two_pages(disk, sync_first=True))
        content = disk.crash().read_bytes("f")
        assert len(content) in (4096, 8192)
        first = [content[i] for i in range(0, 4096, 512)]
        assert set(first) <= {7, 8}
        assert set(content[4096:]) <= {0, 9}
        torn += len(set(first)) == 2
        for start in range(0, len(content), 512):
            assert len(set(content[start : start + 512])) == 1, "a sector is whole or not there"
        outcomes.add(content)
    assert torn > 3
    assert len(outcomes) > 8


def test_a_killed_process_loses_nothing_that_completed() -> None:
    disk = SimDisk(1)
    run(_two_pages(disk, sync_first=False))
    killed = disk.crash(CrashKind.KILL)
    assert killed.read_bytes("f")[:4096] == bytes([8]) * 4096
    # But it is not durable: the power may go next.
    sizes = set()
    for seed in range(20):
        disk = SimDisk(seed)
        run(_two_pages(disk, sync_first=False))
        sizes.add(len(disk.crash(CrashKind.KILL).crash().read_bytes("f")))
    assert sizes == {0, 8192}


def test_names_need_a_directory_sync() -> None:
    async def scene(disk: SimDisk) -> None:
        await disk.open("a", create=True)
        await disk.sync_dir()
        await disk.open("b", create=True)
        await disk.rename("b", "a")

    found = set()
    for seed in range(30):
        disk = SimDisk(seed)
        run(scene(disk))
        found.add(tuple(disk.crash().file_names()))
    assert found == {("a",), ("a", "b")}


def test_after_a_failed_sync_a_second_one_lies() -> None:
    async def scene(disk: SimDisk) -> None:
        file = await disk.open("f", create=True)
        await disk.sync_dir()
        await file.pwritev([PAGE], 0)
        disk.faults.fail_nth(FaultKind.EIO, 1, Op.SYNC)
        with pytest.raises(DeviceError):
            await file.fdatasync()
        await file.fdatasync()

    for seed in range(5):
        disk = SimDisk(seed)
        run(scene(disk))
        assert not any(disk.crash().read_bytes("f"))


def test_the_same_seed_gives_the_same_ruin() -> None:
    def ruin(seed: int) -> bytes:
        disk = SimDisk(seed, profile=DiskProfile(delay_s_max=1e-3))
        run(_two_pages(disk, sync_first=True))
        return disk.crash().read_bytes("f")

    assert [ruin(seed) for seed in range(10)] == [ruin(seed) for seed in range(10)]


def test_power_goes_at_the_chosen_call_and_nothing_works_after() -> None:
    async def scene(disk: SimDisk) -> None:
        disk.faults.fail_nth(FaultKind.POWER, 2, *MUTATING)
        file = await disk.open("f", create=True)
        await file.pwritev([PAGE], 0)
        with pytest.raises(PowerLoss):
            await file.pwritev([PAGE], 4096)
        with pytest.raises(PowerLoss):
            await file.fdatasync()
        await file.close()

    run(scene(SimDisk()))


def test_space_faults_and_damage() -> None:
    async def scene() -> None:
        disk = SimDisk(profile=DiskProfile(capacity_bytes=8192))
        await disk.allocate("a", 8192)
        with pytest.raises(OutOfSpace):
            await disk.allocate("b", 1)
        file = await disk.open("a")
        with pytest.raises(OutOfSpace):
            await file.pwritev([PAGE], 8192)
        disk.faults.misdirect_nth(1, 4096)
        await file.pwritev([PAGE], 0)
        assert not any(disk.read_bytes("a")[:4096])
        await file.fdatasync()
        disk.flip_bit("a", 4096)
        assert disk.crash().read_bytes("a")[4096] == 6
        with pytest.raises(DeviceError):
            await SimDisk().open("nowhere")

    run(scene())


def test_a_cancelled_write_happens_all_the_same() -> None:
    async def scene() -> None:
        disk = SimDisk(profile=DiskProfile(delay_s_min=1.0, delay_s_max=1.0))
        file = await disk.open("f", create=True)
        task = asyncio.create_task(file.pwritev([PAGE], 0))
        await asyncio.sleep(0.5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert disk.read_bytes("f") == PAGE.tobytes()

    run(scene())


def test_slow_files_are_slow() -> None:
    async def scene() -> float:
        disk = SimDisk()
        disk.faults.slow_down(5.0, names=lambda name: name == "slow")
        await disk.open("fast", create=True)
        start = asyncio.get_running_loop().time()
        await disk.open("slow", create=True)
        return asyncio.get_running_loop().time() - start

    assert run(scene()) == pytest.approx(5.0)
