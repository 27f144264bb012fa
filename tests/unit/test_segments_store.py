"""Segments end to end: what is written comes back, whatever happened to the files."""

from __future__ import annotations

import random

import pytest

from ctxstore.errors import ConfigError, DataDirError, DeviceError, OutOfSpace
from ctxstore.limits import KIB, MIB
from ctxstore.testing.disk import CrashKind, DiskProfile, SimDisk
from ctxstore.testing.faults import FaultKind, Op
from ctxstore.testing.loop import run
from ctxstore_daemon.engine.events import ReadStatus
from ctxstore_daemon.segments.files import segment_name
from ctxstore_daemon.segments.geometry import Geometry
from ctxstore_daemon.segments.identity import open_identity
from tests.segment_world import World

MIXED = [5000, 4096, 100, 1, 70_000, 1024, 1025]


def test_shards_survive_a_clean_restart() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        for _ in range(5):
            await world.write(MIXED)
        await world.reopen()
        assert await world.check() == 5 * len(MIXED)

    run(scene())


@pytest.mark.parametrize("kind", CrashKind)
def test_shards_survive_a_crash_without_footers(kind: CrashKind) -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        await world.fill(2)
        world.crash(kind)
        recovered = await world.open()
        assert await world.check() == len(world.acked)
        assert [image.sealed for image in recovered.images] == [True, True, False]

    run(scene())


def test_restarts_go_on_filling_the_same_segment() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        segments = set()
        for turn in range(10):
            segments.add((await world.write([5000])).segment)
            if turn % 2:
                await world.store.close()
            else:
                world.crash()
            await world.open()
            await world.check()
        assert len(segments) == 1

    run(scene())


def test_a_group_after_a_clean_restart_makes_the_footer_stale() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        await world.write(MIXED)
        await world.reopen()
        await world.write(MIXED)
        world.crash()
        await world.open()
        assert await world.check() == 2 * len(MIXED)

    run(scene())


def test_recycled_data_is_gone_and_the_segment_is_used_again() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        await world.fill(3)
        free, usable = world.store.counts()
        world.forget(0)
        await world.store.recycle(0)
        assert world.store.counts() == (free + 1, usable)
        world.crash()
        await world.open()
        await world.check()
        assert all(image.segment != 0 for image in world.recovered.images)
        await world.fill(usable - 1 - 3)
        assert 0 in world.groups
        world.crash()
        await world.open()
        await world.check()
        assert next(i for i in world.recovered.images if i.segment == 0).generation > 1

    run(scene())


def test_a_full_disk_is_said_and_the_cap_is_kept() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        with pytest.raises(OutOfSpace, match="no free segment"):
            await world.fill(10_000)
        assert world.store.counts()[0] == 0
        assert world.disk.total_bytes() <= world.disk_bytes
        await world.reopen()
        assert world.disk.total_bytes() <= world.disk_bytes
        await world.check()

    run(scene())


def test_an_old_image_put_back_is_discarded() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        await world.fill(2)
        old = world.disk.read_bytes(segment_name(0))
        world.forget(0)
        await world.store.recycle(0)
        await world.store.close()
        world.disk.put_bytes(segment_name(0), old)
        await world.open()
        assert all(image.segment != 0 for image in world.recovered.images)
        await world.check()
        assert any("older image" in note or "generation" in note for note in _notes(world))

    run(scene())


def test_a_segment_of_another_node_is_left_alone() -> None:
    async def scene() -> None:
        other = World(seed=99)
        await other.open()
        await other.write(MIXED)
        await other.store.close()
        foreign = other.disk.read_bytes(segment_name(0))
        world = World()
        await world.open()
        await world.write(MIXED)
        await world.store.close()
        world.disk.put_bytes(segment_name(5), foreign)
        await world.open()
        await world.check()
        with pytest.raises(OutOfSpace):
            await world.fill(10_000)
        await world.store.close()
        assert world.disk.read_bytes(segment_name(5)) == foreign
        assert world.disk.total_bytes() <= world.disk_bytes

    run(scene())


