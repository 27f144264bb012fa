"""Data connections on the virtual clock, served by a task as a data thread serves a socket.

Owns the order of calls of `runtime.datathreads`, in the form of awaits: event in, answer out, slots
touched only in between. Frames, events and receipts are the daemon's own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from ctxstore.checksum import checksum
from ctxstore.errors import CtxStoreError, TransportError
from ctxstore.wire import data as wire_data
from ctxstore.wire import messages as wire
from ctxstore_daemon.engine import events
from ctxstore_daemon.server.data import (
    PutReceiptState,
    offer_frame,
    request_event,
    result_frame,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    import numpy.typing as npt

    from ctxstore.testing.clock import SimClock
    from ctxstore.testing.network import SimEnd
    from ctxstore_daemon.executor import StreamInstruction
    from ctxstore_daemon.node import Node
    from ctxstore_daemon.server.session import Greeting

PART_BYTES = 64 * 1024
"""Payloads arrive in parts, so that other things happen in between."""


class SimStream:
    """A data connection and what its thread does. Implements `StreamSink`."""

    def __init__(
        self,
        node: Node,
        end: SimEnd,
        *,
        arena: npt.NDArray[np.uint8],
        clock: SimClock,
        on_over: Callable[[SimStream], None],
        rng: Random,
        damage_chance: float,
    ) -> None:
        self.end_point = end
        self._node = node
        self._arena = arena
        self._clock = clock
        self._on_over = on_over
        self._rng = rng
        self._damage_chance = damage_chance
        self._raw = bytearray()
        self._inbox: deque[StreamInstruction | None] = deque()
        self._news = asyncio.Event()
        self._forgotten = False
        end.on_data = self._arrived
        end.on_closed = self._news.set
        self._task = asyncio.get_running_loop().create_task(self._run())

    def deliver(self, instruction: StreamInstruction) -> None:
        self._inbox.append(instruction)
        self._news.set()

    def end(self, reason: str) -> None:
        del reason
        self.end_point.close()
        self._news.set()

    def forget(self) -> None:
        """The process is dead."""
        self._forgotten = True
        self._task.cancel()

    def _arrived(self, data: bytes) -> None:
        self._raw += data
        self._news.set()

    async def _run(self) -> None:
        greeting = self._node.greet(local=False)
        try:
            conn = await self._greet(greeting)
        except CtxStoreError as error:
            self.end_point.write(greeting.failure(error))
            self.end_point.close()
            greeting.abandon()
            self._on_over(self)
            return
        try:
            while await self._serve_one(conn):
                pass
        except CtxStoreError:
            pass  # the peer is gone, or spoke nonsense: the connection ends either way
        finally:
            if not self._forgotten:
                self._finish(conn)

    def _finish(self, conn: int) -> None:
        self.end_point.close()
        executor = self._node.executor
        while self._inbox:
            left = self._inbox.popleft()
            if left is not None:
                executor.decline(left)
        self._node.server.stream_closed(conn)
        self._on_over(self)

    async def _greet(self, greeting: Greeting) -> int:
        while not greeting.receive(bytes(await self._take_some())):
            pass
        self.end_point.write(greeting.accept_stream())
        conn = greeting.enter_stream()
        self._node.executor.open_stream(conn, self)
        return conn

    async def _serve_one(self, conn: int) -> bool:
        if not await self._has_more():
            return False
        header = wire_data.unpack_header(await self._take(wire_data.DATA_HEADER_BYTES))
        meta = await self._take(header.meta_bytes)
        event = request_event(conn, header, meta, now_ns=self._clock.now().mono_ns)
        self._node.executor.submit(event)
        if isinstance(event, events.StreamGetArrived):
            await self._get(event)
        else:
            await self._put(event)
        return True

    async def _get(self, event: events.StreamGetArrived) -> None:
        answer = await self._answer()
        assert isinstance(answer, events.SendShards), "a get is answered by SendShards"
        try:
            self.end_point.write(wire_data.pack_get_reply(answer.rid, answer.entries))
            hits = np.flatnonzero(answer.entries["status"] == wire.Lookup.HIT).tolist()
            for row in hits:
                length = int(answer.entries["length"][row])
                slot, inline = int(answer.slot_offsets[row]), int(answer.inline_offsets[row])
                if slot < 0:
                    payload = answer.inline[inline : inline + length]
                else:
                    payload = self._arena[slot : slot + length].tobytes()
                self.end_point.write(payload)
                await asyncio.sleep(1e-5)
        finally:
            if not self._forgotten:
                self._node.executor.submit(events.StreamGetDone(event.conn, event.rid))

    async def _put(self, event: events.StreamPutArrived) -> None:
        rid = event.message.rid
        offer = await self._answer()
        assert isinstance(offer, events.OfferPut), "a put is answered by an offer"
        if not len(offer.lengths):
            self.end_point.write(offer_frame(offer))
            return
        receipt = PutReceiptState(offer)
        try:
            self.end_point.write(offer_frame(offer))
            for index in range(len(offer.lengths)):
                await self._receive_payload(offer, receipt, index)
            if damaged := receipt.damaged():
                self.end_point.write(result_frame(rid, receipt.resend_verdicts()))
                for index in damaged:
                    await self._receive_payload(offer, receipt, index)
        finally:
            if not self._forgotten:
                self._node.executor.submit(receipt.done())
        finished = await self._answer()
        assert isinstance(finished, events.PutFinished), "payloads are answered by results"
        self.end_point.write(result_frame(rid, finished.results))

    async def _receive_payload(
        self, offer: events.OfferPut, receipt: PutReceiptState, index: int
    ) -> None:
        slot = receipt.target(index, self._arena)
        length = int(offer.lengths[index])
        payload = slot[:length]
        position = 0
        while position < length:
            part = await self._take(min(length - position, PART_BYTES))
            payload[position : position + len(part)] = np.frombuffer(part, np.uint8)
            position += len(part)
        announced = wire_data.unpack_sum(await self._take(wire_data.DATA_SUM_BYTES))
        slot[length:] = 0
        if length and self._rng.random() < self._damage_chance:
            payload[self._rng.randrange(length)] ^= 0x10
        found = checksum(payload, int(offer.seeds[index]))
        receipt.take(index, announced=announced, found=found)

    # ------------------------------------------------------------------------- bytes

    async def _answer(self) -> StreamInstruction:
        while not self._inbox:
            if self.end_point.closed:
                raise TransportError("the client is gone")
            await self._wait()
        answer = self._inbox.popleft()
        assert answer is not None, "nobody sends None here"
        return answer

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()

    async def _has_more(self) -> bool:
        while not self._raw:
            if self.end_point.closed:
                return False
            await self._wait()
        return True

    async def _take_some(self) -> bytes:
        if not await self._has_more():
            raise TransportError("closed before its hello")
        data, self._raw = bytes(self._raw), bytearray()
        return data

    async def _take(self, count: int) -> bytes:
        while len(self._raw) < count:
            if self.end_point.closed:
                raise TransportError("closed in the middle of a request")
            await self._wait()
        data = bytes(self._raw[:count])
        del self._raw[:count]
        return data
