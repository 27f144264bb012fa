"""What goes into the engine (events) and what comes out (instructions).

Owns the vocabulary between the pure `Machine` and the executor. Wire messages are used as they are:
a request comes in as the message of the client and its answer leaves as the message to be sent.
Offsets into the arena are bytes from its start; slots begin on 4 KiB pages and have whole pages.

Inline shards (length ≤ INLINE_BYTES_MAX, zero included) never have a slot: they carry slot offset
-1 and slot_bytes 0 in CopyIn and OfferPut, and their payloads come back in `inline` of CopyDone and
PayloadDone. Every CopyIn, ReadExtents, WriteGroup, RecycleSegment, AppendMeta and ReserveMeta is
answered exactly once, whatever happens to the connection meanwhile: the engine's I/O pins end only
with the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ctxstore.wire import messages as wire
    from ctxstore_daemon.engine.records import U32, U64, RecordArray, RecordBatch

Offsets = npt.NDArray[np.int64]
Statuses = npt.NDArray[np.uint8]


class ReadStatus(IntEnum):
    """Outcome of reading one extent."""

    OK = 0
    DAMAGED = 1
    """The checksum does not fit: quarantine the copy."""
    FAILED = 2
    """Input/output error, or the segment is gone."""


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class ConnOpened:
    """A control or data connection said hello. `ns` is the index of its namespace in the
    configuration.
    """

    conn: int
    ns: int


@dataclass(frozen=True, slots=True)
class ConnClosed:
    """The connection is gone: leases end, puts whose bytes have not arrived are abandoned, I/O pins
    stay.
    """

    conn: int


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A control request or one-way message (Release, Report; deadline unused). A Put's offsets
    point into the staging of this connection, bounds already checked.
    """

    conn: int
    message: wire.Request | wire.OneWay
    deadline_ns: int


@dataclass(frozen=True, slots=True)
class StreamGetArrived:
    """A get on a data connection; answered by SendShards, ended by StreamGetDone."""

    conn: int
    rid: int
    keys: bytes
    capacities: U32
    exact: bool
    deadline_ns: int


@dataclass(frozen=True, slots=True)
class StreamGetDone:
    """The payloads have been handed to the kernel (or the connection died): pins of (conn, rid)
    end.
    """

    conn: int
    rid: int


@dataclass(frozen=True, slots=True)
class StreamPutArrived:
    """A put on a data connection: answered by OfferPut, then PayloadDone, then PutFinished."""

    conn: int
    message: wire.Put
    deadline_ns: int


@dataclass(frozen=True, slots=True)
class PayloadDone:
    """Payloads of the wanted keys of put (conn, rid), in order: `ok` per key, `sums` as verified in
    the arena.

    A False entry never arrived whole or failed its checksum twice; its slot is given back. `inline`
    holds the payloads of the wanted inline keys one after another, in order, `length` bytes each
    (any bytes for those that are not ok). Exactly one PayloadDone follows an OfferPut with a WANTED
    verdict, with all ok False when the connection died: until then the slots may still be written.
    An OfferPut without WANTED is final: neither PayloadDone nor PutFinished follows.
    """

    conn: int
    rid: int
    ok: npt.NDArray[np.bool_]
    sums: U64
    inline: bytes = b""


@dataclass(frozen=True, slots=True)
class CopyDone:
    """CopyIn finished; `sums` holds one checksum per item in order.

    `inline` holds the payloads of the inline items one after another, in order, `length` bytes
    each; it is the daemon's own copy, and the sums are taken from that copy.
    """

    copy_id: int
    sums: U64
    inline: bytes = b""


@dataclass(frozen=True, slots=True)
class ReadsDone:
    """ReadExtents finished; `statuses` holds a ReadStatus per item in order."""

    read_id: int
    statuses: Statuses


@dataclass(frozen=True, slots=True)
class GroupDone:
    """The group is durable: item i is in `segment` at `pages[i]`, written under sequence `seq`."""

    group_id: int
    segment: int
    generation: int
    seq: int
    pages: U32


@dataclass(frozen=True, slots=True)
class GroupFailed:
    """The group is not durable and never will be. `full`: no room on disk (True) or a device fault
    (False).
    """

    group_id: int
    full: bool
    reason: str


@dataclass(frozen=True, slots=True)
class SegmentsChanged:
    """Free segments that can be opened, after open, seal, recycle or retirement; `usable` counts
    all but retired.
    """

    free: int
    usable: int


@dataclass(frozen=True, slots=True)
class SegmentRecycled:
    """RecycleSegment finished: the segment is free under a new generation."""

    segment: int


@dataclass(frozen=True, slots=True)
class SegmentLost:
    """A segment cannot be read any more (deleted, device error on open): its copies are gone."""

    segment: int
    reason: str


@dataclass(frozen=True, slots=True)
class MetaDone:
    """AppendMeta or ReserveMeta finished; `ok` is False when the log could not be written or
    synced, with `full` because its budget is used up (then nothing was stored).
    """

    meta_id: int
    ok: bool
    full: bool = False


