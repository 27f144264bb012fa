"""What every way to a store must do: sync and asyncio, over shared memory and over TCP.

One real daemon serves all tests of this file. Faults have files of their own.
"""

from __future__ import annotations

import array
import asyncio
import functools
import itertools
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ctxstore_client import ClosedError, DeadlineExceeded, Lookup, PutResult, StatTier
from tests.daemon_process import DaemonProcess, daemon_process
from tests.integration.client_faces import WAYS, Way, open_store
from tests.shards import is_payload_of, payload_of, shard_key

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

KIB = 1024
SIZES = (1, 100, 1024, 1025, 4096, 4097, 100_000, 1024 * KIB)
_spaces = itertools.count(1)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with daemon_process(tmp_path_factory.mktemp("node"), memory="192MiB", disk="512MiB") as process:
        yield process


@pytest.fixture(params=WAYS, ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    return request.param


def on_store(test: Callable[[Any], Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test body against a fresh store of each way."""

    def run(daemon: DaemonProcess, way: Way) -> None:
        async def main() -> None:
            async with open_store(way, daemon.url, timeout_s=10.0) as store:
                await test(store)

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def shards(*sizes: int) -> tuple[list[bytes], list[np.ndarray]]:
    """Fresh keys and their payloads."""
    space = next(_spaces)
    keys = [shard_key(space, number, size) for number, size in enumerate(sizes)]
    return keys, [payload_of(key) for key in keys]


def room(*sizes: int) -> list[np.ndarray]:
    return [np.zeros(size, np.uint8) for size in sizes]


async def stored(store: Any, *sizes: int) -> tuple[list[bytes], list[np.ndarray]]:
    keys, payloads = shards(*sizes)
    assert await store.put(keys, payloads) == [PutResult.COMMITTED] * len(keys)
    return keys, payloads


@on_store
async def test_what_was_put_comes_back(store: Any) -> None:
    keys, payloads = await stored(store, *SIZES)
    buffers = room(*SIZES)
    assert await store.get_into(keys, buffers) == [Lookup.HIT] * len(keys)
    assert all(is_payload_of(k, b) for k, b in zip(keys, buffers, strict=True))
    assert await store.put(keys, payloads) == [PutResult.EXISTS] * len(keys)


@on_store
async def test_a_miss_is_a_value_and_does_not_disturb_its_neighbours(store: Any) -> None:
    keys, _ = await stored(store, 5000, 10)
    missing, _ = shards(7)
    buffers = room(5000, 7, 10)
    verdicts = await store.get_into([keys[0], missing[0], keys[1]], buffers)
    assert verdicts == [Lookup.HIT, Lookup.MISS, Lookup.HIT]
    assert is_payload_of(keys[0], buffers[0])
    assert is_payload_of(keys[1], buffers[2])


@on_store
async def test_buffer_sizes(store: Any) -> None:
    keys, payloads = await stored(store, 5000, 500)
    for key, payload in zip(keys, payloads, strict=True):
        size = len(payload)
        large, small, fitting = room(size + 9, size - 1, size)
        large[:] = 77
        verdicts = await store.get_into([key] * 3, [large, small, fitting])
        assert verdicts == [Lookup.HIT, Lookup.TOO_SMALL, Lookup.HIT]
        assert np.array_equal(large[:size], payload)
        assert set(large[size:].tolist()) == {77}, "only the shard's own bytes are written"
        verdicts = await store.get_into([key] * 2, [large, fitting], exact=True)
        assert verdicts == [Lookup.MISS, Lookup.HIT]


@on_store
async def test_every_kind_of_buffer(store: Any) -> None:
    keys, _ = shards(*[4096] * 5)
    text = os.urandom(4096)
    floats = np.arange(1024, dtype=np.float32).reshape(32, 32)
    sources: list[Any] = [
        text,
        bytearray(text),
        memoryview(text),
        floats,
        array.array("Q", range(512)),
    ]
    assert await store.put(keys, sources) == [PutResult.COMMITTED] * 5
    back = np.zeros((32, 32), np.float32)
    words = array.array("Q", bytes(4096))
    targets: list[Any] = [
        bytearray(4096),
        memoryview(bytearray(4096)),
        np.zeros(4096, np.int8),
        back,
        words,
    ]
    assert await store.get_into(keys, targets) == [Lookup.HIT] * 5
    assert bytes(targets[0]) == bytes(targets[1]) == bytes(targets[2]) == text
    assert np.array_equal(back, floats)
    assert words == sources[4]


@on_store
async def test_a_key_array_and_one_large_buffer_array(store: Any) -> None:
    keys = np.frombuffer(b"".join(shards(*[8192] * 6)[0]), np.uint8).reshape(6, 16)
    block = np.random.default_rng(1).integers(0, 256, (6, 8192), dtype=np.uint8)
    assert await store.put(keys, block) == [PutResult.COMMITTED] * 6
    back = np.zeros_like(block)
    assert await store.get_into(keys, back) == [Lookup.HIT] * 6
    assert np.array_equal(back, block)
    scattered = np.zeros((12, 8192), np.uint8)
    assert await store.get_into(keys[::-1], scattered[::2]) == [Lookup.HIT] * 6
    assert np.array_equal(scattered[::2], block[::-1])


@on_store
async def test_duplicates_in_a_batch(store: Any) -> None:
    (key,), (payload,) = shards(6000)
    results = await store.put([key, key, key], [payload] * 3)
    assert results == [PutResult.COMMITTED, PutResult.EXISTS, PutResult.EXISTS]
    buffers = room(6000, 6000)
    assert await store.get_into([key, key], buffers) == [Lookup.HIT] * 2
    assert all(is_payload_of(key, buffer) for buffer in buffers)


@on_store
async def test_empty_batches(store: Any) -> None:
    assert await store.put([], []) == []
    assert await store.get_into([], []) == []
    assert (await store.exists([])).tolist() == []
    assert await store.match([]) == 0
    assert await store.stat([]) == []
    assert (await store.remove([])).tolist() == []
    async with store.view([]) as views:
        assert len(views) == 0
    async with store.alloc([]) as staged:
        assert len(staged) == 0


@on_store
async def test_exists_match_and_stat(store: Any) -> None:
    keys, _ = await stored(store, 10, 5000, 70_000)
    missing, _ = shards(1)
    asked = [keys[0], keys[1], missing[0], keys[2]]
    found = await store.exists(asked)
    assert found.dtype == np.bool_
    assert found.tolist() == [True, True, False, True]
    assert await store.match(asked) == 2
    assert await store.match(keys) == 3
    assert await store.match(missing) == 0
    stats = await store.stat(asked)
    assert [s and s.length for s in stats] == [10, 5000, None, 70_000]
    assert stats[0].tier is StatTier.INLINE
    assert stats[1].tier in (StatTier.MEMORY, StatTier.NVME)
    assert stats[1].ttl_s is None
    assert not stats[1].held


@on_store
async def test_time_to_live(store: Any) -> None:
    keys, payloads = shards(5000, 10)
    await store.put(keys, payloads, ttl_s=[0.15, None])
    first, second = await store.stat(keys)
    assert first is None or 0 < first.ttl_s <= 0.15
    assert second.ttl_s is None
    await asyncio.sleep(0.4)
    assert (await store.exists(keys)).tolist() == [False, True]
    assert await store.get_into(keys, room(5000, 10)) == [Lookup.MISS, Lookup.HIT]


@on_store
async def test_hold_touch_and_remove(store: Any) -> None:
    keys, payloads = await stored(store, 5000, 10)
    missing, _ = shards(1)
    asked = [*keys, *missing]
    assert (await store.hold(asked, ttl_s=30)).tolist() == [True, True, False]
    assert [s and s.held for s in await store.stat(asked)] == [True, True, None]
    assert (await store.hold(keys, ttl_s=0)).tolist() == [True, True]
    assert not any(s.held for s in await store.stat(keys))
    await store.remove([keys[1]])
    await store.put([keys[1]], [payloads[1]], ttl_s=5)
    assert (await store.touch(asked, ttl_s=100)).tolist() == [True, True, False]
    assert 90 < (await store.stat([keys[1]]))[0].ttl_s <= 100
    assert (await store.remove(asked)).tolist() == [True, True, False]
    assert not (await store.exists(asked)).any()
    assert (await store.remove(asked)).tolist() == [False, False, False]


@on_store
async def test_flush_and_group_durability(store: Any) -> None:
    keys, payloads = shards(5000, 10)
    results = await store.put(keys, payloads, durability="group", priority=[3, -3], cost_s=0.2)
    assert results == [PutResult.COMMITTED] * 2
    assert all(s.durable for s in await store.stat(keys))
    await stored(store, 9000)
    assert await store.flush() >= 0


@on_store
async def test_stats_explain_and_ping(store: Any) -> None:
    keys, _ = await stored(store, 5000)
    stats = await store.stats()
    assert stats["client"]["failures_in_a_row"] == 0
    assert stats["node"]["engine"]["entries"] >= 1
    (line,) = await store.explain(keys)
    assert line["key"] == keys[0].hex()
    assert len(await store.explain(keys * 100)) == 100
    assert 0 < await store.ping() < 10


@on_store
async def test_views_show_shards_and_end_with_their_block(store: Any) -> None:
    keys, _ = await stored(store, 5000, 10, 300_000)
    missing, _ = shards(1)
    async with store.view([keys[0], missing[0], keys[1], keys[2]]) as views:
        assert len(views) == 4
        assert views[1] is None
        for key, view in ((keys[0], views[0]), (keys[1], views[2]), (keys[2], views[3])):
            assert view.readonly
            assert is_payload_of(key, view)
        assert [view is not None for view in views] == [True, False, True, True]
        kept = views[0]
        with pytest.raises(TypeError):
            kept[0] = 1
        views.check()
    with pytest.raises(ValueError, match="released"):
        bytes(kept)
    with pytest.raises(ClosedError):
        views[0]


@on_store
async def test_an_array_of_a_view_stays_readable_after_the_block(store: Any) -> None:
    keys, payloads = await stored(store, 5000)
    async with store.view(keys) as views:
        kept = np.frombuffer(views[0], np.uint8)
        assert np.array_equal(kept, payloads[0])
    # Its content is undefined now, its memory is not gone.
    assert kept.sum() >= 0


@on_store
async def test_many_views_at_once(store: Any) -> None:
    keys, _ = await stored(store, *[4096 + n for n in range(40)])
    async with store.view(keys[:20]) as first, store.view(keys[10:]) as second:
        assert all(is_payload_of(k, v) for k, v in zip(keys[:20], first, strict=True))
        assert all(is_payload_of(k, v) for k, v in zip(keys[10:], second, strict=True))
        assert (await store.exists(keys)).all()


@on_store
async def test_staged_buffers_are_put_in_any_choice(store: Any) -> None:
    sizes = (5000, 10, 70_000, 4096)
    keys, payloads = shards(*sizes)
    async with store.alloc(sizes) as staged:
        assert [view.nbytes for view in staged] == list(sizes)
        for view, payload in zip(staged, payloads, strict=True):
            np.copyto(np.frombuffer(view, np.uint8), payload)
        chosen = [2, 0]
        results = await store.put([keys[i] for i in chosen], [staged[i] for i in chosen])
        assert results == [PutResult.COMMITTED] * 2
        results = await store.put(keys, staged, ttl_s=60)
        assert results == [
            PutResult.EXISTS,
            PutResult.COMMITTED,
            PutResult.EXISTS,
            PutResult.COMMITTED,
        ]
        mixed, more = shards(5000)
        results = await store.put([*mixed, keys[0]], [*more, staged[0]])
        assert results == [PutResult.COMMITTED, PutResult.EXISTS]
        other = staged[0]
    buffers = room(*sizes)
    assert await store.get_into(keys, buffers) == [Lookup.HIT] * 4
    assert all(is_payload_of(k, b) for k, b in zip(keys, buffers, strict=True))
    with pytest.raises(ValueError, match="released"):
        other[0] = 1


@on_store
async def test_tickets(store: Any) -> None:
    keys, payloads = shards(5000, 10, 300_000)
    ticket = await store.submit_put(keys, payloads, ttl_s=60)
    assert await ticket.wait(10) == [PutResult.COMMITTED] * 3
    assert ticket.done()
    buffers = room(5000, 10, 300_000)
    ticket = await store.submit_get(keys, buffers)
    assert await ticket.wait() == [Lookup.HIT] * 3
    assert await ticket.wait() == [Lookup.HIT] * 3, "a result may be asked for twice"
    assert not await ticket.cancel()
    assert all(is_payload_of(k, b) for k, b in zip(keys, buffers, strict=True))
    accepted = await (await store.prefetch(keys, by_s=0.1)).wait(10)
    assert 0 <= accepted <= 3


@on_store
async def test_a_batch_far_above_the_staging_and_lease_shares(store: Any) -> None:
    sizes = [1024 * KIB] * 64  # 64 MiB; a connection may lease a quarter of 168 MiB, stage 6 MiB
    keys, payloads = shards(*sizes)
    results = await store.put(keys, payloads, timeout_s=60)
    assert set(results) == {PutResult.COMMITTED}
    buffers = room(*sizes)
    verdicts = await store.get_into(keys, buffers, timeout_s=60)
    assert set(verdicts) == {Lookup.HIT}
    assert all(is_payload_of(k, b) for k, b in zip(keys, buffers, strict=True))
    await store.remove(keys)


@on_store
async def test_many_small_shards(store: Any) -> None:
    sizes = [16 + n % 50 for n in range(10_000)]
    keys, payloads = shards(*sizes)
    assert set(await store.put(keys, payloads, timeout_s=60)) == {PutResult.COMMITTED}
    assert await store.match(keys) == len(keys)
    buffers = room(*sizes)
    assert set(await store.get_into(keys, buffers, timeout_s=60)) == {Lookup.HIT}
    assert all(is_payload_of(k, b) for k, b in zip(keys, buffers, strict=True))


def bad_calls() -> list[tuple[str, Callable[[Any], Any]]]:
    key, buffer = bytes(16), bytearray(8)
    good = [key]
    strided = np.zeros((8, 8), np.uint8)[:, ::2]
    huge = np.zeros(64 * 1024 * KIB + 1, np.uint8)
    columns = [
        ("ttl_s", -1),
        ("ttl_s", [1, 2]),
        ("ttl_s", float("nan")),
        ("ttl_s", "soon"),
        ("priority", 40_000),
        ("priority", 1.5),
        ("durability", "disk"),
        ("depth0", -1),
        ("cost_s", -0.5),
        ("timeout_s", float("nan")),
        ("timeout_s", float("inf")),
        ("timeout_s", "1"),
    ]
    calls: list[tuple[str, Callable[[Any], Any]]] = [
        (f"{name}={value}", functools.partial(_put_with, good, [buffer], name, value))
        for name, value in columns
    ]
    calls += [
        ("short key", lambda s: s.get_into([b"short"], [buffer])),
        ("second key long", lambda s: s.exists([key, bytes(17)])),
        ("key is text", lambda s: s.match(["a" * 16])),
        ("keys is one key", lambda s: s.match(key)),
        ("keys is a number", lambda s: s.match(7)),
        ("key array dtype", lambda s: s.exists(np.zeros((2, 16), np.int32))),
        ("key array shape", lambda s: s.exists(np.zeros((2, 15), np.uint8))),
        ("fewer buffers", lambda s: s.get_into([key, key], [buffer])),
        ("more buffers", lambda s: s.put(good, [buffer, buffer])),
        ("one buffer", lambda s: s.put(good, buffer)),
        ("no buffers", lambda s: s.put(good, None)),
        ("read-only target", lambda s: s.get_into(good, [b"12345678"])),
        ("read-only array", lambda s: s.get_into(good, [np.frombuffer(b"1234", np.uint8)])),
        ("strided target", lambda s: s.get_into(good, [strided])),
        ("strided source", lambda s: s.put(good, [strided])),
        ("zero bytes", lambda s: s.put(good, [b""])),
        ("zero byte target", lambda s: s.get_into(good, [bytearray()])),
        ("above the shard limit", lambda s: s.put(good, [huge])),
        ("target above the shard limit", lambda s: s.get_into(good, [huge])),
        ("not a buffer", lambda s: s.put(good, [object()])),
        ("objects", lambda s: s.put(good, [np.array([object()])])),
        ("negative hold", lambda s: s.hold(good, ttl_s=-1)),
        ("negative touch", lambda s: s.touch(good, ttl_s=-1)),
        ("negative prefetch", lambda s: s.prefetch(good, by_s=-1)),
        ("timeout of get", lambda s: s.get_into(good, [buffer], timeout_s=True)),
        ("hold without an end", lambda s: s.hold(good, ttl_s=None)),
        ("submit_get", lambda s: s.submit_get([b"x"], [buffer])),
        ("submit_put", lambda s: s.submit_put(good, [b""])),
    ]
    return calls


def _put_with(keys: Any, buffers: Any, name: str, value: Any, store: Any) -> Any:
    return store.put(keys, buffers, **{name: value})


@pytest.mark.parametrize(("what", "call"), bad_calls(), ids=[name for name, _ in bad_calls()])
def test_misuse_is_a_value_error_before_anything_is_sent(
    daemon: DaemonProcess, way: Way, what: str, call: Callable[[Any], Any]
) -> None:
    async def main() -> None:
        async with open_store(way, daemon.url) as store:
            before = (await store.stats())["node"]["server"]["requests"]
            with pytest.raises(ValueError, match=r"\w") as caught:
                await call(store)
            assert not isinstance(caught.value, DeadlineExceeded)
            after = (await store.stats())["node"]["server"]["requests"]
            assert after == {**before, "stats": before["stats"] + 1}
            assert (await store.exists([bytes(16)])).tolist() == [False]

    asyncio.run(main())


@pytest.mark.parametrize("lengths", [[0], [5, -1], [64 * 1024 * KIB + 1], [1.5], ["a"]])
def test_misuse_of_alloc(daemon: DaemonProcess, way: Way, lengths: list[Any]) -> None:
    async def main() -> None:
        async with open_store(way, daemon.url) as store:
            with pytest.raises(ValueError, match="lengths"):
                async with store.alloc(lengths):
                    pass

    asyncio.run(main())


def test_messages_name_argument_and_index(daemon: DaemonProcess, way: Way) -> None:
    async def main() -> None:
        async with open_store(way, daemon.url) as store:
            good = [bytes(16), bytes(16)]
            with pytest.raises(ValueError, match="key 1 has 3 bytes"):
                await store.exists([bytes(16), b"abc"])
            with pytest.raises(ValueError, match=r"buffers\[1\] is read-only"):
                await store.get_into(good, [bytearray(4), b"abcd"])
            with pytest.raises(ValueError, match=r"ttl_s\[1\] is -2"):
                await store.put(good, [b"a", b"b"], ttl_s=[1, -2])

    asyncio.run(main())


def test_a_shard_above_the_nodes_own_limit_is_refused(daemon: DaemonProcess, way: Way) -> None:
    async def main() -> None:
        async with open_store(way, daemon.url) as store:
            keys, payloads = shards(5000)
            large = np.zeros(40 * 1024 * KIB, np.uint8)
            results = await store.put([bytes(15) + b"L", *keys], [large, *payloads])
            assert results == [PutResult.REFUSED, PutResult.COMMITTED]

    asyncio.run(main())


def test_a_closed_store_says_so(daemon: DaemonProcess, way: Way) -> None:
    async def main() -> None:
        async with open_store(way, daemon.url) as store:
            await store.close()
            with pytest.raises(ClosedError):
                await store.exists([bytes(16)])
            with pytest.raises(ClosedError):
                await store.put([bytes(16)], [b"x"])
            with pytest.raises(ClosedError):
                await store.submit_get([bytes(16)], [bytearray(1)])
            await store.close()

    asyncio.run(main())
