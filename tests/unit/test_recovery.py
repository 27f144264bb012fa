"""Recovery as a whole: its speed, the walk over many groups, and what it counts as the newest."""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING

import numpy as np

from ctxstore.limits import KIB, MIB
from ctxstore.testing.clock import SimClock
from ctxstore.testing.disk import CrashKind, SimDisk
from ctxstore.testing.faults import FaultKind, Op
from ctxstore.testing.loop import run
from ctxstore.testing.mover import InlineMover
from ctxstore_daemon.engine.records import META_DTYPE, RECORD_DTYPE, MetaKind, RecordArray
from ctxstore_daemon.segments import startup
from ctxstore_daemon.segments import writer as writer_module
from ctxstore_daemon.segments.files import segment_name
from ctxstore_daemon.segments.format import SegmentHeader
from ctxstore_daemon.segments.identity import open_identity
from ctxstore_daemon.segments.store import SegmentStore
from ctxstore_daemon.segments.writer import OpenSegmentState, SegmentWriter, write_segment_header
from tests.segment_world import World

if TYPE_CHECKING:
    import pytest

    from ctxstore_daemon.segments.identity import Identity

SHARDS = 100_000
SEGMENTS = 10


async def _make_segment(disk: SimDisk, identity: Identity, segment: int, count: int) -> None:
    size = identity.segment_bytes
    file = await disk.open(segment_name(segment), create=True)
    await file.truncate(size)
    await write_segment_header(file, SegmentHeader(segment, identity.node_id, 1, size, 0))
    records: RecordArray = np.zeros(count, RECORD_DTYPE)
    records["key"] = np.random.default_rng(segment).integers(0, 256, (count, 16))
    records["birth"] = np.arange(segment * count + 1, (segment + 1) * count + 1)
    records["length"], records["page"] = 4096, 1 + np.arange(count) % 200
    seqs = records["birth"].astype(np.uint64)
    state = OpenSegmentState(
        segment,
        1,
        size,
        tail=1 * MIB,
        first_seq=int(seqs[0]),
        last_seq=int(seqs[-1]),
        records=[records],
        group_seq=[seqs],
        inline=[b""],
        count=count,
    )
    await SegmentWriter(state, identity).seal(file)


def test_a_hundred_thousand_shards_are_found_at_once() -> None:
    async def scene() -> None:
        disk, clock = SimDisk(), SimClock()
        identity, geometry = await open_identity(
            disk, cluster_id="test", disk_bytes=64 * MIB, rng=random.Random(1)
        )
        store, _ = await SegmentStore.open(
            disk, identity=identity, geometry=geometry, clock=clock, mover=InlineMover()
        )
        rows: RecordArray = np.zeros(SEGMENTS, META_DTYPE)
        rows["kind"], rows["segment"] = int(MetaKind.GENERATION), np.arange(SEGMENTS)
        rows["generation"] = 1
        await store.append_meta(rows, True)
        await store.close()
        for segment in range(SEGMENTS):
            await _make_segment(disk, identity, segment, SHARDS // SEGMENTS)
        began = time.perf_counter()
        store, recovered = await SegmentStore.open(
            disk, identity=identity, geometry=geometry, clock=clock, mover=InlineMover()
        )
        took_s = time.perf_counter() - began
        assert sum(len(image.batch.records) for image in recovered.images) == SHARDS
        assert recovered.seq_floor == SHARDS + 1
        # A million is to take a second; this machine may be busy with other things.
        assert took_s < 1.0 * int(os.environ.get("CTXSTORE_SLOWNESS", "4")) / 10 + 0.2
        await store.close()

    run(scene())


def test_many_small_groups_are_walked() -> None:
    async def scene() -> None:
        world = World(disk_bytes=64 * MIB)
        await world.open()
        for _ in range(300):
            await world.write([100])
        world.crash(CrashKind.KILL)
        reads = world.disk.faults.counts[Op.READ]
        await world.open()
        assert await world.check() == 300
        # Neighbours are read together: far fewer reads than groups.
        assert world.disk.faults.counts[Op.READ] - reads < 40

    run(scene())


def test_a_segment_with_too_many_inline_bytes_has_no_footer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writer_module, "FOOTER_INLINE_BYTES_MAX", 100 * KIB)
    monkeypatch.setattr(startup, "FOOTER_INLINE_BYTES_MAX", 100 * KIB)

    async def scene() -> None:
        world = World()
        await world.open()
        while len(world.groups) < 3:
            await world.write([1000] * 100)
        assert b"ARROW1" not in world.disk.read_bytes(segment_name(0))
        await world.reopen()
        assert await world.check() == len(world.acked)
        await world.write([1000] * 100)
        world.crash()
        await world.open()
        assert await world.check() == len(world.acked)

    run(scene())


def test_only_the_newest_segment_is_resumed_and_full_ones_are_not() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        await world.fill(3)
        last = max(world.groups, key=lambda segment: world.groups[segment][-1].birth)
        recovered = await world.reopen()
        assert [image.segment for image in recovered.images if not image.sealed] == [last]
        assert (await world.write([100])).segment == last
        firsts = [image.first_seq for image in recovered.images]
        assert firsts == sorted(firsts)

    run(scene())


def test_a_segment_that_cannot_be_synced_at_start_is_retired() -> None:
    async def scene() -> None:
        world = World()
        await world.open()
        first = await world.write([5000])
        world.crash(CrashKind.KILL)
        world.disk.faults.fail_by_chance(
            FaultKind.EIO, 1.0, Op.SYNC, names=lambda name: name.startswith("segment-")
        )
        recovered = await world.open()
        assert recovered.images[0].sealed
        world.disk.faults.heal()
        assert (await world.write([5000])).segment != first.segment
        await world.reopen()
        assert await world.check() == 2

    run(scene())


def test_a_start_on_a_read_only_or_full_disk_is_refused_or_works() -> None:
    async def scene(kind: FaultKind) -> None:
        world = World()
        await world.open()
        await world.write([5000, 100])
        world.crash(CrashKind.KILL)
        world.disk.faults.fail_by_chance(kind, 1.0, Op.WRITE, Op.ALLOCATE)
        # Nothing has to be written to start cleanly.
        await world.open()
        await world.check()
        world.disk.faults.heal()
        await world.write([5000])

    run(scene(FaultKind.ENOSPC))
    run(scene(FaultKind.EIO))


def test_sequences_never_go_back() -> None:
    async def scene() -> None:
        world = World(seed=4)
        await world.open()
        row: RecordArray = np.zeros(1, META_DTYPE)
        row["kind"], row["seq"] = int(MetaKind.SEQUENCE), 10_000
        await world.store.append_meta(row, True)
        await world.write([100])
        world.crash()
        recovered = await world.open()
        assert recovered.seq_floor == 10_001
        await world.write([100])
        recovered = await world.reopen()
        assert recovered.seq_floor > 10_002

    run(scene())
