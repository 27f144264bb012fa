"""The client's connections: refusals, deaths, silence, garbage, several hosts, the breaker.

The node is a script (`scripted_node`) over real sockets.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ctxstore.errors import (
    AuthenticationError,
    ClosedError,
    ConfigError,
    DeadlineExceeded,
    Overloaded,
    ProtocolError,
    RemoteProtocolError,
    TransportError,
    UnknownNamespace,
    VersionMismatch,
    WrongCluster,
)
from ctxstore.wire import messages as wire
from ctxstore_client import Lookup, PutResult, connect, connect_async
from tests.unit.scripted_node import ScriptedNode, scripted_node

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def node() -> Iterator[ScriptedNode]:
    with scripted_node() as script:
        yield script


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def noise(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def eventually(condition: Any, timeout_s: float = 5.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("refusal", "raised"),
    [
        (AuthenticationError("no"), AuthenticationError),
        (UnknownNamespace("no"), UnknownNamespace),
        (WrongCluster("no"), WrongCluster),
        (VersionMismatch("only 7 to 9"), VersionMismatch),
    ],
)
@pytest.mark.parametrize("by", ["tcp", "unix"])
def test_refusals_are_raised(
    node: ScriptedNode, by: str, refusal: Exception, raised: type[Exception]
) -> None:
    node.hello_hook = lambda hello: refusal
    url = node.tcp_url if by == "tcp" else node.unix_url
    with pytest.raises(raised):
        connect(url)

    async def main() -> None:
        with pytest.raises(raised):
            await connect_async(url)

    asyncio.run(main())


def test_a_node_that_shuts_down_is_one_that_is_not_there(node: ScriptedNode) -> None:
    node.hello_hook = lambda hello: ClosedError("shutting down")
    with connect(node.unix_url) as store:
        assert store.get_into([key(1)], [bytearray(1)]) == [Lookup.MISS]
        node.hello_hook = None
        eventually(lambda: store.put([key(1)], [b"x"]) == [PutResult.COMMITTED])
        node.hooks[wire.Flush] = lambda script, message: wire.failure_from_error(
            message.rid, ClosedError("shutting down")
        )
        with pytest.raises(TransportError):
            store.flush()


def test_shared_memory_is_required_but_not_there(node: ScriptedNode) -> None:
    node.shared = False
    with pytest.raises(ConfigError, match="require"):
        connect(node.tcp_url, shm="require")
    with pytest.raises(ConfigError, match="require"):
        connect(node.unix_url, shm="require")
    with connect(node.tcp_url, shm="auto") as store:
        assert not store.stats()["client"]["shared_memory"]


def test_a_unix_socket_of_another_node_is_not_used(node: ScriptedNode) -> None:
    with scripted_node() as other:
        node.path, kept = other.path, node.path
        with connect(node.tcp_url) as store:
            assert store.put([key(1)], [b"x"]) == [PutResult.COMMITTED]
            assert not store.stats()["client"]["shared_memory"]
            assert other.payload(key(1)) is None
        node.path = kept


@pytest.mark.parametrize("shm", ["off", "require"])
def test_connections_that_died_while_idle_are_replaced(node: ScriptedNode, shm: str) -> None:
    with connect(node.tcp_url, shm=shm) as store:
        for round_number in range(3):
            assert store.put([key(round_number)], [noise(5000)]) == [PutResult.COMMITTED]
            assert store.get_into([key(round_number)], [bytearray(5000)]) == [Lookup.HIT]
            assert store.exists([key(round_number)]).all()
            node.cut_connections()
            time.sleep(0.05)


@pytest.mark.parametrize("shm", ["off", "require"])
def test_an_operation_survives_the_death_of_a_used_connection(node: ScriptedNode, shm: str) -> None:
    node.store(key(1), noise(5000))
    with connect(node.tcp_url, shm=shm) as store:
        assert store.get_into([key(1)], [bytearray(5000)]) == [Lookup.HIT]
        assert store.exists([key(1)]).all()
        cuts: list[Any] = []

        def cut(script: ScriptedNode, message: Any) -> None:
            script.hooks.clear()
            cuts.append(message)
            script.cut_connections()

        node.hooks[wire.Exists] = cut
        assert store.exists([key(1)]).tolist() == [True]
        assert store.get_into([key(1)], [bytearray(5000)]) == [Lookup.HIT]
        if shm == "require":
            node.hooks[wire.Get] = cut
        else:

            def cut_data(sock: socket.socket, header: Any, meta: bytes) -> bool:
                node.data_hook = None
                cut(node, header)
                return True

            node.data_hook = cut_data
        buffer = bytearray(5000)
        assert store.get_into([key(1)], [buffer]) == [Lookup.HIT]
        assert buffer == noise(5000)
        assert len(cuts) == 2


@pytest.mark.parametrize("garbage", [b"\xff" * 64, (2**31).to_bytes(4, "little"), b"\0\0\0\0"])
def test_garbage_is_a_protocol_error(node: ScriptedNode, garbage: bytes) -> None:
    with connect(node.unix_url) as store:
        node.hooks[wire.Exists] = lambda script, message: garbage
        with pytest.raises(RemoteProtocolError):
            store.exists([key(1)])
        node.hooks.clear()
        assert store.exists([key(1)]).tolist() == [False], "on another connection"


def test_an_answer_outside_the_arena_is_a_protocol_error(node: ScriptedNode) -> None:
    def outside(script: ScriptedNode, message: wire.Get) -> wire.GetReply:
        rows = np.zeros(message.count, wire.ENTRY_DTYPE)
        rows["offset"], rows["length"] = script.arena.size - 4096, 8192
        return wire.GetReply(message.rid, 1, rows.tobytes())

    node.hooks[wire.Get] = outside
    with connect(node.unix_url) as store, pytest.raises(ProtocolError):
        store.get_into([key(1)], [bytearray(8192)])


def test_a_silent_node_costs_at_most_the_deadline(node: ScriptedNode) -> None:
    silent = [wire.Get, wire.Put, wire.Exists, wire.Match, wire.Remove, wire.Flush, wire.Hold]
    node.hooks.update(dict.fromkeys(silent, lambda script, message: None))
    with connect(node.unix_url, timeout_s=0.2) as store:
        began = time.monotonic()
        assert store.get_into([key(1)], [bytearray(1)]) == [Lookup.TIMEOUT]
        assert store.put([key(1)], [b"x"]) == [PutResult.TIMEOUT]
        assert store.exists([key(1)]).tolist() == [False]
        assert store.match([key(1)]) == 0
        for call in (lambda: store.remove([key(1)]), store.flush, lambda: store.hold([key(1)])):
            with pytest.raises(DeadlineExceeded):
                call()
        assert time.monotonic() - began < 7 * 0.2 + 1.0


def test_an_overloaded_node_is_a_value_for_data_and_an_error_for_changes(
    node: ScriptedNode,
) -> None:
    kinds = [wire.Get, wire.Put, wire.Exists, wire.Hold]
    node.hooks.update(
        dict.fromkeys(
            kinds, lambda script, message: wire.failure_from_error(message.rid, Overloaded("full"))
        )
    )
    with connect(node.unix_url) as store:
        assert store.get_into([key(1)], [bytearray(1)]) == [Lookup.OVERLOADED]
        assert store.put([key(1)], [b"x"]) == [PutResult.OVERLOADED]
        assert store.exists([key(1)]).tolist() == [False]
        with pytest.raises(Overloaded):
            store.hold([key(1)])
        node.hooks.clear()
        assert store.put([key(1)], [b"x"]) == [PutResult.COMMITTED]
        assert store.stats()["client"]["links"]["reader"] == 1, "an answer breaks no connection"


def test_the_breaker_opens_and_closes(node: ScriptedNode) -> None:
    port_url = node.tcp_url
    node.close()
    with connect(port_url) as store:
        for _ in range(30):
            assert store.get_into([key(1)], [bytearray(1)]) == [Lookup.MISS]
            assert store.put([key(1)], [b"x"]) == [PutResult.OVERLOADED]
            time.sleep(0.01)
        client = store.stats()["client"]
        assert client["refused_by_breaker"] > client["dial_failures"] > 2
        began = time.monotonic()
        store.get_into([key(1)], [bytearray(1)])
        assert time.monotonic() - began < 0.1


def test_several_hosts_are_tried_in_order(node: ScriptedNode) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = unused.getsockname()[1]
        here = node.control[1]
        with connect(f"ctxstore://127.0.0.1:{nobody},127.0.0.1:{here}", shm="off") as store:
            assert store.put([key(1)], [b"x"]) == [PutResult.COMMITTED]
            assert store.stats()["client"]["route"] == f"ctxstore://127.0.0.1:{here}"
        with scripted_node() as second:
            both = f"ctxstore://127.0.0.1:{here},127.0.0.1:{second.control[1]}"
            with connect(both, shm="off") as store:
                assert store.exists([key(1)]).all()
                node.hello_hook = lambda hello: ClosedError("going down")
                node.cut_connections()
                time.sleep(0.05)
                eventually(lambda: store.put([key(2)], [b"y"]) == [PutResult.COMMITTED])
                assert second.payload(key(2)) == b"y"


def test_at_most_so_many_connections_and_no_deadlock(node: ScriptedNode) -> None:
    payload = noise(5000)
    with connect(node.unix_url) as store:
        wrong: list[object] = []

        def work(number: int) -> None:
            for turn in range(20):
                name = key(number * 1000 + turn)
                buffer = bytearray(16)
                done = store.put([name], [payload[:16]]), store.get_into([name], [buffer])
                if done != ([PutResult.COMMITTED], [Lookup.HIT]) or buffer != payload[:16]:
                    wrong.append(done)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        links = store.stats()["client"]["links"]
        assert links["writer"] <= 2
        assert links["reader"] <= 9


def test_waiting_for_a_connection_ends_with_the_deadline(node: ScriptedNode) -> None:
    with connect(node.unix_url) as store, store.alloc([10]), store.alloc([10]):
        began = time.monotonic()
        assert store.put([key(1)], [b"x"], timeout_s=0.2) == [PutResult.OVERLOADED]
        with pytest.raises(Overloaded), store.alloc([10], timeout_s=0.2):
            pass
        assert 0.35 < time.monotonic() - began < 2