@dataclass(frozen=True, slots=True)
class ArenaGrew:
    """The arena's pages are populated up to this many bytes from its start; slots beyond may not be
    used.
    """

    populated_bytes: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed: deadlines, expiry, write-behind, lease ends."""


@dataclass(frozen=True, slots=True)
class Stopping:
    """Take no new requests, flush what is dirty as fast as possible."""


Event: TypeAlias = (
    ConnOpened
    | ConnClosed
    | RequestArrived
    | StreamGetArrived
    | StreamGetDone
    | StreamPutArrived
    | PayloadDone
    | CopyDone
    | ReadsDone
    | GroupDone
    | GroupFailed
    | SegmentsChanged
    | SegmentRecycled
    | SegmentLost
    | MetaDone
    | ArenaGrew
    | Tick
    | Stopping
)


# ---------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True)
class Reply:
    """Send this message on the control connection."""

    conn: int
    message: wire.Reply


@dataclass(frozen=True, slots=True)
class CloseConn:
    """End a connection (a lease outlived lease_s_max, say); ConnClosed follows when it is gone."""

    conn: int
    reason: str


@dataclass(frozen=True, slots=True)
class CopyIn:
    """Copy staging ranges of `conn` into slots, zero the padding, hash the copies; answer CopyDone.

    The staging mapping must stay alive until CopyDone, also when the connection closes meanwhile.
    Slot offset -1 (slot_bytes 0): an inline item, copied into bytes of its own and handed back in
    `CopyDone.inline`. Staging offset -1: nothing is copied, the slot's bytes are only hashed again;
    such a CopyIn is all of that kind and has conn -1.
    """

    copy_id: int
    conn: int
    staging_offsets: Offsets
    slot_offsets: Offsets
    slot_bytes: Offsets
    lengths: U32
    seeds: U64


@dataclass(frozen=True, slots=True)
class ReadExtents:
    """Read extents into slots and verify each against seed and checksum before anyone sees it;
    answer ReadsDone.

    `slot_offsets` of -1: verify only, into scratch memory of the executor (scrub).
    """

    read_id: int
    segments: U32
    generations: U32
    pages: U32
    lengths: U32
    slot_offsets: Offsets
    slot_bytes: Offsets
    seeds: U64
    checksums: U64


@dataclass(frozen=True, slots=True)
class WriteGroup:
    """Append one group: header, then the slots' bytes, one sync. Inline records have slot offset
    -1, bytes 0.

    The slots are pinned by the engine until GroupDone or GroupFailed.
    """

    group_id: int
    seq: int
    batch: RecordBatch
    slot_offsets: Offsets
    slot_bytes: Offsets


@dataclass(frozen=True, slots=True)
class RecycleSegment:
    """Nothing in the index or in flight refers to the segment any more: make it free; answer
    SegmentRecycled.
    """

    segment: int


@dataclass(frozen=True, slots=True)
class AppendMeta:
    """Append records (META_DTYPE) to the meta log; with `sync` answer only when durable. Answer
    MetaDone. `reserved` records of room are given back, and taken by these records first.
    """

    meta_id: int
    records: RecordArray
    sync: bool
    reserved: int = 0


@dataclass(frozen=True, slots=True)
class ReserveMeta:
    """Keep room for `count` records in the meta log until an AppendMeta gives it back. Answer
    MetaDone.
    """

    meta_id: int
    count: int


@dataclass(frozen=True, slots=True)
class SendShards:
    """Answer a StreamGet: entries (wire DATA_ENTRY_DTYPE, in key order); payload i of a HIT stands
    at slot_offsets[i] in the arena, or at inline_offsets[i] in `inline` where slot_offsets[i] is
    -1.

    All columns have one row per key (-1 where there is no payload). Exactly one StreamGetDone
    follows.
    """

    conn: int
    rid: int
    entries: RecordArray
    slot_offsets: Offsets
    inline_offsets: Offsets
    inline: bytes


@dataclass(frozen=True, slots=True)
class OfferPut:
    """Answer a StreamPut: verdict per key (PutResult, or WANTED) and, for wanted ones, where to
    receive.

    The other columns have one row per WANTED key, in key order; slot offset -1 (slot_bytes 0) means
    an inline shard, received into memory of its own and handed back in `PayloadDone.inline`. The
    receiver zeroes the padding of a slot. Where a PutFinished follows, its results replace all
    these verdicts.
    """

    conn: int
    rid: int
    verdicts: Statuses
    slot_offsets: Offsets
    slot_bytes: Offsets
    lengths: U32
    seeds: U64


@dataclass(frozen=True, slots=True)
class PutFinished:
    """Final results of a StreamPut, PutResult per key."""

    conn: int
    rid: int
    results: Statuses


Instruction: TypeAlias = (
    Reply
    | CloseConn
    | CopyIn
    | ReadExtents
    | WriteGroup
    | RecycleSegment
    | AppendMeta
    | ReserveMeta
    | SendShards
    | OfferPut
    | PutFinished
)
