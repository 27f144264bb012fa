"""A whole node on the virtual clock, spoken to without sockets: sessions, staging, start, stop."""

from __future__ import annotations

import asyncio
import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ctxstore import limits
from ctxstore.config import DaemonConfig, load_config
from ctxstore.errors import (
    AuthenticationError,
    ClosedError,
    CtxStoreError,
    DataDirError,
    LeaseExpired,
    Overloaded,
    RemoteProtocolError,
    UnknownNamespace,
    WrongCluster,
)
from ctxstore.limits import MIB
from ctxstore.testing.clock import SimClock
from ctxstore.testing.disk import CrashKind, SimDisk
from ctxstore.testing.loop import run
from ctxstore.testing.mover import InlineMover
from ctxstore.wire import data as wire_data
from ctxstore.wire import messages as wire
from ctxstore.wire.codec import encode_frame
from ctxstore.wire.connection import ControlConnection, Side
from ctxstore_daemon.engine import events
from ctxstore_daemon.node import Node, NodePhase, Seams
from ctxstore_daemon.segments.store import SegmentStore
from ctxstore_daemon.server.data import PutReceiptState, request_event
from ctxstore_daemon.server.session import Greeting
from ctxstore_daemon.server.shm import StagingBudgetState, StagingGrant
from ctxstore_daemon.tiers.memory import HeapArena
from tests.raw_client import TIMEOUT_US, hello, put_message, some_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

COMMITTED = wire.PutResult.COMMITTED


class Peer:
    """The client's end of a connection in memory. Implements `Outlet` for the node's end."""

    def __init__(self, node: Node, greeting: wire.Hello | None, *, local: bool = True) -> None:
        self.wire = ControlConnection(Side.CLIENT)
        self.inbox: list[wire.Message] = []
        self.ended = False
        self.staging = np.zeros(0, np.uint8)
        self.releases = 0
        self._arrived = asyncio.Event()
        self.connection = node.connect(self, shm=self._grant if local else None)
        if greeting is not None:
            self.send(greeting)

    def write(self, frame: bytes) -> None:
        assert not self.ended, "nothing is written after the end"
        self.inbox += self.wire.receive(frame)
        self._arrived.set()

    def end(self) -> None:
        self.ended = True

    def send(self, message: wire.Message) -> None:
        self.connection.receive(self.wire.send(message))

    def take(self, kind: type[Any]) -> Any:
        message = self.inbox.pop(0)
        assert isinstance(message, kind), message
        return message

    async def ask(self, message: wire.Message, kind: type[Any]) -> Any:
        self.send(message)
        self._arrived.clear()
        if not self.inbox:
            await self._arrived.wait()
        return self.take(kind)

    async def put(self, keys: list[bytes], payload: bytes, **options: Any) -> list[int]:
        offsets = [index * len(payload) for index in range(len(keys))]
        for offset in offsets:
            self.staging[offset : offset + len(payload)] = np.frombuffer(payload, np.uint8)
        lengths = [len(payload)] * len(keys)
        message = put_message(self.wire.next_rid(), keys, lengths, offsets=offsets, **options)
        reply = await self.ask(message, wire.PutReply)
        results: list[int] = reply.result_column.tolist()
        return results

    async def get(self, keys: list[bytes]) -> wire.GetReply:
        message = wire.Get(self.wire.next_rid(), TIMEOUT_US, b"".join(keys))
        reply = await self.ask(message, wire.GetReply)
        assert isinstance(reply, wire.GetReply)
        return reply

    def _grant(self, size: int) -> StagingGrant:
        self.staging = np.zeros(size, np.uint8)

        def release(then: Callable[[], None]) -> None:
            self.releases += 1
            then()

        return StagingGrant(self.staging, release)


def _config(**flags: object) -> DaemonConfig:
    base: dict[str, object] = {"memory.cap_bytes": "64MiB", "disk.cap_bytes": "64MiB"}
    return load_config(flags=base | {key.replace("__", "."): v for key, v in flags.items()})


def _node(disk: SimDisk | None = None, *, delay_s: float = 0.0, **flags: Any) -> Node:
    config = _config(**flags)
    rng = random.Random(4)
    return Node(
        config,
        Seams(
            clock=SimClock(asyncio.get_running_loop()),
            disk=disk or SimDisk(),
            mover=InlineMover(delay_s=delay_s),
            arena=HeapArena(config.arena_bytes),
            rng=rng,
            token_bytes=rng.randbytes,
        ),
    )


