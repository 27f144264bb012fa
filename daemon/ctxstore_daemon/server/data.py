"""What a data connection says and understands, without its socket.

Owns the translation between headers and engine events, and the state of one put's payloads. It
must not touch payload bytes: the data threads receive and send those straight from the arena.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ctxstore.errors import RemoteProtocolError
from ctxstore.wire import data as wire_data
from ctxstore.wire import messages as wire
from ctxstore_daemon.engine import events


def request_event(
    conn: int, header: wire_data.DataHeader, meta: bytes, *, now_ns: int
) -> events.StreamGetArrived | events.StreamPutArrived:
    """The event of a client's header and meta. Raises RemoteProtocolError."""
    if header.op is wire_data.DataOp.GET:
        get = wire_data.unpack_get_meta(header, meta)
        return events.StreamGetArrived(
            conn=conn,
            rid=header.rid,
            keys=bytes(get.keys),
            capacities=get.capacity_column,
            exact=bool(header.flags & wire_data.DataFlag.EXACT),
            deadline_ns=now_ns + get.timeout_us * 1000,
        )
    if header.op is wire_data.DataOp.PUT:
        put = wire_data.unpack_put_meta(header, meta)
        deadline_ns = now_ns + put.timeout_us * 1000
        return events.StreamPutArrived(conn=conn, message=put, deadline_ns=deadline_ns)
    raise RemoteProtocolError(f"data header {header.op.name} is for the other side to send")


def offer_frame(offer: events.OfferPut) -> bytes:
    """Verdicts on an offer."""
    return wire_data.pack_verdicts(wire_data.DataOp.OFFER, offer.rid, offer.verdicts)


def result_frame(rid: int, results: npt.NDArray[np.uint8]) -> bytes:
    """Results of a put, final or with RESEND in them."""
    return wire_data.pack_verdicts(wire_data.DataOp.RESULT, rid, results)


class PutReceiptState:
    """Which payloads of one put have arrived whole. Used by one data thread.

    All indices count the wanted keys of the offer, in key order.
    """

    __slots__ = ("_at", "_inline", "_offer", "_ok", "_starts", "_sums")

    def __init__(self, offer: events.OfferPut) -> None:
        self._offer = offer
        self._at = np.flatnonzero(offer.verdicts == wire.WANTED)
        self._ok = np.zeros(len(self._at), np.bool_)
        self._sums = np.zeros(len(self._at), np.uint64)
        lengths = np.where(offer.slot_offsets < 0, offer.lengths, 0).astype(np.int64)
        self._starts = np.cumsum(lengths) - lengths
        self._inline = np.zeros(int(lengths.sum()), np.uint8)

    def target(self, index: int, arena: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Where payload `index` goes: the whole slot, or memory of its own for an inline one."""
        offer = self._offer
        start = int(offer.slot_offsets[index])
        if start < 0:
            own = int(self._starts[index])
            return self._inline[own : own + int(offer.lengths[index])]
        return arena[start : start + int(offer.slot_bytes[index])]

    def take(self, index: int, *, announced: int, found: int) -> None:
        """Payload `index` has arrived with these sums."""
        self._ok[index] = announced == found
        self._sums[index] = found

    def damaged(self) -> list[int]:
        """Indices whose sums did not agree."""
        found: list[int] = np.flatnonzero(~self._ok).tolist()
        return found

    def resend_verdicts(self) -> npt.NDArray[np.uint8]:
        """Row that asks for the damaged ones again.

        The others are not committed yet: until the last result they read TIMEOUT, outcome unknown.
        """
        row = self._offer.verdicts.copy()
        row[self._at] = wire.PutResult.TIMEOUT
        row[self._at[~self._ok]] = wire.RESEND
        return row

    def done(self) -> events.PayloadDone:
        """What the engine is told at the end, also when the connection broke in between."""
        offer = self._offer
        return events.PayloadDone(
            offer.conn, offer.rid, self._ok, self._sums, self._inline.tobytes()
        )
