"""Data connections: one blocking thread each, payload straight into and out of the arena.

Owns these sockets and threads. A thread never touches the index: it posts events to the loop and
waits for the engine's answer, and it is done with every slot before it says so.
"""

from __future__ import annotations

import queue
import socket
import struct
import threading
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from ctxstore.checksum import checksum
from ctxstore.errors import CtxStoreError, ProtocolError, TransportError
from ctxstore.wire import data as wire_data
from ctxstore.wire import messages as wire
from ctxstore_daemon.engine import events
from ctxstore_daemon.server.data import (
    PutReceiptState,
    offer_frame,
    request_event,
    result_frame,
)
from ctxstore_daemon.server.flow import STALL_S_MAX
from ctxstore_daemon.telemetry.log import event_log

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

    from ctxstore.seams import Clock
    from ctxstore_daemon.executor import Executor, StreamInstruction

ANSWER_GRACE_S: Final = 30.0
"""How long after a request's deadline the engine may still take to answer."""

_TIMEVAL: Final = struct.Struct("ll")

_log = event_log(__name__)


class DataConnection:
    """One data connection and its thread. Implements `StreamSink`.

    Call order on the loop's thread: construct, `start`; `on_closed` is called there once the thread
    has ended and all its events are submitted. `end` makes it end soon; `join` waits for it.
    """

    def __init__(
        self,
        conn: int,
        connected: socket.socket,
        *,
        executor: Executor,
        arena: npt.NDArray[np.uint8],
        clock: Clock,
        loop: asyncio.AbstractEventLoop,
        on_closed: Callable[[DataConnection], None],
    ) -> None:
        self.conn = conn
        self._socket = connected
        self._executor = executor
        self._arena = arena
        self._clock = clock
        self._loop = loop
        self._on_closed = on_closed
        self._inbox: queue.SimpleQueue[StreamInstruction | None] = queue.SimpleQueue()
        self._scratch = bytearray(wire_data.DATA_HEADER_BYTES)
        self._thread = threading.Thread(target=self._run, name=f"ctxstore-data-{conn}")
        self._ending = False

    def start(self) -> None:
        """Turn the socket into a blocking one and serve it."""
        self._socket.setblocking(True)
        # Kernel time-outs instead of Python's: those would make the socket non-blocking, and
        # MSG_WAITALL means nothing on such a one.
        stall = _TIMEVAL.pack(int(STALL_S_MAX), 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, stall)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, stall)
        self._thread.start()

    def deliver(self, instruction: StreamInstruction) -> None:
        """An answer of the engine, for the thread that waits for it."""
        self._inbox.put(instruction)

    def end(self, reason: str) -> None:
        """Wake the thread out of whatever it does; it ends soon."""
        if not self._ending:
            self._ending = True
            _log.debug("data_connection_ended", conn=self.conn, reason=reason)
            self._inbox.put(None)
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # the peer was faster

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread; whether it has ended. Not on the loop's thread."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            while self._serve_one():
                pass
        except ProtocolError as error:
            _log.warning("data_protocol_error", conn=self.conn, error=str(error))
            self._send_failure(error)
        except (OSError, CtxStoreError) as error:
            if not self._ending:
                _log.info("data_connection_broke", conn=self.conn, error=str(error))
        finally:
            self._socket.close()
            self._loop.call_soon_threadsafe(self._finish)

    def _finish(self) -> None:
        """On the loop: the thread is out of every slot. Answers nobody took are given back."""
        self._ending = True
        while not self._inbox.empty():
            left = self._inbox.get_nowait()
            if left is not None:
                self._executor.decline(left)
        self._on_closed(self)

    def _serve_one(self) -> bool:
        """One request; False when the client has closed between requests."""
        if not self._receive(memoryview(self._scratch), idle=True):
            return False
        header = wire_data.unpack_header(bytes(self._scratch))
        meta = bytearray(header.meta_bytes)
        self._receive(memoryview(meta))
        event = request_event(self.conn, header, bytes(meta), now_ns=self._clock.now().mono_ns)
        if isinstance(event, events.StreamGetArrived):
            self._get(event)
        else:
            self._put(event)
        return True

    def _get(self, event: events.StreamGetArrived) -> None:
        self._post(event)
        answer = self._await_answer(event.deadline_ns)
        assert isinstance(answer, events.SendShards), "a get is answered by SendShards"
        try:
            self._send_shards(answer, event.deadline_ns)
        finally:
            # The kernel has copied what was sent, and nothing more will be.
            self._post(events.StreamGetDone(self.conn, event.rid))

    def _send_shards(self, answer: events.SendShards, deadline_ns: int) -> None:
        arena = self._arena
        small = bytearray(wire_data.pack_get_reply(answer.rid, answer.entries))
        hits = np.flatnonzero(answer.entries["status"] == wire.Lookup.HIT)
        rows = zip(
            answer.entries["length"][hits].tolist(),
            answer.slot_offsets[hits].tolist(),
            answer.inline_offsets[hits].tolist(),
            strict=True,
        )
        for length, slot, inline in rows:
            if slot < 0:
                small += answer.inline[inline : inline + length]
                continue
            if small:
                self._send(memoryview(small), deadline_ns, more=True)
                small = bytearray()
            self._send(arena[slot : slot + length].data, deadline_ns)
        if small:
            self._send(memoryview(small), deadline_ns)

    def _put(self, event: events.StreamPutArrived) -> None:
        rid = event.message.rid
        self._post(event)
        offer = self._await_answer(event.deadline_ns)
        assert isinstance(offer, events.OfferPut), "a put is answered by an offer"
        if not len(offer.lengths):
            self._socket.sendall(offer_frame(offer))
            return
        receipt = PutReceiptState(offer)
        try:
            self._socket.sendall(offer_frame(offer))
            indices: Iterable[int] = range(len(offer.lengths))
            self._receive_payloads(offer, receipt, indices, event.deadline_ns)
            if damaged := receipt.damaged():
                _log.warning("payload_damaged", conn=self.conn, count=len(damaged))
                self._socket.sendall(result_frame(rid, receipt.resend_verdicts()))
                self._receive_payloads(offer, receipt, damaged, event.deadline_ns)
        finally:
            # Out of recv_into for good: slots of what did not arrive may go.
            self._post(receipt.done())
        finished = self._await_answer(event.deadline_ns)
        assert isinstance(finished, events.PutFinished), "payloads are answered by results"
        self._socket.sendall(result_frame(rid, finished.results))

    def _receive_payloads(
        self,
        offer: events.OfferPut,
        receipt: PutReceiptState,
        indices: Iterable[int],
        deadline_ns: int,
    ) -> None:
        announced = bytearray(wire_data.DATA_SUM_BYTES)
        for index in indices:
            self._check_deadline(deadline_ns)
            slot = receipt.target(index, self._arena)
            length = int(offer.lengths[index])
            payload = slot[:length]
            self._receive(payload.data)
            self._receive(memoryview(announced))
            slot[length:] = 0
            receipt.take(
                index,
                announced=wire_data.unpack_sum(bytes(announced)),
                found=checksum(payload, int(offer.seeds[index])),
            )

    # ------------------------------------------------------------------------- socket, loop

    def _receive(self, target: memoryview, *, idle: bool = False) -> bool:
        """Fill `target`. With `idle`, silence before the first byte is fine, and False an end."""
        have = 0
        while have < len(target):
            try:
                count = self._socket.recv_into(target[have:], 0, socket.MSG_WAITALL)
            except BlockingIOError:
                if idle and not have:
                    continue
                raise TransportError(f"no byte for {STALL_S_MAX:g} s") from None
            if count == 0:
                if idle and not have:
                    return False
                raise TransportError("the client closed in the middle of a request")
            have += count
        return True

    def _send(self, view: memoryview, deadline_ns: int, *, more: bool = False) -> None:
        """Hand all of `view` to the kernel. A peer that takes it too slowly is cut off."""
        flags = socket.MSG_MORE if more else 0
        sent = self._socket.send(view, flags)
        while sent < len(view):
            self._check_deadline(deadline_ns)
            sent += self._socket.send(view[sent:], flags)

    def _check_deadline(self, deadline_ns: int) -> None:
        late_s = (self._clock.now().mono_ns - deadline_ns) / 1e9
        if late_s > STALL_S_MAX:
            raise TransportError("the peer is too slow: its deadline passed long ago")

    def _post(self, event: events.Event) -> None:
        self._loop.call_soon_threadsafe(self._executor.submit, event)

    def _await_answer(self, deadline_ns: int) -> StreamInstruction:
        left_s = max(0, deadline_ns - self._clock.now().mono_ns) / 1e9
        try:
            answer = self._inbox.get(timeout=left_s + ANSWER_GRACE_S)
        except queue.Empty:
            raise TransportError("the engine did not answer in time") from None
        if answer is None:
            raise TransportError("the node ends this connection")
        return answer

    def _send_failure(self, error: CtxStoreError) -> None:
        try:
            self._socket.sendall(wire_data.pack_failure(wire.failure_from_error(0, error)))
        except OSError:
            return  # it is gone already
