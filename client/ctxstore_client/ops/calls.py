"""Checked calls: arguments of a public method in, a function that builds its plan out.

Owns that every argument is checked before a plan exists, so that nothing is sent for a call that is
wrong. Both faces use it, at once or for a ticket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ctxstore_client.ops import arguments, control, lending, transfers
from ctxstore_client.ops.requests import Context, Plan

if TYPE_CHECKING:
    from ctxstore.keys import Keys
    from ctxstore.wire.messages import Lookup, PutResult
    from ctxstore_client.ops.arguments import Buffers

T = TypeVar("T")

PlanFor = Callable[[Context], Plan[T]]


class PutOptions(NamedTuple):
    """Options of a put as the caller gave them: one value, or one per key."""

    ttl_s: Any
    priority: Any
    durability: str | None
    depth0: Any
    cost_s: Any


def get_call(keys: Keys, buffers: Buffers, *, exact: bool) -> PlanFor[list[Lookup]]:
    """A checked `get_into`. Raises ValueError."""
    rows = arguments.key_rows(keys)
    arrays = arguments.byte_arrays(buffers, count=len(rows), writable=True)
    return lambda context: transfers.get_into(context, rows, arrays, exact=exact)


def put_call(
    keys: Keys,
    buffers: Buffers,
    options: PutOptions,
    *,
    staged: Sequence[lending.Staged],
) -> PlanFor[list[PutResult]]:
    """A checked `put`; `staged` are the allocations that buffers may lie in. Raises ValueError."""
    rows = arguments.key_rows(keys)
    arrays = arguments.byte_arrays(buffers, count=len(rows), writable=False)
    columns = arguments.put_columns(
        len(rows),
        ttl_s=options.ttl_s,
        priority=options.priority,
        durability=options.durability,
        depth0=options.depth0,
        cost_s=options.cost_s,
    )
    sources = lending.find_staged(staged, arrays) if staged and arrays else []
    return lambda context: transfers.put(context, rows, arrays, columns, staged=sources)


def prefetch_call(keys: Keys, by_s: float | None) -> PlanFor[int]:
    """A checked `prefetch`. Raises ValueError."""
    rows = arguments.key_rows(keys)
    by_us = arguments.by_us(by_s)
    return lambda context: control.prefetch(context, rows, by_us)