def _with_node(
    body: Callable[[Node], Coroutine[Any, Any, None]], *, delay_s: float = 0.0, **flags: Any
) -> None:
    async def main() -> None:
        node = _node(delay_s=delay_s, **flags)
        await node.start()
        await body(node)
        await node.stop(5.0)
        assert node.server.reply_errors == 0

    run(main())


def _hello(**fields: Any) -> wire.Hello:
    return hello(**({"shm": True, "staging_bytes": MIB} | fields))


# ---------------------------------------------------------------------------- hello


def test_the_hello_is_answered_with_what_the_node_is() -> None:
    async def body(node: Node) -> None:
        node.server.unix_path, node.server.address_data = "/run/x.sock", "127.0.0.1:1"
        peer = Peer(node, _hello())
        ok = peer.take(wire.HelloOk)
        assert ok.node_id == node.node_id
        assert ok.cluster_id == "ctxstore"
        assert ok.arena_bytes == node.config.arena_bytes
        assert ok.staging_bytes == MIB == len(peer.staging)
        assert ok.shard_bytes_max <= node.config.shard_bytes_max
        assert (ok.unix_path, ok.data_address) == ("/run/x.sock", "127.0.0.1:1")
        assert node.server.sessions[ok.session].staging_bytes == MIB
        other = Peer(node, _hello())
        assert other.take(wire.HelloOk).session != ok.session

    _with_node(body)


def test_a_remote_client_gets_no_memory() -> None:
    async def body(node: Node) -> None:
        ok = Peer(node, _hello(), local=False).take(wire.HelloOk)
        assert (ok.arena_bytes, ok.staging_bytes) == (0, 0)
        ok = Peer(node, _hello(shm=False)).take(wire.HelloOk)
        assert (ok.arena_bytes, ok.staging_bytes) == (0, 0)

    _with_node(body)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"namespace": "nowhere"}, UnknownNamespace),
        ({"cluster_id": "elsewhere"}, WrongCluster),
        ({"token": "t"}, AuthenticationError),
        ({"role": wire.Role.DATA, "session": bytes(16)}, AuthenticationError),
    ],
)
def test_hellos_that_do_not_fit(fields: dict[str, Any], error: type[CtxStoreError]) -> None:
    async def body(node: Node) -> None:
        peer = Peer(node, _hello(**fields))
        failure = peer.take(wire.Failure)
        assert failure.rid == 0
        assert failure.code == error.code
        assert peer.ended
        peer.connection.receive(b"more")
        peer.connection.closed()
        assert node.server.hellos_refused == 1
        assert not node.server.sessions
        assert node.server.staging.used_bytes == 0

    _with_node(body)


def test_connections_are_bounded_by_their_sum() -> None:
    async def body(node: Node) -> None:
        peers = [Peer(node, _hello()) for _ in range(3)]
        failure = peers[2].take(wire.Failure)
        assert failure.code == Overloaded.code
        assert failure.retry_after_ms > 0
        peers[0].connection.closed()
        Peer(node, _hello()).take(wire.HelloOk)

    _with_node(body, limits__connections_max=2)


def test_nothing_but_a_hello_comes_first() -> None:
    async def body(node: Node) -> None:
        peer = Peer(node, None)
        peer.connection.receive(encode_frame(wire.Ping(1)))
        assert peer.ended
        pipelined = Peer(node, None)
        pipelined.connection.receive(encode_frame(_hello()) + encode_frame(wire.Ping(2)))
        assert pipelined.ended
        assert not node.server.sessions

    _with_node(body)


def test_a_data_connection_joins_an_open_session_of_its_namespace() -> None:
    async def body(node: Node) -> None:
        peer = Peer(node, _hello())
        token = peer.take(wire.HelloOk).session
        greeting = Greeting(node.server, local=False)
        data = hello(role=wire.Role.DATA, session=token)
        assert not greeting.receive(encode_frame(data)[:-1])
        assert greeting.receive(encode_frame(data)[-1:])
        client = ControlConnection(Side.CLIENT)
        client.send(data)
        (ok,) = client.receive(greeting.accept_stream())
        assert isinstance(ok, wire.HelloOk)
        assert ok.session == token
        conn = greeting.enter_stream()
        assert node.server.figures()["data_connections"] == 1
        peer.connection.closed()
        node.server.stream_closed(conn)
        with pytest.raises(AuthenticationError, match="no open control connection"):
            Greeting(node.server, local=False).receive(encode_frame(data))

    _with_node(body)


