"""Plans of operations that move no payload: exists, match, stat, hold, touch, remove, and the rest.

Owns how their answers over several requests become one result, and what each says when time or
connection fails. It must not know sockets.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ctxstore.errors import DeadlineExceeded, Overloaded, RemoteProtocolError, TransportError
from ctxstore.wire.messages import (
    CountReply,
    Exists,
    Explain,
    Flush,
    Hold,
    MaskReply,
    Match,
    Message,
    Ping,
    Prefetch,
    Remove,
    Stat,
    StatFlag,
    StatReply,
    Stats,
    StatTier,
    TextReply,
    Touch,
    Verify,
    VerifyReply,
)
from ctxstore_client.ops.exchange import answer_to, ask, on_link, timeout_us
from ctxstore_client.ops.requests import Context, Link, Plan, Purpose, Send

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ctxstore.keys import KeyArray

BoolArray = npt.NDArray[np.bool_]

_FAILING: Final = (DeadlineExceeded, TransportError, Overloaded)
_EXPLAIN_KEYS_MAX: Final = 64
"""Keys of one explanation: its text has to fit a reply."""


class ShardStat(NamedTuple):
    """What a node knows of one shard."""

    length: int
    tier: StatTier
    """Fastest tier that holds it."""
    ttl_s: float | None
    """Remaining time to live; None: no expiry."""
    held: bool
    durable: bool


def _pieces(keys: KeyArray, link: Link) -> Iterator[tuple[int, KeyArray]]:
    """(index of the first key, keys) of each request."""
    size = link.hello.batch_keys_max
    for first in range(0, len(keys), size):
        yield first, keys[first : first + size]


def exists(context: Context, keys: KeyArray) -> Plan[BoolArray]:
    """True where a shard is visible; False also where time or connection ended first."""
    found = np.zeros(len(keys), np.bool_)

    def body(link: Link) -> Plan[None]:
        for first, piece in _pieces(keys, link):
            request = Exists(link.next_rid(), timeout_us(context), piece.data)
            reply = yield from ask(link, request, MaskReply)
            found[first : first + len(piece)] = reply.mask_column.view(np.bool_)

    yield from _or_what_is_known(context, body, len(keys))
    return found


def match(context: Context, keys: KeyArray) -> Plan[int]:
    """Number of leading keys that are visible, or that are known to be when time ran out."""
    known = 0

    def body(link: Link) -> Plan[None]:
        nonlocal known
        known = 0
        for first, piece in _pieces(keys, link):
            request = Match(link.next_rid(), timeout_us(context), piece.data)
            reply = yield from ask(link, request, CountReply)
            known = first + reply.count
            if reply.count < len(piece):
                return

    yield from _or_what_is_known(context, body, len(keys))
    return known


def stat(context: Context, keys: KeyArray) -> Plan[list[ShardStat | None]]:
    """What is known of each shard; None where absent or not answered in time."""
    found: list[ShardStat | None] = [None] * len(keys)

    def body(link: Link) -> Plan[None]:
        for first, piece in _pieces(keys, link):
            request = Stat(link.next_rid(), timeout_us(context), piece.data)
            reply = yield from ask(link, request, StatReply)
            rows = reply.rows
            for index in np.flatnonzero(rows["tier"] != StatTier.ABSENT).tolist():
                found[first + index] = _shard_stat(rows[index])

    yield from _or_what_is_known(context, body, len(keys))
    return found


def _shard_stat(row: Any) -> ShardStat:
    try:
        tier = StatTier(int(row["tier"]))
    except ValueError as error:
        raise RemoteProtocolError(f"STAT_REPLY: unknown tier {row['tier']}") from error
    flags = int(row["flags"])
    ttl_ms = int(row["ttl_ms"])
    return ShardStat(
        length=int(row["length"]),
        tier=tier,
        ttl_s=ttl_ms / 1000 if ttl_ms else None,
        held=bool(flags & StatFlag.HELD),
        durable=bool(flags & StatFlag.DURABLE),
    )


def _or_what_is_known(
    context: Context, body: Callable[[Link], Plan[None]], count: int
) -> Plan[None]:
    """Run a query; what it did not learn in time stays as it was."""
    if not count:
        return
    try:
        yield from on_link(context, Purpose.CONTROL, body)
    except _FAILING:
        return


def prefetch(context: Context, keys: KeyArray, by_us: int) -> Plan[int]:
    """How many of the shards will be promoted; 0 when the daemon cannot be reached."""
    accepted = 0

    def body(link: Link) -> Plan[None]:
        nonlocal accepted
        accepted = 0
        for _, piece in _pieces(keys, link):
            request = Prefetch(link.next_rid(), timeout_us(context), piece.data, by_us)
            reply = yield from ask(link, request, CountReply)
            accepted += reply.count

    yield from _or_what_is_known(context, body, len(keys))
    return accepted


class MaskedOp(NamedTuple):
    """An operation on keys that answers whether it applied, per key."""

    request: Callable[[int, int, KeyArray], Message]
    """(rid, timeout_us, keys) -> request."""


def hold_op(ttl_ms: int) -> MaskedOp:
    """Keep shards for that long from now; 0 ends the hold."""
    return MaskedOp(lambda rid, limit_us, keys: Hold(rid, limit_us, keys.data, ttl_ms))


def touch_op(ttl_ms: int) -> MaskedOp:
    """Mark shards as used, and raise their time to live (0 = leave it)."""
    return MaskedOp(lambda rid, limit_us, keys: Touch(rid, limit_us, keys.data, ttl_ms))


def remove_op() -> MaskedOp:
    """Remove shards for good."""
    return MaskedOp(lambda rid, limit_us, keys: Remove(rid, limit_us, keys.data))


def masked(context: Context, keys: KeyArray, operation: MaskedOp) -> Plan[BoolArray]:
    """Apply to every key. After DeadlineExceeded, TransportError, Overloaded some may be done."""
    applied = np.zeros(len(keys), np.bool_)

    def body(link: Link) -> Plan[None]:
        for first, piece in _pieces(keys, link):
            request = operation.request(link.next_rid(), timeout_us(context), piece)
            reply = yield from ask(link, request, MaskReply)
            # After a retry on a new connection, what was applied before counts as well.
            applied[first : first + len(piece)] |= reply.mask_column.view(np.bool_)

    if len(keys):
        yield from on_link(context, Purpose.CONTROL, body)
    return applied


def flush(context: Context) -> Plan[int]:
    """Shards written to disk. Raises DeadlineExceeded or TransportError."""

    def body(link: Link) -> Plan[int]:
        request = Flush(link.next_rid(), timeout_us(context))
        reply = yield from ask(link, request, CountReply)
        return reply.count

    return (yield from on_link(context, Purpose.CONTROL, body))


def ping(context: Context) -> Plan[float]:
    """Seconds of one round trip. Raises DeadlineExceeded or TransportError."""

    def body(link: Link) -> Plan[float]:
        before = context.deadline.remaining_s()
        yield from ask(link, Ping(link.next_rid()), CountReply)
        return before - context.deadline.remaining_s()

    return (yield from on_link(context, Purpose.CONTROL, body))


def explain(context: Context, keys: KeyArray) -> Plan[list[Any]]:
    """The daemon's explanation of each key, for people. Raises like `flush`."""
    lines: list[Any] = []

    def body(link: Link) -> Plan[None]:
        lines.clear()
        for first in range(0, len(keys), _EXPLAIN_KEYS_MAX):
            piece = keys[first : first + _EXPLAIN_KEYS_MAX]
            request = Explain(link.next_rid(), timeout_us(context), piece.data)
            reply = yield from ask(link, request, TextReply)
            found = _json_of(reply)
            if not isinstance(found, dict) or not isinstance(found.get("explained"), list):
                raise RemoteProtocolError("TEXT_REPLY: no explanation")
            lines.extend(found["explained"])

    if len(keys):
        yield from on_link(context, Purpose.CONTROL, body)
    return lines


