"""Vocabulary of the wire: enums, flags, packed row types, and zero-copy views of column bytes.

Owns the numbers that travel and their meaning. It must not encode frames or know connections.
A number here is part of protocol version 1 and never changes its meaning.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

import numpy as np
import numpy.typing as npt

from ctxstore.limits import KEY_BYTES

VERSION: Final = 1
"""The protocol version this code speaks; it is also the only one."""

VERSION_MIN: Final = 1
VERSION_MAX: Final = VERSION

ID_BYTES: Final = 16
"""Length of node ids, boot ids and session tokens."""

RID_MAX: Final = 2**32 - 1
"""Request ids run from 1 to here; 0 marks one-way messages and failures of a whole connection."""

Column = bytes | memoryview
"""Packed little-endian values. Decoded messages always carry `bytes`; a sender may use views."""

U8Array = npt.NDArray[np.uint8]
U32Array = npt.NDArray[np.uint32]
U64Array = npt.NDArray[np.uint64]
I16Array = npt.NDArray[np.int16]
F32Array = npt.NDArray[np.float32]
RowArray = npt.NDArray[np.void]
"""Rows of a structured dtype: ENTRY_DTYPE, STAT_DTYPE or DATA_ENTRY_DTYPE."""


class Op(IntEnum):
    """First element of every control message."""

    HELLO = 1
    HELLO_OK = 2
    FAILURE = 3
    GET = 16
    RELEASE = 17
    PUT = 18
    EXISTS = 19
    MATCH = 20
    STAT = 21
    PREFETCH = 22
    HOLD = 23
    TOUCH = 24
    REMOVE = 25
    FLUSH = 26
    EXPLAIN = 27
    STATS = 28
    PING = 29
    REPORT = 30
    VERIFY = 31
    GET_REPLY = 64
    PUT_REPLY = 65
    MASK_REPLY = 66
    COUNT_REPLY = 67
    STAT_REPLY = 68
    TEXT_REPLY = 69
    VERIFY_REPLY = 70


class Role(IntEnum):
    """What a connection is for, said in its hello."""

    CONTROL = 0
    DATA = 1


class Durability(IntEnum):
    """When a put is acknowledged. DEFAULT is what the namespace is configured for."""

    DEFAULT = 0
    MEMORY = 1
    GROUP = 2


class Lookup(IntEnum):
    """Outcome of a get for one key. A buffer whose key is not a HIT has undefined content."""

    HIT = 0
    MISS = 1
    TOO_SMALL = 2
    TIMEOUT = 3
    OVERLOADED = 4


class PutResult(IntEnum):
    """Outcome of a put for one key. TIMEOUT: unknown. OVERLOADED: surely not stored, try again."""

    COMMITTED = 0
    EXISTS = 1
    DEGRADED = 2
    REFUSED = 3
    OVERLOADED = 4
    TIMEOUT = 5


WANTED: Final = 255
"""Verdict on a data connection: send this shard's payload and sum."""

RESEND: Final = 254
"""Verdict on a data connection: payload and sum did not agree, send both once more."""


class StatTier(IntEnum):
    """Fastest tier that holds a shard; ABSENT when no visible copy exists."""

    ABSENT = 0
    INLINE = 1
    MEMORY = 2
    NVME = 3


class EntryFlag(IntFlag):
    """Flags of one GetReply row."""

    INLINE = 1


class StatFlag(IntFlag):
    """Flags of one StatReply row."""

    HELD = 1
    DURABLE = 2


class Capability(IntFlag):
    """What a side can do; a connection uses what both sides have. Unknown bits are ignored."""

    SHM = 1
    INLINE = 2
    PUT_STREAM = 4
    VERIFY = 8


CAPABILITIES_KNOWN: Final = (
    Capability.SHM | Capability.INLINE | Capability.PUT_STREAM | Capability.VERIFY
)

ENTRY_DTYPE: Final[np.dtype[np.void]] = np.dtype(
    [
        ("offset", "<u8"),
        ("sum", "<u8"),
        ("length", "<u4"),
        ("generation", "<u4"),
        ("status", "u1"),
        ("flags", "u1"),
        ("pad", "u1", (6,)),
    ]
)
"""One row of GetReply, 32 B. `offset` is into the arena, or into `inline` when flagged INLINE.

`status` is a Lookup, `flags` an EntryFlag. `sum` is the checksum of INLINE rows, else 0.
The client compares `length` with its buffers itself and says TOO_SMALL; the daemon never does here.
"""

STAT_DTYPE: Final[np.dtype[np.void]] = np.dtype(
    [("ttl_ms", "<u8"), ("length", "<u4"), ("tier", "u1"), ("flags", "u1"), ("pad", "u1", (2,))]
)
"""One row of StatReply, 16 B: remaining TTL (0 = none), length, StatTier, StatFlag."""

DATA_ENTRY_DTYPE: Final[np.dtype[np.void]] = np.dtype(
    [("length", "<u4"), ("status", "<u2"), ("flags", "<u2"), ("sum", "<u8")]
)
"""One row of a data connection's get reply, 16 B; `status` is a Lookup, `sum` that of a HIT."""


def column_bytes(column: Column) -> int:
    """Length of a column in bytes, also for views of wider items."""
    return len(column) if type(column) is bytes else memoryview(column).nbytes


def key_rows(keys: Column) -> U8Array:
    """Keys as an (n, 16) uint8 array over the same bytes."""
    return np.frombuffer(keys, dtype=np.uint8).reshape(-1, KEY_BYTES)


def u8_column(column: Column) -> U8Array:
    """The column as uint8 over the same bytes."""
    return np.frombuffer(column, dtype=np.uint8)


def u32_column(column: Column) -> U32Array:
    """The column as little-endian uint32 over the same bytes."""
    return np.frombuffer(column, dtype="<u4")


def u64_column(column: Column) -> U64Array:
    """The column as little-endian uint64 over the same bytes."""
    return np.frombuffer(column, dtype="<u8")


def i16_column(column: Column) -> I16Array:
    """The column as little-endian int16 over the same bytes."""
    return np.frombuffer(column, dtype="<i2")


def f32_column(column: Column) -> F32Array:
    """The column as little-endian float32 over the same bytes."""
    return np.frombuffer(column, dtype="<f4")
