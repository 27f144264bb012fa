"""The client when its daemon is stopped, killed, restarted, or not there; and across forks.

Each test has a daemon of its own. What a healthy daemon must do stands in `test_client_suite`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ctxstore_client import (
    ClosedError,
    DeadlineExceeded,
    ForkedError,
    Lookup,
    PutResult,
    StaleView,
    TransportError,
    UnknownNamespace,
    connect,
    connect_async,
)
from tests.daemon_process import DaemonProcess, daemon_process
from tests.integration.client_faces import WAYS, Way, open_store
from tests.shards import is_payload_of, payload_of, shard_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

KIB = 1024
_spaces = itertools.count(1000)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with daemon_process(tmp_path / "node", memory="64MiB", disk="256MiB") as process:
        yield process


@pytest.fixture(params=WAYS, ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    return request.param


def shards(count: int, size: int) -> tuple[list[bytes], list[np.ndarray]]:
    space = next(_spaces)
    keys = [shard_key(space, number, size) for number in range(count)]
    return keys, [payload_of(key) for key in keys]


def shows(keys: list[bytes], views: Any) -> bool:
    return all(is_payload_of(k, v) for k, v in zip(keys, views, strict=True))


async def until_stored(store: Any, keys: list[bytes], payloads: list[Any]) -> list[Any]:
    """Put until the daemon takes it: it may be coming up."""
    for _ in range(200):
        results = await store.put(keys, payloads, durability="group")
        if set(results) <= {PutResult.COMMITTED, PutResult.EXISTS}:
            return results
        await asyncio.sleep(0.05)
    raise AssertionError(f"never stored: {results}")


@pytest.mark.parametrize("kill", [False, True], ids=["term", "kill"])
def test_restart_under_a_connected_client(daemon: DaemonProcess, way: Way, kill: bool) -> None:
    keys, payloads = shards(4, 100_000)
    more, more_payloads = shards(4, 5000)

    async def main() -> None:
        async with open_store(way, daemon.url) as store:
            assert await store.put(keys, payloads, durability="group") == [0] * 4
            assert await store.match(keys) == 4
            daemon.restart(kill=kill)
            # The first operation finds its connections dead and makes new ones.
            buffers = [np.zeros(100_000, np.uint8) for _ in keys]
            assert await store.get_into(keys, buffers) == [Lookup.HIT] * 4
            assert all(is_payload_of(k, b) for k, b in zip(keys, buffers, strict=True))
            assert await store.put(more, more_payloads) == [PutResult.COMMITTED] * 4
            assert (await store.exists(more)).all()

    asyncio.run(main())


def test_while_the_daemon_is_down_everything_is_quick(daemon: DaemonProcess, way: Way) -> None:
    keys, payloads = shards(4, 5000)
    buffers = [np.zeros(5000, np.uint8) for _ in keys]

    async def main() -> None:
        async with open_store(way, daemon.url) as store:
            assert await store.put(keys, payloads, durability="group") == [0] * 4
            daemon.kill()
            began = time.monotonic()
            for _ in range(20):
                assert await store.get_into(keys, buffers) == [Lookup.MISS] * 4
                assert await store.put(keys, payloads) == [PutResult.OVERLOADED] * 4
                assert not (await store.exists(keys)).any()
                assert await store.match(keys) == 0
                assert await store.stat(keys) == [None] * 4
                async with store.view(keys) as views:
                    assert list(views) == [None] * 4
            for change in (store.remove, store.hold, store.touch):
                with pytest.raises(TransportError):
                    await change(keys)
            with pytest.raises(TransportError):
                await store.flush()
            async with store.alloc([5000]) as staged:
                assert await store.put(keys[:1], staged) == [PutResult.OVERLOADED]
            assert (await store.stats())["node"] is None
            assert time.monotonic() - began < 2.0
            daemon.start()
            await until_stored(store, keys, payloads)
            assert await store.get_into(keys, buffers) == [Lookup.HIT] * 4

    asyncio.run(main())


def test_connect_before_the_daemon_is_there(tmp_path: Path, way: Way) -> None:
    with daemon_process(tmp_path / "node", start=False) as daemon:
        daemon.start()
        url = daemon.url
        daemon.stop()

        async def main() -> None:
            async with open_store(way, url) as store:
                keys, payloads = shards(2, 5000)
                assert await store.get_into(keys, [bytearray(5000)] * 2) == [Lookup.MISS] * 2
                assert await store.put(keys, payloads) == [PutResult.OVERLOADED] * 2
                daemon.start()
                await until_stored(store, keys, payloads)

        asyncio.run(main())


def test_a_stopped_daemon_costs_the_deadline_and_never_writes_late(
    daemon: DaemonProcess, way: Way
) -> None:
    keys, payloads = shards(8, 1024 * KIB)

    async def main() -> None:
        async with open_store(way, daemon.url) as store:
            assert set(await store.put(keys, payloads)) == {PutResult.COMMITTED}
            buffers = [np.zeros(1024 * KIB, np.uint8) for _ in keys]
            assert set(await store.get_into(keys, buffers)) == {Lookup.HIT}
            daemon.pause()
            try:
                began = time.monotonic()
                fresh, sources = shards(8, 1024 * KIB)
                sources = [source.copy() for source in sources]
                verdicts = await store.get_into(keys, buffers, timeout_s=0.4)
                assert Lookup.HIT not in verdicts
                assert verdicts[-1] in (Lookup.TIMEOUT, Lookup.MISS)
                for buffer in buffers:
                    buffer[:] = 7  # reused at once
                results = await store.put(fresh, sources, timeout_s=0.4)
                assert set(results) <= {PutResult.TIMEOUT, PutResult.OVERLOADED}
                for source in sources:
                    source[:] = 9
                assert not (await store.exists(keys, timeout_s=0.4)).any()
                with pytest.raises((DeadlineExceeded, TransportError)):
                    await store.flush(timeout_s=0.4)
                assert time.monotonic() - began < 4 * 0.4 + 1.5
            finally:
                daemon.resume()
            await until_stored(store, *shards(1, 5000))
            assert all((buffer == 7).all() for buffer in buffers)
            # A put of which nobody knows the outcome stored the right bytes or none.
            back = [np.zeros(1024 * KIB, np.uint8) for _ in fresh]
            for verdict, key, buffer in zip(
                await store.get_into(fresh, back), fresh, back, strict=True
            ):
                assert verdict != Lookup.HIT or is_payload_of(key, buffer)

    asyncio.run(main())


def test_a_stopped_daemon_does_not_hold_up_every_call_for_ever(daemon: DaemonProcess) -> None:
    with connect(daemon.url, timeout_s=0.5) as store:
        keys, payloads = shards(1, 5000)
        store.put(keys, payloads)
        daemon.pause()
        try:
            waits = []
            for _ in range(12):
                began = time.monotonic()
                assert store.get_into(keys, [bytearray(5000)])[0] != Lookup.HIT
                waits.append(time.monotonic() - began)
            assert max(waits) < 1.0
            assert min(waits[6:]) < 0.1, "the breaker answers without waiting"
        finally:
            daemon.resume()
        until = time.monotonic() + 10
        while store.get_into(keys, [bytearray(5000)]) != [Lookup.HIT]:
            assert time.monotonic() < until


def test_a_view_over_a_restart_is_stale_but_readable(daemon: DaemonProcess) -> None:
    keys, payloads = shards(2, 100_000)
    with connect(daemon.url, shm="require") as store:
        store.put(keys, payloads, durability="group")
        view = store.view(keys)
        views: Any = view.__enter__()
        daemon.restart(kill=True)
        with store.view(keys) as again:
            assert shows(keys, again)
        assert shows(keys, views)
        with pytest.raises(StaleView):
            view.__exit__(None, None, None)
        assert _maps_of("arena") <= 1, "the old arena is unmapped with its last view"


def test_a_view_past_the_longest_lease_is_stale(tmp_path: Path) -> None:
    arguments = ("--set", "limits.lease_s_max=500ms", "--set", "limits.lease_check_s=100ms")
    with daemon_process(tmp_path / "node", arguments=arguments) as daemon:
        keys, payloads = shards(2, 100_000)
        with connect(daemon.url, shm="require") as store:
            store.put(keys, payloads)
            with store.view(keys) as views:
                assert shows(keys, views)
            view = store.view(keys)
            views = view.__enter__()
            time.sleep(1.2)
            assert shows(keys, views), "the daemon took the lease, not the bytes under a reader"
            with pytest.raises(StaleView):
                views.check()
            with pytest.raises(StaleView):
                view.__exit__(None, None, None)
            with store.view(keys) as views:
                assert shows(keys, views)


def test_closing_the_store_under_an_open_view(daemon: DaemonProcess, way: Way) -> None:
    keys, payloads = shards(2, 100_000)

    async def main() -> None:
        async with open_store(way, daemon.url) as store:
            await store.put(keys, payloads)
            view = store.view(keys)
            views = await view.__aenter__()
            await store.close()
            assert shows(keys, views), "its memory stays until the block ends"
            with contextlib.suppress(StaleView):
                await view.__aexit__(None, None, None)
        assert _maps_of("arena") == 0

    asyncio.run(main())


def test_closing_the_store_under_running_operations(daemon: DaemonProcess) -> None:
    keys, payloads = shards(4, 1024 * KIB)
    for shm in ("require", "off"):
        done = threading.Event()
        with connect(daemon.url, shm=shm) as store:
            store.put(keys, payloads)

            def work(store: Any = store, done: threading.Event = done) -> None:
                buffers = [np.zeros(1024 * KIB, np.uint8) for _ in keys]
                with contextlib.suppress(ClosedError):
                    while True:
                        verdicts = store.get_into(keys, buffers)
                        assert set(verdicts) <= {Lookup.HIT, Lookup.MISS}
                done.set()

            thread = threading.Thread(target=work)
            thread.start()
            time.sleep(0.1)
            store.close()
            assert done.wait(5)
            thread.join()


def _maps_of(name: str) -> int:
    with open("/proc/self/maps", encoding="utf-8") as lines:
        return sum(f"memfd:ctxstore-{name}" in line for line in lines)


def test_everything_is_unmapped_at_close(daemon: DaemonProcess) -> None:
    with connect(daemon.url, shm="require") as store:
        keys, payloads = shards(2, 5000)
        store.put(keys, payloads)
        store.get_into(keys, [bytearray(5000)] * 2)
        assert _maps_of("arena") == 1
        assert _maps_of("staging") == 1
    assert _maps_of("arena") == 0
    assert _maps_of("staging") == 0


@pytest.mark.parametrize("kill", [False, True], ids=["term", "kill"])
def test_alloc_over_a_restart(daemon: DaemonProcess, way: Way, kill: bool) -> None:
    keys, payloads = shards(2, 100_000)
    others, other_payloads = shards(1, 5000)

    async def main() -> None:
        async with open_store(way, daemon.url) as store:
            async with store.alloc([100_000] * 2) as staged:
                for view, payload in zip(staged, payloads, strict=True):
                    np.copyto(np.frombuffer(view, np.uint8), payload)
                daemon.restart(kill=kill)
                for _ in range(5):
                    results = await store.put([*keys, *others], [*staged, *other_payloads])
                    if way.shm == "require":
                        # Its other side is gone, and perhaps its content: never stored again.
                        assert set(results[:2]) <= {PutResult.TIMEOUT, PutResult.OVERLOADED}
                    else:
                        assert set(results[:2]) <= {PutResult.COMMITTED, PutResult.EXISTS}
                    assert results[2] in (PutResult.COMMITTED, PutResult.EXISTS)
            async with store.alloc([100_000] * 2) as again:
                for view, payload in zip(again, payloads, strict=True):
                    np.copyto(np.frombuffer(view, np.uint8), payload)
                assert set(await store.put(keys, again)) <= {PutResult.COMMITTED, PutResult.EXISTS}
            buffers = [np.zeros(100_000, np.uint8) for _ in keys]
            assert await store.get_into(keys, buffers) == [Lookup.HIT] * 2
            assert shows(keys, buffers)

    asyncio.run(main())


def test_staged_buffers_reused_after_a_time_out_change_nothing(
    daemon: DaemonProcess, way: Way
) -> None:
    """The daemon wakes up with the put in its socket: it must not read what was written since."""
    keys, payloads = shards(4, 500_000)

    async def main() -> None:
        async with (
            open_store(way, daemon.url) as store,
            store.alloc([500_000] * 4) as staged,
        ):
            arrays = [np.frombuffer(view, np.uint8) for view in staged]
            for array, payload in zip(arrays, payloads, strict=True):
                np.copyto(array, payload)
            daemon.pause()
            try:
                results = await store.put(keys, staged, timeout_s=0.3)
                assert set(results) <= {PutResult.TIMEOUT, PutResult.OVERLOADED}
                for array in arrays:
                    array[:] = 9
            finally:
                daemon.resume()
            await until_stored(store, *shards(1, 5000))
            await asyncio.sleep(0.2)
            back = [np.zeros(500_000, np.uint8) for _ in keys]
            for verdict, key, buffer in zip(
                await store.get_into(keys, back), keys, back, strict=True
            ):
                assert verdict != Lookup.HIT or is_payload_of(key, buffer)

    asyncio.run(main())


def test_unknown_namespace_and_token(daemon: DaemonProcess) -> None:
    with pytest.raises(UnknownNamespace):
        connect(daemon.url, namespace="nobody-made-this")

    async def main() -> None:
        with pytest.raises(UnknownNamespace):
            async with connect_async(daemon.url, namespace="nobody-made-this"):
                pass

    asyncio.run(main())


def test_a_second_host_takes_over(tmp_path: Path, way: Way) -> None:
    with (
        daemon_process(tmp_path / "a", memory="32MiB", disk="64MiB") as first,
        daemon_process(tmp_path / "b", memory="32MiB", disk="64MiB") as second,
    ):
        both = f"{first.url},{second.url.removeprefix('ctxstore://')}"
        ids = [d.endpoints.node_id for d in (first, second) if d.endpoints is not None]

        async def main() -> None:
            async with open_store(way, both) as store:
                keys, payloads = shards(1, 5000)
                await store.put(keys, payloads)
                assert (await store.stats())["node"]["node"]["id"] == ids[0]
                first.kill()
                await until_stored(store, keys, payloads)
                assert (await store.stats())["node"]["node"]["id"] == ids[1]

        asyncio.run(main())


# ---------------------------------------------------------------- processes and threads


def in_child(work: Callable[[], None]) -> None:
    """Run in a forked child; fails here if it raised there."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - shown by the parent
            with contextlib.suppress(OSError):
                os.write(writing, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, said


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("shm", ["require", "off"])
def test_a_forked_child_makes_its_own_connections(daemon: DaemonProcess, shm: str) -> None:
    keys, payloads = shards(3, 100_000)
    with connect(daemon.url, shm=shm) as store:
        store.put(keys, payloads)
        ticket = store.submit_get(keys, [bytearray(100_000) for _ in keys])
        ticket.wait()
        with store.view(keys) as views, store.alloc([100]) as staged:

            def child() -> None:
                for lent in (views, staged):
                    with pytest.raises(ForkedError):
                        lent[0]
                with pytest.raises(ForkedError):
                    ticket.wait()
                buffers = [np.zeros(100_000, np.uint8) for _ in keys]
                assert store.get_into(keys, buffers) == [Lookup.HIT] * 3
                assert all(is_payload_of(k, b) for k, b in zip(keys, buffers, strict=True))
                assert store.put(*shards(1, 5000)) == [PutResult.COMMITTED]
                with store.view(keys) as own:
                    assert shows(keys, own)
                assert store.submit_get(keys, buffers).wait(10) == [Lookup.HIT] * 3
                store.close()

            in_child(child)
            # The child took nothing of the parent's with it.
            assert shows(keys, views)
            assert store.exists(keys).all()
            assert store.put(*shards(1, 100)) == [PutResult.COMMITTED]
        assert store.get_into(keys, [bytearray(100_000) for _ in keys]) == [Lookup.HIT] * 3


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_fork_while_other_threads_are_busy(daemon: DaemonProcess) -> None:
    keys, payloads = shards(3, 100_000)
    stop = threading.Event()
    with connect(daemon.url) as store:
        store.put(keys, payloads)

        def work() -> None:
            buffers = [bytearray(100_000) for _ in keys]
            while not stop.is_set():
                assert store.get_into(keys, buffers) == [Lookup.HIT] * 3

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:

            def child() -> None:
                buffers = [np.zeros(100_000, np.uint8) for _ in keys]
                assert store.get_into(keys, buffers) == [Lookup.HIT] * 3
                assert is_payload_of(keys[2], buffers[2])

            for _ in range(5):
                in_child(child)
        finally:
            stop.set()
            for thread in threads:
                thread.join()


@pytest.mark.parametrize("shm", ["require", "off"])
def test_many_threads_share_a_store(daemon: DaemonProcess, shm: str) -> None:
    wrong: list[Any] = []
    with connect(daemon.url, shm=shm, timeout_s=20.0) as store:

        def work() -> None:
            try:
                for size in (10, 5000, 200_000, 70_000):
                    keys, payloads = shards(5, size)
                    assert set(store.put(keys, payloads)) == {PutResult.COMMITTED}
                    buffers = [np.zeros(size, np.uint8) for _ in keys]
                    assert set(store.get_into(keys, buffers)) == {Lookup.HIT}
                    assert all(is_payload_of(k, b) for k, b in zip(keys, buffers, strict=True))
                    with store.view(keys) as views:
                        assert shows(keys, views)
                    assert store.match(keys) == 5
            except BaseException as error:  # noqa: BLE001 - shown by the main thread
                wrong.append(error)

        threads = [threading.Thread(target=work) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_many_stores_share_little_staging(daemon: DaemonProcess) -> None:
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(connect(daemon.url, shm="require")) for _ in range(8)]
        for store in stores:  # the first ones keep what staging there is
            keys, payloads = shards(4, 500_000)
            assert store.put(keys, payloads) == [PutResult.COMMITTED] * 4
            buffers = [np.zeros(500_000, np.uint8) for _ in keys]
            assert store.get_into(keys, buffers) == [Lookup.HIT] * 4
            assert shows(keys, buffers)


def test_gather_on_one_loop(daemon: DaemonProcess) -> None:
    async def one(store: Any, size: int) -> None:
        keys, payloads = shards(5, size)
        assert set(await store.put(keys, payloads)) == {PutResult.COMMITTED}
        buffers = [np.zeros(size, np.uint8) for _ in keys]
        assert set(await store.get_into(keys, buffers)) == {Lookup.HIT}
        assert all(is_payload_of(k, b) for k, b in zip(keys, buffers, strict=True))

    async def main() -> None:
        for shm in ("require", "off"):
            async with connect_async(daemon.url, shm=shm, timeout_s=20.0) as store:
                await asyncio.gather(*(one(store, 1000 + 20_000 * n) for n in range(16)))

    asyncio.run(main())


@pytest.mark.parametrize("shm", ["require", "off"])
def test_random_cancellation_leaves_a_working_store(daemon: DaemonProcess, shm: str) -> None:
    keys, payloads = shards(8, 500_000)
    random = np.random.default_rng(5)

    async def main() -> None:
        async with connect_async(daemon.url, shm=shm, timeout_s=20.0) as store:
            assert set(await store.put(keys, payloads)) == {PutResult.COMMITTED}
            for _ in range(40):
                buffers = [np.zeros(500_000, np.uint8) for _ in keys]
                task = asyncio.create_task(store.get_into(keys, buffers))
                await asyncio.sleep(random.random() * 0.006)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                for buffer in buffers:
                    buffer[:] = 7
                await asyncio.sleep(0)
                assert all((buffer == 7).all() for buffer in buffers)
            buffers = [np.zeros(500_000, np.uint8) for _ in keys]
            assert set(await store.get_into(keys, buffers)) == {Lookup.HIT}
            assert all(is_payload_of(k, b) for k, b in zip(keys, buffers, strict=True))

    asyncio.run(main())


@pytest.mark.slow
def test_a_million_keys(daemon: DaemonProcess, way: Way) -> None:
    count = 1_000_000
    keys = np.zeros((count, 16), np.uint8)
    keys[:, :4] = np.arange(count, dtype="<u4").view(np.uint8).reshape(-1, 4)
    keys[:, 15] = 1 + WAYS.index(way)

    async def main() -> None:
        async with open_store(way, daemon.url, timeout_s=60.0) as store:
            assert not (await store.exists(keys)).any()
            assert await store.match(keys) == 0
            stored = keys[:70_000]
            payloads = [row for row in stored]
            assert set(await store.put(stored, payloads)) == {PutResult.COMMITTED}
            assert await store.match(keys) == 70_000
            found = await store.exists(keys)
            assert found[:70_000].all()
            assert not found[70_000:].any()
            back = np.zeros((count, 16), np.uint8)
            verdicts = await store.get_into(keys, back)
            assert verdicts.count(Lookup.HIT) == 70_000
            assert np.array_equal(back[:70_000], stored)

    asyncio.run(main())