def node_stats(context: Context) -> Plan[dict[str, Any] | None]:
    """Counters of the node; None when it does not answer in time."""

    def body(link: Link) -> Plan[Any]:
        request = Stats(link.next_rid(), timeout_us(context))
        return _json_of((yield from ask(link, request, TextReply)))

    try:
        found = yield from on_link(context, Purpose.CONTROL, body)
    except _FAILING:
        return None
    return found if isinstance(found, dict) else {"value": found}


def _json_of(reply: TextReply) -> Any:
    try:
        return json.loads(reply.text)
    except ValueError as error:
        raise RemoteProtocolError(f"TEXT_REPLY: not JSON: {error}") from error


def verify(
    context: Context, bytes_per_s: int, progress: Callable[[VerifyReply], None]
) -> Plan[VerifyReply]:
    """Scrub every shard on disk; `progress` is called with each report. Raises like `flush`."""

    def body(link: Link) -> Plan[VerifyReply]:
        limit_us = timeout_us(context)
        request = Verify(link.next_rid(), limit_us, bytes_per_s)
        yield Send(link, link.encode(request))
        while True:
            reply = yield from answer_to(link, request.rid, VerifyReply)
            progress(reply)
            if reply.done:
                return reply

    return (yield from on_link(context, Purpose.CONTROL, body))
