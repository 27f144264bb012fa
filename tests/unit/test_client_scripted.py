"""The client against answers that a healthy daemon never gives, over real sockets and memory.

The node is a script (`scripted_node`); each test bends one answer and looks at what callers see.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ctxstore import limits
from ctxstore.errors import (
    ClosedError,
    DeadlineExceeded,
    Overloaded,
    ProtocolError,
)
from ctxstore.wire import data as wired
from ctxstore.wire import messages as wire
from ctxstore_client import Lookup, PutResult, StaleView, connect, connect_async
from tests.unit.scripted_node import ScriptedNode, scripted_node

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator


@pytest.fixture
def node() -> Iterator[ScriptedNode]:
    with scripted_node() as script:
        yield script


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def noise(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def shown(views: Any, index: int) -> bytes:
    return bytes(views[index])


@contextlib.contextmanager
def stale_end(caught: list[StaleView]) -> Iterator[None]:
    """The end of the view inside must raise StaleView."""
    try:
        yield
    except StaleView as error:
        caught.append(error)
    assert caught, "the view's end said nothing"


def eventually(condition: Any, timeout_s: float = 5.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.005)


# ---------------------------------------------------------------- shared memory


def test_a_slot_that_was_reused_during_the_copy_is_a_miss(node: ScriptedNode) -> None:
    node.store(key(1), noise(5000))
    node.store(key(2), noise(6000))
    page = node.slots[key(2)][0] // limits.PAGE_BYTES

    def reuse(script: ScriptedNode, message: wire.Get) -> wire.GetReply:
        reply = script.get_reply(message)
        script.generations[page] += 1
        return reply

    node.hooks[wire.Get] = reuse
    with connect(node.unix_url) as store:
        buffers = [bytearray(5000), bytearray(6000)]
        assert store.get_into([key(1), key(2)], buffers) == [Lookup.HIT, Lookup.MISS]
        caught: list[StaleView] = []
        with stale_end(caught), store.view([key(1), key(2)]) as views:
            assert shown(views, 0) == noise(5000)
            with pytest.raises(StaleView):
                views.check()
        assert "reused" in str(caught[0])
        del node.hooks[wire.Get]
        with store.view([key(1)]) as views:
            views.check()


def test_a_view_whose_connection_ended_is_stale(node: ScriptedNode) -> None:
    node.store(key(1), noise(5000))
    with connect(node.unix_url) as store:
        caught: list[StaleView] = []
        with stale_end(caught), store.view([key(1)]) as views:
            node.cut_connections()
            time.sleep(0.05)
            assert shown(views, 0) == noise(5000), "the bytes stay mapped"
        assert "connection" in str(caught[0])
        assert store.get_into([key(1)], [bytearray(5000)]) == [Lookup.HIT]


def test_an_error_inside_a_view_is_not_hidden_by_its_staleness(node: ScriptedNode) -> None:
    node.store(key(1), noise(5000))
    with connect(node.unix_url) as store, contextlib.suppress(KeyError), store.view([key(1)]):
        node.generations[node.slots[key(1)][0] // limits.PAGE_BYTES] += 1
        raise KeyError


def test_leases_ride_with_the_next_request_and_are_flushed_when_there_is_none(
    node: ScriptedNode,
) -> None:
    node.store(key(1), noise(5000))
    with connect(node.unix_url) as store:
        for _ in range(3):
            store.get_into([key(1)], [bytearray(5000)])
        eventually(lambda: node.released == [1, 2, 3], timeout_s=2.0)


def test_an_inline_payload_with_a_wrong_sum_is_a_miss_and_reported(node: ScriptedNode) -> None:
    node.store(key(1), b"abc")
    node.store(key(2), b"defg")

    def damage(script: ScriptedNode, message: wire.Get) -> wire.GetReply:
        reply = script.get_reply(message)
        return wire.GetReply(reply.rid, reply.lease, reply.entries, b"abX" + b"defg")

    node.hooks[wire.Get] = damage
    with connect(node.unix_url) as store:
        buffers = [bytearray(3), bytearray(4)]
        assert store.get_into([key(1), key(2)], buffers) == [Lookup.MISS, Lookup.HIT]
        assert buffers[1] == b"defg"
        with store.view([key(1), key(2)]) as views:
            assert views[0] is None
            assert shown(views, 1) == b"defg"
        eventually(lambda: node.reported.count(key(1)) == 2)


def test_a_lease_share_that_is_too_small_for_the_batch_is_taken_in_turns(
    node: ScriptedNode,
) -> None:
    for number in range(6):
        node.store(key(number), noise(5000 + number))
    asked: list[int] = []

    def stingy(script: ScriptedNode, message: wire.Get) -> wire.GetReply:
        asked.append(message.count)
        reply = script.get_reply(message)
        rows = reply.rows.copy()
        rows["status"][2:] = wire.Lookup.OVERLOADED
        return wire.GetReply(reply.rid, reply.lease, rows.tobytes())

    node.hooks[wire.Get] = stingy
    with connect(node.unix_url) as store:
        buffers = [bytearray(5000 + number) for number in range(6)]
        assert store.get_into([key(n) for n in range(6)], buffers) == [Lookup.HIT] * 6
        assert asked == [6, 4, 2]
        assert [bytes(b) for b in buffers] == [noise(5000 + n) for n in range(6)]

        def full(script: ScriptedNode, message: wire.Get) -> wire.GetReply:
            rows = np.zeros(message.count, wire.ENTRY_DTYPE)
            rows["status"] = wire.Lookup.OVERLOADED
            return wire.GetReply(message.rid, 0, rows.tobytes())

        node.hooks[wire.Get] = full
        assert store.get_into([key(1)], buffers[:1]) == [Lookup.OVERLOADED]


def test_requests_respect_the_nodes_batch_limit(node: ScriptedNode) -> None:
    node.batch_keys_max = 7
    keys = [key(number) for number in range(20)]
    with connect(node.unix_url) as store:
        assert store.put(keys, [b"x"] * 20) == [PutResult.COMMITTED] * 20
        assert node.seen["Put"] == 3
        assert store.match([*keys, key(99)]) == 20
        assert node.seen["Match"] == 3
        assert store.match([key(99), *keys]) == 0
        assert node.seen["Match"] == 4, "what follows a miss is not asked"
        assert store.exists(keys).all()
        assert store.get_into(keys, [bytearray(1) for _ in keys]) == [Lookup.HIT] * 20
        assert node.seen["Get"] == 3


def test_without_staging_puts_take_the_sockets_way(node: ScriptedNode) -> None:
    node.grants_staging = False
    with connect(node.unix_url) as store:
        with pytest.raises(Overloaded), store.alloc([10]):
            pass
        assert store.put([key(1)], [noise(5000)]) == [PutResult.COMMITTED]
        assert node.payload(key(1)) == noise(5000)
        assert store.get_into([key(1)], [bytearray(5000)]) == [Lookup.HIT]


def test_what_does_not_fit_the_staging_takes_the_sockets_way(node: ScriptedNode) -> None:
    node.staging_bytes = 64 * 1024
    sizes = [5000, 200_000, 70_000]
    keys = [key(number) for number in range(3)]
    with connect(node.unix_url) as store:
        assert store.put(keys, [noise(s) for s in sizes]) == [PutResult.COMMITTED] * 3
        assert [node.payload(k) for k in keys] == [noise(s) for s in sizes]
        assert node.seen["PUT"] == 1
        assert store.put([key(9)], [noise(2 << 20)]) == [PutResult.REFUSED]


def test_with_neither_staging_nor_data_port_puts_are_overloaded(node: ScriptedNode) -> None:
    node.grants_staging = False
    node.data = ("127.0.0.1", 1)
    with connect(node.unix_url) as store:
        assert store.put([key(1)], [b"abc"]) == [PutResult.OVERLOADED]


# ---------------------------------------------------------------- data connections


def damage_once(node: ScriptedNode) -> None:
    def hook(sock: socket.socket, header: Any, meta: bytes) -> bool:
        node.data_hook = None
        node.send_shards(sock, header, meta, damage=True)
        return True

    node.data_hook = hook


def test_a_payload_with_a_wrong_sum_is_a_miss_and_reported(node: ScriptedNode) -> None:
    node.store(key(1), noise(5000))
    node.store(key(2), noise(6000))
    with connect(node.tcp_url, shm="off") as store:
        buffers = [bytearray(5000), bytearray(6000)]
        damage_once(node)
        assert store.get_into([key(1), key(2)], buffers) == [Lookup.MISS, Lookup.HIT]
        assert buffers[1] == noise(6000)
        eventually(lambda: node.reported == [key(1)])
        assert store.get_into([key(1)], buffers[:1]) == [Lookup.HIT]
        damage_once(node)
        with store.view([key(1), key(2)]) as views:
            assert views[0] is None
            assert shown(views, 1) == noise(6000)


def test_a_put_is_sent_again_once_when_asked_to(node: ScriptedNode) -> None:
    payload = noise(5000)
    verdicts: list[int] = [wire.RESEND, wire.PutResult.COMMITTED]

    def hook(sock: socket.socket, header: Any, meta: bytes) -> bool:
        offer = np.array([wire.WANTED], np.uint8)
        sock.sendall(wired.pack_verdicts(wired.DataOp.OFFER, header.rid, offer))
        for verdict in verdicts:
            got = b""
            while len(got) < 5008:
                got += sock.recv(5008 - len(got))
            assert got[:5000] == payload
            result = np.array([verdict], np.uint8)
            sock.sendall(wired.pack_verdicts(wired.DataOp.RESULT, header.rid, result))
        return True

    node.data_hook = hook
    with connect(node.tcp_url, shm="off") as store:
        assert store.put([key(1)], [payload]) == [PutResult.COMMITTED]
        verdicts[1] = wire.PutResult.REFUSED
        assert store.put([key(1)], [payload]) == [PutResult.REFUSED]


def test_nothing_is_written_after_the_verdict(node: ScriptedNode) -> None:
    """The payload stalls half way; the rest is sent only after the caller has his verdict."""
    payload = noise(600_000)
    node.store(key(1), payload)
    told = threading.Event()
    sent_rest = threading.Event()

    def hook(sock: socket.socket, header: Any, meta: bytes) -> bool:
        entries = np.zeros(1, wire.DATA_ENTRY_DTYPE)
        entries["length"] = len(payload)
        sock.sendall(wired.pack_get_reply(header.rid, entries))
        sock.sendall(payload[:300_000])
        assert told.wait(10)
        with contextlib.suppress(OSError):
            sock.sendall(payload[300_000:])
        sent_rest.set()
        return True

    node.data_hook = hook
    with connect(node.tcp_url, shm="off") as store:
        buffer = np.zeros(len(payload), np.uint8)
        began = time.monotonic()
        assert store.get_into([key(1)], [buffer], timeout_s=0.3) == [Lookup.TIMEOUT]
        assert 0.25 < time.monotonic() - began < 2
        buffer[:] = 7
        told.set()
        assert sent_rest.wait(10)
        time.sleep(0.05)
        assert (buffer == 7).all()


@pytest.mark.parametrize("shm", ["off", "require"])
def test_a_cancelled_coroutine_is_over_with_the_buffers(node: ScriptedNode, shm: str) -> None:
    payload = noise(600_000)
    node.store(key(1), payload)
    gate = threading.Event()

    def hold_data(sock: socket.socket, header: Any, meta: bytes) -> bool:
        assert gate.wait(10)
        node.send_shards(sock, header, meta)
        return True

    def hold_control(script: ScriptedNode, message: wire.Get) -> wire.GetReply:
        assert gate.wait(10)
        return script.get_reply(message)

    node.data_hook = hold_data
    node.hooks[wire.Get] = hold_control

    async def main() -> None:
        async with connect_async(node.tcp_url, shm=shm) as store:
            buffer = np.zeros(len(payload), np.uint8)
            task = asyncio.create_task(store.get_into([key(1)], [buffer]))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            buffer[:] = 7
            gate.set()
            await asyncio.sleep(0.1)
            assert (buffer == 7).all()
            node.data_hook = None
            assert await store.get_into([key(1)], [buffer]) == [Lookup.HIT]
            assert buffer.tobytes() == payload

    asyncio.run(main())


@pytest.mark.parametrize("shm", ["off", "require"])
def test_a_cancelled_ticket_is_over_with_the_buffers(node: ScriptedNode, shm: str) -> None:
    payload = noise(600_000)
    node.store(key(1), payload)
    gate = threading.Event()

    def hold_data(sock: socket.socket, header: Any, meta: bytes) -> bool:
        assert gate.wait(10)
        return False

    def hold_control(script: ScriptedNode, message: wire.Get) -> wire.GetReply:
        assert gate.wait(10)
        return script.get_reply(message)

    node.data_hook = hold_data
    node.hooks[wire.Get] = hold_control
    with connect(node.tcp_url, shm=shm) as store:
        buffers = [np.zeros(len(payload), np.uint8) for _ in range(8)]
        tickets = [store.submit_get([key(1)], [buffer]) for buffer in buffers]
        time.sleep(0.1)
        assert not any(ticket.done() for ticket in tickets)
        with pytest.raises(DeadlineExceeded):
            tickets[0].wait(0.01)
        for ticket in tickets[::-1]:  # those that wait for a thread first
            assert ticket.cancel()
            assert ticket.done()
            assert ticket.wait() == [Lookup.TIMEOUT]
        for buffer in buffers:
            buffer[:] = 7
        gate.set()
        time.sleep(0.1)
        assert all((buffer == 7).all() for buffer in buffers)


def test_a_cancelled_async_ticket_is_over_with_the_buffers(node: ScriptedNode) -> None:
    node.store(key(1), noise(600_000))
    gate = threading.Event()

    def hold_data(sock: socket.socket, header: Any, meta: bytes) -> bool:
        assert gate.wait(10)
        return False

    node.data_hook = hold_data

    async def main() -> None:
        async with connect_async(node.tcp_url, shm="off") as store:
            buffer = np.zeros(600_000, np.uint8)
            ticket = await store.submit_get([key(1)], [buffer])
            left_alone = await store.submit_get([key(1)], [np.zeros(600_000, np.uint8)])
            with pytest.raises(DeadlineExceeded):
                await ticket.wait(0.05)
            assert await ticket.cancel()
            assert await ticket.wait() == [Lookup.TIMEOUT]
            buffer[:] = 7
            gate.set()
            assert await left_alone.wait(10) == [Lookup.HIT]
            assert (buffer == 7).all()
            assert not await left_alone.cancel()
            never_asked_for = await store.submit_get([key(1)], [buffer])
            assert not never_asked_for.done()

    asyncio.run(main())


def test_too_many_tickets_are_overloaded(
    node: ScriptedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctxstore_client.tickets.TICKETS_MAX", 3)
    gate = threading.Event()
    node.hooks[wire.Get] = lambda script, message: gate.wait(10) and script.get_reply(message)
    with connect(node.unix_url) as store:
        tickets = [store.submit_get([key(1)], [bytearray(1)]) for _ in range(2)]
        with contextlib.suppress(Overloaded):
            while len(tickets) < 20:
                tickets.append(store.submit_get([key(1)], [bytearray(1)]))
        assert len(tickets) < 20
        gate.set()
        assert all(ticket.wait(10) == [Lookup.MISS] for ticket in tickets)
    with pytest.raises(ClosedError):
        store.submit_get([key(1)], [bytearray(1)])


def test_tickets_that_wait_are_cancelled_at_close(node: ScriptedNode) -> None:
    gate = threading.Event()
    node.hooks[wire.Get] = lambda script, message: gate.wait(10) and None
    with connect(node.unix_url) as store:
        tickets = [store.submit_get([key(1)], [bytearray(1)]) for _ in range(12)]
        store.close()
        gate.set()
        results = {ticket.wait(10)[0] for ticket in tickets}
        assert results <= {Lookup.TIMEOUT, Lookup.MISS}


def test_a_broken_operation_raises_where_its_ticket_is_waited_for(node: ScriptedNode) -> None:
    node.hooks[wire.Get] = lambda script, message: b"\xff" * 64
    with connect(node.unix_url) as store:
        ticket = store.submit_get([key(1)], [bytearray(1)])
        for _ in range(2):
            with pytest.raises(ProtocolError):
                ticket.wait(10)
