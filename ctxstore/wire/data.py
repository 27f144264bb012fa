"""Headers and packed parts of data connections, which carry payloads between hello and close.

Owns the 32-byte header and the meta bytes behind it, with a bound on each. Payloads are not its
business: they go from socket to final destination without passing here. It must not keep state.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, Never

import numpy as np

from ctxstore.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from ctxstore.limits import (
    BATCH_KEYS_MAX,
    FAILURE_TEXT_BYTES_MAX,
    FRAME_BYTES_MAX,
    KEY_BYTES,
    SHARD_BYTES_MAX,
)
from ctxstore.wire import checks
from ctxstore.wire.codec import decode_message, encode_payload
from ctxstore.wire.columns import (
    DATA_ENTRY_DTYPE,
    RESEND,
    RID_MAX,
    VERSION,
    WANTED,
    Column,
    Lookup,
    PutResult,
    RowArray,
    U8Array,
    U32Array,
    column_bytes,
    key_rows,
    u8_column,
    u32_column,
)
from ctxstore.wire.control import Failure, Put

DATA_MAGIC: Final = int.from_bytes(b"CTXD", "little")
_HEADER: Final = struct.Struct("<IBBHQIIQ")
DATA_HEADER_BYTES: Final = _HEADER.size

_TIMEOUT: Final = struct.Struct("<Q")
_SUM: Final = struct.Struct("<Q")
DATA_SUM_BYTES: Final = _SUM.size
"""Follows each payload of a put."""

_FAILURE_META_BYTES_MAX: Final = FAILURE_TEXT_BYTES_MAX + 64
_RESULTS: Final = bytes(PutResult)
_LOOKUPS: Final = tuple(Lookup)


class DataOp(IntEnum):
    """What a header announces."""

    GET = 1
    GET_REPLY = 2
    PUT = 3
    OFFER = 4
    RESULT = 5
    FAILURE = 6


class DataFlag(IntFlag):
    """Flags of a header. EXACT (GET): a shard of another length than its capacity is a MISS."""

    EXACT = 1


class VerdictPhase(IntEnum):
    """Which bytes besides final results a row of verdicts may hold."""

    OFFER = WANTED
    RESULT = RESEND
    LAST = 0


@dataclass(frozen=True, slots=True)
class DataHeader:
    """One header. `count` keys; `meta_bytes` follow, then `body_bytes` of payload (GET_REPLY)."""

    op: DataOp
    rid: int
    count: int
    meta_bytes: int
    body_bytes: int = 0
    flags: int = 0


@dataclass(frozen=True, slots=True)
class GetMeta:
    """Meta of a GET: views of the received bytes."""

    timeout_us: int
    keys: memoryview
    capacities: memoryview

    @property
    def key_rows(self) -> U8Array:
        """(n, 16) uint8."""
        return key_rows(self.keys)

    @property
    def capacity_column(self) -> U32Array:
        """(n,) uint32: bytes of each destination."""
        return u32_column(self.capacities)


def pack_header(header: DataHeader) -> bytes:
    """The 32 bytes. Raises LocalProtocolError."""
    _check_header(header, LocalProtocolError)
    return _HEADER.pack(
        DATA_MAGIC,
        VERSION,
        header.op,
        header.flags,
        header.rid,
        header.count,
        header.meta_bytes,
        header.body_bytes,
    )


def unpack_header(data: Column) -> DataHeader:
    """Parse exactly 32 bytes. Raises RemoteProtocolError; afterwards every length is bounded."""
    if column_bytes(data) != DATA_HEADER_BYTES:
        raise RemoteProtocolError(f"data header of {column_bytes(data)} bytes")
    magic, version, op, flags, rid, count, meta_bytes, body_bytes = _HEADER.unpack(data)
    if magic != DATA_MAGIC:
        raise RemoteProtocolError("data header without its magic number")
    if version != VERSION:
        raise RemoteProtocolError(f"data header of version {version}, agreed was {VERSION}")
    try:
        known = DataOp(op)
    except ValueError:
        raise RemoteProtocolError(f"unknown data op {op}") from None
    header = DataHeader(
        op=known, rid=rid, count=count, meta_bytes=meta_bytes, body_bytes=body_bytes, flags=flags
    )
    _check_header(header, RemoteProtocolError)
    return header


def pack_get(
    rid: int, keys: Column, capacities: Column, *, timeout_us: int, exact: bool = False
) -> bytes:
    """Header and meta of a GET. `capacities` u32[n]. Raises LocalProtocolError."""
    count = column_bytes(keys) // KEY_BYTES
    if column_bytes(keys) != KEY_BYTES * count or column_bytes(capacities) != 4 * count:
        raise LocalProtocolError("GET: one key and one capacity each")
    header = DataHeader(
        op=DataOp.GET,
        rid=rid,
        count=count,
        meta_bytes=_get_meta_bytes(count),
        flags=DataFlag.EXACT if exact else 0,
    )
    cut_us = min(max(0, timeout_us), checks.TIMEOUT_US_MAX)
    return b"".join((pack_header(header), _TIMEOUT.pack(cut_us), keys, capacities))


def unpack_get_meta(header: DataHeader, meta: Column) -> GetMeta:
    """Views of the meta bytes of a GET, which must stay alive. Raises RemoteProtocolError."""
    view = _expect_meta(header, meta, DataOp.GET)
    (timeout_us,) = _TIMEOUT.unpack_from(view)
    end = _TIMEOUT.size + KEY_BYTES * header.count
    return GetMeta(
        timeout_us=min(timeout_us, checks.TIMEOUT_US_MAX),
        keys=view[_TIMEOUT.size : end],
        capacities=view[end:],
    )


def pack_get_reply(rid: int, entries: RowArray) -> bytes:
    """Header and entries; the payloads of the HITs follow in order. Raises LocalProtocolError."""
    body_bytes = _hit_bytes(entries, LocalProtocolError)
    header = DataHeader(
        op=DataOp.GET_REPLY,
        rid=rid,
        count=len(entries),
        meta_bytes=entries.nbytes,
        body_bytes=body_bytes,
    )
    return pack_header(header) + entries.tobytes()


def unpack_entries(
    header: DataHeader, meta: Column, capacities: U32Array, *, exact: bool = False
) -> RowArray:
    """Rows of a GET_REPLY over the bytes of `meta`, to be read before any payload.

    Raises RemoteProtocolError unless they answer exactly the keys asked for, every HIT fits its
    destination, and the payloads add up to the header's `body_bytes`.
    """
    view = _expect_meta(header, meta, DataOp.GET_REPLY)
    if header.count != len(capacities):
        raise RemoteProtocolError(f"{header.count} entries for {len(capacities)} keys")
    entries: RowArray = np.frombuffer(view, dtype=DATA_ENTRY_DTYPE)
    if _hit_bytes(entries, RemoteProtocolError) != header.body_bytes:
        raise RemoteProtocolError("GET_REPLY: payloads do not add up to the body")
    hits = entries["status"] == Lookup.HIT
    lengths = entries["length"][hits]
    fits = lengths == capacities[hits] if exact else lengths <= capacities[hits]
    if not fits.all():
        raise RemoteProtocolError("GET_REPLY: a payload does not fit its destination")
    return entries


def pack_put(put: Put) -> bytes:
    """Header and meta of a PUT offer; `put.offsets` must be empty. Raises LocalProtocolError."""
    if column_bytes(put.offsets):
        raise LocalProtocolError("PUT: no staging offsets on a data connection")
    meta = encode_payload(put)
    header = DataHeader(op=DataOp.PUT, rid=put.rid, count=put.count, meta_bytes=len(meta))
    return pack_header(header) + meta


def unpack_put_meta(header: DataHeader, meta: Column) -> Put:
    """The offer of a PUT. Raises RemoteProtocolError."""
    put = decode_message(_expect_meta(header, meta, DataOp.PUT))
    if not isinstance(put, Put) or put.rid != header.rid or put.count != header.count:
        raise RemoteProtocolError("PUT: the offer does not belong to its header")
    if column_bytes(put.offsets):
        raise RemoteProtocolError("PUT: staging offsets on a data connection")
    return put


def pack_verdicts(op: DataOp, rid: int, verdicts: U8Array) -> bytes:
    """Header and u8[n] of an OFFER or RESULT. Raises LocalProtocolError."""
    if op not in (DataOp.OFFER, DataOp.RESULT):
        raise LocalProtocolError(f"{op.name} carries no verdicts")
    header = DataHeader(op=op, rid=rid, count=len(verdicts), meta_bytes=len(verdicts))
    return pack_header(header) + verdicts.tobytes()


def unpack_verdicts(
    header: DataHeader, meta: Column, *, count: int, phase: VerdictPhase
) -> U8Array:
    """u8[count] of final PutResults, or in OFFER also WANTED, in RESULT also RESEND.

    LAST is the RESULT after a resend, which may not ask again. Raises RemoteProtocolError.
    """
    op = DataOp.OFFER if phase is VerdictPhase.OFFER else DataOp.RESULT
    view = _expect_meta(header, meta, op)
    if header.count != count:
        raise RemoteProtocolError(f"{header.count} verdicts for {count} keys")
    allowed = _RESULTS if phase is VerdictPhase.LAST else _RESULTS + bytes((phase,))
    rest = bytes(view).translate(None, allowed)
    if rest:
        raise RemoteProtocolError(f"{op.name}: verdict {rest[0]} is not allowed here")
    return u8_column(view)


def pack_sum(checksum: int) -> bytes:
    """The 8 bytes behind a payload of a put."""
    return _SUM.pack(checksum)


def unpack_sum(data: Column) -> int:
    """Raises RemoteProtocolError unless there are exactly 8 bytes."""
    if column_bytes(data) != DATA_SUM_BYTES:
        raise RemoteProtocolError(f"checksum of {column_bytes(data)} bytes")
    return int(_SUM.unpack(data)[0])


def pack_failure(failure: Failure) -> bytes:
    """Header and meta of a failure; the sender closes the connection after it."""
    meta = encode_payload(failure)
    header = DataHeader(op=DataOp.FAILURE, rid=failure.rid, count=0, meta_bytes=len(meta))
    return pack_header(header) + meta


def unpack_failure(header: DataHeader, meta: Column) -> Failure:
    """Raises RemoteProtocolError."""
    failure = decode_message(_expect_meta(header, meta, DataOp.FAILURE))
    if not isinstance(failure, Failure) or failure.rid != header.rid:
        raise RemoteProtocolError("FAILURE: the message does not belong to its header")
    return failure


def _get_meta_bytes(count: int) -> int:
    return _TIMEOUT.size + (KEY_BYTES + 4) * count


def _check_header(header: DataHeader, error: type[ProtocolError]) -> None:
    """Bound every number of a header, so that nobody allocates or waits for what cannot be."""

    def fail(reason: str) -> Never:
        raise error(f"data header {header.op.name}: {reason}")

    op, count = header.op, header.count
    if not (0 if op is DataOp.FAILURE else 1) <= header.rid <= RID_MAX:
        fail(f"rid {header.rid}")
    # As plain ints: the complement of an IntFlag knows only the flags that have a name.
    if header.flags & ~(int(DataFlag.EXACT) if op is DataOp.GET else 0):
        fail(f"flags {header.flags:#x}")
    if op is DataOp.FAILURE:
        if count:
            fail("a failure counts no keys")
    elif not 1 <= count <= BATCH_KEYS_MAX:
        fail(f"{count} keys, allowed are 1 to {BATCH_KEYS_MAX}")
    lowest, highest = _meta_bounds(op, count)
    if not lowest <= header.meta_bytes <= highest:
        fail(f"{header.meta_bytes} bytes of meta, allowed are {lowest} to {highest}")
    body_bytes_max = SHARD_BYTES_MAX * count if op is DataOp.GET_REPLY else 0
    if not 0 <= header.body_bytes <= body_bytes_max:
        fail(f"{header.body_bytes} bytes of body, at most {body_bytes_max}")


def _meta_bounds(op: DataOp, count: int) -> tuple[int, int]:
    if op is DataOp.PUT:
        return (KEY_BYTES + 4) * count, FRAME_BYTES_MAX
    if op is DataOp.FAILURE:
        return 1, _FAILURE_META_BYTES_MAX
    if op is DataOp.GET:
        exact = _get_meta_bytes(count)
    elif op is DataOp.GET_REPLY:
        exact = DATA_ENTRY_DTYPE.itemsize * count
    else:
        exact = count
    return exact, exact


def _expect_meta(header: DataHeader, meta: Column, op: DataOp) -> memoryview:
    if header.op is not op:
        raise RemoteProtocolError(f"data header {header.op.name} where {op.name} was due")
    view = memoryview(meta)
    if view.nbytes != header.meta_bytes:
        raise RemoteProtocolError(
            f"{op.name}: {view.nbytes} bytes of meta, not {header.meta_bytes}"
        )
    return view


def _hit_bytes(entries: RowArray, error: type[ProtocolError]) -> int:
    """Payload bytes of the HITs, after checking every row."""
    if not len(entries):
        raise error("GET_REPLY without entries")
    statuses = entries["status"]
    lengths = entries["length"]
    if np.maximum.reduce(statuses) >= len(_LOOKUPS):
        raise error("GET_REPLY: unknown status")
    if entries["flags"].any():
        raise error("GET_REPLY: unknown flags")
    if np.maximum.reduce(lengths) > SHARD_BYTES_MAX:
        raise error(f"GET_REPLY: a shard above {SHARD_BYTES_MAX} bytes")
    return int(np.add.reduce(lengths, where=statuses == Lookup.HIT, dtype=np.uint64))
