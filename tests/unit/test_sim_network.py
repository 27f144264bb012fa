"""The simulated network: order, delay, cuts, clogs, half-open connections."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

from ctxstore.testing import loop as sim_loop
from ctxstore.testing.network import NetworkProfile, SimEnd, SimNetwork

if TYPE_CHECKING:
    from collections.abc import Coroutine


class Peer:
    """What one end has heard."""

    def __init__(self, end: SimEnd) -> None:
        self.end = end
        self.heard = b""
        self.pieces = 0
        self.closed = 0
        end.on_data = self._take
        end.on_closed = self._close

    def _take(self, data: bytes) -> None:
        self.heard += data
        self.pieces += 1

    def _close(self) -> None:
        self.closed += 1


def connected(
    seed: int = 1, profile: NetworkProfile | None = None
) -> tuple[SimNetwork, Peer, Peer]:
    network = SimNetwork(asyncio.get_running_loop(), Random(seed), profile)
    servers: list[Peer] = []
    client = Peer(network.connect(lambda end: servers.append(Peer(end))))
    return network, client, servers[0]


def play(main: Coroutine[None, None, None]) -> None:
    sim_loop.run(main)


def test_bytes_arrive_in_order_whatever_the_pieces() -> None:
    async def main() -> None:
        _, client, server = connected(profile=NetworkProfile(pieces_max=5))
        sent = b""
        for number in range(50):
            part = bytes([number]) * (number + 1)
            sent += part
            client.end.write(part)
        await asyncio.sleep(1)
        assert server.heard == sent
        assert server.pieces > 50

    play(main())


def test_a_close_arrives_after_what_was_written() -> None:
    async def main() -> None:
        network, client, server = connected()
        client.end.write(b"last words")
        client.end.close()
        client.end.write(b"too late")
        await asyncio.sleep(1)
        assert server.heard == b"last words"
        assert (server.closed, client.closed) == (1, 0)
        assert server.end.closed
        assert not network.connections

    play(main())


def test_a_cut_tells_both_and_loses_what_is_on_its_way() -> None:
    async def main() -> None:
        network, client, server = connected()
        client.end.write(b"lost")
        network.connections[0].cut()
        await asyncio.sleep(1)
        assert server.heard == b""
        assert (server.closed, client.closed) == (1, 1)
        assert not network.connections

    play(main())


def test_a_clog_delays_and_loses_nothing() -> None:
    async def main() -> None:
        network, client, server = connected()
        network.connections[0].clog(5.0)
        client.end.write(b"patience")
        await asyncio.sleep(4.9)
        assert server.heard == b""
        await asyncio.sleep(0.2)
        assert server.heard == b"patience"

    play(main())


def test_half_open_tells_nobody_until_it_is_healed() -> None:
    async def main() -> None:
        network, client, server = connected()
        network.connections[0].half_open()
        client.end.write(b"into the void")
        server.end.close()
        await asyncio.sleep(100)
        assert (client.closed, server.closed, server.heard) == (0, 0, b"")
        network.heal()
        assert client.closed == 1
        assert server.closed == 0, "it had closed by itself"
        assert not network.connections

    play(main())


def test_healing_ends_a_clog_at_once() -> None:
    async def main() -> None:
        network, client, server = connected()
        network.connections[0].clog(1000.0)
        client.end.write(b"now")
        await asyncio.sleep(1)
        network.heal()
        await asyncio.sleep(0.01)
        assert server.heard == b"now"

    play(main())


def test_the_same_seed_gives_the_same_arrivals() -> None:
    async def arrivals() -> list[tuple[float, int]]:
        loop = asyncio.get_running_loop()
        _, client, server = connected(seed=7)
        seen: list[tuple[float, int]] = []
        server.end.on_data = lambda data: seen.append((loop.time(), len(data)))
        for _ in range(20):
            client.end.write(bytes(100))
        await asyncio.sleep(1)
        return seen

    first = sim_loop.run(arrivals())

    assert first == sim_loop.run(arrivals())
    assert len({when for when, _ in first}) > 3
