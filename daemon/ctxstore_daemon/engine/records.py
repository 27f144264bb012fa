"""Columns that engine and segments share: shard records, meta records, and what recovery found.

Owns the numpy layouts, which are also the on-disk layouts (packed, little endian). It must not
read or
write files, and it must not decide anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Any

import numpy as np
import numpy.typing as npt

RecordArray = npt.NDArray[Any]
"""A one-dimensional structured array of RECORD_DTYPE or META_DTYPE."""

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]


class RecordFlag(IntFlag):
    """Bits of a shard record's `flags`."""

    NONE = 0
    INLINE = 1
    """The payload (≤ 1 KiB) follows the record table instead of standing in an extent; `page` is
    0."""


RECORD_DTYPE = np.dtype(
    [
        ("key", "u1", (16,)),
        ("ns_id", "<u8"),
        ("incarnation", "<u8"),
        ("birth", "<u8"),  # birth sequence: of the original put, kept by every copy
        ("checksum", "<u8"),
        ("written_at_ns", "<i8"),  # wall clock
        ("ttl_ms", "<u8"),  # 0 = no expiry
        ("length", "<u4"),  # payload bytes
        ("page", "<u4"),  # extent offset in the segment, in 4 KiB pages
        ("depth", "<u4"),
        ("cost_s", "<f4"),  # NaN = unknown
        ("priority", "<i2"),
        ("flags", "<u2"),  # RecordFlag
        ("reserved", "<u4"),
    ]
)
"""One shard in a group header or footer; 88 bytes, no padding."""


class MetaKind(IntEnum):
    """What a meta-log record says."""

    TOMBSTONE = 1
    """Copies of (ns, key) with birth ≤ `seq` are removed, for ever."""
    HOLD = 2
    """Keep (ns, key) born at `birth` until at_wall_ns + ttl_ms; ttl_ms 0 ends the hold."""
    TTL = 3
    """(ns, key) born at `birth` now expires at at_wall_ns + ttl_ms; ttl_ms 0 = never."""
    QUARANTINE = 4
    """The copy at (segment, generation, page) is damaged: never serve it."""
    GENERATION = 5
    """`segment` is written under `generation` from now on; images of another one are discarded."""
    SEQUENCE = 6
    """Sequence numbers up to `seq` may have been handed out."""
    RETIRED = 7
    """`segment` failed a sync or write and takes no more data."""


META_DTYPE = np.dtype(
    [
        ("kind", "<u4"),
        ("segment", "<u4"),
        ("generation", "<u4"),
        ("page", "<u4"),
        ("ns_id", "<u8"),
        ("incarnation", "<u8"),
        ("key", "u1", (16,)),
        ("birth", "<u8"),
        ("seq", "<u8"),  # node sequence when logged; for a tombstone its own sequence number
        ("at_wall_ns", "<i8"),
        ("ttl_ms", "<u8"),
    ]
)
"""One meta-log record without its frame (sequence and checksum are added by the log); 80 bytes."""


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """Records in group order, with the payloads of the INLINE ones concatenated in record order."""

    records: RecordArray
    inline: bytes = b""


@dataclass(frozen=True, slots=True)
class SegmentImage:
    """What recovery found in one segment: live-looking records, not yet compared with other
    segments.

    `group_seq` (u64, one per record) is the sequence of the group that wrote it: of two copies of
    the same
    (ns, key, birth), and of two births, the larger sequence wins. `sealed` is False for the open
    segment.
    """

    segment: int
    generation: int
    first_seq: int
    last_seq: int
    batch: RecordBatch
    group_seq: U64
    sealed: bool


@dataclass(frozen=True, slots=True)
class Recovered:
    """Everything a start found in the data directory; `seq_floor` is above every number ever
    used."""

    images: tuple[SegmentImage, ...] = ()
    meta: RecordArray = field(default_factory=lambda: np.zeros(0, META_DTYPE))
    seq_floor: int = 1
