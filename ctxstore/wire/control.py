"""The messages of control connections as frozen dataclasses, in the order of their wire fields.

Owns what each message carries and which reply answers which request. It must not encode or check
anything: `ctxstore.wire.codec` does. Batches are columns of bytes, viewed in place as numpy arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from ctxstore.errors import CtxStoreError, Overloaded, error_from_code
from ctxstore.limits import FAILURE_TEXT_BYTES_MAX, KEY_BYTES, REQUEST_TIMEOUT_S_MAX
from ctxstore.wire.columns import (
    ENTRY_DTYPE,
    STAT_DTYPE,
    Column,
    Durability,
    F32Array,
    I16Array,
    Op,
    Role,
    RowArray,
    U8Array,
    U32Array,
    U64Array,
    column_bytes,
    f32_column,
    i16_column,
    key_rows,
    u8_column,
    u32_column,
    u64_column,
)

_RETRY_AFTER_MS_MAX = int(REQUEST_TIMEOUT_S_MAX * 1000)


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a client. `session` is 16 bytes on a DATA connection, else empty."""

    op: ClassVar[Op] = Op.HELLO
    rid: int
    version_min: int
    version_max: int
    role: Role
    cluster_id: str
    """Empty: any cluster."""
    namespace: str
    token: str = field(repr=False)
    client: str
    """Free text naming the client program, for logs."""
    capabilities: int
    """Bits of Capability; unknown ones are ignored."""
    shm: bool
    """The client can map descriptors that come with HelloOk."""
    staging_bytes: int
    """Staging wanted; the daemon grants this, less, or 0."""
    session: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class HelloOk:
    """Answer to Hello. Descriptors, if any, come with it: arena, then staging if granted."""

    op: ClassVar[Op] = Op.HELLO_OK
    rid: int
    version: int
    capabilities: int
    node_id: bytes
    boot_id: bytes
    cluster_id: str
    session: bytes = field(repr=False)
    """Token that lets DATA connections join this control connection's session."""
    ns_id: int
    incarnation: int
    arena_bytes: int
    """0: no shared memory on this connection."""
    staging_bytes: int
    """Granted; 0: none, and no second descriptor."""
    shard_bytes_max: int
    lease_bytes_max: int
    lease_s_max: float
    batch_keys_max: int
    unix_path: str
    """Empty: none."""
    data_address: str
    """host:port of the data listener; empty: none."""
    server: str


@dataclass(frozen=True, slots=True)
class Failure:
    """The request failed as a whole. With `rid` 0 the connection is closed after it."""

    op: ClassVar[Op] = Op.FAILURE
    rid: int
    code: int
    message: str
    retry_after_ms: int = 0


def failure_from_error(rid: int, error: CtxStoreError) -> Failure:
    """What to send for an error of ours; its text is cut to FAILURE_TEXT_BYTES_MAX."""
    retry_ms = 0
    if isinstance(error, Overloaded):
        retry_ms = min(max(1, round(error.retry_after_s * 1000)), _RETRY_AFTER_MS_MAX)
    return Failure(rid=rid, code=error.code, message=_cut_text(str(error)), retry_after_ms=retry_ms)


def _cut_text(text: str) -> str:
    return text.encode(errors="replace")[:FAILURE_TEXT_BYTES_MAX].decode(errors="ignore")


def error_from_failure(failure: Failure) -> CtxStoreError:
    """The exception a received failure stands for."""
    if failure.code == Overloaded.code:
        return Overloaded(failure.message, retry_after_s=failure.retry_after_ms / 1000)
    return error_from_code(failure.code, failure.message)


@dataclass(frozen=True, slots=True)
class KeysRequest:
    """Shape shared by requests that carry a deadline and keys; never sent itself."""

    rid: int
    timeout_us: int
    keys: Column

    @property
    def count(self) -> int:
        """Number of keys."""
        return column_bytes(self.keys) // KEY_BYTES

    @property
    def key_rows(self) -> U8Array:
        """(n, 16) uint8."""
        return key_rows(self.keys)


@dataclass(frozen=True, slots=True)
class Get(KeysRequest):
    """Lease the slots of these keys. Answered by GetReply."""

    op: ClassVar[Op] = Op.GET


