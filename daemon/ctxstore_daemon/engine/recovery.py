"""The index of a start: from what the data directory held to rows.

Owns which of several copies of a key lives, and what tombstones, quarantines, TTLs and holds make
of it. Works by column: a million records take about a second. It must not read files; an engine is
loaded once, empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ctxstore_daemon.engine.core import NS_PER_MS, TTL_MS_MAX, Core
from ctxstore_daemon.engine.index import NEVER_NS, VISIBLE, Rows
from ctxstore_daemon.engine.records import (
    RECORD_DTYPE,
    MetaKind,
    RecordArray,
    RecordFlag,
    Recovered,
)

if TYPE_CHECKING:
    from ctxstore_daemon.engine.extents import ExtentsState

_NO_NAMESPACE = 0xFFFF


@dataclass(slots=True)
class CopiesState:
    """All records of all segments, one row per copy, narrowed down step by step."""

    records: RecordArray
    segment: npt.NDArray[np.int32]
    generation: npt.NDArray[np.uint32]
    group_seq: npt.NDArray[np.uint64]
    inline_at: npt.NDArray[np.int64]
    """Where the payload of an INLINE record starts in `inline`."""
    ns: npt.NDArray[np.uint16]
    inline: bytes

    def keep(self, which: npt.NDArray[np.bool_] | Rows) -> None:
        """Drop all other copies (or put them in this order)."""
        if which.dtype == np.bool_ and which.all():
            return
        self.records = self.records[which]
        self.segment = self.segment[which]
        self.generation = self.generation[which]
        self.group_seq = self.group_seq[which]
        self.inline_at = self.inline_at[which]
        self.ns = self.ns[which]


def load(core: Core, extents: ExtentsState, recovered: Recovered) -> list[tuple[int, int]]:
    """Fill the empty index; returns holds still running as (row, end on the monotonic clock)."""
    core.seq = max(core.seq, recovered.seq_floor)
    for image in sorted(recovered.images, key=lambda image: (image.first_seq, image.segment)):
        extents.written(image.segment, image.generation, image.last_seq)
    copies = _gather(core, recovered)
    copies.keep(copies.ns != _NO_NAMESPACE)
    _bury(copies, recovered.meta)
    _quarantine(copies, recovered.meta)
    _newest_copies(copies)
    expires = _expiry(core, copies, recovered.meta)
    copies.keep(expires > core.now_ns)
    expires = expires[expires > core.now_ns]
    if len(copies.records) > core.settings.entries_max:
        newest = np.argsort(copies.group_seq, kind="stable")[-core.settings.entries_max :]
        copies.keep(newest)
        expires = expires[newest]
    rows = _fill(core, copies, expires)
    return _holds(core, recovered.meta, rows)


def _gather(core: Core, recovered: Recovered) -> CopiesState:
    images = recovered.images
    counts = [len(image.batch.records) for image in images]
    if not images:
        records: RecordArray = np.zeros(0, RECORD_DTYPE)
    else:
        # As plain bytes: numpy joins structured arrays field by field, ten times slower.
        parts = [np.ascontiguousarray(i.batch.records).view(np.uint8) for i in images]
        records = np.concatenate(parts).view(RECORD_DTYPE)
    inline_at = np.full(len(records), -1, np.int64)
    blobs: list[bytes] = []
    start = blob_start = 0
    for image, count in zip(images, counts, strict=True):
        own = image.batch.records
        flagged = (own["flags"] & RecordFlag.INLINE) != 0
        if flagged.any():
            lengths = np.where(flagged, own["length"], 0).astype(np.int64)
            at = blob_start + np.cumsum(lengths) - lengths
            inline_at[start : start + count][flagged] = at[flagged]
            blobs.append(image.batch.inline)
            blob_start += len(image.batch.inline)
        start += count
    ns = np.full(len(records), _NO_NAMESPACE, np.uint16)
    for number, namespace in enumerate(core.settings.namespaces):
        own_ns = records["ns_id"] == namespace.ns_id
        own_ns &= records["incarnation"] == namespace.incarnation
        ns[own_ns] = number
    sequences = [image.group_seq for image in images]
    return CopiesState(
        records=records,
        segment=np.repeat(np.array([i.segment for i in images], np.int32), counts),
        generation=np.repeat(np.array([i.generation for i in images], np.uint32), counts),
        group_seq=np.concatenate(sequences) if sequences else np.zeros(0, np.uint64),
        inline_at=inline_at,
        ns=ns,
        inline=b"".join(blobs),
    )


def _names(records: RecordArray) -> list[tuple[int, int, bytes]]:
    keys: list[bytes] = np.ascontiguousarray(records["key"]).view("V16").reshape(-1).tolist()
    return list(zip(records["ns_id"].tolist(), records["incarnation"].tolist(), keys, strict=True))


def _with_keys_of(copies: CopiesState, records: RecordArray) -> Rows:
    """Positions of copies whose key occurs in the meta records: the few that need a closer look."""
    if not len(records) or not len(copies.records):
        return np.zeros(0, np.int64)
    halves = np.ascontiguousarray(copies.records["key"]).view("<u8").reshape(-1, 2)
    wanted = np.ascontiguousarray(records["key"]).view("<u8").reshape(-1, 2)
    return np.flatnonzero(np.isin(halves[:, 1], wanted[:, 1]))


def _bury(copies: CopiesState, meta: RecordArray) -> None:
    """Remove copies born before their key was removed."""
    stones = meta[meta["kind"] == MetaKind.TOMBSTONE]
    near = _with_keys_of(copies, stones)
    if not len(near):
        return
    dead_until: dict[tuple[int, int, bytes], int] = {}
    for name, seq in zip(_names(stones), stones["seq"].tolist(), strict=True):
        dead_until[name] = max(seq, dead_until.get(name, 0))
    alive = np.ones(len(copies.records), np.bool_)
    found = copies.records[near]
    births = found["birth"].tolist()
    for at, name, birth in zip(near.tolist(), _names(found), births, strict=True):
        alive[at] = birth > dead_until.get(name, 0)
    copies.keep(alive)


def _quarantine(copies: CopiesState, meta: RecordArray) -> None:
    """Remove damaged copies; another copy of the same shard may live."""
    marks = meta[meta["kind"] == MetaKind.QUARANTINE]
    if not len(marks) or not len(copies.records):
        return
    damaged = dict.fromkeys(
        zip(
            marks["segment"].tolist(),
            marks["generation"].tolist(),
            marks["page"].tolist(),
            strict=True,
        )
    )
    segments = np.unique(marks["segment"]).astype(np.int64)
    near = np.flatnonzero(np.isin(copies.segment, segments) & (copies.inline_at < 0))
    alive = np.ones(len(copies.records), np.bool_)
    places = zip(
        copies.segment[near].tolist(),
        copies.generation[near].tolist(),
        copies.records["page"][near].tolist(),
        strict=True,
    )
    for at, place in zip(near.tolist(), places, strict=True):
        alive[at] = place not in damaged
    copies.keep(alive)


def _newest_copies(copies: CopiesState) -> None:
    """Of several copies of a key, the one written last lives."""
    order = np.argsort(copies.group_seq, kind="stable")
    if not np.array_equal(order, np.arange(len(order))):
        copies.keep(order)
    near = _doubtful(copies)
    if not len(near):
        return
    last: dict[tuple[int, int, bytes], int] = {}
    alive = np.ones(len(copies.records), np.bool_)
    for at, name in zip(near.tolist(), _names(copies.records[near]), strict=True):
        older = last.get(name)
        if older is not None:
            alive[older] = False
        last[name] = at
    copies.keep(alive)


def _doubtful(copies: CopiesState) -> Rows:
    """Positions, ascending, of copies whose key may occur more than once (a mix of it does)."""
    halves = np.ascontiguousarray(copies.records["key"]).view("<u8").reshape(-1, 2)
    mix = halves[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ halves[:, 1]
    mix += copies.ns
    order = np.argsort(mix)
    same = np.zeros(len(mix) + 1, np.bool_)
    same[1:-1] = mix[order[1:]] == mix[order[:-1]]
    return np.sort(order[same[1:] | same[:-1]])


def _expiry(core: Core, copies: CopiesState, meta: RecordArray) -> npt.NDArray[np.int64]:
    """End of each copy's TTL on the monotonic clock; whatever the wall clock did, at most the whole
    TTL.
    """
    records = copies.records
    ttl = np.minimum(records["ttl_ms"], np.uint64(TTL_MS_MAX)).astype(np.int64) * NS_PER_MS
    left = np.clip(records["written_at_ns"] + ttl - core.wall_ns, 0, ttl)
    expires: npt.NDArray[np.int64] = np.where(ttl == 0, NEVER_NS, core.now_ns + left)
    changes = meta[meta["kind"] == MetaKind.TTL]
    near = _with_keys_of(copies, changes)
    if not len(near):
        return expires
    newest: dict[tuple[int, int, bytes], tuple[int, int, int, int]] = {}
    columns = (changes[name].tolist() for name in ("seq", "birth", "at_wall_ns", "ttl_ms"))
    for name, change in zip(_names(changes), zip(*columns, strict=True), strict=True):
        if change >= newest.get(name, (0, 0, 0, 0)):
            newest[name] = change
    for at, name in zip(near.tolist(), _names(records[near]), strict=True):
        seq, birth, at_wall_ns, ttl_ms = newest.get(name, (0, 0, 0, 0))
        if not seq or birth != records["birth"][at] or seq < copies.group_seq[at]:
            continue
        expires[at] = _ends_at(core, at_wall_ns, ttl_ms)
    return expires


def _ends_at(core: Core, at_wall_ns: int, ttl_ms: int) -> int:
    if not ttl_ms:
        return NEVER_NS
    ttl_ns = min(ttl_ms, TTL_MS_MAX) * NS_PER_MS
    return core.now_ns + min(max(at_wall_ns + ttl_ns - core.wall_ns, 0), ttl_ns)


def _fill(core: Core, copies: CopiesState, expires: npt.NDArray[np.int64]) -> Rows:
    index = core.index
    records = copies.records
    rows = index.load(ns=copies.ns, keys=records["key"])
    part = slice(1, len(rows) + 1)
    index.length[part] = records["length"]
    index.segment[part] = copies.segment
    index.page[part] = records["page"]
    index.birth[part] = records["birth"]
    index.checksum[part] = records["checksum"]
    index.expires_ns[part] = expires
    index.depth[part] = records["depth"]
    index.cost_s[part] = records["cost_s"]
    index.priority[part] = records["priority"]
    index.flags[part] = VISIBLE
    for at in np.flatnonzero(copies.inline_at >= 0).tolist():
        start = int(copies.inline_at[at])
        row = int(rows[at])
        index.set_inline(row, copies.inline[start : start + index.length_at[row]])
        core.enqueue(row)
    core.inline_bytes = index.inline_bytes
    for number in range(len(core.ns_bytes)):
        core.ns_bytes[number] = int(records["length"][copies.ns == number].sum(dtype=np.int64))
    return rows


def _holds(core: Core, meta: RecordArray, rows: Rows) -> list[tuple[int, int]]:
    """Rows that are still held, and until when."""
    records = meta[meta["kind"] == MetaKind.HOLD]
    index = core.index
    numbers = {
        (ns.ns_id, ns.incarnation): number for number, ns in enumerate(core.settings.namespaces)
    }
    held: dict[int, tuple[int, int]] = {}
    columns = (records[name].tolist() for name in ("seq", "birth", "at_wall_ns", "ttl_ms"))
    for name, change in zip(_names(records), zip(*columns, strict=True), strict=True):
        number = numbers.get(name[:2])
        row = index.find(number, name[2]) if number is not None else 0
        seq, birth, at_wall_ns, ttl_ms = change
        if row and index.birth_at[row] == birth and seq >= held.get(row, (0, 0))[0]:
            ends = _ends_at(core, at_wall_ns, ttl_ms) if ttl_ms else 0
            held[row] = (seq, ends)
    return [(row, ends) for row, (_, ends) in held.items() if ends > core.now_ns]
