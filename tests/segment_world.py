"""A segment store on a simulated disk, with a model of what it must give back.

Owns the payloads and what was acknowledged. Used by the tests of segments, recovery and crashes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from ctxstore import checksum
from ctxstore.limits import KIB, MIB, PAGE_BYTES
from ctxstore.testing.clock import SimClock
from ctxstore.testing.disk import CrashKind, SimDisk
from ctxstore.testing.mover import InlineMover
from ctxstore_daemon.engine.events import GroupDone, ReadExtents, WriteGroup
from ctxstore_daemon.engine.records import (
    META_DTYPE,
    RECORD_DTYPE,
    MetaKind,
    RecordArray,
    RecordBatch,
    RecordFlag,
    Recovered,
)
from ctxstore_daemon.segments.buffers import aligned_zeros, round_up
from ctxstore_daemon.segments.identity import open_identity
from ctxstore_daemon.segments.store import SegmentStore

DISK_BYTES = 12 * MIB
NS_ID = 7
INCARNATION = 3


@dataclass(frozen=True)
class Shard:
    """One shard as put: `birth` is its sequence number."""

    key: bytes
    payload: bytes
    birth: int
    inline: bool


@dataclass
class World:
    """`open` and `crash` change `disk` and `store`; `acked` is what groups promised."""

    seed: int = 0
    disk_bytes: int = DISK_BYTES
    disk: SimDisk = field(default_factory=SimDisk)
    clock: SimClock = field(default_factory=SimClock)
    acked: dict[bytes, Shard] = field(default_factory=dict)
    tried: dict[bytes, Shard] = field(default_factory=dict)
    removed: set[bytes] = field(default_factory=set)
    groups: dict[int, list[Shard]] = field(default_factory=dict)  # by segment, acknowledged
    seq: int = 1

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.arena = aligned_zeros(4 * MIB)
        self.store: SegmentStore
        self.recovered = Recovered()
        self.damaged = 0  # extents that `found` could not read back whole

    async def open(self) -> Recovered:
        """Start a store on the disk as it is."""
        identity, geometry = await open_identity(
            self.disk, cluster_id="test", disk_bytes=self.disk_bytes, rng=random.Random(self.seed)
        )
        self.store, self.recovered = await SegmentStore.open(
            self.disk, identity=identity, geometry=geometry, clock=self.clock, mover=InlineMover()
        )
        assert self.recovered.seq_floor >= 1
        self.seq = max(self.seq, self.recovered.seq_floor)
        return self.recovered

    async def reopen(self) -> Recovered:
        """Stop cleanly and start again."""
        await self.store.close()
        return await self.open()

    def crash(self, kind: CrashKind = CrashKind.POWER) -> None:
        """Lose the power (or the process); `open` starts on what is left."""
        self.disk = self.disk.crash(kind)

    def shards(self, sizes: list[int]) -> list[Shard]:
        """New shards; those up to 1 KiB travel inline."""
        made = []
        for size in sizes:
            self.seq += 1
            key = self.rng.randbytes(16)
            made.append(Shard(key, self.rng.randbytes(size), self.seq, size <= KIB))
        return made

    def order(self, shards: list[Shard]) -> WriteGroup:
        """Lay shards into the arena and name them to the store."""
        self.seq += 1
        records: RecordArray = np.zeros(len(shards), RECORD_DTYPE)
        offsets, sizes, at = [], [], 0
        for row, shard in zip(records, shards, strict=True):
            size = len(shard.payload)
            row["key"] = np.frombuffer(shard.key, np.uint8)
            row["ns_id"], row["incarnation"] = NS_ID, INCARNATION
            row["birth"], row["length"] = shard.birth, size
            row["checksum"] = checksum.shard_checksum(
                shard.payload, key=shard.key, ns_id=NS_ID, incarnation=INCARNATION
            )
            row["flags"] = int(RecordFlag.INLINE) if shard.inline else 0
            offsets.append(at)
            sizes.append(0 if shard.inline else round_up(size))
            if not shard.inline:
                self.arena[at : at + sizes[-1]] = 0
                self.arena[at : at + size] = np.frombuffer(shard.payload, np.uint8)
                at += sizes[-1]
        inline = b"".join(shard.payload for shard in shards if shard.inline)
        return WriteGroup(
            self.seq,
            self.seq,
            RecordBatch(records, inline),
            np.array(offsets, np.int64),
            np.array(sizes, np.int64),
        )

    async def write(self, sizes: list[int]) -> GroupDone:
        """Write one group of new shards; they count as acknowledged when this returns."""
        shards = self.shards(sizes)
        self.tried.update({shard.key: shard for shard in shards})
        done = await self.store.write_group(self.order(shards), self.arena)
        self.acked.update({shard.key: shard for shard in shards})
        self.groups.setdefault(done.segment, []).extend(shards)
        return done

    async def fill(self, segments: int, size: int = 60 * KIB) -> None:
        """Write groups until this many segments have been sealed."""
        start = (await self.write([size] * 2)).segment
        seen = {start}
        while len(seen) <= segments:
            seen.add((await self.write([size] * 2)).segment)

    async def remove(self, key: bytes) -> None:
        """Log a tombstone; the shard counts as removed when this returns."""
        self.seq += 1
        row: RecordArray = np.zeros(1, META_DTYPE)
        row["kind"], row["seq"] = int(MetaKind.TOMBSTONE), self.seq
        row["ns_id"], row["incarnation"] = NS_ID, INCARNATION
        row["key"] = np.frombuffer(key, np.uint8)
        row["at_wall_ns"] = self.clock.now().wall_ns
        await self.store.append_meta(row, True)
        self.removed.add(key)

    def forget(self, segment: int) -> None:
        """Before a recycle: nobody expects the segment's shards any more."""
        for shard in self.groups.pop(segment, []):
            self.acked.pop(shard.key, None)

    def tombstones(self) -> dict[bytes, int]:
        """Key to sequence of what the meta log says is removed."""
        meta = self.recovered.meta
        rows = meta[meta["kind"] == MetaKind.TOMBSTONE]
        return {row["key"].tobytes(): int(row["seq"]) for row in rows}

    async def found(self) -> dict[bytes, bytes]:
        """Key to payload of everything recovered, each extent read back and verified."""
        payloads: dict[bytes, bytes] = {}
        self.damaged = 0
        dead = self.tombstones()
        for image in self.recovered.images:
            records = image.batch.records
            assert len(image.group_seq) == len(records)
            flags = (records["flags"] & int(RecordFlag.INLINE)) != 0
            at = 0
            for row in records[flags]:
                length = int(row["length"])
                payloads[row["key"].tobytes()] = image.batch.inline[at : at + length]
                at += length
            assert at == len(image.batch.inline)
            for row, status, payload in await self.read(
                records[~flags], image.segment, image.generation
            ):
                self.damaged += status != 0
                if status == 0:
                    payloads[row["key"].tobytes()] = payload
            for row in records:
                key = row["key"].tobytes()
                if dead.get(key, 0) >= int(row["birth"]):
                    payloads.pop(key, None)
        return payloads

    async def read(
        self, records: RecordArray, segment: int, generation: int
    ) -> list[tuple[np.void, int, bytes]]:
        """(record, status, bytes) of extents of one segment, read in batches."""
        results: list[tuple[np.void, int, bytes]] = []
        for start in range(0, len(records), 16):
            rows = records[start : start + 16]
            sizes = -(-rows["length"].astype(np.int64) // PAGE_BYTES) * PAGE_BYTES
            order = ReadExtents(
                1,
                np.full(len(rows), segment, np.uint32),
                np.full(len(rows), generation, np.uint32),
                rows["page"].astype(np.uint32),
                rows["length"].astype(np.uint32),
                np.cumsum(sizes) - sizes,
                sizes,
                checksum.seeds(
                    rows["key"], ns_id=NS_ID, incarnation=INCARNATION, lengths=rows["length"]
                ),
                rows["checksum"].astype(np.uint64),
            )
            self.arena[:] = 0xAA
            statuses = await self.store.read_extents(order, self.arena)
            for row, status, at in zip(rows, statuses, order.slot_offsets, strict=True):
                content = self.arena[at : at + int(row["length"])].tobytes()
                results.append((row, int(status), content))
        return results

    async def check(self, *, lost_ok: bool = False) -> int:
        """Everything acknowledged is there (unless `lost_ok`), and nothing has wrong bytes."""
        found = await self.found()
        for key, payload in found.items():
            assert payload == self.tried[key].payload, "wrong bytes"
            assert key not in self.removed, "a removed shard is back"
        if not lost_ok:
            missing = [key for key in self.acked if key not in found and key not in self.removed]
            assert not missing, f"{len(missing)} of {len(self.acked)} acknowledged shards are lost"
        return len(found)
