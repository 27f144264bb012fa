"""The meta log: what is acknowledged stays, what is superseded goes, damage is noticed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ctxstore.errors import DeviceError, OutOfSpace
from ctxstore.testing.clock import SimClock
from ctxstore.testing.disk import CrashKind, DiskProfile, SimDisk
from ctxstore.testing.faults import FaultKind, Op
from ctxstore.testing.loop import run
from ctxstore_daemon.engine.records import META_DTYPE, MetaKind, RecordArray
from ctxstore_daemon.segments.identity import Identity
from ctxstore_daemon.segments.metaformat import FRAME_BYTES, Horizon, compact
from ctxstore_daemon.segments.metalog import MetaLog
from tests.segment_world import World

if TYPE_CHECKING:
    from ctxstore_daemon.segments.metareader import MetaFound

IDENTITY = Identity(bytes(16), "test", 1 << 20, 42)
NONE = np.zeros(0, META_DTYPE)
DAY_NS = 24 * 3600 * 10**9
LOG, MIRROR = "meta-000001.log", "meta-000001-mirror.log"


def rows(kind: MetaKind, *seqs: int, **columns: object) -> RecordArray:
    made: RecordArray = np.zeros(len(seqs), META_DTYPE)
    made["kind"], made["seq"] = int(kind), seqs
    made["key"][:, 0:4] = np.array(seqs, "<u4").view(np.uint8).reshape(-1, 4)
    for name, value in columns.items():
        made[name] = value
    return made


async def opened(
    disk: SimDisk, *, cells: int = 100_000, horizon: Horizon | None = None
) -> tuple[MetaLog, MetaFound]:
    log, found = await MetaLog.open(disk, identity=IDENTITY, file_bytes_max=cells * FRAME_BYTES)
    await log.start(lambda: horizon or Horizon(0, SimClock().now().wall_ns), extra=NONE)
    return log, found


async def seqs_after(disk: SimDisk) -> list[int]:
    log, found = await opened(disk)
    await log.close()
    assert found.lost == 0
    return found.records["seq"].tolist()


@pytest.mark.parametrize("kind", CrashKind)
def test_synced_records_survive_a_crash(kind: CrashKind) -> None:
    async def scene() -> None:
        disk = SimDisk(3)
        log, _ = await opened(disk)
        for seq in range(1, 30):
            await log.append(rows(MetaKind.TOMBSTONE, seq), sync=True)
        disk = disk.crash(kind)
        assert await seqs_after(disk) == list(range(1, 30))
        # What the start wrote is as good.
        assert await seqs_after(disk.crash(kind)) == list(range(1, 30))

    run(scene())


def test_unsynced_records_may_be_lost_but_only_from_the_end() -> None:
    async def scene(seed: int) -> int:
        disk = SimDisk(seed)
        log, _ = await opened(disk)
        await log.append(rows(MetaKind.TOMBSTONE, *range(1, 11)), sync=True)
        for seq in range(11, 40):
            await log.append(rows(MetaKind.TOMBSTONE, seq), sync=False)
        found = await seqs_after(disk.crash())
        assert found[:10] == list(range(1, 11))
        return len(found)

    assert len({run(scene(seed)) for seed in range(12)}) > 2


def test_concurrent_appends_share_their_syncs() -> None:
    async def scene() -> None:
        disk = SimDisk(1, profile=DiskProfile(delay_s_min=1e-3, delay_s_max=2e-3))
        log, _ = await opened(disk)
        before = disk.faults.counts[Op.SYNC]
        async with asyncio.TaskGroup() as group:
            for seq in range(1, 101):
                group.create_task(log.append(rows(MetaKind.TOMBSTONE, seq), sync=True))
        syncs = disk.faults.counts[Op.SYNC] - before
        assert syncs <= 2 * 3  # log and mirror
        assert sorted(await seqs_after(disk.crash())) == list(range(1, 101))

    run(scene())


@pytest.mark.parametrize("name", [LOG, MIRROR])
@pytest.mark.parametrize("offset", [0, 9, 50, 104, 300, 104 * 20 + 1])
def test_one_damaged_byte_costs_nothing(name: str, offset: int) -> None:
    async def scene() -> None:
        disk = SimDisk(3)
        log, _ = await opened(disk)
        for seq in range(1, 30):
            await log.append(rows(MetaKind.TOMBSTONE, seq), sync=True)
        await log.close()
        disk.flip_bit(name, offset)
        log, found = await opened(disk)
        assert found.lost == 0
        assert [file for file, _ in found.damaged] == [name]
        assert found.records["seq"].tolist() == list(range(1, 30))
        await log.append(rows(MetaKind.TOMBSTONE, 30), sync=True)
        await log.close()
        log, found = await opened(disk)
        assert not found.damaged  # the start has written it anew
        assert found.records["seq"].tolist() == list(range(1, 31))
        await log.close()

    run(scene())


@pytest.mark.parametrize("name", [LOG, MIRROR])
def test_one_file_gone_or_cut_costs_nothing(name: str) -> None:
    async def scene(cut: bool) -> None:
        disk = SimDisk(3)
        log, _ = await opened(disk)
        await log.append(rows(MetaKind.TOMBSTONE, *range(1, 30)), sync=True)
        await log.close()
        if cut:
            disk.cut(name, 1000)
        else:
            disk.delete(name)
        assert await seqs_after(disk) == list(range(1, 30))

    run(scene(True))
    run(scene(False))


def test_a_record_damaged_in_both_files_is_counted_as_lost() -> None:
    async def scene() -> None:
        disk = SimDisk(3)
        log, _ = await opened(disk)
        for seq in range(1, 30):
            await log.append(rows(MetaKind.TOMBSTONE, seq), sync=True)
        await log.close()
        for name in (LOG, MIRROR):
            disk.flip_bit(name, FRAME_BYTES * 8 + 3)
        log, found = await opened(disk)
        assert found.lost == 1
        assert len(found.records) == 28
        await log.close()

    run(scene())


def test_with_removals_lost_no_shard_comes_back() -> None:
    async def scene(delete: bool) -> None:
        world = World()
        await world.open()
        await world.fill(1)
        for shard in list(world.acked.values())[:3]:
            await world.remove(shard.key)
        await world.write([100])
        await world.store.close()
        for name in world.disk.file_names():
            if name.startswith("meta-"):
                if delete:
                    world.disk.delete(name)
                else:
                    for offset in range(FRAME_BYTES, 12 * FRAME_BYTES, 50):
                        if offset < len(world.disk.read_bytes(name)):
                            world.disk.flip_bit(name, offset)
        recovered = await world.open()
        assert recovered.images == ()
        assert any("dropped" in note for note in world.store.state.notes)
        assert recovered.seq_floor > world.seq - 10
        world.acked.clear()
        await world.write([5000])
        for kind in CrashKind:
            # And they stay away, also when the next log knows nothing of what was lost.
            world.crash(kind)
            await world.open()
            assert await world.check() == 1

    run(scene(True))
    run(scene(False))


@pytest.mark.parametrize("op", [Op.WRITE, Op.SYNC])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_fault_of_one_file_is_survived_by_new_files(op: Op, nth: int) -> None:
    async def scene() -> None:
        disk = SimDisk(3)
        log, _ = await opened(disk)
        await log.append(rows(MetaKind.TOMBSTONE, 1), sync=True)
        disk.faults.fail_nth(FaultKind.EIO, nth, op)
        await log.append(rows(MetaKind.TOMBSTONE, 2), sync=True)
        await log.append(rows(MetaKind.TOMBSTONE, 3), sync=True)
        assert LOG not in disk.file_names()
        assert await seqs_after(disk.crash()) == [1, 2, 3]

    run(scene())


def test_when_nothing_can_be_written_it_is_said_and_later_it_works_again() -> None:
    async def scene() -> None:
        disk = SimDisk(3)
        log, _ = await opened(disk)
        await log.append(rows(MetaKind.TOMBSTONE, 1), sync=True)
        disk.faults.fail_by_chance(FaultKind.EIO, 1.0, Op.SYNC)
        with pytest.raises(DeviceError):
            await log.append(rows(MetaKind.TOMBSTONE, 2), sync=True)
        with pytest.raises(DeviceError):
            await log.append(rows(MetaKind.TOMBSTONE, 3), sync=True)
        disk.faults.heal()
        await log.append(rows(MetaKind.TOMBSTONE, 4), sync=True)
        found = await seqs_after(disk.crash())
        assert {1, 4} <= set(found) <= {1, 2, 3, 4}

    run(scene())


def test_a_log_deleted_under_us_is_made_anew() -> None:
    async def scene() -> None:
        disk = SimDisk(3)
        log, _ = await opened(disk)
        await log.append(rows(MetaKind.TOMBSTONE, 1), sync=True)
        disk.delete(LOG)
        disk.delete(MIRROR)
        await log.append(rows(MetaKind.TOMBSTONE, 2), sync=True)
        assert await seqs_after(disk.crash()) == [1, 2]

    run(scene())


def test_a_cancelled_append_leaves_a_log_that_can_be_read() -> None:
    async def scene() -> None:
        disk = SimDisk(1, profile=DiskProfile(delay_s_min=1e-3, delay_s_max=2e-3))
        log, _ = await opened(disk)
        for seq in range(1, 40, 2):
            task = asyncio.create_task(log.append(rows(MetaKind.TOMBSTONE, seq), sync=True))
            await asyncio.sleep(0.0005 * (seq % 7))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await log.append(rows(MetaKind.TOMBSTONE, seq + 1), sync=True)
        found = await seqs_after(disk.crash())
        assert set(range(2, 41, 2)) <= set(found)

    run(scene())


def test_size_is_bounded_and_a_full_log_says_so() -> None:
    async def scene() -> None:
        disk = SimDisk(3)
        wall = SimClock().now().wall_ns
        log, _ = await opened(disk, cells=1000)
        stored = 0
        for seq in range(1, 2000, 10):
            batch = rows(MetaKind.TOMBSTONE, *range(seq, seq + 10), at_wall_ns=wall)
            try:
                await log.append(batch, sync=True)
            except OutOfSpace:
                break
            stored += 10
        with pytest.raises(OutOfSpace, match="larger disk cap"):
            await log.append(batch, sync=True)
        assert 900 <= stored < 1000
        # The last part is for what frees space again.
        await log.append(
            rows(MetaKind.GENERATION, 1, segment=1, generation=2), sync=True, vital=True
        )
        assert log.file_bytes <= 1000 * FRAME_BYTES
        assert len(await seqs_after(disk.crash())) == stored + 1

    run(scene())


def test_reserved_room_is_nobody_elses() -> None:
    async def scene() -> None:
        disk = SimDisk(3)
        wall = SimClock().now().wall_ns
        log, _ = await opened(disk, cells=1000)
        await log.reserve(500)
        await log.reserve(400)
        with pytest.raises(OutOfSpace):
            await log.reserve(100)
        tombstones = rows(MetaKind.TOMBSTONE, *range(1, 901), at_wall_ns=wall)
        with pytest.raises(OutOfSpace):
            await log.append(tombstones[:100], sync=True)
        await log.append(tombstones[:500], sync=True, reserved=500)
        with pytest.raises(OutOfSpace):
            await log.append(tombstones[500:600], sync=True)
        await log.append(NONE, sync=False, reserved=400)
        await log.append(tombstones[500:], sync=True)
        with pytest.raises(OutOfSpace):
            await log.reserve(100)
        assert await seqs_after(disk.crash()) == list(range(1, 901))

    run(scene())


def test_a_store_with_a_full_log_still_writes() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        wall = world.clock.now().wall_ns
        refused = 0
        for seq in range(0, 10_000, 50):
            batch = rows(MetaKind.TOMBSTONE, *range(seq, seq + 50), at_wall_ns=wall)
            try:
                await world.store.append_meta(batch, False)
            except OutOfSpace:
                refused += 1
        assert refused > 10
        world.seq = 1_000_000
        reserve = rows(MetaKind.SEQUENCE, 2_000_000)
        await world.store.append_meta(np.concatenate([reserve, reserve]), True)
        await world.fill(4)
        world.forget(0)
        await world.store.recycle(0)
        world.crash()
        assert (await world.open()).seq_floor == 2_000_001
        await world.check()
        assert world.disk.total_bytes() <= world.disk_bytes

    run(scene())


def test_superseded_records_make_room_without_end() -> None:
    async def scene() -> None:
        disk = SimDisk(3)
        log, _ = await opened(disk, cells=500)
        for seq in range(1, 5000, 10):
            batch = rows(MetaKind.TTL, *range(seq, seq + 10), birth=1, ttl_ms=seq)
            batch["key"] = 0
            batch["key"][:, 0] = np.arange(10)
            await log.append(batch, sync=seq % 100 == 1)
        assert log.file_bytes <= 500 * FRAME_BYTES
        assert disk.total_bytes() <= 4 * 500 * FRAME_BYTES
        await log.close()
        _, found = await opened(disk, cells=500)
        latest = found.records[np.argsort(found.records["seq"])][-10:]
        assert latest["seq"].tolist() == list(range(4991, 5001))

    run(scene())


def compacted(records: RecordArray, *, oldest_seq: int = 0, wall_ns: int = 0) -> list[int]:
    return compact(records, Horizon(oldest_seq, wall_ns))["seq"].tolist()


def test_a_tombstone_goes_when_it_is_a_day_old_and_nothing_older_is_stored() -> None:
    tombstone = rows(MetaKind.TOMBSTONE, 10, at_wall_ns=1000)
    assert compacted(tombstone, oldest_seq=11, wall_ns=1000 + DAY_NS) == []
    assert compacted(tombstone, oldest_seq=10, wall_ns=1000 + DAY_NS) == [10]
    assert compacted(tombstone, oldest_seq=11, wall_ns=999 + DAY_NS) == [10]
    # A clock that was set back must not make it young or old by mistake.
    assert compacted(tombstone, oldest_seq=11, wall_ns=1000 - 5 * DAY_NS) == [10]


def test_of_the_same_only_the_last_is_kept() -> None:
    same = {"key": 7, "ns_id": 1, "birth": 3}
    ttls = rows(MetaKind.TTL, 5, 9, 7, **same)
    assert compacted(ttls) == [9]
    assert compacted(ttls, oldest_seq=10) == []  # every copy carries a newer TTL itself
    holds = rows(MetaKind.HOLD, 5, 9, 7, **same, ttl_ms=[10, 0, 10])
    assert compacted(holds) == []  # the last one ended the hold
    holds["ttl_ms"][1] = 10
    assert compacted(holds, wall_ns=9_999_999) == [9]
    assert compacted(holds, wall_ns=10_000_001) == []
    tombstones = rows(MetaKind.TOMBSTONE, 5, 9, 7, key=1)
    assert compacted(tombstones) == [9]
    other = rows(MetaKind.TOMBSTONE, 5, 9, 7, key=1, ns_id=[1, 2, 1])
    assert compacted(other) == [9, 7]
    assert compacted(rows(MetaKind.SEQUENCE, 100, 300, 200)) == [300]


def test_only_the_latest_generation_and_what_belongs_to_it_is_kept() -> None:
    log = np.concatenate(
        [
            rows(MetaKind.GENERATION, 1, 2, 3, segment=[4, 4, 5], generation=[1, 2, 1]),
            rows(MetaKind.QUARANTINE, 4, 5, 6, segment=[4, 4, 5], generation=[1, 2, 1], page=3),
            rows(MetaKind.RETIRED, 7, 8, segment=[4, 5], generation=[1, 1]),
            rows(MetaKind.QUARANTINE, 9, segment=77, generation=1),
        ]
    )
    assert compacted(log) == [2, 3, 5, 6, 8]
    assert compacted(np.zeros(0, META_DTYPE)) == []
