"""Off-line verification: finds each kind of damage, names it, and calls nothing else damage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from ctxstore.errors import DataDirError
from ctxstore.testing.disk import SimDisk
from ctxstore.testing.faults import FaultKind, Op
from ctxstore.testing.loop import run
from ctxstore.testing.mover import InlineMover
from ctxstore_daemon.engine.records import META_DTYPE, MetaKind, RecordArray
from ctxstore_daemon.segments.files import segment_name
from ctxstore_daemon.segments.verifier import DamageKind, VerifyProgress, verify_directory
from tests.segment_world import World

if TYPE_CHECKING:
    from ctxstore_daemon.segments.verifier import VerifyReport


async def _stopped() -> World:
    world = World()
    await world.open()
    await world.fill(2)
    await world.write([100, 900, 5000])
    await world.store.close()
    return world


async def _verify(world: World) -> VerifyReport:
    before = {name: world.disk.read_bytes(name) for name in world.disk.file_names()}
    report = await verify_directory(world.disk, mover=InlineMover())
    after = {name: world.disk.read_bytes(name) for name in world.disk.file_names()}
    assert before == after
    return report


def test_a_good_directory_is_good() -> None:
    async def scene() -> None:
        world = await _stopped()
        steps: list[VerifyProgress] = []
        report = await verify_directory(world.disk, mover=InlineMover(), progress=steps.append)
        assert report.ok
        assert report.shards == len(world.acked)
        assert report.segments == 3
        assert report.shard_bytes == sum(len(shard.payload) for shard in world.acked.values())
        assert steps[-1].done_bytes == steps[-1].total_bytes == report.shard_bytes
        assert report.notes == []

    run(scene())


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("payload", DamageKind.SHARD),
        ("group", DamageKind.GROUP),
        ("header", DamageKind.SEGMENT),
        ("footer", DamageKind.FOOTER),
        ("trailer", DamageKind.FOOTER),
        ("meta", DamageKind.META_LOG),
    ],
)
def test_each_kind_of_damage_is_named(where: str, kind: DamageKind) -> None:
    async def scene() -> None:
        world = await _stopped()
        data = world.disk.read_bytes(segment_name(0))
        name = "meta-000001.log" if where == "meta" else segment_name(0)
        offset = {
            "payload": 3 * 4096 + 77,
            "group": 4096 + 70,
            "header": 33,
            "footer": data.index(b"ARROW1") + 3000,
            "trailer": len(data) - 4096 + 40,
            "meta": 150,
        }[where]
        world.disk.flip_bit(name, offset)
        report = await _verify(world)
        assert [(damage.kind, damage.file) for damage in report.damages] == [(kind, name)]
        if where == "payload":
            assert bytes.fromhex(report.damages[0].key) in world.acked
            assert report.damages[0].offset == 2 * 4096

    run(scene())


def test_quarantined_shards_are_known_already() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        done = await world.write([5000, 5000])
        row: RecordArray = np.zeros(1, META_DTYPE)
        row["kind"], row["segment"] = int(MetaKind.QUARANTINE), done.segment
        row["generation"], row["page"] = done.generation, done.pages[1]
        await world.store.append_meta(row, True)
        await world.store.close()
        world.disk.flip_bit(segment_name(done.segment), int(done.pages[1]) * 4096)
        report = await _verify(world)
        assert report.ok
        assert (report.shards, report.quarantined) == (1, 1)
        await world.open()
        assert await world.check(lost_ok=True) == 1  # and recovery leaves it out

    run(scene())


def test_unreadable_files_and_lost_records_are_damage() -> None:
    async def scene() -> None:
        world = await _stopped()
        world.disk.faults.fail_by_chance(
            FaultKind.EIO, 1.0, Op.READ, names=lambda name: name == segment_name(1)
        )
        report = await _verify(world)
        assert [damage.kind for damage in report.damages] == [DamageKind.UNREADABLE]
        world.disk.faults.heal()
        for name in ("meta-000001.log", "meta-000001-mirror.log"):
            world.disk.flip_bit(name, 150)
        report = await _verify(world)
        assert any("no copy" in damage.detail for damage in report.damages)
        for name in ("meta-000001.log", "meta-000001-mirror.log"):
            world.disk.delete(name)
        report = await _verify(world)
        assert {damage.kind for damage in report.damages} == {DamageKind.META_LOG}

    run(scene())


def test_a_directory_that_is_none_is_refused() -> None:
    async def scene() -> None:
        with pytest.raises(DataDirError, match="no IDENTITY"):
            await verify_directory(SimDisk(), mover=InlineMover())

    run(scene())
