"""Every tier passes the one suite: memory, nvme on a simulated disk, nvme on a real one's rules."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ctxstore import checksum
from ctxstore.limits import MIB
from ctxstore.testing.clock import SimClock
from ctxstore.testing.disk import DiskProfile, SimDisk
from ctxstore.testing.mover import InlineMover
from ctxstore.testing.tier_suite import TierSuite
from ctxstore_daemon.engine.records import RECORD_DTYPE, RecordArray
from ctxstore_daemon.segments.files import segment_name
from ctxstore_daemon.segments.identity import open_identity
from ctxstore_daemon.segments.store import SegmentStore
from ctxstore_daemon.tiers.memory import HeapArena, MemoryTier
from ctxstore_daemon.tiers.nvme import NvmeTier

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence


class _DaemonTier(TierSuite):
    def records(self, payloads: Sequence[bytes]) -> RecordArray:
        rows: RecordArray = np.zeros(len(payloads), RECORD_DTYPE)
        for index, (row, payload) in enumerate(zip(rows, payloads, strict=True)):
            key = random.Random(payload).randbytes(15) + bytes([index % 256])
            row["key"] = np.frombuffer(key, np.uint8)
            row["ns_id"], row["length"] = 3, len(payload)
            row["checksum"] = checksum.shard_checksum(payload, key=key, ns_id=3, incarnation=0)
        return rows


class TestMemoryTier(_DaemonTier):
    @asynccontextmanager
    async def open_tier(self) -> AsyncGenerator[MemoryTier, None]:
        tier = MemoryTier(HeapArena(8 * MIB))
        yield tier
        await tier.close()

    async def damage(self, tier: Any, location: Any) -> bool:
        return False


class TestNvmeTier(_DaemonTier):
    profile = DiskProfile(delay_s_min=1e-5, delay_s_max=1e-3)

    @asynccontextmanager
    async def open_tier(self) -> AsyncGenerator[NvmeTier, None]:
        self.disk = SimDisk(5, profile=self.profile)
        identity, geometry = await open_identity(
            self.disk, cluster_id="test", disk_bytes=12 * MIB, rng=random.Random(5)
        )
        store, recovered = await SegmentStore.open(
            self.disk, identity=identity, geometry=geometry, clock=SimClock(), mover=InlineMover()
        )
        tier = NvmeTier(store, seq=recovered.seq_floor)
        yield tier
        await tier.close()

    async def damage(self, tier: Any, location: Any) -> bool:
        self.disk.flip_bit(segment_name(int(location["segment"])), int(location["page"]) * 4096)
        return True


class TestNvmeTierWithoutDirectIo(TestNvmeTier):
    profile = DiskProfile(direct=False, sector_bytes=4096)
