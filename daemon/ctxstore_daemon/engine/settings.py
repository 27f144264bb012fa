"""What the engine needs to know about its node, fixed at start.

Owns the frozen settings that `node` builds from the configuration. It must not read configuration
itself and holds no state.
"""

from __future__ import annotations

from dataclasses import dataclass

from ctxstore import limits
from ctxstore.wire.messages import Durability


@dataclass(frozen=True, slots=True)
class NamespaceSettings:
    """One configured namespace; events name it by its position in `EngineSettings.namespaces`."""

    name: str
    ns_id: int
    incarnation: int = 0
    durability: Durability = Durability.MEMORY
    """What Durability.DEFAULT means here; MEMORY or GROUP."""
    quota_bytes: int = 0
    """Payload bytes of all its shards on any tier; a put beyond is REFUSED. 0 = no quota."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Bounds and shares of one node. Sizes in bytes, times in seconds."""

    namespaces: tuple[NamespaceSettings, ...]
    arena_bytes: int
    """Whole arena with its generation table."""
    entries_max: int
    shard_bytes_max: int
    disk_bytes: int
    """Capacity of the nvme tier, of which holds may take a share; 0 = this node has no disk."""
    segment_bytes: int = limits.SEGMENT_BYTES_MAX
    flush_interval_s: float = 0.5
    lease_s_max: float = 60.0
    dirty_fraction: float = 0.5
    """Part of the arena that may wait for write-behind; puts wait above it."""
    group_shards_max: int = limits.GROUP_SHARDS_MAX
    group_bytes_max: int = 64 * limits.MIB
    """A group closes before this is passed; one larger shard makes a group of its own."""
    group_shards_target: int = 32
    group_bytes_target: int = 16 * limits.MIB
    """With this much waiting, a group is written without waiting for the flush interval."""
    lease_fraction: float = limits.LEASE_ARENA_FRACTION
    hold_fraction: float = limits.HOLD_TIER_FRACTION
    survivor_fraction: float = limits.SURVIVOR_SEGMENT_FRACTION
    waiting_puts_max: int = limits.WAITING_PUTS_MAX
    reclaim_free_min: int = 2
    """Reclaim starts when fewer segments are free: one to fill while the next is made ready."""
    read_shards_max: int = 64
    """Extents in one ReadExtents, so that waiting requests progress one by one."""
    write_attempts_max: int = 3
    """Groups a memory-durability shard may fail in before it is kept in memory only."""
    inline_bytes_max: int = 64 * limits.MIB
    """Inline payloads in memory, outside the arena; shards of at most 1 KiB wait or make room."""
    inline_reply_bytes_max: int = 4 * limits.MIB
    """Inline payload of one reply, well inside a frame; more is OVERLOADED for those keys."""
