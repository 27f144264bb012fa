"""Byte layout of the meta log, and which of its records still say anything.

Owns frames of fixed size, so that one damaged frame hides no other, and the rules of compaction. It
must not read files.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash

from ctxstore.limits import TOMBSTONE_AGE_S_MIN
from ctxstore_daemon.engine.records import META_DTYPE, MetaKind, RecordArray
from ctxstore_daemon.segments.format import FORMAT_VERSION, Fault, Invalid

if TYPE_CHECKING:
    import numpy.typing as npt

META_MAGIC: Final = b"CTXMETAL"
FRAME_DTYPE: Final = np.dtype(
    [("record", META_DTYPE), ("index", "<u8"), ("synced", "<u8"), ("checksum", "<u8")]
)
"""One record in the file: its number in the log, how many were known synced, and a checksum."""
FRAME_BYTES: Final = FRAME_DTYPE.itemsize
_SUMMED_BYTES: Final = FRAME_BYTES - 8
_HEADER: Final = struct.Struct("<8sHHI16sQQ")

_MS: Final = 1_000_000
_TOMBSTONE_AGE_NS: Final = int(TOMBSTONE_AGE_S_MIN * 1e9)


@dataclass(frozen=True, slots=True)
class MetaHeader:
    """First frame-sized cell of a log file. Records [0, checkpoint) were written with it."""

    number: int
    node_id: bytes
    checkpoint: int


@dataclass(frozen=True, slots=True)
class MetaFrames:
    """Valid frames of one file or of several merged: in index order, each index once.

    `synced` is the largest count of synced records that any frame claims.
    """

    records: RecordArray
    indexes: npt.NDArray[np.uint64]
    synced: int
    bad_cells: int

    @property
    def missing(self) -> int:
        """Records that were synced once and are in no frame."""
        return self.synced - int((self.indexes < self.synced).sum())


def _file_seed(secret: int, number: int) -> int:
    return xxhash.xxh3_64_intdigest(struct.pack("<QQ", secret, number))


def pack_meta_header(header: MetaHeader, secret: int) -> bytes:
    """One frame-sized cell."""
    fixed = _HEADER.pack(
        META_MAGIC, FORMAT_VERSION, 0, header.number, header.node_id, header.checkpoint, 0
    )
    body = fixed.ljust(_SUMMED_BYTES, b"\0")
    value = xxhash.xxh3_64_intdigest(body, _file_seed(secret, header.number))
    return body + struct.pack("<Q", value)


def parse_meta_header(data: bytes, *, number: int, secret: int) -> MetaHeader | Invalid:
    """The header of log file `number`, or why it is none."""
    if len(data) < FRAME_BYTES:
        return Invalid(Fault.SHORT, f"{len(data)} bytes")
    magic, version, _, found, node_id, checkpoint, _ = _HEADER.unpack_from(data)
    if magic != META_MAGIC:
        return Invalid(Fault.MAGIC)
    if version > FORMAT_VERSION:
        return Invalid(Fault.VERSION, f"version {version}")
    (stored,) = struct.unpack_from("<Q", data, _SUMMED_BYTES)
    if xxhash.xxh3_64_intdigest(data[:_SUMMED_BYTES], _file_seed(secret, number)) != stored:
        return Invalid(Fault.CHECKSUM)
    if found != number:
        return Invalid(Fault.PLACE, f"log {found}")
    return MetaHeader(found, node_id, checkpoint)


def pack_frames(
    records: RecordArray, *, first_index: int, synced: int, number: int, secret: int
) -> bytes:
    """Frames of `records`, numbered from `first_index`."""
    frames: RecordArray = np.zeros(len(records), FRAME_DTYPE)
    frames["record"] = records
    frames["index"] = np.arange(first_index, first_index + len(records), dtype=np.uint64)
    frames["synced"] = synced
    frames["checksum"] = _sums(frames, _file_seed(secret, number))
    return frames.tobytes()


def _sums(frames: RecordArray, seed: int) -> npt.NDArray[np.uint64]:
    bytes_of = frames.view(np.uint8).reshape(len(frames), FRAME_BYTES)[:, :_SUMMED_BYTES]
    cells: list[bytes] = (
        np.ascontiguousarray(bytes_of).view(f"V{_SUMMED_BYTES}").reshape(-1).tolist()
    )
    digest = xxhash.xxh3_64_intdigest
    sums = (digest(cell, seed) for cell in cells)
    return np.fromiter(sums, np.uint64, len(frames))


def parse_frames(data: npt.NDArray[np.uint8], *, number: int, secret: int) -> MetaFrames:
    """Every valid frame of a file's bytes after its header cell; damaged ones are left out."""
    count = len(data) // FRAME_BYTES
    frames: RecordArray = np.frombuffer(data, FRAME_DTYPE, count)
    good = frames["checksum"] == _sums(frames, _file_seed(secret, number))
    # A frame also has its place: a copy of it elsewhere in the file says nothing.
    good &= frames["index"] == np.arange(count, dtype=np.uint64)
    kept = frames[good]
    synced = int(kept["synced"].max()) if len(kept) else 0
    return MetaFrames(kept["record"].copy(), kept["index"].copy(), synced, count - len(kept))


