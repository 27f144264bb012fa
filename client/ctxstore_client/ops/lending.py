"""Plans and objects of memory that is lent to the caller: zero-copy views and staged buffers.

Owns their lifetime: what is taken when they open, checked and given back when they close. A closed
or forked one refuses access; memory that the caller still refers to is never unmapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, overload

import numpy as np
import numpy.typing as npt

from ctxstore.errors import (
    ClosedError,
    DeadlineExceeded,
    ForkedError,
    Overloaded,
    StaleView,
    TransportError,
)
from ctxstore.wire.messages import Lookup, RowArray
from ctxstore_client.ops.arguments import addresses
from ctxstore_client.ops.batches import staged_sizes
from ctxstore_client.ops.requests import Acquire, ByteArray, Context, Link, LinkPool, Plan, Purpose
from ctxstore_client.ops.shared import LeasedRows, defer_release, lease_rows, unchanged
from ctxstore_client.ops.stream import StreamGet, report_damage
from ctxstore_client.ops.transfers import StagedSource

if TYPE_CHECKING:
    from ctxstore.keys import KeyArray

VIEW_KEYS_MAX: Final = 64
"""Keys that share what a connection may lease while a view over TCP knows no lengths."""

_FAILING: Final = (DeadlineExceeded, TransportError, Overloaded)


class _Lent(Sequence["memoryview | None"]):
    """What views and staged buffers share: memoryviews that end when it closes."""

    __slots__ = ("_closed", "_pool", "_process", "_views")

    def __init__(self, pool: LinkPool, views: list[memoryview | None]) -> None:
        self._pool = pool
        self._views = views
        self._process = pool.process
        self._closed = False

    @overload
    def __getitem__(self, index: int) -> memoryview | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[memoryview | None]: ...
    def __getitem__(self, index: int | slice) -> memoryview | list[memoryview | None] | None:
        self._check_usable()
        return self._views[index]

    def __len__(self) -> int:
        return len(self._views)

    def __iter__(self) -> Iterator[memoryview | None]:
        self._check_usable()
        return iter(self._views)

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that opened it; nothing is mapped here then."""
        return self._process != self._pool.process

    def _check_usable(self) -> None:
        if self.forked:
            raise ForkedError(
                "views and staged buffers are not mapped in a forked child: open new ones there"
            )
        if self._closed:
            raise ClosedError("used after its `with` block")

    def _end_views(self) -> bool:
        """Release every memoryview; False when the caller keeps memory of one by other means."""
        self._closed = True
        ended = True
        for view in self._views:
            if view is not None:
                try:
                    view.release()
                except BufferError:
                    ended = False
        return ended


# ---------------------------------------------------------------- views


class Views(_Lent):
    """One read-only memoryview per key, None where there is no shard; valid inside the `with` only.

    They show the daemon's memory itself (over TCP: a pooled local buffer). A memoryview or array
    made from one must not be used after the block. Any thread may read; another process must not.
    """

    __slots__ = ("_buffers", "_leases", "_link", "_mapped")

    def __init__(
        self,
        pool: LinkPool,
        views: list[memoryview | None],
        *,
        link: Link | None = None,
        leases: Sequence[int] = (),
        mapped: RowArray | None = None,
        buffers: Sequence[ByteArray] = (),
    ) -> None:
        super().__init__(pool, views)
        self._link = link
        self._leases = list(leases)
        self._mapped = mapped
        self._buffers = list(buffers)

    def check(self) -> None:
        """Raise StaleView unless every view still shows what was leased. Costs microseconds."""
        self._check_usable()
        if (reason := self._stale_reason()) is not None:
            raise StaleView(reason)

    def _stale_reason(self) -> str | None:
        link, mapped = self._link, self._mapped
        if link is None or mapped is None or not len(mapped):
            return None
        assert link.arena is not None, "only links with an arena are held by views"
        if not unchanged(link.arena, mapped).all():
            return "a slot was reused while its view was open"
        if not link.alive:
            return "the connection that held the lease ended while the view was open"
        return None

    def close(self) -> None:
        """End the views. Raises StaleView when what was read may not have been what was stored."""
        if (reason := self.release()) is not None:
            raise StaleView(reason)

    def release(self) -> str | None:
        """End the views; returns why they were stale, None if they were not. Idempotent."""
        if self._closed or self.forked:
            self._closed = True
            return None
        reason = self._stale_reason()
        ended = self._end_views()
        link, self._link = self._link, None
        if link is not None and reason is None:
            for lease in self._leases:
                defer_release(link, lease)
            self._pool.give_back(link)
        elif link is not None:
            self._pool.discard(link)
        for buffer in self._buffers:
            if ended:
                self._pool.buffers.give_back(buffer)
            else:
                self._pool.buffers.forget(buffer)
        self._buffers.clear()
        return reason


