"""The measured paths of one node that go to NVMe, and restart.

Owns one function per path; each returns a Row. A read counts as one from NVMe only because the
daemon was
restarted just before: its memory is empty then.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

import ctxstore_client
from ctxstore_client import PutResult
from ctxstore_client.benchmark.dataset import Dataset, WrongBytes
from ctxstore_client.benchmark.harness import Row, Sample, Stopwatch, Versus, interleave
from ctxstore_client.benchmark.node import BenchNode
from ctxstore_client.benchmark.paths import OP_TIMEOUT_S, get_all, put_all

if TYPE_CHECKING:
    from pathlib import Path

    from ctxstore_client.benchmark.ceilings import DiskCeiling
    from ctxstore_client.benchmark.paths import Effort

MIB = 1024 * 1024
RESTART_SHARDS = 1_000_000
BYTES_PER_ENTRY_MAX = 260
BATCH_BYTES = 32 * MIB
READERS = 2
SMALL_BYTES = 1040
FILL_BATCH = 4096


def nvme_read(
    node: BenchNode, ceiling: DiskCeiling, block: int, *, total: int, effort: Effort
) -> Row:
    """Random shards from NVMe into the arena, without the copy to a client: views of cold
    shards."""
    key, target = ("nvme_read_2m", 0.95) if block == 2 * MIB else ("nvme_read_256k", 0.88)
    data = Dataset.make(total // block, block, seed=21)
    with ctxstore_client.connect(node.address, shm="require") as store:
        put_all(store, data, "group")
    turn = iter(range(1_000_000))

    def subject() -> Sample:
        node.restart()
        node.wait_populated()
        return _cold_views(node, data.shuffled(next(turn)))

    versus = interleave(subject, lambda: ceiling.read(block), rounds=effort.rounds)
    with ctxstore_client.connect(node.address) as store:
        store.remove(data.keys, timeout_s=OP_TIMEOUT_S)
    return versus.row(key, target, ceiling_tool=ceiling.name, ceiling_huge_pages=ceiling.huge)


def _cold_views(node: BenchNode, data: Dataset) -> Sample:
    """One pass over all shards by two threads; the views stay open until the clock has stopped."""
    batches = list(data.batches(BATCH_BYTES // data.payloads.shape[1]))
    watch = Stopwatch([node.pid])
    with (
        ctxstore_client.connect(node.address, shm="require") as store,
        ThreadPoolExecutor(READERS) as pool,
        ExitStack() as stack,
    ):
        store.exists(data.keys[:1])
        opened: list[tuple[Dataset, object]] = []

        def read(batch: Dataset) -> None:
            views = stack.enter_context(store.view(batch.keys, timeout_s=OP_TIMEOUT_S))
            opened.append((batch, views))

        def work() -> int:
            list(pool.map(read, batches))
            return data.total_bytes

        sample = watch.measure(work)
        for batch, views in opened:
            batch.check(views)  # type: ignore[arg-type]
    return sample


def nvme_write(node: BenchNode, ceiling: DiskCeiling, effort: Effort) -> Row:
    """put with durability=group of 96 shards of 2 MiB, beside raw writes of as many bytes with
    one sync."""
    data = Dataset.make(96, 2 * MIB, seed=22)
    turn = iter(range(1_000_000))
    watch = Stopwatch([node.pid])
    with ctxstore_client.connect(node.address, shm="require") as store:

        def subject() -> Sample:
            fresh = data.rekeyed(next(turn))

            def work() -> int:
                put_all(store, fresh, "group")
                return fresh.total_bytes

            sample = watch.measure(work)
            with store.view(fresh.keys[:32]) as views:
                Dataset(fresh.keys[:32], fresh.payloads[:32]).check(views)
            store.remove(fresh.keys, timeout_s=OP_TIMEOUT_S)
            return sample

        versus = interleave(
            subject, lambda: ceiling.write(2 * MIB, data.total_bytes), rounds=effort.rounds
        )
    return versus.row("nvme_write", 0.85, ceiling_tool=ceiling.name)


def remote_nvme(node: BenchNode, effort: Effort) -> Row:
    """get_into over TCP of cold shards, beside the same gets from the same server's DRAM."""
    data = Dataset.make(128, 2 * MIB, seed=23)
    with ctxstore_client.connect(node.address) as store:
        put_all(store, data, "group")
    cold: list[Sample] = []
    warm: list[Sample] = []
    for _ in range(effort.rounds):
        node.restart()
        node.wait_populated()
        first, second = _remote_passes(node, data)
        cold.append(first)
        warm.append(second)
    with ctxstore_client.connect(node.address) as store:
        store.remove(data.keys, timeout_s=OP_TIMEOUT_S)
    return Versus(tuple(cold), tuple(warm)).row("remote_nvme", 0.60, ceiling_tool="same, from DRAM")


