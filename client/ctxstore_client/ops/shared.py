"""Plans that move shards through shared memory: get, view and put on the daemon's own host.

Owns the order of lease, copy, generation check and release, and what of a staging is in use. Slots
are only ever read; every byte the client writes for a put lies in its own staging.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ctxstore import limits
from ctxstore.checksum import seeds
from ctxstore.errors import Overloaded, TransportError
from ctxstore.wire.messages import (
    EntryFlag,
    Get,
    GetReply,
    Lookup,
    Put,
    PutReply,
    PutResult,
    Release,
    Report,
    RowArray,
)
from ctxstore_client.ops.arguments import PutColumns, addresses
from ctxstore_client.ops.batches import (
    Indices,
    RingState,
    cut_by_bytes,
    cut_by_count,
    run_starts,
    slot_sizes,
    spanning,
    staged_sizes,
)
from ctxstore_client.ops.exchange import answer_to, timeout_us
from ctxstore_client.ops.requests import (
    Arena,
    ByteArray,
    Checksum,
    Context,
    Copy,
    Link,
    Plan,
    Send,
)

if TYPE_CHECKING:
    from ctxstore.keys import KeyArray

GET_KEYS_MAX: Final = 4096
"""Keys of one get: their inline payloads (1 KiB each at most) have to fit one reply."""

PUT_PIECES: Final = 4
"""Parts of a staging that are filled, sent and answered in turn."""

UNDECIDED: Final = 255
"""Status of a key that has no verdict yet."""


@dataclass(frozen=True, slots=True)
class GetState:
    """A get in progress: `statuses` (uint8) is the part that changes."""

    keys: KeyArray
    buffers: list[ByteArray]
    exact: bool
    sizes: npt.NDArray[np.int64] = field(init=False)
    statuses: npt.NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        sizes = np.fromiter((b.size for b in self.buffers), np.int64, len(self.buffers))
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "statuses", np.full(len(self.keys), UNDECIDED, np.uint8))

    def undecided(self) -> Indices:
        """Indices of the keys without a verdict."""
        return np.flatnonzero(self.statuses == UNDECIDED)


def shared_get(context: Context, link: Link, state: GetState) -> Plan[None]:
    """Fill the buffers of all undecided keys."""
    arena = link.arena
    assert arena is not None, "the pool lent a link without shared memory"
    while True:
        todo = state.undecided()
        refused = 0
        for piece in cut_by_bytes(
            todo,
            slot_sizes(state.sizes[todo]),
            keys_max=min(GET_KEYS_MAX, link.hello.batch_keys_max),
            bytes_max=max(1, link.hello.lease_bytes_max // 2),
        ):
            refused += yield from _get_piece(context, link, arena, state, piece)
        # The lease share was the limit, not memory: what was refused fits now that leases ended.
        if not refused or refused == len(todo):
            state.statuses[state.statuses == UNDECIDED] = Lookup.OVERLOADED
            return


def _get_piece(
    context: Context, link: Link, arena: Arena, state: GetState, piece: Indices
) -> Plan[int]:
    """One request; returns how many keys it left undecided because of the lease share."""
    request = Get(link.next_rid(), timeout_us(context), state.keys[piece].data)
    yield Send(link, link.encode(request))
    reply = yield from answer_to(link, request.rid, GetReply)
    rows = reply.rows
    verdicts = rows["status"].copy()
    hits = verdicts == Lookup.HIT
    verdicts[hits & (rows["length"] > state.sizes[piece])] = Lookup.TOO_SMALL
    if state.exact:
        verdicts[hits & (rows["length"] != state.sizes[piece])] = Lookup.MISS
    hits = verdicts == Lookup.HIT
    inline = (rows["flags"] & EntryFlag.INLINE) != 0
    mapped = np.flatnonzero(hits & ~inline)
    if mapped.size:
        targets, sources = _copy_runs(arena, state, rows[mapped], piece[mapped])
        yield Copy(targets, sources)
        reused = ~unchanged(arena, rows[mapped])
        if reused.any():
            verdicts[mapped[reused]] = Lookup.MISS
            context.pool.count("slots_reused_during_copy", int(np.count_nonzero(reused)))
    if reply.lease:
        defer_release(link, reply.lease)
    packed = np.flatnonzero(hits & inline)
    if packed.size:
        wrong = yield from _take_inline(link, state, reply, packed, piece)
        verdicts[wrong] = Lookup.MISS
        context.pool.count("checksum_failures", len(wrong))
    refused = verdicts == Lookup.OVERLOADED
    state.statuses[piece[~refused]] = verdicts[~refused]
    return int(np.count_nonzero(refused))


def defer_release(link: Link, lease: int) -> None:
    """End a lease with the next frame that is sent on the link."""
    # On a connection that the daemon has ended, its leases have ended too.
    with contextlib.suppress(TransportError):
        link.defer(link.encode(Release(0, np.array([lease], "<u8").data)))


def unchanged(arena: Arena, rows: RowArray) -> npt.NDArray[np.bool_]:
    """Whether the slot of each row still is the one that was leased; to be asked after the copy."""
    pages = (rows["offset"] // limits.PAGE_BYTES).astype(np.int64)
    same: npt.NDArray[np.bool_] = arena.generations[pages] == rows["generation"]
    return same


def _copy_runs(
    arena: Arena, state: GetState, rows: RowArray, indices: Indices
) -> tuple[list[ByteArray], list[ByteArray]]:
    """Pairs to copy; neighbours in the arena and in the destination become one pair."""
    offsets = rows["offset"].astype(np.int64)
    lengths = rows["length"].astype(np.int64)
    buffers = [state.buffers[i] for i in indices.tolist()]
    at, size = offsets.tolist(), lengths.tolist()
    if len(buffers) > 1 and (offsets[1:] == offsets[:-1] + lengths[:-1]).any():
        begins = addresses(buffers)
        firsts = run_starts(offsets, begins, lengths)
        if len(firsts) < len(buffers):
            stops = np.append(firsts[1:], len(buffers)).tolist()
            targets: list[ByteArray] = []
            sources: list[ByteArray] = []
            for first, stop in zip(firsts.tolist(), stops, strict=True):
                total = at[stop - 1] + size[stop - 1] - at[first]
                sources.append(arena.data[at[first] : at[first] + total])
                owners = buffers[first:stop]
                targets.append(spanning(owners[0], int(begins[first]), total, owners))
            return targets, sources
    return (
        [buffer[:n] for buffer, n in zip(buffers, size, strict=True)],
        [arena.data[o : o + n] for o, n in zip(at, size, strict=True)],
    )


class InlineRows(NamedTuple):
    """Payloads that came in the reply, after their checksums were compared."""

    payloads: list[ByteArray]
    wrong: npt.NDArray[np.bool_]


def checked_inline(
    link: Link, keys: KeyArray, rows: RowArray, inline: bytes | memoryview
) -> Plan[InlineRows]:
    """Views of inline payloads; those whose checksum does not fit are reported to the daemon."""
    data = np.frombuffer(inline, np.uint8)
    payloads = [
        data[offset : offset + length]
        for offset, length in zip(rows["offset"].tolist(), rows["length"].tolist(), strict=True)
    ]
    expected = seeds(
        keys, ns_id=link.hello.ns_id, incarnation=link.hello.incarnation, lengths=rows["length"]
    )
    sums: list[int] = yield Checksum(payloads, expected.tolist())
    wrong = np.array(sums, np.uint64) != rows["sum"]
    if wrong.any():
        announced = np.ascontiguousarray(rows["sum"][wrong])
        link.defer(link.encode(Report(0, keys[wrong].tobytes(), announced.data)))
    return InlineRows(payloads, wrong)


def _take_inline(
    link: Link, state: GetState, reply: GetReply, packed: Indices, piece: Indices
) -> Plan[Indices]:
    """Copy inline payloads to their buffers; returns the positions whose checksum was wrong."""
    indices = piece[packed]
    found = yield from checked_inline(link, state.keys[indices], reply.rows[packed], reply.inline)
    good = np.flatnonzero(~found.wrong).tolist()
    sources = [found.payloads[i] for i in good]
    targets = [state.buffers[int(indices[i])][: found.payloads[i].size] for i in good]
    yield Copy(targets, sources)
    return packed[found.wrong]


# ---------------------------------------------------------------- put


@dataclass(frozen=True, slots=True)
class PutState:
    """A put in progress: `results` (uint8) and `unanswered` are the parts that change."""

    keys: KeyArray
    buffers: list[ByteArray]
    columns: PutColumns
    lengths: npt.NDArray[np.int64] = field(init=False)
    results: npt.NDArray[np.uint8] = field(init=False)
    unanswered: npt.NDArray[np.uint32] = field(init=False)
    """How often each shard was offered without a verdict since: if at all, it may be stored."""

    def __post_init__(self) -> None:
        lengths = np.fromiter((b.size for b in self.buffers), np.int64, len(self.buffers))
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "results", np.full(len(self.keys), UNDECIDED, np.uint8))
        object.__setattr__(self, "unanswered", np.zeros(len(self.keys), np.uint32))

    def undecided(self) -> Indices:
        """Indices of the keys without a verdict."""
        return np.flatnonzero(self.results == UNDECIDED)

    def refuse_above(self, limit_bytes: int) -> Indices:
        """Refuse what is too large for the node; returns the undecided rest."""
        todo = self.undecided()
        self.results[todo[self.lengths[todo] > limit_bytes]] = PutResult.REFUSED
        return self.undecided()

    def offered(self, piece: Indices) -> None:
        """These are being sent: from now on nobody knows whether they are stored."""
        self.results[piece] = UNDECIDED
        self.unanswered[piece] += 1

    def answered(self, piece: Indices, verdicts: int | npt.NDArray[np.uint8]) -> None:
        """What became of these; OVERLOADED says nothing of an offer that was lost before."""
        lost = self.unanswered[piece] > 1
        doubtful = lost & (np.asarray(verdicts) == PutResult.OVERLOADED)
        self.results[piece] = np.where(doubtful, PutResult.TIMEOUT, verdicts)
        self.unanswered[piece] = 0

    def give_up(self, piece: Indices) -> None:
        """A verdict for those that have none: surely not stored is only what was never sent."""
        rest = piece[self.results[piece] == UNDECIDED]
        unsure = self.unanswered[rest] > 0
        self.results[rest] = np.where(unsure, PutResult.TIMEOUT, PutResult.OVERLOADED)

    def request(
        self, rid: int, limit_us: int, piece: Indices, offsets: npt.NDArray[np.int64] | None
    ) -> Put:
        """The message that offers or places these keys."""
        options = self.columns.rows(piece)
        return Put(
            rid=rid,
            timeout_us=limit_us,
            durability=options.durability,
            keys=self.keys[piece].tobytes(),
            lengths=self.lengths[piece].astype("<u4").data,
            offsets=b"" if offsets is None else offsets.astype("<u8").data,
            ttl_ms=options.ttl_ms.data,
            priority=options.priority.data,
            depth=options.depth.data,
            cost=options.cost.data,
        )


class _Sent(NamedTuple):
    rid: int
    piece: Indices


def shared_put(context: Context, link: Link, state: PutState) -> Plan[None]:
    """Copy undecided shards into the staging, part by part, and put each part.

    What is larger than the staging that was granted stays undecided.
    """
    todo = state.refuse_above(link.hello.shard_bytes_max)
    staging = link.staging
    if staging is None:
        return
    todo = todo[state.lengths[todo] <= staging.size]
    sizes = staged_sizes(state.lengths[todo])
    ring = RingState(staging.size)
    sent: deque[_Sent] = deque()
    for piece in cut_by_bytes(
        todo,
        sizes,
        keys_max=link.hello.batch_keys_max,
        bytes_max=max(1, staging.size // PUT_PIECES),
    ):
        taken = staged_sizes(state.lengths[piece])
        total = int(taken.sum())
        while (base := ring.take(total)) is None:
            yield from _collect(link, state, sent.popleft())
            ring.give_back_oldest()
        offsets = base + np.cumsum(taken) - taken
        places = zip(offsets.tolist(), state.lengths[piece].tolist(), strict=True)
        yield Copy(
            [staging[at : at + size] for at, size in places],
            [state.buffers[i] for i in piece.tolist()],
        )
        request = state.request(link.next_rid(), timeout_us(context), piece, offsets)
        frame = link.encode(request)
        state.offered(piece)
        yield Send(link, frame)
        sent.append(_Sent(request.rid, piece))
    while sent:
        yield from _collect(link, state, sent.popleft())


def staged_put(
    context: Context,
    link: Link,
    state: PutState,
    chosen: Indices,
    *,
    offsets: npt.NDArray[np.int64],
) -> Plan[None]:
    """Put shards that already lie in the link's staging, at `offsets` (one for every key)."""
    for piece in cut_by_count(chosen, link.hello.batch_keys_max):
        request = state.request(link.next_rid(), timeout_us(context), piece, offsets[piece])
        frame = link.encode(request)
        state.offered(piece)
        yield Send(link, frame)
        yield from _collect(link, state, _Sent(request.rid, piece))