def test_a_truncated_segment_gives_what_is_left() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        await world.fill(2)
        await world.store.close()
        name = segment_name(0)
        world.disk.cut(name, len(world.disk.read_bytes(name)) // 2)
        await world.open()
        assert 0 < await world.check(lost_ok=True) < len(world.acked)
        kept_of_1 = {shard.key for shard in world.groups[1]}
        assert kept_of_1 <= set(await world.found())
        world.forget(0)
        await world.store.recycle(0)
        await world.reopen()
        assert await world.check() == len(world.acked)

    run(scene())


def test_a_file_deleted_while_stopped_costs_only_its_shards() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        await world.fill(2)
        await world.store.close()
        world.disk.delete(segment_name(1))
        world.forget(1)
        await world.open()
        assert await world.check() == len(world.acked)
        await world.fill(world.store.counts()[1] - 3)

    run(scene())


def test_nothing_is_acknowledged_into_a_deleted_file() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        first = await world.write(MIXED)
        world.disk.delete(segment_name(first.segment))
        world.forget(first.segment)
        with pytest.raises(DeviceError, match="deleted"):
            await world.write(MIXED)
        await world.write(MIXED)
        world.crash()
        await world.open()
        assert await world.check() == len(MIXED)

    run(scene())


@pytest.mark.parametrize("where", ["payload", "group", "header", "footer", "trailer"])
def test_one_flipped_byte_never_gives_wrong_bytes(where: str) -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        await world.fill(2)
        await world.store.close()
        data = world.disk.read_bytes(segment_name(0))
        tail = world.recovered  # before: nothing
        assert not tail.images
        offset = {
            "payload": 3 * 4096 + 77,
            "group": 4096 + 70,
            "header": 33,
            "footer": data.index(b"ARROW1") + 3000,
            "trailer": len(data) - 4096 + 40,
        }[where]
        world.disk.flip_bit(segment_name(0), offset, bit=3)
        await world.open()
        count = await world.check(lost_ok=True)
        lost = len(world.acked) - count
        # Footer, group headers and meta log stand in for each other.
        assert lost == (1 if where == "payload" else 0)

    run(scene())


def test_a_damaged_extent_is_reported_as_damaged() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        done = await world.write([5000, 6000, 7000])
        await world.reopen()
        world.disk.flip_bit(segment_name(done.segment), int(done.pages[1]) * 4096 + 5999)
        image = world.recovered.images[0]
        rows = await world.read(image.batch.records, image.segment, image.generation)
        assert [status for _, status, _ in rows] == [
            ReadStatus.OK,
            ReadStatus.DAMAGED,
            ReadStatus.OK,
        ]
        gone = await world.read(image.batch.records, image.segment, image.generation + 1)
        assert {status for _, status, _ in gone} == {ReadStatus.FAILED}

    run(scene())


def test_read_errors_fail_only_their_extents() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        await world.write([5000, 6000, 7000])
        await world.reopen()
        image = world.recovered.images[0]
        # The run of three fails, then of the single reads the second.
        world.disk.faults.fail_nth(FaultKind.EIO, 1, Op.READ)
        world.disk.faults.fail_nth(FaultKind.EIO, 2, Op.READ)
        rows = await world.read(image.batch.records, image.segment, image.generation)
        assert sorted(status for _, status, _ in rows) == [
            ReadStatus.OK,
            ReadStatus.OK,
            ReadStatus.FAILED,
        ]

    run(scene())


@pytest.mark.parametrize("op", [Op.WRITE, Op.SYNC])
def test_a_failed_write_or_sync_retires_the_segment_for_ever(op: Op) -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        first = await world.write(MIXED)
        usable = world.store.counts()[1]
        world.disk.faults.fail_nth(FaultKind.EIO, 1, op)
        syncs = world.disk.faults.counts[Op.SYNC]
        with pytest.raises(DeviceError):
            await world.write(MIXED)
        assert world.store.counts()[1] == usable - 1
        # One failed sync of the segment, then the retirement in log and mirror: no second try.
        assert world.disk.faults.counts[Op.SYNC] - syncs == (3 if op is Op.SYNC else 2)
        second = await world.write(MIXED)
        assert second.segment != first.segment
        world.crash()
        await world.open()
        assert await world.check() == 2 * len(MIXED)
        assert world.store.counts()[1] == usable - 1
        assert (await world.write(MIXED)).segment != first.segment

    run(scene())


def test_no_room_for_a_new_segment_is_not_a_fault() -> None:
    async def scene() -> None:
        world = World(disk=SimDisk(profile=DiskProfile(capacity_bytes=3 * MIB + 400 * KIB)))
        await world.open()
        with pytest.raises(OutOfSpace):
            await world.fill(20)
        assert world.store.state.segments_retired == 0
        assert world.store.counts()[0] == 0
        world.clock.pass_time(11)
        assert world.store.counts()[0] > 0  # worth another try
        world.forget(0)
        await world.store.recycle(0)
        await world.write(MIXED)
        await world.reopen()
        await world.check()

    run(scene())


def test_a_smaller_cap_drops_the_oldest_segments() -> None:
    async def scene() -> None:
        world = World(disk_bytes=24 * MIB)
        await world.open()
        with pytest.raises(OutOfSpace):
            await world.fill(10_000)
        await world.store.close()
        world.disk_bytes = 18 * MIB
        await world.open()
        assert world.disk.total_bytes() <= world.disk_bytes
        assert 0 < await world.check(lost_ok=True) < len(world.acked)
        newest = max(world.groups, key=lambda segment: world.groups[segment][-1].birth)
        assert {shard.key for shard in world.groups[newest]} <= set(await world.found())
        await world.store.close()
        world.disk_bytes = 10 * MIB
        with pytest.raises(ConfigError, match="too small"):
            await world.open()

    run(scene())


def test_an_unreadable_segment_is_set_aside_and_comes_back() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        await world.fill(2)
        await world.store.close()
        world.disk.faults.fail_by_chance(
            FaultKind.EIO, 1.0, Op.READ, names=lambda name: name == segment_name(0)
        )
        await world.open()
        assert await world.check(lost_ok=True) == len(world.acked) - len(world.groups[0])
        await world.store.close()
        world.disk.faults.heal()
        await world.open()
        assert await world.check() == len(world.acked)

    run(scene())


def test_a_group_larger_than_a_segment_is_refused() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        with pytest.raises(OutOfSpace, match="fits no segment"):
            await world.write([100 * KIB] * 10)
        await world.write([world.store.geometry.shard_bytes_max] * 2 + [1000] * 50)
        await world.write(MIXED)

    run(scene())


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"ctxstore-data-format: 2\nanything\n", "newer version"),
        (b"something else", "damaged"),
        (b"", "damaged"),
    ],
)
def test_an_identity_that_cannot_be_used_is_explained(content: bytes, text: str) -> None:
    async def scene() -> None:
        world = World()
        world.disk.put_bytes("IDENTITY", content)
        with pytest.raises(DataDirError, match=text):
            await world.open()

    run(scene())


def test_a_directory_of_another_cluster_or_without_identity_is_refused() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        await world.write(MIXED)
        await world.store.close()
        with pytest.raises(DataDirError, match="belongs to cluster 'test'"):
            await open_identity(
                world.disk, cluster_id="other", disk_bytes=12 * MIB, rng=random.Random(1)
            )
        world.disk.delete("IDENTITY")
        with pytest.raises(DataDirError, match="no IDENTITY"):
            await world.open()

    run(scene())


def test_geometry_stays_inside_the_cap() -> None:
    for disk_bytes in (12 * MIB, 100 * MIB, 1 << 30, 20 << 30, 10 << 40):
        geometry = Geometry.for_disk(disk_bytes)
        used = geometry.segments * geometry.segment_bytes + geometry.meta_bytes_max
        assert used <= disk_bytes
        assert used >= 0.85 * disk_bytes
        assert geometry.segments >= 8
        assert geometry.segment_bytes <= min(256 * MIB, max(MIB, disk_bytes // 16))
    with pytest.raises(ConfigError):
        Geometry.for_disk(5 * MIB)


def _notes(world: World) -> list[str]:
    return world.store.state.notes