def open_view(context: Context, keys: KeyArray) -> Plan[Views]:
    """Lease and show every shard; None for all of them where time or connection ended first."""
    nothing: list[memoryview | None] = [None] * len(keys)
    if not len(keys):
        return Views(context.pool, nothing)
    try:
        return (yield from _open_view(context, keys))
    except _FAILING:
        return Views(context.pool, nothing)


def _open_view(context: Context, keys: KeyArray) -> Plan[Views]:
    while True:
        link: Link = yield Acquire(Purpose.READ)
        stale = not link.fresh
        try:
            if link.streams:
                views = yield from _streamed_view(context, link, keys)
                context.pool.give_back(link)
                return views
            leased = yield from lease_rows(context, link, keys)
        except TransportError:
            context.pool.discard(link)
            if not stale or context.deadline.remaining_s() <= 0:
                raise
        except BaseException:
            context.pool.discard(link)
            raise
        else:
            return _mapped_view(context.pool, link, leased)


def _mapped_view(pool: LinkPool, link: Link, leased: LeasedRows) -> Views:
    assert link.arena is not None, "a link that is no data connection has an arena"
    rows = leased.rows
    views: list[memoryview | None] = [None] * len(rows)
    hits = rows["status"] == Lookup.HIT
    for index, payload in leased.inline.items():
        if hits[index]:
            views[index] = payload.data.toreadonly()
            hits[index] = False
    at = np.flatnonzero(hits)
    data = link.arena.data
    places = zip(at.tolist(), rows["offset"][at].tolist(), rows["length"][at].tolist(), strict=True)
    for index, offset, length in places:
        views[index] = data[offset : offset + length].data
    return Views(pool, views, link=link, leases=leased.leases, mapped=rows[at])