@dataclass(frozen=True, slots=True)
class GetReply:
    """Where the shards lie. `lease` 0: nothing was leased (no HIT in the arena)."""

    op: ClassVar[Op] = Op.GET_REPLY
    rid: int
    lease: int
    entries: Column
    inline: Column = b""

    @property
    def rows(self) -> RowArray:
        """(n,) of ENTRY_DTYPE."""
        return np.frombuffer(self.entries, dtype=ENTRY_DTYPE)


@dataclass(frozen=True, slots=True)
class Release:
    """One-way: these leases end."""

    op: ClassVar[Op] = Op.RELEASE
    rid: int
    """Always 0."""
    leases: Column

    @property
    def lease_column(self) -> U64Array:
        """(n,) uint64."""
        return u64_column(self.leases)


@dataclass(frozen=True, slots=True)
class Put:
    """Store these shards. Answered by PutReply.

    `lengths` u32[n]; `offsets` u64[n] into the connection's staging, empty on data connections.
    `ttl_ms` u64 (0 = none), `priority` i16, `depth` u32 (chunks before this one in its prefix) and
    `cost` f32 (seconds of recompute, NaN = unknown) hold one value for all keys, or one per key:
    numpy broadcasts them.
    """

    op: ClassVar[Op] = Op.PUT
    rid: int
    timeout_us: int
    durability: Durability
    keys: Column
    lengths: Column
    offsets: Column
    ttl_ms: Column
    priority: Column
    depth: Column
    cost: Column

    @property
    def count(self) -> int:
        """Number of keys."""
        return column_bytes(self.keys) // KEY_BYTES

    @property
    def key_rows(self) -> U8Array:
        """(n, 16) uint8."""
        return key_rows(self.keys)

    @property
    def length_column(self) -> U32Array:
        """(n,) uint32, bytes."""
        return u32_column(self.lengths)

    @property
    def offset_column(self) -> U64Array:
        """(n,) or (0,) uint64, bytes from the start of the staging."""
        return u64_column(self.offsets)

    @property
    def ttl_ms_column(self) -> U64Array:
        """(1,) or (n,) uint64."""
        return u64_column(self.ttl_ms)

    @property
    def priority_column(self) -> I16Array:
        """(1,) or (n,) int16."""
        return i16_column(self.priority)

    @property
    def depth_column(self) -> U32Array:
        """(1,) or (n,) uint32."""
        return u32_column(self.depth)

    @property
    def cost_column(self) -> F32Array:
        """(1,) or (n,) float32, seconds."""
        return f32_column(self.cost)


@dataclass(frozen=True, slots=True)
class PutReply:
    """`results` u8[n] of PutResult."""

    op: ClassVar[Op] = Op.PUT_REPLY
    rid: int
    results: Column

    @property
    def result_column(self) -> U8Array:
        """(n,) uint8 of PutResult."""
        return u8_column(self.results)


@dataclass(frozen=True, slots=True)
class Exists(KeysRequest):
    """Which of these keys are visible? Answered by MaskReply."""

    op: ClassVar[Op] = Op.EXISTS


@dataclass(frozen=True, slots=True)
class Match(KeysRequest):
    """How many leading keys are visible? Answered by CountReply."""

    op: ClassVar[Op] = Op.MATCH


@dataclass(frozen=True, slots=True)
class Stat(KeysRequest):
    """Length, tier and remaining TTL of each key. Answered by StatReply."""

    op: ClassVar[Op] = Op.STAT


@dataclass(frozen=True, slots=True)
class Prefetch(KeysRequest):
    """Promote these shards within `by_us` (0 = soon). Answered by CountReply: how many will be."""

    op: ClassVar[Op] = Op.PREFETCH
    by_us: int


@dataclass(frozen=True, slots=True)
class Hold(KeysRequest):
    """Keep these shards for `ttl_ms` from now; 0 ends the hold.

    Answered by MaskReply (1 = applied); above the hold share by Failure(Overloaded).
    """

    op: ClassVar[Op] = Op.HOLD
    ttl_ms: int


@dataclass(frozen=True, slots=True)
class Touch(KeysRequest):
    """Mark as used and raise the TTL to `ttl_ms` from now (0 = leave it). Answered by MaskReply."""

    op: ClassVar[Op] = Op.TOUCH
    ttl_ms: int


