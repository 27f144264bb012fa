"""Every named bound of ctxstore, with its reason.

Owns numbers that protect a process from its peers or from itself. It must hold no behaviour.
A bound that an operator may change is a setting in `ctxstore.config`; its hard limit stands here.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

PAGE_BYTES: Final = 4096
"""Unit of slots, extents and O_DIRECT: the largest logical block size of the disks in use."""

HUGE_PAGE_BYTES: Final = 2 * MIB
"""Chunk of the arena that slabs are carved from; one x86-64 huge page."""

KEY_BYTES: Final = 16
"""Placement group (6), chunk id (8), cell index (2)."""

INLINE_BYTES_MAX: Final = 1024
"""Shards up to this length live in the index and travel in replies: a page each would waste 4x."""

SHARD_BYTES_MAX: Final = 64 * MIB
"""Hard limit of a shard; a node announces a smaller one where its segments or shares are
smaller."""

FRAME_BYTES_MAX: Final = 8 * MIB
"""Largest control frame: 65,536 keys with every column, and inline payloads, fit."""

BATCH_KEYS_MAX: Final = 65_536
"""Keys in one request. The client splits larger batches; a server answers more with an error."""

HELLO_BYTES_MAX: Final = 16 * KIB
"""Largest frame before authentication: a stranger cannot make the daemon allocate."""

HELLO_TIMEOUT_S: Final = 5.0
"""A connection that has not said hello by then is closed."""

NAME_BYTES_MAX: Final = 255
"""Cluster, namespace and node names, tokens' ids."""

TOKEN_BYTES_MAX: Final = 4096
"""A credential in the hello."""

TEXT_BYTES_MAX: Final = 64 * KIB
"""Error texts, explanations and statistics documents."""

REQUEST_TIMEOUT_S_MAX: Final = 600.0
"""Longest deadline a request may carry; longer ones are cut to it."""

OUTSTANDING_REQUESTS_MAX: Final = 64
"""Requests of one control connection that may await their replies; one more is a protocol error."""

OUTBOX_BYTES_MAX: Final = 32 * MIB
"""Replies queued to a client that does not read; above it the connection is closed."""

WAITING_PUTS_MAX: Final = 4096
"""Puts of a node that wait for room; one more is OVERLOADED."""

SEGMENTS_MIN: Final = 8
"""Fewer segments would make each reclaim throw away too much at once."""

SEGMENT_BYTES_MAX: Final = 256 * MIB
"""Large enough that headers, footers and syncs vanish in the noise."""

SEGMENT_BYTES_MIN: Final = 1 * MIB
"""Below this a group of a few shards would not fit."""

GROUP_SHARDS_MAX: Final = 256
"""Shards in one group commit: with a header page this stays below IOV_MAX (1024) buffers."""

HOLD_TIER_FRACTION: Final = 0.5
"""Holds may keep at most this part of a tier, so that eviction can always make room."""

LEASE_ARENA_FRACTION: Final = 0.25
"""One connection's leases may keep at most this part of the arena."""

STAGING_MEMORY_FRACTION: Final = 0.125
"""Staging of all connections together, of the memory cap."""

INLINE_MEMORY_FRACTION: Final = 1 / 16
"""Payloads of inline shards, which lie outside the arena, of the memory cap."""

SURVIVOR_SEGMENT_FRACTION: Final = 0.25
"""Shards hit since written that a reclaim copies out, of a segment's bytes (held ones always)."""

TOMBSTONE_AGE_S_MIN: Final = 24 * 3600.0
"""A tombstone stays at least this long, and until no older segment can hold its key."""

KV_GROUPS_MAX: Final = 256
"""Manifest cells are 0xFF00 + KV-cache group."""

MANIFEST_CELL_BASE: Final = 0xFF00
"""Cell indices from here on are manifests; grid cells stay below."""

TTL_S_MAX: Final = 100 * 365 * 24 * 3600.0
"""Longest TTL, about a hundred years: nanoseconds since the epoch then still fit 64 signed bits."""

COST_S_MAX: Final = 1e6
"""Largest recompute cost of a shard, in seconds; anything above is a mistake of the sender."""

FAILURE_TEXT_BYTES_MAX: Final = 4 * KIB
"""Message of a failure: it must fit where only a hello is expected."""
