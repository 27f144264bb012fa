"""The measured paths of one node that need no disk ceiling: shared memory, metadata, TCP.

Owns one function per path; each returns a Row. Bytes are verified after every timed pass, outside
of it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

import ctxstore_client
from ctxstore_client import Lookup, PutResult
from ctxstore_client.benchmark.ceilings import TcpCeiling, copy_ceiling
from ctxstore_client.benchmark.dataset import Dataset, WrongBytes
from ctxstore_client.benchmark.harness import (
    Row,
    Sample,
    Stopwatch,
    interleave,
    latencies_us,
    latency_row,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ctxstore_client import Store
    from ctxstore_client.benchmark.node import BenchNode

MIB = 1024 * 1024
OP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard to try: rounds of each throughput row, calls and rounds of each latency row."""

    rounds: int
    calls: int
    latency_rounds: int


def put_all(store: Store, data: Dataset, durability: Literal["memory", "group"] = "memory") -> None:
    """Put and insist that every shard was stored."""
    results = store.put(
        data.keys, list(data.payloads), durability=durability, timeout_s=OP_TIMEOUT_S
    )
    bad = [r.name for r in results if r not in (PutResult.COMMITTED, PutResult.EXISTS)]
    if bad:
        raise RuntimeError(f"{len(bad)} of {len(results)} puts failed, the first with {bad[0]}")


def get_all(store: Store, data: Dataset, buffers: list[np.ndarray]) -> None:
    """Get and insist on hits; does not look at the bytes."""
    lookups = store.get_into(data.keys, buffers, timeout_s=OP_TIMEOUT_S)
    bad = [found.name for found in lookups if found is not Lookup.HIT]
    if bad:
        raise WrongBytes(f"{len(bad)} of {len(lookups)} gets were no hits, the first {bad[0]}")


def same_host_get(
    node: BenchNode, key: str, *, shape: tuple[int, int], target: float, effort: Effort
) -> Row:
    """get_into of warm shards through shared memory, beside one np.copyto of as many bytes."""
    data = Dataset.make(*shape, seed=11)
    buffers = [np.zeros(shape[1], np.uint8) for _ in range(shape[0])]
    watch = Stopwatch([node.pid])
    with ctxstore_client.connect(node.address, shm="require") as store:
        put_all(store, data)

        def work() -> int:
            get_all(store, data, buffers)
            return data.total_bytes

        def subject() -> Sample:
            for buffer in buffers:
                buffer.fill(0)
            sample = watch.measure(work)
            data.check(buffers)
            return sample

        row = interleave(subject, copy_ceiling(data.total_bytes), rounds=effort.rounds).row(
            key, target
        )
        store.remove(data.keys)
    return row


def same_host_put(node: BenchNode, key: str, *, staged: bool, target: float, effort: Effort) -> Row:
    """put of 32 shards of 2 MiB through shared memory: from any buffer, or from `alloc` views
    already
    filled."""
    data = Dataset.make(32, 2 * MIB, seed=12)
    watch = Stopwatch([node.pid])
    turn = iter(range(1_000_000))
    with ctxstore_client.connect(node.address, shm="require") as store:

        def subject() -> Sample:
            fresh = data.rekeyed(next(turn))
            with ExitStack() as stack:
                buffers: list[np.ndarray] = list(fresh.payloads)
                if staged:
                    views = stack.enter_context(store.alloc([2 * MIB] * 32))
                    buffers = [np.frombuffer(view, np.uint8) for view in views if view is not None]
                    for view, payload in zip(buffers, fresh.payloads, strict=True):
                        np.copyto(view, payload)
                results: list[PutResult] = []

                def work() -> int:
                    results.extend(store.put(fresh.keys, buffers, timeout_s=OP_TIMEOUT_S))
                    return fresh.total_bytes

                sample = watch.measure(work)
                buffers.clear()
            if any(result is not PutResult.COMMITTED for result in results):
                raise RuntimeError(f"a put was not committed: {results}")
            back = [np.zeros(2 * MIB, np.uint8) for _ in range(32)]
            get_all(store, fresh, back)
            fresh.check(back)
            store.remove(fresh.keys, timeout_s=OP_TIMEOUT_S)
            return sample

        return interleave(subject, copy_ceiling(data.total_bytes), rounds=effort.rounds).row(
            key, target
        )


