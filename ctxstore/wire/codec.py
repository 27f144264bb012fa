"""Encoding of control messages: a msgpack array `[op, rid, fields...]` in a frame.

Owns the check of every field, in both directions: what a peer sends wrong is a RemoteProtocolError,
what this side would send wrong a LocalProtocolError. It must not know connections or their order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, cast

import msgpack

from ctxstore.errors import (
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    VersionMismatch,
)
from ctxstore.limits import (
    BATCH_KEYS_MAX,
    FAILURE_TEXT_BYTES_MAX,
    FRAME_BYTES_MAX,
    HELLO_BYTES_MAX,
    SHARD_BYTES_MAX,
    TEXT_BYTES_MAX,
)
from ctxstore.wire import checks, control
from ctxstore.wire.checks import Violation
from ctxstore.wire.columns import RID_MAX, VERSION_MAX, VERSION_MIN, Column, Op
from ctxstore.wire.frames import pack_frame

if TYPE_CHECKING:
    from collections.abc import Callable

    from ctxstore.wire.control import Message

ARRAY_FIELDS_MAX: Final = 32
"""Elements of a message's array: version 1 needs 20, a newer hello may have more."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """How one message travels: `values` reads op and fields off it, `checks` go with the fields."""

    message: type[Any]
    names: tuple[str, ...]
    checks: tuple[Callable[[Any], Any], ...]
    values: Callable[[Any], tuple[Any, ...]]
    relations: Callable[[Any], None] | None = None
    """What must hold between fields; raises Violation."""


def _shape(
    message: type[Any],
    *field_checks: Callable[[Any], Any],
    relations: Callable[[Any], None] | None = None,
) -> _Shape:
    names = tuple(field.name for field in fields(message))
    assert names[0] == "rid", "the request id is the first field"
    assert len(names) == len(field_checks), f"{message.__name__}: one check per field"
    return _Shape(message, names, field_checks, attrgetter("op", *names), relations)


_rid = checks.integer(1, RID_MAX)
_no_rid = checks.integer(0, 0)
_any_rid = checks.integer(0, RID_MAX)
_u64 = checks.integer(0, 2**64 - 1)
_timeout = checks.timeout_us
_keys = checks.keys

_SHAPES: Final[tuple[_Shape, ...]] = (
    _shape(
        control.Hello,
        _rid,
        checks.integer(0, checks.VERSION_NUMBER_MAX),
        checks.integer(0, checks.VERSION_NUMBER_MAX),
        checks.role,
        checks.name,
        checks.name,
        checks.token,
        checks.name,
        _u64,
        checks.boolean,
        checks.integer(0, checks.MAPPING_BYTES_MAX),
        checks.session,
        relations=checks.hello,
    ),
    _shape(
        control.HelloOk,
        _rid,
        checks.integer(VERSION_MIN, VERSION_MAX),
        _u64,
        checks.identity,
        checks.identity,
        checks.name,
        checks.identity,
        _u64,
        _u64,
        checks.integer(0, checks.MAPPING_BYTES_MAX),
        checks.integer(0, checks.MAPPING_BYTES_MAX),
        checks.integer(1, SHARD_BYTES_MAX),
        checks.integer(0, checks.MAPPING_BYTES_MAX),
        checks.seconds,
        checks.integer(1, BATCH_KEYS_MAX),
        checks.name,
        checks.name,
        checks.name,
    ),
    _shape(
        control.Failure,
        _any_rid,
        checks.integer(0, 2**16 - 1),
        checks.text(FAILURE_TEXT_BYTES_MAX),
        checks.integer(0, checks.RETRY_AFTER_MS_MAX),
    ),
    _shape(control.Get, _rid, _timeout, _keys),
    _shape(
        control.GetReply, _rid, _u64, checks.get_entries, checks.inline, relations=checks.get_reply
    ),
    _shape(control.Release, _no_rid, checks.leases),
    _shape(
        control.Put,
        _rid,
        _timeout,
        checks.durability,
        _keys,
        checks.column,
        checks.column,
        checks.column,
        checks.column,
        checks.column,
        checks.column,
        relations=checks.put,
    ),
    _shape(control.PutReply, _rid, checks.put_results),
    _shape(control.Exists, _rid, _timeout, _keys),
    _shape(control.Match, _rid, _timeout, _keys),
    _shape(control.Stat, _rid, _timeout, _keys),
    _shape(control.Prefetch, _rid, _timeout, _keys, _timeout),
    _shape(control.Hold, _rid, _timeout, _keys, checks.integer(0, checks.TTL_MS_MAX)),
    _shape(control.Touch, _rid, _timeout, _keys, checks.integer(0, checks.TTL_MS_MAX)),
    _shape(control.Remove, _rid, _timeout, _keys),
    _shape(control.Flush, _rid, _timeout),
    _shape(control.Explain, _rid, _timeout, _keys),
    _shape(control.Stats, _rid, _timeout),
    _shape(control.Ping, _rid),
    _shape(control.Report, _no_rid, _keys, checks.column, relations=checks.report),
    _shape(control.Verify, _rid, _timeout, _u64),
    _shape(control.MaskReply, _rid, checks.mask),
    _shape(control.CountReply, _rid, _u64),
    _shape(control.StatReply, _rid, checks.stat_entries),
    _shape(control.TextReply, _rid, checks.text(TEXT_BYTES_MAX)),
    _shape(control.VerifyReply, _rid, checks.boolean, _u64, _u64, _u64, _u64, _u64),
)