# ---------------------------------------------------------------------------- requests


@pytest.mark.parametrize("step", [1, 3, 7, 1000])
def test_requests_cut_anywhere(step: int) -> None:
    async def body(node: Node) -> None:
        peer = Peer(node, None)
        stream = peer.wire.send(_hello())
        for at in range(0, len(stream), step):
            peer.connection.receive(stream[at : at + step])
        peer.take(wire.HelloOk)
        keys = some_keys(3)
        assert await peer.put(keys, b"p" * 5000) == [COMMITTED] * 3
        rid = peer.wire.next_rid()
        frame = peer.wire.send(wire.Get(rid, TIMEOUT_US, b"".join(keys)))
        for at in range(0, len(frame), step):
            peer.connection.receive(frame[at : at + step])
        assert (peer.take(wire.GetReply).rows["status"] == wire.Lookup.HIT).all()

    _with_node(body)


def test_payloads_land_in_slots_or_inline() -> None:
    async def body(node: Node) -> None:
        peer = Peer(node, _hello())
        peer.take(wire.HelloOk)
        big, small = some_keys(2)
        assert await peer.put([big], b"b" * 10_000) == [COMMITTED]
        assert await peer.put([small], b"s" * 100) == [COMMITTED]
        reply = await peer.get([big, small])
        first, second = reply.rows
        arena = node._seams.arena
        offset = int(first["offset"])
        assert arena.data[offset : offset + 10_000].tobytes() == b"b" * 10_000
        assert not arena.data[offset + 10_000 : offset + 12_288].any(), "padding is zeroed"
        assert arena.generations[offset // limits.PAGE_BYTES] == first["generation"]
        assert second["flags"] & wire.EntryFlag.INLINE
        at = int(second["offset"])
        assert bytes(reply.inline[at : at + 100]) == b"s" * 100

    _with_node(body)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, MIB + 1), (MIB, 1), (2**64 - 1, 1), (2**63, 2), (MIB - 1, 2)]
)
def test_puts_outside_the_staging_end_the_connection(offset: int, length: int) -> None:
    async def body(node: Node) -> None:
        peer = Peer(node, _hello())
        peer.take(wire.HelloOk)
        peer.send(put_message(5, some_keys(1), [length], offsets=[offset]))
        assert peer.take(wire.Failure).code == RemoteProtocolError.code
        assert peer.ended
        assert node.server.protocol_errors == 1

    _with_node(body)


def test_a_get_without_a_map_of_the_arena_ends_the_connection() -> None:
    async def body(node: Node) -> None:
        peer = Peer(node, _hello(), local=False)
        peer.take(wire.HelloOk)
        peer.send(wire.Get(5, 1_000_000, bytes(16)))
        failure = peer.take(wire.Failure)
        assert failure.code == RemoteProtocolError.code
        assert "data connection" in failure.message
        assert peer.ended
        assert node.machine.audit() == []

    _with_node(body)


def test_stats_are_json_with_every_part() -> None:
    async def body(node: Node) -> None:
        peer = Peer(node, _hello())
        peer.take(wire.HelloOk)
        found = json.loads((await peer.ask(wire.Stats(3, TIMEOUT_US), wire.TextReply)).text)
        assert found["phase"] == "serving"
        assert found["engine"]["entries"] == 0
        assert found["server"]["requests"] == {"stats": 1}
        assert found["server"]["staging_bytes"] == MIB
        assert found["node"]["id"] == node.node_id.hex()
        assert found["arena"]["populated_bytes"] == node.config.arena_bytes

    _with_node(body)


def test_a_lease_kept_too_long_ends_its_connection() -> None:
    async def body(node: Node) -> None:
        peer = Peer(node, _hello())
        peer.take(wire.HelloOk)
        (key,) = some_keys(1)
        await peer.put([key], b"l" * 5000)
        assert (await peer.get([key])).lease
        await asyncio.sleep(3)
        assert peer.take(wire.Failure).code == LeaseExpired.code
        assert peer.ended
        assert node.machine.stats().leases == 1, "its slots stay until the client is gone"
        peer.connection.closed()
        assert node.machine.stats().leases == 0

    _with_node(body, limits__lease_s_max=1.5, limits__lease_check_s=0.5)


def test_a_reply_nobody_asked_for_ends_the_connection_and_is_counted() -> None:
    async def main() -> None:
        node = _node()
        await node.start()
        peer = Peer(node, _hello())
        ok = peer.take(wire.HelloOk)
        node.server.sessions[ok.session].deliver(wire.CountReply(99, 1))
        assert peer.ended
        assert node.server.reply_errors == 1
        await node.stop(1.0)

    run(main())


