"""What every test gets: hypothesis profiles and a check that nothing was left behind.

Owns no fixture data of the levels below; those keep their own. It must stay cheap, since the leak
check runs after each test.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

# HYPOTHESIS_PROFILE=slow digs deeper; the default keeps the property level inside its budget.
_SHARED_MACHINE = [HealthCheck.too_slow]  # how fast data is drawn says nothing on a busy machine
settings.register_profile("default", deadline=None, suppress_health_check=_SHARED_MACHINE)
settings.register_profile(
    "slow", deadline=None, max_examples=2000, suppress_health_check=_SHARED_MACHINE
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

LEAK_SETTLE_S = 2.0
"""How long something on its way out (a thread that ends, a child that is reaped) may take."""

_FDS = Path("/proc/self/fd")
_TASKS = Path("/proc/self/task")
# Threads and descriptors that libraries keep for the life of the process.
_LASTING_THREADS = ("pytest_timeout", "tqdm_monitor")
_LASTING_FDS = ("/dev/null", "/dev/urandom")

_call_failed = pytest.StashKey[bool]()


class _Footprint:
    """Descriptors, threads and children of this process at one moment."""

    def __init__(self) -> None:
        self.fds: Counter[str] = Counter()
        for entry in os.listdir(_FDS):
            with contextlib.suppress(OSError):  # the descriptor of this very listing
                target = os.readlink(_FDS / entry)
                if target not in _LASTING_FDS and not target.startswith("/proc/"):
                    self.fds[target.split(":[")[0] if ":[" in target else target] += 1
        self.threads = Counter(
            thread.name
            for thread in threading.enumerate()
            if thread.name not in _LASTING_THREADS and type(thread).__name__ != "TMonitor"
        )
        self.children: Counter[str] = Counter()
        for task in os.listdir(_TASKS):
            with contextlib.suppress(OSError):  # the thread has ended since
                self.children.update((_TASKS / task / "children").read_text().split())

    def grown_since(self, before: _Footprint) -> list[str]:
        """What is here and was not in ``before``, one line each."""
        pairs = (
            ("descriptor", self.fds - before.fds),
            ("thread", self.threads - before.threads),
            ("child process", self.children - before.children),
        )
        return [f"{kind} {what} x{n}" for kind, more in pairs for what, n in sorted(more.items())]


class _LoopComplaints(logging.Handler):
    """Collects what asyncio reports only in its log: tasks and errors nobody waited for."""

    def __init__(self) -> None:
        super().__init__(level=logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "was destroyed but it is pending" in message or "was never retrieved" in message:
            self.lines.append(f"asyncio: {message}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember a failed test: its traceback holds objects, so what they hold is no leak."""
    report = yield
    if report.when == "call":
        item.stash[_call_failed] = not report.passed
    return report


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test after which descriptors, threads, children or pending tasks remain."""
    if request.node.get_closest_marker("leaks_ok") is not None:
        yield
        return
    complaints = _LoopComplaints()
    logging.getLogger("asyncio").addHandler(complaints)
    before = _Footprint()
    try:
        yield
    finally:
        leaks = _leaks_after(before)
        logging.getLogger("asyncio").removeHandler(complaints)
    if request.node.stash.get(_call_failed, True):
        return
    leaks += complaints.lines
    if leaks:
        pytest.fail("left behind:\n  " + "\n  ".join(leaks), pytrace=False)


def _leaks_after(before: _Footprint) -> list[str]:
    leaks = _Footprint().grown_since(before)
    if not leaks:
        return leaks
    gc.collect()
    until = time.monotonic() + LEAK_SETTLE_S
    while leaks := _Footprint().grown_since(before):
        if time.monotonic() > until:
            break
        time.sleep(0.01)
    return leaks