_BY_TYPE: Final[dict[type[Any], _Shape]] = {shape.message: shape for shape in _SHAPES}
_BY_OP: Final[dict[int, _Shape]] = {int(shape.message.op): shape for shape in _SHAPES}
_HELLO: Final = int(Op.HELLO)
_OPEN_ENDED: Final = (int(Op.HELLO), int(Op.HELLO_OK))
"""Messages that a newer peer may have lengthened: what version 1 does not know is ignored."""


def encode_payload(message: Message) -> bytes:
    """The msgpack array of a message, without the frame's length. Raises LocalProtocolError."""
    shape = _BY_TYPE.get(type(message))
    if shape is None:
        raise LocalProtocolError(f"{type(message).__name__} is not a message")
    values = list(shape.values(message))
    _check(shape, values, LocalProtocolError)
    try:
        if shape.relations is not None:
            shape.relations(message)
        return cast("bytes", msgpack.packb(values))
    except Violation as violation:
        raise LocalProtocolError(f"{shape.message.op.name}.{violation}") from None


def encode_frame(message: Message) -> bytes:
    """A whole control frame. Raises LocalProtocolError where the protocol forbids the message."""
    limit = HELLO_BYTES_MAX if message.op in _OPEN_ENDED else FRAME_BYTES_MAX
    return pack_frame(encode_payload(message), limit=limit)


def decode_message(payload: Column) -> Message:
    """The message in a frame's payload; it shares no memory with `payload`.

    Raises RemoteProtocolError naming message and field, and VersionMismatch for a hello that offers
    no version of ours (its further fields are not looked at: they belong to another version).
    """
    values = _unpack(payload)
    if type(values) is not list or not values or type(values[0]) is not int:
        raise RemoteProtocolError("a message is an array that starts with its op")
    shape = _BY_OP.get(values[0])
    if shape is None:
        raise RemoteProtocolError(f"unknown op {values[0]}")
    if values[0] in _OPEN_ENDED:
        if values[0] == _HELLO:
            _check_versions(values)
        del values[len(shape.names) + 1 :]
    if len(values) != len(shape.names) + 1:
        raise RemoteProtocolError(
            f"{shape.message.op.name} has {len(values) - 1} fields, not {len(shape.names)}"
        )
    _check(shape, values, RemoteProtocolError)
    message = cast("Message", shape.message(*values[1:]))
    if shape.relations is not None:
        try:
            shape.relations(message)
        except Violation as violation:
            raise RemoteProtocolError(f"{shape.message.op.name}.{violation}") from None
    return message


def _check(shape: _Shape, values: list[Any], error: type[ProtocolError]) -> None:
    """Put each field's checked form in the place of its value."""
    index = 0
    try:
        for check in shape.checks:
            index += 1
            values[index] = check(values[index])
    except Violation as violation:
        name = shape.names[index - 1]
        raise error(f"{shape.message.op.name}.{name}: {violation}") from None


def _flat(values: list[Any]) -> list[Any]:
    """Refuse nested arrays while unpacking: they would blow a frame up many times in memory."""
    for value in values:
        if type(value) is list:
            raise Violation("nested array")
    return values


def _unpack(payload: Column) -> Any:
    try:
        return msgpack.unpackb(
            payload,
            raw=False,
            strict_map_key=True,
            list_hook=_flat,
            max_array_len=ARRAY_FIELDS_MAX,
            max_map_len=0,
            max_ext_len=0,
            max_str_len=TEXT_BYTES_MAX,
            max_bin_len=FRAME_BYTES_MAX,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"malformed message: {error}") from error


def _check_versions(values: list[Any]) -> None:
    if len(values) < 4 or type(values[2]) is not int or type(values[3]) is not int:
        raise RemoteProtocolError("HELLO starts with the versions it offers")
    lowest, highest = values[2], values[3]
    if not 0 <= lowest <= highest:
        raise RemoteProtocolError(f"HELLO.version_min: {lowest} to {highest} is no range")
    if highest < VERSION_MIN or lowest > VERSION_MAX:
        raise VersionMismatch(
            f"this side speaks versions {VERSION_MIN} to {VERSION_MAX}, "
            f"the other side {lowest} to {highest}"
        )