def _remote_passes(node: BenchNode, data: Dataset) -> tuple[Sample, Sample]:
    halves = list(data.batches(len(data.keys) // 2))
    buffers = [
        [np.zeros(half.payloads.shape[1], np.uint8) for _ in range(len(half.keys))]
        for half in halves
    ]
    watch = Stopwatch([node.pid])
    samples: list[Sample] = []
    with (
        ctxstore_client.connect(node.address, shm="off") as store,
        ThreadPoolExecutor(2) as pool,
    ):
        store.exists(data.keys[:1])

        def work() -> int:
            list(pool.map(lambda i: get_all(store, halves[i], buffers[i]), range(2)))
            return data.total_bytes

        for _ in range(2):
            samples.append(watch.measure(work))
            for half, filled in zip(halves, buffers, strict=True):
                half.check(filled)
                for buffer in filled:
                    buffer.fill(0)
    return samples[0], samples[1]


def restart_1m(directory: Path, effort: Effort, shards: int = RESTART_SHARDS) -> Row:
    """From spawning the process to ready, over a million small shards; memory per entry."""
    options = ("--set", f"limits.entries_max={2 * shards}")
    home = directory / "restart"
    home.mkdir()
    node = BenchNode(home, memory="1GiB", disk="8GiB", options=options)
    with node:
        node.wait_populated()
        base_bytes, base_s = node.anonymous_bytes(), node.ready_s
    with node:
        _fill(node, shards)
    times: list[float] = []
    per_entry: list[float] = []
    for _ in range(max(2, effort.rounds)):
        with node:
            node.wait_populated()
            times.append(node.ready_s)
            per_entry.append((node.anonymous_bytes() - base_bytes) / shards)
            _check_sample(node, shards)
    used = statistics.median(per_entry)
    met = statistics.median(times) <= 3.0 and used <= BYTES_PER_ENTRY_MAX
    return Row(
        "restart_1m",
        round(statistics.median(times), 3),
        "s",
        3.0,
        round(min(times), 3),
        verdict=met,
        extra={"bytes_per_entry": round(used, 1), "empty_s": round(base_s, 3), "shards": shards},
    )


def _restart_keys(start: int, stop: int) -> np.ndarray:
    """Keys that name their number, spread over placement groups."""
    numbers = np.arange(start, stop, dtype=np.uint64)
    return np.stack([numbers * np.uint64(0x9E3779B97F4A7C15), numbers], axis=1).view(np.uint8)


def _fill(node: BenchNode, shards: int) -> None:
    """Put `shards` shards just too long to be inline, a page each on disk."""
    payload = np.arange(SMALL_BYTES, dtype=np.uint32).astype(np.uint8)
    with ctxstore_client.connect(node.address) as store:
        for start in range(0, shards, FILL_BATCH):
            keys = _restart_keys(start, min(start + FILL_BATCH, shards))
            results = store.put(keys, [payload] * len(keys), timeout_s=OP_TIMEOUT_S)
            if any(result is not PutResult.COMMITTED for result in results):
                raise RuntimeError(f"shards from {start} on could not be put")
        store.flush(timeout_s=OP_TIMEOUT_S)


def _check_sample(node: BenchNode, shards: int) -> None:
    """All keys are known, and some shards from all over come back whole."""
    payload = np.arange(SMALL_BYTES, dtype=np.uint32).astype(np.uint8)
    with ctxstore_client.connect(node.address) as store:
        found = sum(
            int(store.exists(_restart_keys(start, min(start + FILL_BATCH, shards))).sum())
            for start in range(0, shards, FILL_BATCH)
        )
        if found != shards:
            raise WrongBytes(f"{found} of {shards} shards are known after the restart")
        keys = _restart_keys(0, shards)[:: max(1, shards // 200)].copy()
        buffers = [np.zeros(SMALL_BYTES, np.uint8) for _ in keys]
        get_all(store, Dataset(keys, np.empty((0, 0), np.uint8)), buffers)
        if any(not np.array_equal(buffer, payload) for buffer in buffers):
            raise WrongBytes("a shard came back with other bytes after the restart")
