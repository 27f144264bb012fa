"""The right to open a connection is never lost: not to a deadline, an error or a cancellation.

Every way to a store, against a scripted node over real sockets.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from ctxstore_client import Lookup, PutResult, connect
from ctxstore_client.aio import AsyncDriver
from ctxstore_client.dialing import Dialer
from ctxstore_client.links import LinkKind
from ctxstore_client.ops.requests import Acquire, Deadline, Plan, Purpose
from ctxstore_client.pool import LINKS_MAX, Permit, Pool
from tests.integration.client_faces import WAYS, SyncAsAsync, Way, open_store
from tests.unit.scripted_node import ScriptedNode, scripted_node

if TYPE_CHECKING:
    from collections.abc import Iterator

PAYLOAD = b"x" * 5000


@pytest.fixture
def node() -> Iterator[ScriptedNode]:
    with scripted_node() as script:
        yield script


@pytest.fixture(params=WAYS, ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    return request.param


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def inner(store: Any) -> Any:
    """The store itself, whichever face wraps it."""
    return getattr(store, "store", store)


def open_links(store: Any) -> dict[str, int]:
    """How many connections of each kind there are, counted one by one."""
    links = inner(store)._pool._state.links
    return {kind.value: sum(link.kind is kind for link in links) for kind in LinkKind}


async def in_step(store: Any) -> None:
    """An operation of each kind works, and the bookkeeping is that of the open connections."""
    assert await store.put([key(1000)], [PAYLOAD]) == [PutResult.COMMITTED]
    assert await store.get_into([key(1000)], [bytearray(5000)]) == [Lookup.HIT]
    assert (await store.exists([key(1000)])).all()
    client = (await store.stats())["client"]
    assert client["links"] == open_links(store)
    assert client["lent"] == 0


class Late(Deadline):
    """Passes between two looks at it: the first grants time, the next ones none."""

    def __init__(self, looks: int) -> None:
        super().__init__(time.monotonic, 60.0)
        self.looks = looks

    def remaining_s(self) -> float:
        self.looks -= 1
        return 60.0 if self.looks >= 0 else -1.0


def test_a_deadline_that_passes_at_once_costs_no_permit(node: ScriptedNode, way: Way) -> None:
    async def main() -> None:
        async with open_store(way, node.tcp_url) as store:
            for _ in range(2 * max(LINKS_MAX.values())):
                await store.put([key(1)], [PAYLOAD], timeout_s=1e-6)
                await store.exists([key(1)], timeout_s=1e-6)
                await store.get_into([key(1)], [bytearray(5000)], timeout_s=1e-6)
            await in_step(store)

    asyncio.run(main())


@pytest.mark.parametrize("looks", [1, 2])
@pytest.mark.parametrize("purpose", [Purpose.WRITE, Purpose.READ, Purpose.STREAM])
def test_a_deadline_that_passes_before_the_dial_costs_no_permit(
    node: ScriptedNode, way: Way, purpose: Purpose, looks: int
) -> None:
    def plan() -> Plan[None]:
        yield Acquire(purpose)

    async def main() -> None:
        async with open_store(way, node.tcp_url) as store:
            driver = inner(store)._driver
            for _ in range(2 * max(LINKS_MAX.values())):
                context = driver.context(60.0)._replace(deadline=Late(looks))
                try:
                    found = driver.run(plan(), context)
                    if way.asynchronous:
                        await found
                except TimeoutError:
                    pass
                else:
                    for link in set(driver.pool._state.lent):
                        driver.pool.discard(link)
            await in_step(store)

    asyncio.run(main())


def test_who_waits_for_a_permit_gets_one_that_was_given_up(node: ScriptedNode) -> None:
    async def main() -> None:
        async with open_store(Way(True, "require"), node.unix_url) as store:
            pool: Pool = store._pool
            kept = []
            for _ in range(LINKS_MAX[LinkKind.WRITER]):
                permit = pool.checkout(Acquire(Purpose.WRITE))
                assert isinstance(permit, Permit)
                kept.append(permit)
            waiting = asyncio.create_task(store.put([key(1)], [PAYLOAD], timeout_s=20.0))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            pool.give_up(kept[0])
            pool.give_up(kept[0])  # once is all it counts for
            assert await waiting == [PutResult.COMMITTED]
            assert pool.snapshot()["links"]["writer"] == 2
            pool.give_up(kept[1])
            await in_step(store)

    asyncio.run(main())


def test_no_thread_to_dial_on_costs_no_permit(
    node: ScriptedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise RuntimeError("no thread")

    async def main() -> None:
        async with open_store(Way(True, "require"), node.unix_url) as store:
            with monkeypatch.context() as patch:
                patch.setattr(AsyncDriver, "dial_in_thread", refuse)
                for _ in range(4):
                    with pytest.raises(RuntimeError, match="no thread"):
                        await store.put([key(1)], [PAYLOAD])
            await in_step(store)

    asyncio.run(main())


def test_a_cancelled_dial_serves_the_next_one(
    node: ScriptedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Dialer.open_link

    def slowly(self: Dialer, *arguments: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return real(self, *arguments, **options)

    async def main() -> None:
        async with open_store(Way(True, "require"), node.unix_url) as store:
            monkeypatch.setattr(Dialer, "open_link", slowly)
            for _ in range(3):
                puts = [
                    asyncio.create_task(store.put([key(n)], [PAYLOAD], timeout_s=5.0))
                    for n in range(6)
                ]
                await asyncio.sleep(0.02)
                for put in puts:
                    put.cancel()
                await asyncio.wait(puts)
            await asyncio.sleep(0.3)
            await in_step(store)

    asyncio.run(main())


def test_the_deadline_holds_while_every_dialling_thread_is_busy(
    node: ScriptedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Dialer.open_stream

    def slowly(self: Dialer, *arguments: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return real(self, *arguments, **options)

    async def main() -> None:
        async with open_store(Way(True, "off"), node.tcp_url) as store:
            with monkeypatch.context() as patch:
                patch.setattr(Dialer, "open_stream", slowly)
                begun = time.monotonic()
                gets = [store.get_into([key(9)], [bytearray(9)], timeout_s=0.1) for _ in range(12)]
                verdicts = await asyncio.gather(*gets)
                assert time.monotonic() - begun < 0.45
                assert verdicts == [[Lookup.TIMEOUT]] * 12
            await asyncio.sleep(1.6)
            await in_step(store)

    asyncio.run(main())


@pytest.mark.parametrize(("shm", "opening"), [("require", "open_link"), ("off", "open_stream")])
def test_cancelling_a_ticket_never_waits_for_a_dial(
    node: ScriptedNode, monkeypatch: pytest.MonkeyPatch, shm: str, opening: str
) -> None:
    """As with a node that was stopped: the kernel accepts connections and nobody says hello."""
    dialling = threading.Semaphore(0)
    go_on = threading.Event()
    real = getattr(Dialer, opening)

    def silent(self: Dialer, *arguments: Any, **options: Any) -> Any:
        dialling.release()
        go_on.wait(10)
        return real(self, *arguments, **options)

    with connect(node.tcp_url, shm=shm) as store:
        monkeypatch.setattr(Dialer, opening, silent)
        for number in range(2):
            ticket = store.submit_put([key(number)], [PAYLOAD])
            assert dialling.acquire(timeout=5)
            begun = time.monotonic()
            assert ticket.cancel()
            assert time.monotonic() - begun < 0.5
            assert ticket.wait(0) == [PutResult.OVERLOADED]
        late = store.submit_put([key(2)], [PAYLOAD], timeout_s=0.1)
        assert late.wait(0.6) == [PutResult.OVERLOADED]
        go_on.set()
        assert store.submit_put([key(3)], [PAYLOAD]).wait(5) == [PutResult.COMMITTED]
        until = time.monotonic() + 5.0
        while store.stats()["client"]["links"] != open_links(store):
            assert time.monotonic() < until, "the abandoned dials never came to an end"
            time.sleep(0.005)
        asyncio.run(in_step(SyncAsAsync(store)))
