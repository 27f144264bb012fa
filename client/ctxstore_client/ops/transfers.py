"""Plans of get_into and put as callers see them: a verdict for every key, whatever happens.

Owns the choice between shared memory and data connections, and what failures mean for keys without
a verdict. It must not know how either path works.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
import numpy.typing as npt

from ctxstore import limits
from ctxstore.errors import DeadlineExceeded, Overloaded, TransportError
from ctxstore.keys import KeyArray, key_list
from ctxstore.wire.messages import Lookup, PutResult
from ctxstore_client.ops.exchange import on_link, with_link
from ctxstore_client.ops.requests import (
    Acquire,
    ByteArray,
    Context,
    Link,
    Parallel,
    Plan,
    Purpose,
)
from ctxstore_client.ops.shared import (
    UNDECIDED,
    GetState,
    PutState,
    shared_get,
    shared_put,
    staged_put,
)
from ctxstore_client.ops.stream import stream_get, stream_put

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from enum import IntEnum

    from ctxstore_client.ops.arguments import PutColumns
    from ctxstore_client.ops.batches import Indices

STREAMS: Final = 2
"""Data connections that one operation uses side by side."""

STREAM_BYTES_MIN: Final = 8 * limits.MIB
"""Below this a second connection costs more than it brings."""

_LOOKUPS: Final = tuple(Lookup)
_RESULTS: Final = tuple(PutResult)

S = TypeVar("S", GetState, PutState)


def get_into(
    context: Context, keys: KeyArray, buffers: list[ByteArray], *, exact: bool
) -> Plan[list[Lookup]]:
    """Fill each buffer whose shard is there; one verdict per key."""
    if not len(keys):
        return []
    state = GetState(keys, buffers, exact)

    def body(link: Link) -> Plan[None]:
        if not link.streams:
            yield from shared_get(context, link, state)
            return
        yield from _side_by_side(context, link, state, state.sizes, stream_get)

    try:
        yield from on_link(context, Purpose.READ, body)
    except DeadlineExceeded:
        _settle(state.statuses, Lookup.TIMEOUT)
    except Overloaded:
        _settle(state.statuses, Lookup.OVERLOADED)
    except TransportError:
        _settle(state.statuses, Lookup.MISS)
    _count(context, "get", state.statuses, _LOOKUPS)
    return [_LOOKUPS[status] for status in state.statuses.tolist()]


def put(
    context: Context,
    keys: KeyArray,
    buffers: list[ByteArray],
    columns: PutColumns,
    *,
    staged: Sequence[StagedSource] = (),
) -> Plan[list[PutResult]]:
    """Store each shard; one result per key. `staged`: which of them lie in a staging already."""
    if not len(keys):
        return []
    state = PutState(keys, buffers, columns)
    for source in staged:
        yield from _put_staged(context, state, source)
    if len(state.undecided()):
        yield from _put_unstaged(context, state)
    _count(context, "put", state.results, _RESULTS)
    return [_RESULTS[result] for result in state.results.tolist()]


def _put_staged(context: Context, state: PutState, source: StagedSource) -> Plan[None]:
    """Put what lies in a staging through its own connection, and never in another way.

    Once that connection is gone the daemon has cleared the memory: a copy of it would be wrong.
    """
    state.refuse_above(source.link.hello.shard_bytes_max)
    mine = source.indices[state.results[source.indices] == UNDECIDED]
    offsets = np.zeros(len(state.keys), np.int64)
    offsets[source.indices] = source.offsets
    with contextlib.suppress(DeadlineExceeded, TransportError, Overloaded):
        yield Acquire(Purpose.WRITE, exactly=source.link)
        plan = staged_put(context, source.link, state, mine, offsets=offsets)
        yield from with_link(context, source.link, plan)
    state.give_up(mine)


def _put_unstaged(context: Context, state: PutState) -> Plan[None]:
    def body(link: Link) -> Plan[None]:
        if not link.streams:
            yield from shared_put(context, link, state)
            if len(state.undecided()):
                yield from _put_without_staging(context, state)
            return
        todo = state.refuse_above(link.hello.shard_bytes_max)
        if len(set(key_list(state.keys))) < len(state.keys):
            # Of equal keys in one batch the first is to be the one that is stored.
            yield from stream_put(context, link, state, todo)
            return
        yield from _side_by_side(context, link, state, state.lengths, stream_put)

    largest = int(state.lengths[state.undecided()].max())
    with contextlib.suppress(DeadlineExceeded, TransportError, Overloaded):
        yield from on_link(context, Purpose.WRITE, body, staging_bytes=largest)
    state.give_up(state.undecided())


def _count(
    context: Context, what: str, verdicts: npt.NDArray[np.uint8], names: Sequence[IntEnum]
) -> None:
    for verdict, count in enumerate(np.bincount(verdicts).tolist()):
        if count:
            context.pool.count(f"{what}_{names[verdict].name.lower()}", count)


def _put_without_staging(context: Context, state: PutState) -> Plan[None]:
    """The socket's way for what no staging was granted for: all of it is lent to others now."""
    try:
        link: Link = yield Acquire(Purpose.STREAM)
    except (TransportError, DeadlineExceeded):
        state.give_up(state.undecided())
        return
    yield from with_link(context, link, stream_put(context, link, state, state.undecided()))


class StagedSource:
    """Which shards of a put lie in a staging that the caller holds, and at which offsets."""

    __slots__ = ("indices", "link", "offsets")

    def __init__(self, link: Link, indices: Indices, offsets: npt.NDArray[np.int64]) -> None:
        self.link = link
        self.indices = indices
        self.offsets = offsets


def _settle(verdicts: npt.NDArray[np.uint8], verdict: int) -> None:
    verdicts[verdicts == UNDECIDED] = verdict


def _side_by_side(
    context: Context,
    link: Link,
    state: S,
    sizes: npt.NDArray[np.int64],
    work: Callable[[Context, Link, S, Indices], Plan[None]],
) -> Plan[None]:
    """Do the undecided keys over this link, and half of them over a second one if they are many.

    The second link is never waited for: two operations that hold one each would wait for ever.
    """
    todo = state.undecided()
    halves = split_evenly(todo, sizes[todo], STREAMS)
    second: Link | None = None
    if len(halves) > 1:
        second = yield Acquire(Purpose.READ, spare=True)
    if second is None:
        yield from work(context, link, state, todo)
        return
    yield Parallel(
        [
            work(context, link, state, halves[0]),
            with_link(context, second, work(context, second, state, halves[1])),
        ]
    )


def split_evenly(indices: Indices, sizes: npt.NDArray[np.int64], parts: int) -> Sequence[Indices]:
    """Consecutive parts of about equal bytes; a single one where that is not worth it."""
    total = int(sizes.sum())
    if len(indices) < parts or total < parts * STREAM_BYTES_MIN:
        return [indices]
    ends = np.cumsum(sizes)
    cuts = np.searchsorted(ends, [total * part // parts for part in range(1, parts)], "right")
    return [piece for piece in np.split(indices, np.maximum(cuts, 1)) if len(piece)]