def metadata(node: BenchNode, wanted: Callable[[str], bool], effort: Effort) -> list[Row]:
    """Round trips without payload: exists of 32 and 256 keys, match of 400, a view of 32 shards
    of 2
    MiB."""
    small = Dataset.make(400, 4096, seed=13)
    large = Dataset.make(32, 2 * MIB, seed=14)
    rows: list[Row] = []
    with ctxstore_client.connect(node.address, shm="require") as store:
        put_all(store, small)
        put_all(store, large)
        if not store.exists(small.keys).all() or store.match(small.keys) != 400:
            raise WrongBytes("keys that were put are not found")

        def view() -> None:
            with store.view(large.keys) as views:
                assert len(views) == 32

        with store.view(large.keys) as views:
            large.check(views)
        keys_32, keys_256 = small.keys[:32].copy(), small.keys[:256].copy()
        calls: list[tuple[str, Callable[[], object], float]] = [
            ("rpc_32", lambda: store.exists(keys_32), 60),
            ("rpc_256", lambda: store.exists(keys_256), 250),
            ("match_400", lambda: store.match(small.keys), 400),
            ("view_32", view, 300),
        ]
        for key, call, target_us in calls:
            if wanted(key):
                rows.append(
                    latency_row(
                        key,
                        call,
                        target_us=target_us,
                        calls=effort.calls,
                        rounds=effort.latency_rounds,
                    )
                )
        store.remove(small.keys)
        store.remove(large.keys)
    return rows


def tcp_get(node: BenchNode, effort: Effort) -> Row:
    """get_into over TCP from DRAM, checksums verified, two callers at once; beside two plain
    streams."""
    data = Dataset.make(64, 2 * MIB, seed=15)
    halves = list(data.batches(32))
    buffers = [[np.zeros(2 * MIB, np.uint8) for _ in range(32)] for _ in halves]
    watch = Stopwatch([node.pid])
    ceiling = TcpCeiling(streams=2)
    with (
        ctxstore_client.connect(node.address, shm="off") as store,
        ThreadPoolExecutor(2) as pool,
    ):
        put_all(store, data)

        def pull(index: int) -> None:
            for _ in range(4):
                get_all(store, halves[index], buffers[index])

        def work() -> int:
            list(pool.map(pull, range(2)))
            return data.total_bytes * 4

        def subject() -> Sample:
            sample = watch.measure(work)
            for half, filled in zip(halves, buffers, strict=True):
                half.check(filled)
                for buffer in filled:
                    buffer.fill(0)
            return sample

        versus = interleave(subject, ceiling, rounds=effort.rounds)
        store.remove(data.keys)
    row = versus.row("tcp_get", 0.85, ceiling_tool=ceiling.name)
    assert row.cpu_s_per_gb is not None
    row.extra["cpu_ratio"] = round(row.cpu_s_per_gb / versus.ceiling_cpu_s_per_gb, 3)
    return row


def ping_under_load(node: BenchNode, effort: Effort) -> Row:
    """A one-key exists while another process streams from the same daemon over TCP."""
    data = Dataset.make(32, 2 * MIB, seed=16)
    idle: list[float] = []
    busy: list[float] = []
    with ctxstore_client.connect(node.address, shm="require") as store:
        put_all(store, data)
        one = data.keys[:1].copy()
        store.exists(one)
        for _ in range(effort.latency_rounds):
            idle.append(statistics.median(latencies_us(lambda: store.exists(one), effort.calls)))
            with _streamer(node, data):
                busy.append(
                    statistics.median(latencies_us(lambda: store.exists(one), effort.calls))
                )
        store.remove(data.keys)
    ratios = [loaded / calm for loaded, calm in zip(busy, idle, strict=True)]
    return Row(
        "ping_under_load",
        round(statistics.median(busy), 2),
        "us",
        3.0,
        round(min(busy), 2),
        ceiling=round(statistics.median(idle), 2),
        ratio=round(statistics.median(ratios), 3),
        at_most=True,
        extra={"idle": round(statistics.median(idle), 2)},
    )


class _streamer:
    """A child process that gets the data set over TCP, again and again, until the block ends."""

    def __init__(self, node: BenchNode, data: Dataset) -> None:
        command = [sys.executable, "-m", "ctxstore_client.benchmark.stream", node.address]
        command += [data.keys.tobytes().hex(), str(data.payloads.shape[1])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"streaming\n":
            raise RuntimeError("the streaming process did not start")

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(OP_TIMEOUT_S)
        self._process.stdout.close()
