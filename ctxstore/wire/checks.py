"""What each field of a control message may hold, as small functions that return the checked value.

Owns the bounds of the wire, except the frame length. It must not raise protocol errors itself: a
Violation says what is wrong, the codec knows whose fault it is. Batches are checked as wholes, by
length arithmetic and byte tables, never key by key.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ctxstore.limits import (
    BATCH_KEYS_MAX,
    COST_S_MAX,
    FRAME_BYTES_MAX,
    INLINE_BYTES_MAX,
    KEY_BYTES,
    NAME_BYTES_MAX,
    REQUEST_TIMEOUT_S_MAX,
    SHARD_BYTES_MAX,
    TOKEN_BYTES_MAX,
    TTL_S_MAX,
)
from ctxstore.wire.columns import (
    ENTRY_DTYPE,
    ID_BYTES,
    STAT_DTYPE,
    Column,
    Durability,
    EntryFlag,
    Lookup,
    PutResult,
    Role,
    StatTier,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ctxstore.wire.control import GetReply, Hello, Put, Report

VERSION_NUMBER_MAX: Final = 2**16 - 1
"""Protocol versions are small numbers."""

MAPPING_BYTES_MAX: Final = 2**47
"""User address space of x86-64: no arena or staging is larger, and offset + length cannot wrap."""

TTL_MS_MAX: Final = int(TTL_S_MAX * 1000)
TIMEOUT_US_MAX: Final = int(REQUEST_TIMEOUT_S_MAX * 1_000_000)
RETRY_AFTER_MS_MAX: Final = int(REQUEST_TIMEOUT_S_MAX * 1000)

_KEYS_BYTES_MAX: Final = KEY_BYTES * BATCH_KEYS_MAX
_LOOKUPS: Final = bytes(Lookup)
_PUT_RESULTS: Final = bytes(PutResult)
_STAT_TIERS: Final = bytes(StatTier)
_STATUS_AT: Final = ENTRY_DTYPE.fields["status"][1] if ENTRY_DTYPE.fields else 0
_FLAGS_AT: Final = ENTRY_DTYPE.fields["flags"][1] if ENTRY_DTYPE.fields else 0
_TIER_AT: Final = STAT_DTYPE.fields["tier"][1] if STAT_DTYPE.fields else 0


class Violation(ValueError):
    """A value is outside what the protocol allows."""


def integer(lowest: int, highest: int) -> Callable[[Any], Any]:
    """An int within both bounds; bool is no int here."""

    def check(value: Any) -> int:
        if type(value) is int and lowest <= value <= highest:
            return value
        raise Violation(f"{_shown(value)} is no integer of {lowest} to {highest}")

    return check


def timeout_us(value: Any) -> int:
    """Microseconds; more than the longest deadline is cut to it."""
    if type(value) is int and 0 <= value < 2**64:
        return value if value < TIMEOUT_US_MAX else TIMEOUT_US_MAX
    raise Violation(f"{_shown(value)} is no time in microseconds")


def boolean(value: Any) -> bool:
    """True or false, not 0 or 1."""
    if type(value) is bool:
        return value
    raise Violation(f"{_shown(value)} is no boolean")


def seconds(value: Any) -> float:
    """A positive finite float."""
    if type(value) is float and 0.0 < value < math.inf:
        return value
    raise Violation(f"{_shown(value)} is no positive number of seconds")


def text(bytes_max: int) -> Callable[[Any], Any]:
    """A str of at most so many bytes of UTF-8."""

    def check(value: Any) -> str:
        if type(value) is not str:
            raise Violation(f"{_shown(value)} is no text")
        try:
            length = len(value.encode())
        except UnicodeEncodeError as error:
            raise Violation("text with lone surrogates") from error
        if length > bytes_max:
            raise Violation(f"text of {length} bytes, at most {bytes_max}")
        return value

    return check


_short_text = text(NAME_BYTES_MAX)
token = text(TOKEN_BYTES_MAX)


def name(value: Any) -> str:
    """Short and printable, since names end up in logs; may be empty."""
    checked: str = _short_text(value)
    if not checked.isprintable():
        raise Violation("a name must be printable")
    return checked


def role(value: Any) -> Role:
    """A Role, also from its number."""
    return Role(integer(0, max(Role))(int(value) if type(value) is Role else value))


def durability(value: Any) -> Durability:
    """A Durability, also from its number."""
    if type(value) is Durability:
        return value
    if type(value) is int and 0 <= value <= Durability.GROUP:
        return Durability(value)
    raise Violation(f"{_shown(value)} is no durability")


def identity(value: Any) -> bytes:
    """Exactly 16 bytes."""
    if type(value) is bytes and len(value) == ID_BYTES:
        return value
    raise Violation(f"{_shown(value)} is no id of {ID_BYTES} bytes")


def session(value: Any) -> bytes:
    """16 bytes or none."""
    return b"" if value == b"" and type(value) is bytes else identity(value)


def column(value: Any) -> Column:
    """Packed bytes of any length; how many is a relation to the keys."""
    _length(value)
    return value  # type: ignore[no-any-return]


def keys(value: Any) -> Column:
    """1 to BATCH_KEYS_MAX keys."""
    length = len(value) if type(value) is bytes else _length(value)
    if length % KEY_BYTES or not 0 < length <= _KEYS_BYTES_MAX:
        raise Violation(
            f"{length} bytes of keys; wanted are 1 to {BATCH_KEYS_MAX} keys of {KEY_BYTES} bytes"
        )
    return value  # type: ignore[no-any-return]


def leases(value: Any) -> Column:
    """1 to BATCH_KEYS_MAX u64."""
    _rows(value, 8)
    return value  # type: ignore[no-any-return]


def inline(value: Any) -> Column:
    """Inline payload bytes of a reply."""
    length = _length(value)
    if length > FRAME_BYTES_MAX:
        raise Violation(f"{length} bytes, at most {FRAME_BYTES_MAX}")
    return value  # type: ignore[no-any-return]


def get_entries(value: Any) -> Column:
    """Rows of ENTRY_DTYPE with known status and flags."""
    _rows(value, ENTRY_DTYPE.itemsize)
    _only(value, _LOOKUPS, start=_STATUS_AT, step=ENTRY_DTYPE.itemsize)
    _only(value, b"\x00\x01", start=_FLAGS_AT, step=ENTRY_DTYPE.itemsize)
    return value  # type: ignore[no-any-return]


def stat_entries(value: Any) -> Column:
    """Rows of STAT_DTYPE with a known tier."""
    _rows(value, STAT_DTYPE.itemsize)
    _only(value, _STAT_TIERS, start=_TIER_AT, step=STAT_DTYPE.itemsize)
    return value  # type: ignore[no-any-return]


def put_results(value: Any) -> Column:
    """1 to BATCH_KEYS_MAX PutResults."""
    _rows(value, 1)
    _only(value, _PUT_RESULTS)
    return value  # type: ignore[no-any-return]


def mask(value: Any) -> Column:
    """1 to BATCH_KEYS_MAX of 0 or 1."""
    _rows(value, 1)
    _only(value, b"\x00\x01")
    return value  # type: ignore[no-any-return]


def hello(message: Hello) -> None:
    """Versions in order; a session token exactly where there is a session to join."""
    if message.version_min > message.version_max:
        raise Violation("version_min: above version_max")
    if bool(message.session) != (message.role is Role.DATA):
        raise Violation("session: belongs to data connections, and each of them needs it")


def put(message: Put) -> None:
    """Columns fit the keys; lengths, TTLs and costs are within bounds."""
    count = _length(message.keys) // KEY_BYTES
    if _length(message.lengths) != 4 * count:
        raise Violation("lengths: not one per key")
    if _length(message.offsets) not in (0, 8 * count):
        raise Violation("offsets: neither none nor one per key")
    ttl_ms = _one_or_all(message.ttl_ms, 8, count, "ttl_ms")
    _one_or_all(message.priority, 2, count, "priority")
    _one_or_all(message.depth, 4, count, "depth")
    cost = _one_or_all(message.cost, 4, count, "cost")
    if np.maximum.reduce(message.length_column) > SHARD_BYTES_MAX:
        raise Violation(f"lengths: shards have at most {SHARD_BYTES_MAX} bytes")
    if ttl_ms and np.maximum.reduce(message.ttl_ms_column) > TTL_MS_MAX:
        raise Violation(f"ttl_ms: at most {TTL_MS_MAX}")
    if cost:
        costs = message.cost_column
        # fmax and fmin pass over NaN, which means unknown.
        if np.fmax.reduce(costs) > COST_S_MAX or np.fmin.reduce(costs) < 0.0:
            raise Violation(f"cost: 0 to {COST_S_MAX} seconds, or NaN")


def report(message: Report) -> None:
    """One sum per key."""
    if (
        _length(message.sums) // 8 != _length(message.keys) // KEY_BYTES
        or _length(message.sums) % 8
    ):
        raise Violation("sums: not one per key")


def get_reply(message: GetReply) -> None:
    """Lengths within bounds, and inline rows inside the inline bytes."""
    rows = message.rows
    lengths = rows["length"]
    if np.maximum.reduce(lengths) > SHARD_BYTES_MAX:
        raise Violation(f"entries: a shard above {SHARD_BYTES_MAX} bytes")
    flags = rows["flags"]
    if not flags.any():
        if _length(message.inline):
            raise Violation("inline: bytes that no entry names")
        return
    inlined = flags == EntryFlag.INLINE
    lengths = lengths[inlined]
    offsets = rows["offset"][inlined]
    if np.maximum.reduce(lengths) > INLINE_BYTES_MAX:
        raise Violation(f"entries: an inline shard above {INLINE_BYTES_MAX} bytes")
    size = _length(message.inline)
    if np.maximum.reduce(offsets) > size or np.maximum.reduce(offsets + lengths) > size:
        raise Violation("entries: an inline shard outside the inline bytes")


def _length(value: Any) -> int:
    if type(value) is bytes:
        return len(value)
    if type(value) is memoryview and value.c_contiguous:
        return value.nbytes
    raise Violation(f"{_shown(value)} is no bytes")


def _rows(value: Any, row_bytes: int) -> None:
    length = len(value) if type(value) is bytes else _length(value)
    if length % row_bytes or not 0 < length <= row_bytes * BATCH_KEYS_MAX:
        raise Violation(
            f"{length} bytes; wanted are 1 to {BATCH_KEYS_MAX} rows of {row_bytes} bytes"
        )


def _only(value: Column, allowed: bytes, *, start: int = 0, step: int = 1) -> None:
    """Every `step`-th byte is one of `allowed`: what remains after deleting those is wrong."""
    if type(value) is not bytes:
        value = bytes(value)
    rest = value[start::step].translate(None, allowed)
    if rest:
        raise Violation(f"unknown value {rest[0]}")


def _one_or_all(value: Column, item_bytes: int, count: int, column_name: str) -> bool:
    """Whether the column holds anything but one zero item; such a column needs no further check."""
    length = _length(value)
    if length != item_bytes and length != item_bytes * count:
        raise Violation(f"{column_name}: neither one value nor one per key")
    return length != item_bytes or any(value)


def _shown(value: Any) -> str:
    """A value of the peer, short enough for an error text."""
    if isinstance(value, bytes | memoryview):
        return f"{len(value)} bytes"
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