def _streamed_view(context: Context, link: Link, keys: KeyArray) -> Plan[Views]:
    """Views of pooled buffers that are filled from a data connection."""
    taken: dict[int, ByteArray] = {}
    pool = context.pool

    def target_for(index: int, length: int) -> ByteArray:
        taken[index] = pool.buffers.take(length)[:length]
        return taken[index]

    job = StreamGet(context, keys, exact=False, target_for=target_for)
    statuses = np.full(len(keys), Lookup.MISS, np.uint8)
    capacities = np.full(len(keys), link.hello.shard_bytes_max, "<u4")
    views: list[memoryview | None] = [None] * len(keys)
    try:
        # Lengths are not known yet: a request asks for few enough that most nodes can hold them.
        sizes = np.full(len(keys), link.hello.lease_bytes_max // VIEW_KEYS_MAX, np.int64)
        yield from job.run(link, np.arange(len(keys)), capacities, statuses, sizes=sizes)
        yield from report_damage(context, job.damaged)
    except BaseException:
        # The link is closed by whoever lent it before these are filled by somebody else.
        pool.discard(link)
        for buffer in taken.values():
            pool.buffers.give_back(buffer)
        raise
    for index in np.flatnonzero(statuses == Lookup.HIT).tolist():
        views[index] = taken[index].data.toreadonly()
    return Views(pool, views, buffers=list(taken.values()))


# ---------------------------------------------------------------- staged buffers


class Staged(_Lent):
    """One writable memoryview per length, inside the `with` only; a put of them skips a copy.

    They may be put more than once, in any choice and order, and by any thread of this process.
    """

    __slots__ = ("_buffers", "_first", "_link", "_stop")

    def __init__(
        self,
        pool: LinkPool,
        views: list[memoryview],
        *,
        link: Link | None = None,
        buffers: Sequence[ByteArray] = (),
    ) -> None:
        super().__init__(pool, list(views))
        self._link = link
        self._buffers = list(buffers)
        self._first = self._stop = 0
        if link is not None and link.staging is not None:
            self._first = int(addresses([link.staging])[0])
            self._stop = self._first + link.staging.size

    def source_of(
        self, begins: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> StagedSource | None:
        """Which buffers, given by address, lie in the staging, and where; None if none does."""
        link = self._link
        if link is None or self._closed or self.forked:
            return None
        inside = np.flatnonzero((begins >= self._first) & (stops <= self._stop))
        if not len(inside):
            return None
        return StagedSource(link, inside, begins[inside] - self._first)

    def close(self) -> None:
        """End the buffers; what was put stays put."""
        if self._closed or self.forked:
            self._closed = True
            return
        ended = self._end_views()
        link, self._link = self._link, None
        if link is not None:
            # A buffer that the caller kept would let it write into a later put of someone else.
            if ended:
                self._pool.end_hold(link)
            else:
                self._pool.discard(link)
        for buffer in self._buffers:
            if ended:
                self._pool.buffers.give_back(buffer)
            else:
                self._pool.buffers.forget(buffer)
        self._buffers.clear()


def open_staged(context: Context, lengths: npt.NDArray[np.int64]) -> Plan[Staged]:
    """Lend staging for shards of these lengths. Raises Overloaded where the node grants too little.

    Over TCP, or without a daemon, the buffers are local ones: a put of them is an ordinary put.
    """
    if not len(lengths):
        return Staged(context.pool, [])
    sizes = staged_sizes(lengths)
    total = int(sizes.sum())
    try:
        link: Link = yield Acquire(Purpose.WRITE, staging_bytes=total)
    except DeadlineExceeded as error:
        raise Overloaded("no staging became free in time") from error
    except TransportError:
        return _local_staged(context.pool, lengths)
    if link.streams:
        context.pool.give_back(link)
        return _local_staged(context.pool, lengths)
    staging = link.staging
    if staging is None or staging.size < total:
        context.pool.give_back(link)
        granted = 0 if staging is None else staging.size
        raise Overloaded(f"{total} bytes of staging wanted, the node grants {granted}")
    at = (np.cumsum(sizes) - sizes).tolist()
    views = [staging[o : o + n].data for o, n in zip(at, lengths.tolist(), strict=True)]
    context.pool.hold(link)
    return Staged(context.pool, views, link=link)


def _local_staged(pool: LinkPool, lengths: npt.NDArray[np.int64]) -> Staged:
    buffers: list[ByteArray] = []
    try:
        buffers.extend(pool.buffers.take(length)[:length] for length in lengths.tolist())
    except Overloaded:
        for buffer in buffers:
            pool.buffers.give_back(buffer)
        raise
    return Staged(pool, [buffer.data for buffer in buffers], buffers=buffers)


def find_staged(open_ones: Sequence[Staged], buffers: Sequence[ByteArray]) -> list[StagedSource]:
    """The stagings that some of these buffers lie in."""
    begins = addresses(buffers)
    stops = begins + np.fromiter((b.size for b in buffers), np.int64, len(buffers))
    found = (staged.source_of(begins, stops) for staged in open_ones)
    return [source for source in found if source is not None]
