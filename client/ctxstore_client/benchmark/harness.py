"""Timing of a subject beside its ceiling: interleaved rounds, medians, CPU seconds of all
processes.

Owns `Sample`, `Row` and the loop that alternates subject and ceiling, so that noise of a shared
machine
meets both alike. It must not know what is being measured.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

GB = 1e9


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed pass: seconds of wall time, bytes moved, CPU seconds of every process involved."""

    wall_s: float
    moved_bytes: int
    cpu_s: float

    @property
    def gb_per_s(self) -> float:
        """Throughput in GB/s (1e9 bytes)."""
        return self.moved_bytes / GB / self.wall_s

    @property
    def cpu_s_per_gb(self) -> float:
        """CPU seconds spent per GB moved."""
        return self.cpu_s / (self.moved_bytes / GB)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report. `value` and `ratio` are medians over rounds; latencies have no
    ceiling."""

    key: str
    value: float
    unit: str
    target: float
    best: float
    ceiling: float | None = None
    ratio: float | None = None
    cpu_s_per_gb: float | None = None
    at_most: bool = False
    verdict: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the figure reaches its target: a ratio at least, a latency at most."""
        if self.verdict is not None:
            return self.verdict
        if self.ratio is None:
            return self.value <= self.target
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target

    def as_json(self) -> dict[str, Any]:
        """The row as the documented JSON object."""
        return {
            "value": self.value,
            "unit": self.unit,
            "ceiling": self.ceiling,
            "ratio": self.ratio,
            "cpu_s_per_gb": self.cpu_s_per_gb,
            "target": self.target,
            "met": self.met,
            "best": self.best,
            **self.extra,
        }


def process_cpu_s(pid: int) -> float:
    """User and system seconds that process `pid` and its reaped children have used."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def own_cpu_s() -> float:
    """User and system seconds of this process, at the clock's full resolution."""
    return time.process_time()


class Stopwatch:
    """Wall and CPU seconds of one pass, over this process and the daemons named."""

    def __init__(self, pids: Sequence[int] = ()) -> None:
        self._pids = tuple(pids)

    def measure(self, work: Callable[[], int]) -> Sample:
        """Run `work`, which returns the bytes it moved."""
        cpu = own_cpu_s() + sum(process_cpu_s(pid) for pid in self._pids)
        start = time.perf_counter()
        moved = work()
        wall = time.perf_counter() - start
        cpu = own_cpu_s() + sum(process_cpu_s(pid) for pid in self._pids) - cpu
        return Sample(wall, moved, cpu)


@dataclass(frozen=True, slots=True)
class Versus:
    """Samples of a subject and of its ceiling, round by round."""

    subject: tuple[Sample, ...]
    ceiling: tuple[Sample, ...]

    def row(self, key: str, target: float, **extra: object) -> Row:
        """Medians of per-round figures; the ratio of a round is subject over the ceiling of that
        round."""
        rates = [sample.gb_per_s for sample in self.subject]
        ceilings = [sample.gb_per_s for sample in self.ceiling]
        ratios = [rate / top for rate, top in zip(rates, ceilings, strict=True)]
        extra.setdefault("best_ratio", round(max(ratios), 4))
        return Row(
            key,
            round(statistics.median(rates), 4),
            "GB/s",
            target,
            round(max(rates), 4),
            ceiling=round(statistics.median(ceilings), 4),
            ratio=round(statistics.median(ratios), 4),
            cpu_s_per_gb=round(statistics.median(s.cpu_s_per_gb for s in self.subject), 4),
            extra=extra,
        )

    @property
    def ceiling_cpu_s_per_gb(self) -> float:
        """Median CPU seconds per GB of the ceiling."""
        return statistics.median(sample.cpu_s_per_gb for sample in self.ceiling)


def interleave(
    subject: Callable[[], Sample], ceiling: Callable[[], Sample], *, rounds: int
) -> Versus:
    """Alternate both for `rounds` rounds after one unmeasured warm-up of each; the order flips
    each round."""
    subject()
    ceiling()
    subjects: list[Sample] = []
    ceilings: list[Sample] = []
    for index in range(rounds):
        if index % 2 == 0:
            ceilings.append(ceiling())
            subjects.append(subject())
        else:
            subjects.append(subject())
            ceilings.append(ceiling())
    return Versus(tuple(subjects), tuple(ceilings))


def latency_row(
    key: str, call: Callable[[], object], *, target_us: float, calls: int, rounds: int
) -> Row:
    """p50 of `calls` calls in microseconds, the median of it over `rounds` rounds."""
    for _ in range(max(10, calls // 10)):
        call()
    medians: list[float] = []
    tails: list[float] = []
    for _ in range(rounds):
        taken = latencies_us(call, calls)
        medians.append(statistics.median(taken))
        tails.append(taken[int(len(taken) * 0.99)])
    return Row(
        key,
        round(statistics.median(medians), 2),
        "us",
        target_us,
        round(min(medians), 2),
        extra={"p99": round(statistics.median(tails), 2)},
    )


def latencies_us(call: Callable[[], object], calls: int) -> list[float]:
    """Sorted wall times of single calls, in microseconds."""
    taken: list[float] = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        call()
        taken.append((time.perf_counter_ns() - start) / 1000)
    taken.sort()
    return taken