@dataclass(frozen=True, slots=True)
class Remove(KeysRequest):
    """Remove for good. Answered by MaskReply (1 = it was there) when the tombstones are durable."""

    op: ClassVar[Op] = Op.REMOVE


@dataclass(frozen=True, slots=True)
class Explain(KeysRequest):
    """Why each key is or is not here, for people. Answered by TextReply (JSON)."""

    op: ClassVar[Op] = Op.EXPLAIN


@dataclass(frozen=True, slots=True)
class Flush:
    """Write everything committed so far to disk. Answered by CountReply: shards flushed."""

    op: ClassVar[Op] = Op.FLUSH
    rid: int
    timeout_us: int


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters of the node. Answered by TextReply (JSON)."""

    op: ClassVar[Op] = Op.STATS
    rid: int
    timeout_us: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Answered by CountReply(0)."""

    op: ClassVar[Op] = Op.PING
    rid: int


@dataclass(frozen=True, slots=True)
class Report:
    """One-way: payloads of these keys reached the client with another checksum than announced.

    `sums` u64[n] are the announced ones, so that the daemon knows which copy is meant.
    """

    op: ClassVar[Op] = Op.REPORT
    rid: int
    """Always 0."""
    keys: Column
    sums: Column

    @property
    def count(self) -> int:
        """Number of keys."""
        return column_bytes(self.keys) // KEY_BYTES

    @property
    def key_rows(self) -> U8Array:
        """(n, 16) uint8."""
        return key_rows(self.keys)

    @property
    def sum_column(self) -> U64Array:
        """(n,) uint64."""
        return u64_column(self.sums)


@dataclass(frozen=True, slots=True)
class Verify:
    """Scrub every shard on disk. Answered by VerifyReply messages until one is `done`.

    `timeout_us` bounds the silence between two of them, not the whole scrub.
    `bytes_per_s` 0: no limit.
    """

    op: ClassVar[Op] = Op.VERIFY
    rid: int
    timeout_us: int
    bytes_per_s: int


@dataclass(frozen=True, slots=True)
class VerifyReply:
    """Progress of a scrub: shards and bytes checked so far, of `total` shards."""

    op: ClassVar[Op] = Op.VERIFY_REPLY
    rid: int
    done: bool
    shards: int
    checked_bytes: int
    damaged: int
    unreadable: int
    total: int


@dataclass(frozen=True, slots=True)
class MaskReply:
    """`mask` u8[n], each 0 or 1."""

    op: ClassVar[Op] = Op.MASK_REPLY
    rid: int
    mask: Column

    @property
    def mask_column(self) -> U8Array:
        """(n,) uint8; `.view(bool)` is safe."""
        return u8_column(self.mask)


@dataclass(frozen=True, slots=True)
class CountReply:
    """One number."""

    op: ClassVar[Op] = Op.COUNT_REPLY
    rid: int
    count: int


@dataclass(frozen=True, slots=True)
class StatReply:
    """`entries` rows of STAT_DTYPE."""

    op: ClassVar[Op] = Op.STAT_REPLY
    rid: int
    entries: Column

    @property
    def rows(self) -> RowArray:
        """(n,) of STAT_DTYPE."""
        return np.frombuffer(self.entries, dtype=STAT_DTYPE)


@dataclass(frozen=True, slots=True)
class TextReply:
    """A JSON document for people and tools."""

    op: ClassVar[Op] = Op.TEXT_REPLY
    rid: int
    text: str


Request = (
    Hello
    | Get
    | Put
    | Exists
    | Match
    | Stat
    | Prefetch
    | Hold
    | Touch
    | Remove
    | Flush
    | Explain
    | Stats
    | Ping
    | Verify
)
"""Messages of a client that are answered."""

OneWay = Release | Report
"""Messages of a client that are not answered; their rid is 0."""

Reply = (
    HelloOk
    | Failure
    | GetReply
    | PutReply
    | MaskReply
    | CountReply
    | StatReply
    | TextReply
    | VerifyReply
)
"""Messages of a daemon."""

Message = Request | OneWay | Reply
"""Anything that travels on a control connection."""
