"""The nvme tier: shards in segments.

Owns which segments still hold a live shard of this tier's callers. Layout, order of writes and
verification are the segment store's.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore import checksum
from ctxstore.errors import DeviceError, OutOfSpace
from ctxstore_daemon.engine.events import ReadExtents, Statuses
from ctxstore_daemon.engine.records import RecordArray, RecordBatch
from ctxstore_daemon.tiers.base import LOCATION_DTYPE, Locations, Pages, Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ctxstore_daemon.segments.store import SegmentStore

_LOG: Final = logging.getLogger(__name__)


class NvmeTier(Tier):
    """`Tier` over a SegmentStore that nobody else writes to; `seq` is the recovery's floor."""

    def __init__(self, store: SegmentStore, *, seq: int) -> None:
        self._store = store
        self._seq = seq
        self._live: Counter[int] = Counter()
        self._open: int | None = None
        self._closed = False

    @property
    def room_bytes(self) -> int:
        """Free segments; each takes at least one group of this size."""
        return self._store.counts()[0] * self._store.geometry.group_bytes_max // 2

    async def write(self, records: RecordArray, payloads: Sequence[Pages]) -> Locations:
        """See `Tier.write`: one group, durable on return."""
        self._seq += 1
        done = await self._store.append_group(
            RecordBatch(records), list(payloads), group_id=self._seq, seq=self._seq
        )
        self._live[done.segment] += len(records)
        before, self._open = self._open, done.segment
        if before is not None and before != done.segment:
            await self._recycle_if_empty(before)
        locations: Locations = np.zeros(len(records), LOCATION_DTYPE)
        locations["segment"], locations["generation"] = done.segment, done.generation
        locations["page"], locations["length"] = done.pages, records["length"]
        locations["checksum"] = records["checksum"]
        locations["seed"] = [_seed(row) for row in records]
        return locations

    async def read(self, locations: Locations, buffers: Sequence[Pages]) -> Statuses:
        """See `Tier.read`: every payload is verified against its checksum."""
        sizes = np.array([len(buffer) for buffer in buffers], np.int64)
        order = ReadExtents(
            read_id=0,
            segments=locations["segment"].astype(np.uint32),
            generations=locations["generation"].astype(np.uint32),
            pages=locations["page"].astype(np.uint32),
            lengths=locations["length"].astype(np.uint32),
            slot_offsets=np.zeros(len(locations), np.int64),
            slot_bytes=sizes,
            seeds=locations["seed"].astype(np.uint64),
            checksums=locations["checksum"].astype(np.uint64),
        )
        return await self._store.read_into(order, buffers)

    async def free(self, locations: Locations) -> None:
        """See `Tier.free`: space comes back by whole segments."""
        for segment in np.unique(locations["segment"]).tolist():
            self._live[segment] -= int((locations["segment"] == segment).sum())
            assert self._live[segment] >= 0, "a location is freed once"
            if segment != self._open:
                await self._recycle_if_empty(segment)

    async def close(self) -> None:
        """Seal and close the store."""
        if not self._closed:
            self._closed = True
            await self._store.close()

    async def _recycle_if_empty(self, segment: int) -> None:
        if self._live[segment]:
            return
        try:
            await self._store.recycle(segment)
        except (DeviceError, OutOfSpace) as error:
            _LOG.warning("segment_not_recycled segment=%d reason=%s", segment, error)


def _seed(row: np.void) -> int:
    return checksum.seed(
        row["key"].tobytes(),
        ns_id=int(row["ns_id"]),
        incarnation=int(row["incarnation"]),
        length=int(row["length"]),
    )