def _collect(link: Link, state: PutState, sent: _Sent) -> Plan[None]:
    try:
        reply = yield from answer_to(link, sent.rid, PutReply)
    except Overloaded:
        # Of this piece nothing was stored; other pieces have their own answers.
        state.answered(sent.piece, PutResult.OVERLOADED)
        return
    state.answered(sent.piece, reply.result_column)


# ---------------------------------------------------------------- view


class LeasedRows(NamedTuple):
    """What a view is made of: one row per key, in key order, and inline payloads where they are."""

    rows: RowArray
    inline: dict[int, ByteArray]
    leases: list[int]


def lease_rows(context: Context, link: Link, keys: KeyArray) -> Plan[LeasedRows]:
    """Lease every shard at once; the leases last until they are released or the link is closed."""
    pieces: list[RowArray] = []
    inline: dict[int, ByteArray] = {}
    leases: list[int] = []
    size = min(GET_KEYS_MAX, link.hello.batch_keys_max)
    for first in range(0, len(keys), size):
        piece = keys[first : first + size]
        request = Get(link.next_rid(), timeout_us(context), piece.data)
        yield Send(link, link.encode(request))
        reply = yield from answer_to(link, request.rid, GetReply)
        rows = reply.rows.copy()
        if reply.lease:
            leases.append(reply.lease)
        flagged = (rows["flags"] & EntryFlag.INLINE) != 0
        packed = np.flatnonzero((rows["status"] == Lookup.HIT) & flagged)
        if packed.size:
            found = yield from checked_inline(link, piece[packed], rows[packed], reply.inline)
            rows["status"][packed[found.wrong]] = Lookup.MISS
            for at, payload in zip(packed.tolist(), found.payloads, strict=True):
                inline[first + at] = payload
        pieces.append(rows)
    return LeasedRows(np.concatenate(pieces), inline, leases)
