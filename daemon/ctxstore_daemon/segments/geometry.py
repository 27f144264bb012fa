"""How a disk cap is divided: segments, meta log, small files.

Owns the arithmetic that keeps every file of a node inside `--disk`. It must not touch the disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ctxstore.errors import ConfigError
from ctxstore.limits import (
    GIB,
    KIB,
    MIB,
    PAGE_BYTES,
    SEGMENT_BYTES_MAX,
    SEGMENT_BYTES_MIN,
    SEGMENTS_MIN,
    SHARD_BYTES_MAX,
)
from ctxstore.units import format_size

SMALL_FILES_BYTES: Final = 64 * KIB
"""LOCK, IDENTITY, endpoints.json and the directory itself."""

SEGMENT_SLACK_BYTES: Final = 16 * KIB
"""What a file system may charge for one file beyond its bytes (extent tree blocks)."""

META_BYTES_MIN: Final = 1 * MIB
"""A quarter is one log file: 2,500 records, enough for the smallest store."""

META_BYTES_MAX: Final = 1 * GIB
"""More would be 2.5 million removals a day; the log is read whole at each start."""

META_DISK_SHARE: Final = 16
"""The meta log's part of the disk is one in this many: 150,000 removals a day per GiB, and all
shards of a small store at once."""

META_FILES: Final = 4
"""Log and mirror, and while the log is rewritten their successors beside them."""

_SEGMENTS_WANTED: Final = 16
_SEGMENT_UNIT: Final = 64 * KIB


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of one data directory. All in bytes except `segments`, a count."""

    disk_bytes: int
    segment_bytes: int
    segments: int
    meta_bytes_max: int

    @classmethod
    def for_disk(cls, disk_bytes: int, *, segment_bytes: int | None = None) -> Geometry:
        """Divide `disk_bytes`. An existing directory passes the segment size it was made with.

        Raises ConfigError when the cap leaves no room for the fewest segments that work.
        """
        if segment_bytes is None:
            wanted = disk_bytes // _SEGMENTS_WANTED // _SEGMENT_UNIT * _SEGMENT_UNIT
            segment_bytes = min(SEGMENT_BYTES_MAX, max(SEGMENT_BYTES_MIN, wanted))
        meta = disk_bytes // META_DISK_SHARE // PAGE_BYTES * PAGE_BYTES
        meta = min(META_BYTES_MAX, max(META_BYTES_MIN, meta))
        overhead = meta + SMALL_FILES_BYTES
        segments = (disk_bytes - overhead) // (segment_bytes + SEGMENT_SLACK_BYTES)
        if segments < SEGMENTS_MIN:
            least = SEGMENTS_MIN * (segment_bytes + SEGMENT_SLACK_BYTES) + overhead
            least = -(-least // MIB) * MIB
            raise ConfigError(
                f"a disk cap of {format_size(max(disk_bytes, 0))} is too small: "
                f"{SEGMENTS_MIN} segments of {format_size(segment_bytes)} "
                f"and the logs need {format_size(least)}"
            )
        return cls(disk_bytes, segment_bytes, segments, meta)

    @property
    def meta_file_bytes_max(self) -> int:
        """Most bytes of one meta-log file."""
        return self.meta_bytes_max // META_FILES

    @property
    def group_bytes_max(self) -> int:
        """Header and extents of one group that surely fits an empty segment."""
        return self.segment_bytes // 2

    @property
    def shard_bytes_max(self) -> int:
        """Largest shard the segments can take."""
        return min(SHARD_BYTES_MAX, self.segment_bytes // 4)