# ---------------------------------------------------------------------------- staging


def test_staging_outlives_a_copy_that_runs() -> None:
    async def body(node: Node) -> None:
        peer = Peer(node, _hello())
        peer.take(wire.HelloOk)
        (key,) = some_keys(1)
        peer.staging[:5000] = 7
        peer.send(put_message(5, [key], [5000], offsets=[0]))
        peer.connection.closed()
        assert peer.releases == 0
        assert node.server.staging.used_bytes == MIB
        await asyncio.sleep(1.0)
        assert peer.releases == 1
        assert node.server.staging.used_bytes == 0
        other = Peer(node, _hello())
        other.take(wire.HelloOk)
        assert await other.put([key], b"x" * 5000) in ([COMMITTED], [wire.PutResult.EXISTS])

    _with_node(body, delay_s=0.2)


def test_staging_goes_at_once_without_copies() -> None:
    async def body(node: Node) -> None:
        peer = Peer(node, _hello())
        peer.connection.closed()
        peer.connection.closed()
        assert peer.releases == 1
        assert node.server.staging.used_bytes == 0

    _with_node(body)


def test_the_budget_gives_pages_until_nothing_is_left() -> None:
    budget = StagingBudgetState(10 * limits.PAGE_BYTES, connection_bytes_max=6 * limits.PAGE_BYTES)
    assert budget.grant(2**40) == 6 * limits.PAGE_BYTES
    assert budget.grant(limits.PAGE_BYTES + 1) == limits.PAGE_BYTES
    assert budget.grant(100) == 0
    assert budget.grant(0) == 0
    assert budget.grant(2**40) == 3 * limits.PAGE_BYTES
    assert budget.grant(limits.PAGE_BYTES) == 0
    budget.give_back(3 * limits.PAGE_BYTES)
    assert budget.grant(2**40) == 3 * limits.PAGE_BYTES


def test_all_staging_together_stays_inside_its_share() -> None:
    async def body(node: Node) -> None:
        peers = [Peer(node, _hello(staging_bytes=2**40)) for _ in range(6)]
        granted = [peer.take(wire.HelloOk).staging_bytes for peer in peers]
        assert sum(granted) <= node.config.staging_bytes_max
        assert granted[0] == node.config.staging_connection_bytes
        assert granted[-1] == 0, "the last ones do without"

    _with_node(body)


# ---------------------------------------------------------------------------- data connections


def test_data_requests_become_events() -> None:
    keys = some_keys(2)
    sizes = np.array([10, 20], "<u4").tobytes()
    packed = wire_data.pack_get(3, b"".join(keys), sizes, timeout_us=5_000_000, exact=True)
    header = wire_data.unpack_header(packed[:32])
    event = request_event(9, header, packed[32:], now_ns=1000)
    assert isinstance(event, events.StreamGetArrived)
    assert (event.conn, event.rid, event.exact) == (9, 3, True)
    assert event.keys == b"".join(keys)
    assert event.capacities.tolist() == [10, 20]
    assert event.deadline_ns == 1000 + 5_000_000_000
    offer = put_message(4, keys, [10, 20], timeout_us=7)
    packed = wire_data.pack_put(offer)
    put = request_event(9, wire_data.unpack_header(packed[:32]), packed[32:], now_ns=0)
    assert isinstance(put, events.StreamPutArrived)
    assert put.message == offer
    packed = wire_data.pack_verdicts(wire_data.DataOp.OFFER, 4, np.zeros(1, np.uint8))
    with pytest.raises(RemoteProtocolError, match="other side"):
        request_event(9, wire_data.unpack_header(packed[:32]), packed[32:], now_ns=0)


