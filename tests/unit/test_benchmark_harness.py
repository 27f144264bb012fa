"""The arithmetic of the benchmark: ratios per round, medians, targets, ceilings that really run."""

from __future__ import annotations

import time

import numpy as np
import pytest

from ctxstore_client.benchmark.ceilings import DiskCeiling, TcpCeiling, copy_ceiling
from ctxstore_client.benchmark.dataset import Dataset, WrongBytes
from ctxstore_client.benchmark.harness import (
    Row,
    Sample,
    Stopwatch,
    Versus,
    interleave,
    latency_row,
    process_cpu_s,
)


def test_ratio_is_the_median_of_per_round_ratios() -> None:
    subject = (Sample(1.0, 10**9, 0.5), Sample(0.5, 10**9, 0.5), Sample(0.25, 10**9, 0.5))
    ceiling = (Sample(0.5, 10**9, 0.1), Sample(0.5, 10**9, 0.1), Sample(0.5, 10**9, 0.1))
    row = Versus(subject, ceiling).row("x", 0.9)
    assert (row.value, row.ceiling, row.ratio) == (2.0, 2.0, 1.0)
    assert row.best == 4.0
    assert row.cpu_s_per_gb == 0.5
    assert row.met
    assert set(row.as_json()) >= {
        "value", "unit", "ceiling", "ratio", "cpu_s_per_gb", "target", "met", "best",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (Row("a", 1.0, "GB/s", 0.9, 1.0, ceiling=2.0, ratio=0.89), False),
        (Row("a", 59.0, "us", 60.0, 50.0), True),
        (Row("a", 61.0, "us", 60.0, 50.0), False),
        (Row("a", 100.0, "us", 3.0, 1.0, ceiling=50.0, ratio=2.0, at_most=True), True),
        (Row("a", 200.0, "us", 3.0, 1.0, ceiling=50.0, ratio=4.0, at_most=True), False),
        (Row("a", 1.0, "s", 3.0, 1.0, verdict=False), False),
    ],
)
def test_a_target_is_a_floor_for_ratios_and_a_ceiling_for_latencies(row: Row, met: bool) -> None:
    assert row.met is met


def test_rounds_alternate_after_a_warm_up() -> None:
    order: list[str] = []

    def note(name: str) -> Sample:
        order.append(name)
        return Sample(1.0, 1, 0.0)

    versus = interleave(lambda: note("s"), lambda: note("c"), rounds=3)
    assert "".join(order) == "sc" + "cs" + "sc" + "cs"
    assert len(versus.subject) == len(versus.ceiling) == 3


def test_stopwatch_counts_this_process() -> None:
    def burn() -> int:
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass
        return 7

    sample = Stopwatch().measure(burn)
    assert sample.moved_bytes == 7
    assert sample.cpu_s >= 0.05
    assert process_cpu_s(1) >= 0.0


def test_latency_row_reports_median_and_tail() -> None:
    row = latency_row("x", lambda: None, target_us=50, calls=100, rounds=3)
    assert 0 <= row.best <= row.value
    assert row.extra["p99"] >= row.value
    assert row.ceiling is None


def test_wrong_bytes_are_noticed() -> None:
    data = Dataset.make(3, 4096, seed=1)
    copies: list[object] = [payload.copy() for payload in data.payloads]
    data.check(copies)
    bad = data.payloads[1].copy()
    bad[17] ^= 1
    copies[1] = bad
    with pytest.raises(WrongBytes, match="shard 1"):
        data.check(copies)
    with pytest.raises(WrongBytes, match="missing"):
        data.check([None])
    assert np.array_equal(Dataset.make(3, 4096, seed=1).keys, data.keys)
    assert not np.array_equal(data.rekeyed(5).keys, data.keys)


def test_ceilings_without_tools(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    tcp = TcpCeiling(seconds=0.05)
    disk = DiskCeiling(tmp_path, 16 * 1024 * 1024, huge=False)
    disk.prepare()
    assert (tcp.name, disk.name) == ("built-in sockets", "built-in preadv threads")
    try:
        read = disk.read(1024 * 1024, seconds=0.05)
        write = disk.write(1024 * 1024, 8 * 1024 * 1024)
    except OSError as error:
        pytest.skip(f"no O_DIRECT on the temporary directory: {error}")
    for sample in (tcp(), copy_ceiling(1024 * 1024)(), read, write):
        assert sample.moved_bytes > 0
        assert sample.wall_s > 0
