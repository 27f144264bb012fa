"""Questions about keys that move nothing: exists, match, stat, explain.

Owns their answers, by column. It must not change the index: even an expired row is only left out.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from ctxstore.limits import TEXT_BYTES_MAX
from ctxstore.wire import messages as wire
from ctxstore.wire.messages import StatFlag, StatTier
from ctxstore_daemon.engine.index import (
    DIRTY,
    HELD,
    HIT,
    INLINE,
    LOADING,
    NEVER_NS,
    VISIBLE,
    WRITING,
    split_keys,
)

if TYPE_CHECKING:
    from ctxstore_daemon.engine.core import Core

_EXPLAINED_MAX = 64


def exists(core: Core, conn: int, message: wire.Exists) -> None:
    """One byte per key."""
    rows = core.index.find_batch(core.conns[conn].ns, message.keys)
    seen = core.index.visible(rows, core.now_ns)
    core.reply(conn, wire.MaskReply(message.rid, seen.tobytes()))


def match(core: Core, conn: int, message: wire.Match) -> None:
    """Number of leading keys that are there."""
    rows = core.index.find_batch(core.conns[conn].ns, message.keys)
    seen = core.index.visible(rows, core.now_ns)
    count = len(rows) if seen.all() else int(seen.argmin())
    core.reply(conn, wire.CountReply(message.rid, count))


def stat(core: Core, conn: int, message: wire.Stat) -> None:
    """Length, fastest tier and remaining TTL of each key."""
    index = core.index
    rows = index.find_batch(core.conns[conn].ns, message.keys)
    seen = index.visible(rows, core.now_ns)
    flags = index.flags[rows]
    entries = np.zeros(len(rows), wire.STAT_DTYPE)
    tier = np.full(len(rows), int(StatTier.NVME), np.uint8)
    tier[index.slot[rows] > 0] = StatTier.MEMORY
    tier[(flags & INLINE) != 0] = StatTier.INLINE
    entries["tier"] = tier * seen
    entries["length"] = index.length[rows] * seen
    expires = index.expires_ns[rows]
    left = np.maximum((expires - core.now_ns) // 1_000_000, 1)
    entries["ttl_ms"] = np.where(seen & (expires != NEVER_NS), left, 0)
    held = np.where(flags & HELD, int(StatFlag.HELD), 0)
    durable = np.where(index.segment[rows] >= 0, int(StatFlag.DURABLE), 0)
    entries["flags"] = (held + durable) * seen
    core.reply(conn, wire.StatReply(message.rid, entries.tobytes()))


def explain(core: Core, conn: int, message: wire.Explain) -> None:
    """What the node knows of each key, as JSON; of a long list only the first 64."""
    ns = core.conns[conn].ns
    names = split_keys(message.keys)
    document = {
        "namespace": core.settings.namespaces[ns].name,
        "keys": len(names),
        "explained": [_explain_key(core, ns, name) for name in names[:_EXPLAINED_MAX]],
    }
    core.reply(conn, wire.TextReply(message.rid, json.dumps(document)[:TEXT_BYTES_MAX]))


def _explain_key(core: Core, ns: int, name: bytes) -> dict[str, object]:
    index = core.index
    row = index.find(ns, name)
    flags = index.flags_at[row]
    found: dict[str, object] = {"key": name.hex(), "state": "absent"}
    if not row:
        return found
    expires = index.expires_ns_at[row]
    if not flags & VISIBLE:
        found["state"] = "being put"
    elif expires <= core.now_ns:
        found["state"] = "expired"
    else:
        found["state"] = "visible"
    tiers = []
    if flags & INLINE:
        tiers.append("inline")
    if index.slot_at[row]:
        tiers.append("memory")
    if index.segment_at[row] >= 0:
        tiers.append("nvme")
    page = index.slot_at[row]
    return found | {
        "tiers": tiers,
        "length": index.length_at[row],
        "birth": index.birth_at[row],
        "priority": index.priority_at[row],
        "depth": index.depth_at[row],
        "ttl_ms": core.remaining_ms(row),
        "held": bool(flags & HELD),
        "hit_since_written": bool(flags & HIT),
        "waits_for_disk": bool(flags & (DIRTY | WRITING)),
        "loading": bool(flags & LOADING),
        "users": core.slabs.pins_at[page] if page else 0,
        "segment": index.segment_at[row],
    }