def test_a_put_is_received_into_slots_and_memory_of_its_own() -> None:
    arena = np.zeros(8 * limits.PAGE_BYTES, np.uint8)
    offer = events.OfferPut(
        conn=1,
        rid=2,
        verdicts=np.array([wire.WANTED, wire.PutResult.EXISTS, wire.WANTED, wire.WANTED], np.uint8),
        slot_offsets=np.array([4096, -1, -1]),
        slot_bytes=np.array([8192, 0, 0]),
        lengths=np.array([5000, 3, 2], np.uint32),
        seeds=np.zeros(3, np.uint64),
    )
    receipt = PutReceiptState(offer)
    for index, value in enumerate((1, 2, 3)):
        receipt.target(index, arena)[:] = value
        receipt.take(index, announced=value, found=value if index != 1 else 99)
    assert set(arena[4096:12288].tolist()) == {1}
    assert receipt.damaged() == [1]
    row = receipt.resend_verdicts().tolist()
    timeout = int(wire.PutResult.TIMEOUT)
    assert row == [timeout, wire.PutResult.EXISTS, wire.RESEND, timeout]
    receipt.take(1, announced=2, found=2)
    done = receipt.done()
    assert done.ok.all()
    assert done.sums.tolist() == [1, 2, 3]
    assert done.inline == b"\x02\x02\x02\x03\x03"


def test_answers_that_nobody_takes_are_given_back() -> None:
    async def body(node: Node) -> None:
        peer = Peer(node, _hello())
        peer.take(wire.HelloOk)
        (key, other) = some_keys(2)
        await peer.put([key], b"d" * 5000)
        executor = node.executor
        executor.submit(events.ConnOpened(77, 0))
        capacities = np.array([5000], np.uint32)
        executor.submit(events.StreamGetArrived(77, 1, key, capacities, False, 2**62))
        executor.submit(events.StreamPutArrived(77, put_message(2, [other], [9000]), 2**62))
        executor.close_conn(77)
        assert await peer.put([other], b"o" * 9000) == [COMMITTED]

    _with_node(body)


# ---------------------------------------------------------------------------- start, stop, failure


def test_what_was_put_is_there_after_a_stop_and_after_a_crash() -> None:
    async def main() -> None:
        disk = SimDisk(3)
        keys = some_keys(4)
        for round_ in range(4):
            node = _node(disk)
            await node.start()
            peer = Peer(node, _hello())
            peer.take(wire.HelloOk)
            if round_:
                statuses = (await peer.get(keys[:round_])).rows["status"]
                assert (statuses == wire.Lookup.HIT).all()
            durability = wire.Durability.GROUP if round_ % 2 else wire.Durability.MEMORY
            await peer.put([keys[round_]], bytes([round_]) * 9000, durability=durability)
            if round_ % 2:
                assert node._runner is not None
                node._runner.cancel()
                await asyncio.wait([node._runner])
                disk = disk.crash(CrashKind.POWER)
            else:
                await node.stop(5.0)

    run(main())


def test_stopping_tells_clients_and_takes_no_more() -> None:
    async def main() -> None:
        node = _node()
        await node.start()
        assert node.health().serving
        peer = Peer(node, _hello())
        peer.take(wire.HelloOk)
        await node.stop(5.0)
        assert peer.take(wire.Failure).code == ClosedError.code
        assert peer.ended
        late = Peer(node, _hello())
        assert late.take(wire.Failure).code == ClosedError.code
        assert node.phase is NodePhase.STOPPED
        assert not node.health().serving
        peer.connection.closed()
        await node.server.wait_empty()
        assert peer.releases == 1
        await node.stop(5.0)
        await node.wait_failed()

    run(main())


def test_a_defect_of_the_engine_ends_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        node = _node()
        await node.start()
        peer = Peer(node, _hello())
        peer.take(wire.HelloOk)

        def broken(event: events.Event, now: object) -> list[events.Instruction]:
            raise RuntimeError("index and slabs disagree")

        monkeypatch.setattr(node.machine, "handle", broken)
        with pytest.raises(RuntimeError, match="disagree"):
            peer.send(wire.Flush(3, TIMEOUT_US))
        with pytest.raises(ExceptionGroup):
            await node.wait_failed()
        assert node.health().failed
        await node.stop(1.0)

    run(main())


def test_a_defect_while_a_node_begins_ends_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such record")

    async def main() -> None:
        monkeypatch.setattr(SegmentStore, "append_meta", broken)
        with pytest.raises((RuntimeError, ExceptionGroup)):
            await asyncio.wait_for(_node().start(), 60.0)

    run(main())


def test_a_directory_of_another_cluster_is_refused() -> None:
    async def main() -> None:
        disk = SimDisk()
        node = _node(disk)
        await node.start()
        await node.stop(1.0)
        with pytest.raises(DataDirError, match="belongs to cluster 'ctxstore'"):
            await _node(disk, node__cluster_id="other").start()

    run(main())


def test_figures_before_the_start_are_few_but_there() -> None:
    async def main() -> None:
        node = _node()
        assert node.stats()["phase"] == "new"
        assert not node.health().serving

    run(main())