def merge_frames(parts: list[MetaFrames]) -> MetaFrames:
    """Union of a log and its mirror: a record is there if either file has it."""
    records = np.concatenate([part.records for part in parts])
    indexes = np.concatenate([part.indexes for part in parts])
    unique, first = np.unique(indexes, return_index=True)
    return MetaFrames(
        records[first],
        unique,
        max(part.synced for part in parts),
        sum(part.bad_cells for part in parts),
    )


# ------------------------------------------------------------------------------ compaction


@dataclass(frozen=True, slots=True)
class Horizon:
    """What decides whether a record still matters.

    `oldest_seq` is the first group sequence of the oldest segment that holds data: everything that
    can be read was written at or after it. `wall_ns` is the time of day.
    """

    oldest_seq: int
    wall_ns: int


def compact(records: RecordArray, horizon: Horizon) -> RecordArray:
    """The records that still say something, in their order. Later ones win over earlier ones."""
    if not len(records):
        return records
    keep = np.zeros(len(records), np.bool_)
    kinds = records["kind"]
    generations = _latest(records, kinds == MetaKind.GENERATION, ["segment"], by_seq=False)
    keep |= generations
    current = {int(row["segment"]): int(row["generation"]) for row in records[generations]}
    keep |= _latest(records, kinds == MetaKind.SEQUENCE, [])
    for kind, fields in (
        (MetaKind.RETIRED, ["segment"]),
        (MetaKind.QUARANTINE, ["segment", "generation", "page"]),
    ):
        found = _latest(records, kinds == kind, fields, by_seq=False)
        found &= _of_generation(records, current)
        keep |= found
    keep |= _live_tombstones(records, horizon)
    key_and_birth = ["ns_id", "incarnation", "key", "birth"]
    # A copy written after a TTL change carries the new TTL itself.
    ttls = _latest(records, kinds == MetaKind.TTL, key_and_birth)
    keep |= ttls & (records["seq"] >= np.uint64(max(0, horizon.oldest_seq)))
    holds = _latest(records, kinds == MetaKind.HOLD, key_and_birth)
    ends = records["at_wall_ns"].astype(np.float64) + records["ttl_ms"].astype(np.float64) * _MS
    keep |= holds & (records["ttl_ms"] > 0) & (ends > horizon.wall_ns)
    return records[keep]


def _live_tombstones(records: RecordArray, horizon: Horizon) -> npt.NDArray[np.bool_]:
    """A tombstone goes when it is a day old *and* no older segment can hold its key."""
    found = _latest(records, records["kind"] == MetaKind.TOMBSTONE, ["ns_id", "incarnation", "key"])
    # A clock that was set back makes the age negative: the tombstone stays.
    old = horizon.wall_ns - records["at_wall_ns"] >= _TOMBSTONE_AGE_NS
    unreachable = records["seq"] < np.uint64(max(0, horizon.oldest_seq))
    live: npt.NDArray[np.bool_] = found & ~(old & unreachable)
    return live


def _latest(
    records: RecordArray, mask: npt.NDArray[np.bool_], fields: list[str], *, by_seq: bool = True
) -> npt.NDArray[np.bool_]:
    """Of the records in `mask`, the last for each value of `fields`: by seq, or as logged."""
    chosen = np.flatnonzero(mask)
    result = np.zeros(len(records), np.bool_)
    if not len(chosen):
        return result
    if by_seq:
        chosen = chosen[np.argsort(records["seq"][chosen], kind="stable")]
    if not fields:
        result[chosen[-1]] = True
        return result
    named = np.dtype([(name, META_DTYPE[name]) for name in fields])
    rows: RecordArray = np.zeros(len(chosen), named)
    for name in fields:
        rows[name] = records[name][chosen]
    # Byte strings of one width are equal where all their bytes are, and numpy sorts them fast.
    values = rows.view(f"S{named.itemsize}").reshape(-1)
    order = np.argsort(values, kind="stable")
    in_order = values[order]
    last = np.ones(len(rows), np.bool_)
    last[:-1] = in_order[1:] != in_order[:-1]
    result[chosen[order[last]]] = True
    return result


def _of_generation(records: RecordArray, current: dict[int, int]) -> npt.NDArray[np.bool_]:
    size = 1 + max(current, default=0)
    table = np.zeros(size, np.int64)
    for segment, generation in current.items():
        table[segment] = generation
    segments = records["segment"].astype(np.int64)
    known = segments < size
    result: npt.NDArray[np.bool_] = known & (
        table[np.where(known, segments, 0)] == records["generation"]
    )
    return result
