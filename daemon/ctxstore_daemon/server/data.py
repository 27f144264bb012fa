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
    """Which payloads of one put have arrived whole. Used by one data thread."""

    __slots__ = ("ok", "sums", "verdicts", "wanted")

    def __init__(self, verdicts: npt.NDArray[np.uint8]) -> None:
        self.verdicts = verdicts
        self.wanted = np.flatnonzero(verdicts == wire.WANTED)
        """Positions in the batch of the payloads to come."""
        self.ok = np.zeros(len(self.wanted), np.bool_)
        self.sums = np.zeros(len(self.wanted), np.uint64)

    def take(self, index: int, *, announced: int, found: int) -> None:
        """Payload `index` of the wanted ones has arrived with these sums."""
        self.ok[index] = announced == found
        self.sums[index] = found

    def damaged(self) -> list[int]:
        """Indices among the wanted ones whose sums did not agree."""
        found: list[int] = np.flatnonzero(~self.ok).tolist()
        return found

    def resend_verdicts(self) -> npt.NDArray[np.uint8]:
        """Row that asks for the damaged ones again.

        The others are not committed yet: until the last result they read TIMEOUT, outcome unknown.
        """
        row = np.where(self.verdicts == wire.WANTED, wire.PutResult.TIMEOUT, self.verdicts)
        row[self.wanted[~self.ok]] = wire.RESEND
        return row.astype(np.uint8)

    def done(self, conn: int, rid: int) -> events.PayloadDone:
        """What the engine is told at the end, also when the connection broke in between."""
        return events.PayloadDone(conn, rid, self.ok, self.sums)
