"""The daemon goes away and comes back under clients that stay connected.

Same ports, same objects: misses meanwhile, hits afterwards, never an exception out of get or put.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctxstore.errors import CtxStoreError, StaleView
from ctxstore.wire.messages import Lookup, PutResult
from ctxstore_client import connect
from tests.crash.oracle import wait_until_up
from tests.daemon_process import daemon_process
from tests.faults.nodes import hits, lookups, make_keys, put_all
from tests.shards import is_payload_of, payload_of, shard_length

LARGE = make_keys(1, 4, 700_000)
SMALL = make_keys(2, 4, 600)
KEYS = [*LARGE, *SMALL]


@pytest.mark.parametrize("shm", ["auto", "off"])
@pytest.mark.parametrize("kill", [True, False])
def test_misses_while_it_is_down_and_hits_afterwards(tmp_path: Path, shm: str, kill: bool) -> None:
    with (
        daemon_process(tmp_path / "data") as daemon,
        connect(daemon.url, shm=shm, timeout_s=2) as store,
    ):
        assert set(put_all(store, KEYS, durability="group")) == {PutResult.COMMITTED}
        written_behind = make_keys(3, 3, 70_000)
        assert set(put_all(store, written_behind)) == {PutResult.COMMITTED}
        for _ in range(2):
            if kill:
                store.flush()
                daemon.kill()
            else:
                assert daemon.stop() == 0
            for _ in range(3):
                began = time.monotonic()
                assert set(lookups(store, KEYS)) == {Lookup.MISS}
                results = put_all(store, make_keys(4, 2, 5000), durability="group")
                # The first put may find out only after it was sent.
                assert set(results) <= {PutResult.OVERLOADED, PutResult.TIMEOUT}, results
                assert not store.exists(KEYS).any()
                assert store.match(KEYS) == 0
                assert time.monotonic() - began < 2.5, "nobody answers: no reason to wait"
            daemon.start()
            wait_until_up(store)
            assert all(hits(store, KEYS))
            assert all(hits(store, written_behind)), "a clean stop and a flush both write them"
        assert set(put_all(store, make_keys(4, 2, 5000))) <= {
            PutResult.COMMITTED,
            PutResult.EXISTS,
        }


def test_open_views_outlive_the_daemon(tmp_path: Path) -> None:
    with daemon_process(tmp_path / "data") as daemon, connect(daemon.url, timeout_s=2) as store:
        put_all(store, KEYS, durability="group")
        opened = store.view(KEYS)
        views = opened.__enter__()
        for _ in range(2):
            daemon.restart(kill=True)
            wait_until_up(store)
            # Its writer is dead: the old memory stays as it was.
            check_views(views)
            with store.view(KEYS) as fresh:
                check_views(fresh)
            put_all(store, make_keys(5, 20, 500_000))
        with pytest.raises(StaleView):
            opened.__exit__(None, None, None)
        assert all(hits(store, KEYS))
        assert _arenas_mapped() == 1, "the maps of dead daemons are gone"


def check_views(views: Any) -> None:
    for key, view in zip(KEYS, views, strict=True):
        assert view is not None
        assert is_payload_of(key, view)


def _arenas_mapped() -> int:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum("ctxstore-arena" in line for line in lines)


@pytest.mark.parametrize("shm", ["auto", "off"])
def test_staged_buffers_of_a_dead_daemon_can_be_filled_and_are_not_stored(
    tmp_path: Path, shm: str
) -> None:
    with (
        daemon_process(tmp_path / "data") as daemon,
        connect(daemon.url, shm=shm, timeout_s=2) as store,
    ):
        put_all(store, KEYS, durability="group")
        fresh = make_keys(6, 3, 400_000)
        with store.alloc([shard_length(key) for key in fresh]) as staged:
            daemon.kill()
            for key, memory in zip(fresh, staged, strict=True):
                assert memory is not None
                memory[:] = payload_of(key).data
            results = store.put(fresh, staged, durability="group")
            assert set(results) <= {PutResult.OVERLOADED, PutResult.TIMEOUT}, results
            daemon.start()
            wait_until_up(store)
            for key, memory in zip(fresh, staged, strict=True):
                assert memory is not None
                memory[:] = payload_of(key).data
            results = store.put(fresh, staged, durability="group")
            stored = [r in (PutResult.COMMITTED, PutResult.EXISTS) for r in results]
            assert hits(store, fresh) == stored, results
        assert all(hits(store, KEYS))
        with store.alloc([shard_length(key) for key in fresh]) as staged:
            for key, memory in zip(fresh, staged, strict=True):
                assert memory is not None
                memory[:] = payload_of(key).data
            assert set(store.put(fresh, staged)) <= {PutResult.COMMITTED, PutResult.EXISTS}
        assert all(hits(store, fresh))


@pytest.mark.parametrize("shm", ["auto", "off"])
def test_tickets_fail_cleanly(tmp_path: Path, shm: str) -> None:
    with (
        daemon_process(tmp_path / "data") as daemon,
        connect(daemon.url, shm=shm, timeout_s=5) as store,
    ):
        put_all(store, KEYS, durability="group")
        buffers = [np.zeros(shard_length(key), np.uint8) for key in KEYS]
        fresh = make_keys(7, 4, 700_000)
        daemon.pause()
        get = store.submit_get(KEYS, buffers)
        put = store.submit_put(fresh, [payload_of(key) for key in fresh], durability="group")
        prefetch = store.prefetch(KEYS)
        time.sleep(0.2)
        assert not get.done()
        daemon.kill()
        began = time.monotonic()
        assert set(get.wait(6)) <= {Lookup.MISS, Lookup.TIMEOUT}
        assert set(put.wait(6)) <= {PutResult.OVERLOADED, PutResult.TIMEOUT}
        assert prefetch.wait(6) == 0
        assert time.monotonic() - began < 2, "a dead daemon is known to be dead"
        assert get.done()
        assert put.done()
        daemon.start()
        wait_until_up(store)
        get = store.submit_get(KEYS, buffers)
        assert set(get.wait(6)) == {Lookup.HIT}
        for key, buffer in zip(KEYS, buffers, strict=True):
            assert is_payload_of(key, buffer)


def test_changes_raise_what_can_be_tried_again(tmp_path: Path) -> None:
    with daemon_process(tmp_path / "data") as daemon, connect(daemon.url, timeout_s=2) as store:
        put_all(store, KEYS, durability="group")
        daemon.kill()
        for change in (
            lambda: store.remove(KEYS[:1]),
            lambda: store.hold(KEYS[:1]),
            lambda: store.touch(KEYS[:1], ttl_s=5),
            store.flush,
        ):
            with pytest.raises(CtxStoreError) as caught:
                change()
            assert caught.value.retryable
        daemon.start()
        wait_until_up(store)
        assert store.remove(KEYS[:1]).all()
        daemon.restart(kill=True)
        wait_until_up(store)
        assert hits(store, KEYS) == [False] + [True] * (len(KEYS) - 1)


def test_a_clean_stop_under_load_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    """SIGTERM writes what was committed in memory; clients see misses, no errors."""
    with (
        daemon_process(tmp_path / "data", memory="128MiB") as daemon,
        connect(daemon.url, timeout_s=2) as store,
    ):
        kept: list[bytes] = []
        tickets: list[tuple[list[bytes], Any]] = []
        for turn in range(12):
            keys = make_keys(8, 4, 300_000, first=4 * turn)
            ticket = store.submit_put(
                keys,
                [payload_of(key) for key in keys],
                durability=("group", "memory")[turn % 2],
            )
            tickets.append((keys, ticket))
        time.sleep(0.05)
        assert daemon.stop() == 0
        assert not (daemon.directory / "endpoints.json").exists()
        for keys, ticket in tickets:
            results = ticket.wait(5)
            kept += [
                key
                for key, result in zip(keys, results, strict=True)
                if result is PutResult.COMMITTED
            ]
        assert kept, "some were acknowledged before the signal"
        daemon.start()
        wait_until_up(store)
        assert all(hits(store, kept))
