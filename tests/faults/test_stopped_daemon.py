"""SIGSTOP of the daemon for longer than its clients are willing to wait, then SIGCONT.

Every call returns by its deadline; what the caller got back is his: nothing is written there later,
and nothing that he writes there is stored.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest

from ctxstore.errors import CtxStoreError, DeadlineExceeded
from ctxstore.wire.messages import Lookup, PutResult
from ctxstore_client import connect, connect_async
from tests.daemon_process import DaemonProcess, daemon_process
from tests.faults.nodes import figure, hits, make_keys, put_all, until
from tests.shards import is_payload_of, payload_of, shard_length

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE_S: Final = 0.4
TOLERANCE_S: Final = 1.0
PATTERN: Final = 0x3C
LENGTH: Final = 1_500_000
KEYS: Final = make_keys(1, 12, LENGTH)
SMALL: Final = make_keys(2, 8, 900)

pytestmark = pytest.mark.parametrize("shm", ["auto", "off"])


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    directory = tmp_path_factory.mktemp("stopped")
    with daemon_process(directory / "data", memory="128MiB", disk="512MiB") as daemon:
        with connect(daemon.url) as store:
            assert set(put_all(store, [*KEYS, *SMALL])) == {PutResult.COMMITTED}
            store.flush()
        yield daemon


@contextmanager
def warm_store(daemon: DaemonProcess, shm: str) -> Iterator[Any]:
    """A store that has used every kind of connection it has; the daemon runs afterwards."""
    with connect(daemon.url, shm=shm, timeout_s=DEADLINE_S) as store:
        assert all(hits_patiently(store, [*KEYS[:2], *SMALL[:1]]))
        put_all(store, KEYS[:1], timeout_s=5)
        try:
            yield store
        finally:
            daemon.resume()


def hits_patiently(store: Any, keys: list[bytes]) -> list[bool]:
    buffers = [np.zeros(shard_length(key), np.uint8) for key in keys]
    statuses = store.get_into(keys, buffers, timeout_s=5)
    for key, status, buffer in zip(keys, statuses, buffers, strict=True):
        assert status is not Lookup.HIT or is_payload_of(key, buffer)
    assert set(statuses) <= {Lookup.HIT, Lookup.MISS}, statuses
    return [status is Lookup.HIT for status in statuses]


@contextmanager
def by_deadline(deadline_s: float = DEADLINE_S) -> Iterator[None]:
    began = time.monotonic()
    yield
    took_s = time.monotonic() - began
    assert took_s < deadline_s + TOLERANCE_S, f"{took_s:.2f} s for a deadline of {deadline_s} s"


def works_again(store: Any, space: int) -> None:
    """After SIGCONT the same store serves everything."""
    until(lambda: store.exists(KEYS[:1], timeout_s=5).all(), what="the store answers again")
    assert all(hits_patiently(store, [*KEYS, *SMALL]))
    fresh = make_keys(space, 3, LENGTH)
    results = put_all(store, fresh, durability="group", timeout_s=5)
    assert set(results) <= {PutResult.COMMITTED, PutResult.EXISTS}, results
    assert all(hits_patiently(store, fresh))
    until(lambda: figure(store, "leases") == 0, what="no lease is left")


def test_gets_return_and_write_nothing_later(daemon: DaemonProcess, shm: str) -> None:
    keys = [*KEYS, *SMALL]
    with warm_store(daemon, shm) as store:
        daemon.pause()
        kept: list[np.ndarray[Any, Any]] = []
        for _ in range(3):
            buffers = [np.zeros(shard_length(key), np.uint8) for key in keys]
            with by_deadline():
                statuses = store.get_into(keys, buffers, timeout_s=DEADLINE_S)
            assert set(statuses) <= {Lookup.TIMEOUT, Lookup.MISS}, statuses
            for buffer in buffers:
                buffer[:] = PATTERN
            kept += buffers
        daemon.resume()
        works_again(store, 11 if shm == "auto" else 12)
        time.sleep(0.3)
        for buffer in kept:
            assert (buffer == PATTERN).all(), "written after the verdict"


def test_gets_that_are_stopped_half_way(daemon: DaemonProcess, shm: str) -> None:
    rng = random.Random(4)
    kept: list[np.ndarray[Any, Any]] = []
    with warm_store(daemon, shm) as store:
        for _ in range(6):
            buffers = [np.zeros(LENGTH, np.uint8) for _ in KEYS]
            timer = threading.Timer(rng.uniform(0, 0.015), daemon.pause)
            timer.start()
            with by_deadline():
                statuses = store.get_into(KEYS, buffers, timeout_s=DEADLINE_S)
            timer.join()
            for key, status, buffer in zip(KEYS, statuses, buffers, strict=True):
                if status is Lookup.HIT:
                    assert is_payload_of(key, buffer)
                else:
                    buffer[:] = PATTERN
                    kept.append(buffer)
            daemon.resume()
        works_again(store, 13 if shm == "auto" else 14)
        for buffer in kept:
            assert (buffer == PATTERN).all(), "written after the verdict"


def test_puts_give_their_buffers_back(daemon: DaemonProcess, shm: str) -> None:
    """What the caller writes into a buffer he got back is never stored under the key."""
    base = 20 if shm == "auto" else 30
    rng = random.Random(5)
    sent: list[bytes] = []
    with warm_store(daemon, shm) as store:
        for turn in range(5):
            keys = make_keys(base + turn, 8, LENGTH)
            sources = [payload_of(key).copy() for key in keys]
            # At once, or somewhere in the middle of the transfer.
            timer = threading.Timer(rng.uniform(0, 0.01) if turn else 0.0, daemon.pause)
            timer.start()
            if not turn:
                timer.join()
            with by_deadline():
                results = store.put(keys, sources, durability="group", timeout_s=DEADLINE_S)
            timer.join()
            for source in sources:
                source[:] = PATTERN
            assert PutResult.REFUSED not in results, results
            sent += keys
            daemon.resume()
            surely_not = [k for k, r in zip(keys, results, strict=True) if r.name == "OVERLOADED"]
            until(lambda: store.exists(KEYS[:1], timeout_s=5).all(), what="answers again")
            assert not any(hits_patiently(store, surely_not)), "OVERLOADED: surely not stored"
        time.sleep(0.3)
        hits_patiently(store, sent)
        # Also what went to the disk: a store of its own sees the same.
        with connect(daemon.url, shm="off") as other:
            hits(other, sent)
        results = put_all(store, sent, durability="group", timeout_s=20)
        assert set(results) <= {PutResult.COMMITTED, PutResult.EXISTS}, results
        assert all(hits_patiently(store, sent))
        assert store.remove(sent, timeout_s=5).all()


def test_questions_and_changes_return(daemon: DaemonProcess, shm: str) -> None:
    with warm_store(daemon, shm) as store:
        daemon.pause()
        ticket = store.submit_get(KEYS, [np.zeros(LENGTH, np.uint8) for _ in KEYS])
        with by_deadline(0.1), pytest.raises(DeadlineExceeded):
            ticket.wait(0.1)
        with by_deadline(0):
            ticket.cancel()
        assert ticket.done()
        with by_deadline():
            assert not store.exists(KEYS).any()
        with by_deadline():
            assert store.match(KEYS) == 0
        with by_deadline():
            assert store.stat(KEYS) == [None] * len(KEYS)
        with by_deadline(), store.view(KEYS) as views:
            assert list(views) == [None] * len(KEYS)
        with by_deadline():
            assert store.stats()["node"] is None
        changes: list[Callable[[], Any]] = [
            lambda: store.remove(make_keys(3, 1, 5)),
            lambda: store.hold(SMALL, ttl_s=1),
            lambda: store.touch(SMALL, ttl_s=50),
            store.flush,
            lambda: store.explain(SMALL),
        ]
        for change in changes:
            with by_deadline(), pytest.raises(CtxStoreError) as caught:
                change()
            assert caught.value.retryable, caught.value
        daemon.resume()
        works_again(store, 40 if shm == "auto" else 41)


def test_new_clients_of_a_stopped_daemon(daemon: DaemonProcess, shm: str) -> None:
    daemon.pause()
    try:
        with by_deadline(), connect(daemon.url, shm=shm, timeout_s=DEADLINE_S) as store:
            buffers = [np.zeros(LENGTH, np.uint8)]
            for _ in range(4):
                with by_deadline():
                    assert store.get_into(KEYS[:1], buffers)[0] in (Lookup.MISS, Lookup.TIMEOUT)
                with by_deadline():
                    (result,) = put_all(store, make_keys(42, 1, LENGTH))
                    assert result in (PutResult.OVERLOADED, PutResult.TIMEOUT)
            daemon.resume()
            works_again(store, 43 if shm == "auto" else 44)
    finally:
        daemon.resume()


def test_the_asynchronous_face_returns_as_well(daemon: DaemonProcess, shm: str) -> None:
    async def run() -> None:
        async with await connect_async(daemon.url, shm=shm, timeout_s=DEADLINE_S) as store:
            buffers = [np.zeros(LENGTH, np.uint8) for _ in KEYS]
            assert set(await store.get_into(KEYS, buffers, timeout_s=5)) == {Lookup.HIT}
            daemon.pause()
            try:
                with by_deadline():
                    gets = store.get_into(KEYS, buffers)
                    puts = store.put(make_keys(45, 2, LENGTH), [payload_of(KEYS[0])] * 2)
                    statuses, results = await asyncio.gather(gets, puts)
                for buffer in buffers:
                    buffer[:] = PATTERN
                assert set(statuses) <= {Lookup.MISS, Lookup.TIMEOUT}
                assert set(results) <= {PutResult.OVERLOADED, PutResult.TIMEOUT}
                with by_deadline():
                    assert not (await store.exists(KEYS)).any()
            finally:
                daemon.resume()
            end = time.monotonic() + 5
            while not (await store.exists(KEYS, timeout_s=5)).all():
                assert time.monotonic() < end
                await asyncio.sleep(0.02)
            assert all((buffer == PATTERN).all() for buffer in buffers), "a late write"
            assert set(await store.get_into(KEYS, buffers, timeout_s=5)) == {Lookup.HIT}

    asyncio.run(run())
