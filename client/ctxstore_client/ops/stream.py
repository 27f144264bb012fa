"""Plans that move shards over a data connection: get and put between hosts.

Owns the dialogue of headers, entries, payloads and verdicts, and the check of what is received.
Payloads go from the socket to their final destination; nothing here copies one.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ctxstore import limits
from ctxstore.checksum import seeds
from ctxstore.errors import Overloaded, RemoteProtocolError, TransportError
from ctxstore.wire.data import (
    DATA_HEADER_BYTES,
    DataHeader,
    DataOp,
    VerdictPhase,
    pack_get,
    pack_put,
    pack_sum,
    unpack_entries,
    unpack_failure,
    unpack_header,
    unpack_verdicts,
)
from ctxstore.wire.messages import (
    RESEND,
    WANTED,
    Lookup,
    PutResult,
    Report,
    RowArray,
    error_from_failure,
)
from ctxstore_client.ops.batches import Indices, cut_by_bytes, slot_sizes
from ctxstore_client.ops.exchange import on_link, timeout_us
from ctxstore_client.ops.requests import (
    ByteArray,
    Checksum,
    Context,
    Link,
    Plan,
    Purpose,
    ReceiveInto,
    Send,
    SendBuffers,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ctxstore.keys import KeyArray
    from ctxstore_client.ops.shared import GetState, PutState

PIECE_BYTES: Final = 64 * limits.MIB
"""Payload of one request: round trips vanish, and a node can still pin it at once."""

PIECE_KEYS_MAX: Final = 4096

GATHER_BYTES: Final = 32 * limits.KIB
GATHER_BUFFERS: Final = 256
"""Small payloads are sent together up to these; the kernel takes 1024 buffers at once."""

REQUESTS_AHEAD: Final = 2
"""Gets that are on their way at once, so that the daemon never waits for the next one."""


def _piece_bytes(link: Link) -> int:
    """A small node lets one connection pin less: half of it, since slots are larger than shards."""
    return max(1, min(PIECE_BYTES, link.hello.lease_bytes_max // 2))


class _Damaged(NamedTuple):
    """Keys whose payloads arrived with another checksum than announced, and that announced one."""

    keys: KeyArray
    sums: npt.NDArray[np.uint64]


class _Asked(NamedTuple):
    rid: int
    piece: Indices
    capacities: npt.NDArray[np.uint32]


def _receive_header(link: Link) -> Plan[DataHeader]:
    raw = np.empty(DATA_HEADER_BYTES, np.uint8)
    yield ReceiveInto(link, raw)
    header = unpack_header(raw.data)
    if header.op is DataOp.FAILURE:
        meta = yield from _receive_meta(link, header)
        error = error_from_failure(unpack_failure(header, meta))
        # The daemon closes a data connection after a failure, whatever it was.
        if error.retryable:
            raise error
        raise TransportError(f"the daemon ended the transfer: {error}") from error
    return header


def _receive_meta(link: Link, header: DataHeader) -> Plan[memoryview]:
    meta = np.empty(header.meta_bytes, np.uint8)
    if meta.size:
        yield ReceiveInto(link, meta)
    return meta.data


def _expect_rid(header: DataHeader, rid: int) -> None:
    if header.rid != rid:
        raise RemoteProtocolError(f"data header answers {header.rid}, asked was {rid}")


# ---------------------------------------------------------------- get


class StreamGet:
    """A get over one data connection; `target_for` names buffers once lengths are known."""

    def __init__(
        self,
        context: Context,
        keys: KeyArray,
        *,
        exact: bool,
        target_for: Callable[[int, int], ByteArray],
    ) -> None:
        self._context = context
        self._keys = keys
        self._exact = exact
        self._target_for = target_for
        """(index of the key, length) -> destination of exactly that length."""
        self.damaged: list[_Damaged] = []

    def run(
        self,
        link: Link,
        indices: Indices,
        capacities: npt.NDArray[np.uint32],
        statuses: npt.NDArray[np.uint8],
        *,
        sizes: npt.NDArray[np.int64],
    ) -> Plan[None]:
        """Get the keys at `indices`; `capacities` and `statuses` are of all keys.

        `sizes`: what each of `indices` takes of the node's memory, as far as is known.
        """
        while True:
            yield from self._ask_all(link, indices, capacities, statuses, sizes=sizes)
            refused = statuses[indices] == Lookup.OVERLOADED
            # The share of a connection was the limit, not memory: it is free again now.
            if not refused.any() or refused.all():
                return
            indices, sizes = indices[refused], sizes[refused]

    def _ask_all(
        self,
        link: Link,
        indices: Indices,
        capacities: npt.NDArray[np.uint32],
        statuses: npt.NDArray[np.uint8],
        *,
        sizes: npt.NDArray[np.int64],
    ) -> Plan[None]:
        ahead: deque[_Asked] = deque()
        for piece in cut_by_bytes(
            indices,
            sizes,
            keys_max=min(PIECE_KEYS_MAX, link.hello.batch_keys_max),
            bytes_max=_piece_bytes(link),
        ):
            asked = _Asked(link.next_rid(), piece, capacities[piece])
            limit_us = timeout_us(self._context)
            frame = pack_get(
                asked.rid,
                self._keys[piece].data,
                asked.capacities.data,
                timeout_us=limit_us,
                exact=self._exact,
            )
            yield Send(link, frame)
            ahead.append(asked)
            if len(ahead) == REQUESTS_AHEAD:
                yield from self._take(link, ahead.popleft(), statuses)
        while ahead:
            yield from self._take(link, ahead.popleft(), statuses)

    def _take(self, link: Link, asked: _Asked, statuses: npt.NDArray[np.uint8]) -> Plan[None]:
        header = yield from _receive_header(link)
        _expect_rid(header, asked.rid)
        meta = yield from _receive_meta(link, header)
        entries = unpack_entries(header, meta, asked.capacities, exact=self._exact)
        verdicts = entries["status"].astype(np.uint8)
        hits = np.flatnonzero(verdicts == Lookup.HIT)
        # The link only says it arrived in step; what is a HIT is decided by the checksums below.
        verdicts[hits] = Lookup.MISS
        if hits.size:
            yield from self._receive_payloads(link, asked.piece, entries, hits, verdicts)
        statuses[asked.piece] = verdicts

    def _receive_payloads(
        self,
        link: Link,
        piece: Indices,
        entries: RowArray,
        hits: Indices,
        verdicts: npt.NDArray[np.uint8],
    ) -> Plan[None]:
        keys = self._keys[piece[hits]]
        lengths = entries["length"][hits]
        expected = seeds(
            keys, ns_id=link.hello.ns_id, incarnation=link.hello.incarnation, lengths=lengths
        ).tolist()
        announced = entries["sum"][hits].tolist()
        rows = zip(hits.tolist(), piece[hits].tolist(), lengths.tolist(), strict=True)
        wrong: list[int] = []
        for at, (row, index, length) in enumerate(rows):
            target = self._target_for(index, length)
            if length:
                yield ReceiveInto(link, target)
            (found,) = yield Checksum((target,), (expected[at],))
            if found == announced[at]:
                verdicts[row] = Lookup.HIT
            else:
                wrong.append(at)
        if wrong:
            sums = np.ascontiguousarray(entries["sum"][hits][wrong])
            self.damaged.append(_Damaged(keys[wrong], sums))


def stream_get(context: Context, link: Link, state: GetState, chosen: Indices) -> Plan[None]:
    """Fill the buffers of the chosen keys; damaged payloads are misses and are reported."""

    def target_for(index: int, length: int) -> ByteArray:
        return state.buffers[index][:length]

    job = StreamGet(context, state.keys, exact=state.exact, target_for=target_for)
    sizes = slot_sizes(state.sizes[chosen])
    yield from job.run(link, chosen, state.sizes.astype("<u4"), state.statuses, sizes=sizes)
    yield from report_damage(context, job.damaged)


def report_damage(context: Context, damaged: list[_Damaged]) -> Plan[None]:
    """Tell the daemon which copies arrived broken, so that it looks at its own."""
    if not damaged:
        return
    context.pool.count("checksum_failures", sum(len(keys) for keys, _ in damaged))

    def body(link: Link) -> Plan[None]:
        for keys, sums in damaged:
            yield Send(link, link.encode(Report(0, keys.tobytes(), sums.data)))

    yield from on_link(context, Purpose.CONTROL, body)


# ---------------------------------------------------------------- put


def stream_put(context: Context, link: Link, state: PutState, chosen: Indices) -> Plan[None]:
    """Offer the chosen shards, piece by piece, and send what is wanted."""
    while True:
        for piece in cut_by_bytes(
            chosen,
            slot_sizes(state.lengths[chosen]),
            keys_max=min(PIECE_KEYS_MAX, link.hello.batch_keys_max),
            bytes_max=_piece_bytes(link),
        ):
            yield from _put_piece(context, link, state, piece)
        refused = chosen[state.results[chosen] == PutResult.OVERLOADED]
        if not len(refused) or len(refused) == len(chosen):
            return
        chosen = refused


def _put_piece(context: Context, link: Link, state: PutState, piece: Indices) -> Plan[None]:
    offer = state.request(link.next_rid(), timeout_us(context), piece, None)
    frame = pack_put(offer)
    state.offered(piece)
    try:
        verdicts = yield from _dialogue(link, state, piece, offer.rid, frame)
    except Overloaded:
        # Of this piece nothing was stored; it ends the others, too, with the connection.
        state.answered(piece, PutResult.OVERLOADED)
        raise
    state.answered(piece, verdicts)


def _dialogue(
    link: Link, state: PutState, piece: Indices, rid: int, frame: bytes
) -> Plan[npt.NDArray[np.uint8]]:
    """Offer, payloads of what is wanted, once more what arrived damaged; returns the results."""
    yield Send(link, frame)
    verdicts = yield from _verdicts(link, rid, len(piece), VerdictPhase.OFFER)
    wanted = np.flatnonzero(verdicts == WANTED)
    if not wanted.size:
        return verdicts
    expected = seeds(
        state.keys[piece[wanted]],
        ns_id=link.hello.ns_id,
        incarnation=link.hello.incarnation,
        lengths=state.lengths[piece[wanted]],
    )
    yield from _send_payloads(link, state, piece[wanted], expected)
    verdicts = yield from _verdicts(link, rid, len(piece), VerdictPhase.RESULT)
    again = np.flatnonzero(verdicts == RESEND)
    if again.size:
        if not np.isin(again, wanted).all():
            raise RemoteProtocolError("RESULT: asks again for what was never sent")
        chosen = np.searchsorted(wanted, again)
        yield from _send_payloads(link, state, piece[again], expected[chosen])
        verdicts = yield from _verdicts(link, rid, len(piece), VerdictPhase.LAST)
    return verdicts


def _verdicts(link: Link, rid: int, count: int, phase: VerdictPhase) -> Plan[npt.NDArray[np.uint8]]:
    header = yield from _receive_header(link)
    _expect_rid(header, rid)
    meta = yield from _receive_meta(link, header)
    return unpack_verdicts(header, meta, count=count, phase=phase)


def _send_payloads(
    link: Link, state: PutState, indices: Indices, expected: npt.NDArray[np.uint64]
) -> Plan[None]:
    small: list[bytes | ByteArray] = []
    gathered = 0
    for index, seed in zip(indices.tolist(), expected.tolist(), strict=True):
        payload = state.buffers[index]
        # Summed right before it is sent, while the payload comes through the caches once.
        (checksum,) = yield Checksum((payload,), (seed,))
        small += (payload, pack_sum(checksum))
        gathered += payload.size
        if gathered >= GATHER_BYTES or len(small) >= GATHER_BUFFERS:
            yield SendBuffers(link, small)
            small, gathered = [], 0
    if small:
        yield SendBuffers(link, small)
