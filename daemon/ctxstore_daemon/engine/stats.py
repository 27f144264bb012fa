"""Counters and figures of one engine.

Owns what is counted and its names. It must not decide anything from a counter; names are those that
the metrics page shows, without prefix.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class CountersState:
    """Only ever growing numbers since start."""

    get_hits_memory: int = 0
    get_hits_nvme: int = 0
    get_hit_bytes: int = 0
    get_misses: int = 0
    get_too_small: int = 0
    get_timeouts: int = 0
    get_overloaded: int = 0
    put_committed: int = 0
    put_committed_bytes: int = 0
    put_exists: int = 0
    put_refused: int = 0
    put_overloaded: int = 0
    put_timeouts: int = 0
    put_length_differs: int = 0
    put_payload_failed: int = 0
    evicted: int = 0
    demoted: int = 0
    slabs_cleared: int = 0
    promoted: int = 0
    expired: int = 0
    removed: int = 0
    quarantined: int = 0
    read_failed: int = 0
    groups_written: int = 0
    groups_failed: int = 0
    shards_written: int = 0
    bytes_written: int = 0
    write_given_up: int = 0
    reclaimed_segments: int = 0
    reclaim_survivors: int = 0
    reclaim_dropped: int = 0
    segments_lost: int = 0
    leases_expired: int = 0
    reports: int = 0
    reports_confirmed: int = 0
    meta_failed: int = 0

    def as_dict(self) -> dict[str, int]:
        """Name to value, in the order above."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Figures of this moment, beside the counters. Bytes are those of whole pages."""

    entries: int
    entries_max: int
    index_bytes: int
    arena_bytes: int
    arena_populated_bytes: int
    arena_used_bytes: int
    inline_bytes: int
    leases: int
    leased_bytes: int
    holds: int
    held_bytes: int
    dirty_shards: int
    dirty_bytes: int
    waiting_puts: int
    waiting_gets: int
    loading: int
    connections: int
    segments: int
    segments_free: int
    segments_usable: int
    disk_ok: bool
    sequence: int
    counters: dict[str, int]
