"""What each method says when its deadline has passed already, and what a put then knows.

Every way to a store, against a scripted node over real sockets.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

from ctxstore.errors import Overloaded as NodeOverloaded
from ctxstore.wire import messages as wire
from ctxstore_client import DeadlineExceeded, Lookup, Overloaded, PutResult, connect
from ctxstore_client.ops.requests import Context, Deadline
from tests.integration.client_faces import WAYS, Way, open_store
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


class Late(Deadline):
    """Has time left for so many looks at it, and none from then on."""

    def __init__(self, looks: int) -> None:
        super().__init__(time.monotonic, 60.0)
        self.looks = looks

    def remaining_s(self) -> float:
        self.looks -= 1
        return 60.0 if self.looks >= 0 else -1.0


@pytest.mark.parametrize("timeout_s", [0, -1, 0.0, -1e-9, float("-inf")])
def test_a_deadline_that_has_passed_is_no_misuse(
    node: ScriptedNode, way: Way, timeout_s: float
) -> None:
    async def main() -> None:
        async with open_store(way, node.tcp_url) as store:
            keys = [key(1), key(2)]
            assert await store.put(keys, [PAYLOAD] * 2) == [PutResult.COMMITTED] * 2
            seen = node.seen.copy()
            none = {"timeout_s": timeout_s}
            buffers = [bytearray(5000), bytearray(5000)]
            assert await store.get_into(keys, buffers, timeout_s) == [Lookup.TIMEOUT] * 2
            new = [key(3), key(4)]
            assert await store.put(new, [PAYLOAD] * 2, **none) == [PutResult.OVERLOADED] * 2
            assert (await store.exists(keys, **none)).tolist() == [False, False]
            assert await store.match(keys, **none) == 0
            assert await store.stat(keys, **none) == [None, None]
            assert (await store.stats(**none))["node"] is None
            for call in (store.remove, store.hold, store.touch, store.explain):
                with pytest.raises(DeadlineExceeded):
                    await call(keys, **none)
            for question in (store.flush, store.ping):
                with pytest.raises(DeadlineExceeded):
                    await question(**none)
            async with store.view(keys, **none) as views:
                assert list(views) == [None, None]
            with pytest.raises(Overloaded):
                async with store.alloc([5000], **none):
                    pass
            ticket = await store.submit_get(keys, buffers, timeout_s)
            assert await ticket.wait(5) == [Lookup.TIMEOUT] * 2
            ticket = await store.submit_put(new, [PAYLOAD] * 2, **none)
            assert await ticket.wait(5) == [PutResult.OVERLOADED] * 2
            assert await (await store.prefetch(keys, **none)).wait(5) == 0
            assert node.seen == seen, "nothing was sent for any of these"
            assert (await store.stats())["client"].get("discarded", 0) == 0
            assert await store.get_into(keys, buffers) == [Lookup.HIT] * 2

    asyncio.run(main())


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), "5", True])
def test_a_store_needs_time_by_default(node: ScriptedNode, timeout_s: Any) -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        connect(node.tcp_url, timeout_s=timeout_s)


@pytest.mark.parametrize("staged", [False, True])
def test_only_what_was_sent_may_be_stored(node: ScriptedNode, way: Way, staged: bool) -> None:
    """The deadline passes at every point of a put in turn."""

    async def main() -> None:
        async with open_store(way, node.tcp_url) as store:
            driver = getattr(store, "store", store)._driver
            real = driver.context
            overloaded = 0
            result = PutResult.OVERLOADED
            for looks in range(1, 40):
                before = node.seen["Put"] + node.seen["PUT"]
                async with store.alloc([5000]) as views:
                    views[0][:] = PAYLOAD
                    source = views[0] if staged else PAYLOAD
                    driver.context = lambda _, n=looks: Context(driver.pool, Late(n))
                    (result,) = await store.put([key(looks)], [source])
                    driver.context = real
                sent = node.seen["Put"] + node.seen["PUT"] > before
                assert not (sent and result is PutResult.OVERLOADED), f"after {looks} looks"
                if result is PutResult.OVERLOADED:
                    overloaded += 1
                    assert not (await store.exists([key(looks)])).any()
                if result is PutResult.COMMITTED:
                    break
            assert result is PutResult.COMMITTED
            assert overloaded >= 1, "the first ones had no time to send anything"

    asyncio.run(main())


@pytest.mark.parametrize("way", [way for way in WAYS if way.shm == "require"], ids=str)
def test_an_offer_that_was_lost_stays_in_doubt(node: ScriptedNode, way: Way) -> None:
    """The first connection dies with the offer; the second says OVERLOADED of another one."""

    def refuse(script: ScriptedNode, message: Any) -> Any:
        return wire.failure_from_error(message.rid, NodeOverloaded("no room"))

    def cut(script: ScriptedNode, message: Any) -> Any:
        script.hooks[wire.Put] = refuse
        raise ConnectionError("cut")

    async def main() -> None:
        async with open_store(way, node.unix_url) as store:
            assert await store.put([key(1)], [PAYLOAD]) == [PutResult.COMMITTED]
            node.hooks[wire.Put] = refuse
            assert await store.put([key(2)], [PAYLOAD]) == [PutResult.OVERLOADED]
            node.hooks[wire.Put] = cut
            assert await store.put([key(3)], [PAYLOAD]) == [PutResult.TIMEOUT]

    asyncio.run(main())


def test_the_first_arguments_may_go_by_position(node: ScriptedNode, way: Way) -> None:
    async def main() -> None:
        async with open_store(way, node.tcp_url) as store:
            keys = [key(1)]
            assert await store.put(keys, [PAYLOAD], 60) == [PutResult.COMMITTED]
            assert await store.get_into(keys, [bytearray(5000)], 5.0) == [Lookup.HIT]
            assert (await store.hold(keys, 5)).all()
            assert (await store.touch(keys, 5)).all()
            assert await (await store.prefetch(keys, 0.5)).wait(5) == 0
            ticket = await store.submit_put([key(2)], [PAYLOAD], 60)
            assert await ticket.wait(5) == [PutResult.COMMITTED]
            ticket = await store.submit_get(keys, [bytearray(5000)], 5.0)
            assert await ticket.wait(5) == [Lookup.HIT]

    asyncio.run(main())


def test_a_hold_without_an_end_says_how_to_end_one(node: ScriptedNode, way: Way) -> None:
    async def main() -> None:
        async with open_store(way, node.tcp_url) as store:
            with pytest.raises(ValueError, match="ttl_s=0 ends a hold"):
                await store.hold([key(1)], None)
            assert not node.seen["Hold"]

    asyncio.run(main())
