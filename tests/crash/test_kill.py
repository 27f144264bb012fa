"""SIGKILL at random moments under load, again and again, with clients that stay connected.

The promise: what was acknowledged with `group` is there with the right bytes, what was removed
never comes back, wrong bytes are never seen. CTXSTORE_CRASH_KILLS says how often,
CTXSTORE_CRASH_SEED repeats a run as far as timing lets it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import pytest

from ctxstore_client import connect
from tests.crash.load import LoadWorker
from tests.crash.oracle import wait_until_up
from tests.daemon_process import ROOT, DaemonProcess, daemon_process

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.crash, pytest.mark.timeout(300)]

KILLS: Final = int(os.environ.get("CTXSTORE_CRASH_KILLS", "20"))
EPOCH_KILLS_MAX: Final = 20
"""Kills over one data directory: all that is put in one epoch fits the disk."""

MEMORY: Final = "256MiB"
"""A 16th of it is for inline shards: all of one epoch fit, so that none may leave."""

SEED: Final = int(os.environ.get("CTXSTORE_CRASH_SEED", str(time.time_ns() % 1_000_000)))
ANSWER_TIMEOUT_S: Final = 60.0


class Worker:
    """A worker that runs somewhere else: `ask` it and `take` its answer."""

    def __init__(self) -> None:
        self.answers: queue.Queue[str] = queue.Queue()

    def ask(self, command: str) -> None:
        raise NotImplementedError

    def take(self) -> None:
        """Wait for the answer to `ask`; fails the test where it is not empty."""
        try:
            problem = self.answers.get(timeout=ANSWER_TIMEOUT_S)
        except queue.Empty:
            problem = f"a worker did not answer in {ANSWER_TIMEOUT_S:.0f} s"
        assert not problem, problem


class ThreadWorker(Worker):
    """On a thread of this process, perhaps sharing its store with others."""

    def __init__(self, store: Any, *, space: int, seed: int) -> None:
        super().__init__()
        self.load = LoadWorker(store, space=space, seed=seed)
        self._commands: queue.Queue[str] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name=f"load-{space}")
        self._thread.start()

    def _run(self) -> None:
        # What goes wrong is an answer already; the thread only ends.
        with contextlib.suppress(Exception):
            self.load.run(self._commands, self.answers.put)

    def ask(self, command: str) -> None:
        self._commands.put(command)

    def close(self) -> None:
        self._commands.put("stop")
        self._thread.join()


class ProcessWorker(Worker):
    """In a process of its own, as inference workers are."""

    def __init__(self, url: str, *, space: int, seed: int) -> None:
        super().__init__()
        self.last: dict[str, Any] = {}
        command = [sys.executable, "-m", "tests.crash.load", url, str(space), str(seed)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None, "a pipe was asked for"
        for line in self._process.stdout:
            self.last = json.loads(line)
            self.answers.put(self.last["text"])

    def ask(self, command: str) -> None:
        assert self._process.stdin is not None, "a pipe was asked for"
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.ask("stop")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None, "a pipe was asked for"
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@contextlib.contextmanager
def working(daemon: DaemonProcess, seed: int) -> Iterator[list[Worker]]:
    """Four workers under load: two share a store, one has TCP only, one is another process."""
    with contextlib.ExitStack() as stack:
        shared = stack.enter_context(connect(daemon.url, timeout_s=2.0))
        remote = stack.enter_context(connect(daemon.url, timeout_s=2.0, shm="off"))
        workers: list[Worker] = []
        for space, store in enumerate((shared, shared, remote), start=1):
            thread = ThreadWorker(store, space=space, seed=seed)
            stack.callback(thread.close)
            workers.append(thread)
        process = ProcessWorker(daemon.url, space=4, seed=seed)
        stack.callback(process.close)
        workers.append(process)
        yield workers


def ask_all(workers: list[Worker], command: str) -> None:
    """Let all do it at the same time, and wait."""
    for worker in workers:
        worker.ask(command)
    for worker in workers:
        worker.take()


def summary(workers: list[Worker]) -> dict[str, int]:
    """What was done and checked, of all workers."""
    total: dict[str, int] = {}
    for worker in workers:
        if isinstance(worker, ThreadWorker):
            parts = [dict(worker.load.done), worker.load.oracle.counts]
        else:
            assert isinstance(worker, ProcessWorker), "there are two kinds"
            parts = [worker.last["done"], worker.last["checked"]]
        for part in parts:
            for name, count in part.items():
                total[name] = total.get(name, 0) + count
    return total


@pytest.mark.parametrize("epoch", range(-(-KILLS // EPOCH_KILLS_MAX)))
def test_acknowledged_shards_survive_kills_under_load(
    tmp_path: Path, epoch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    kills = min(EPOCH_KILLS_MAX, KILLS - epoch * EPOCH_KILLS_MAX)
    seed = SEED + epoch
    rng = random.Random(seed)
    began = time.monotonic()
    with (
        daemon_process(tmp_path / "data", memory=MEMORY, disk="2GiB") as daemon,
        working(daemon, seed) as workers,
    ):
        try:
            for _ in range(kills):
                time.sleep(rng.uniform(0.05, 0.7))
                daemon.kill()
                time.sleep(rng.choice((0.0, 0.0, 0.15)))
                daemon.start()
                ask_all(workers, "check")
            ask_all(workers, "check all")
        except BaseException as error:
            error.add_note(f"CTXSTORE_CRASH_SEED={seed}\n{daemon.log[-4000:]}")
            raise
        found = summary(workers)
    with capsys.disabled():
        sys.stdout.write(
            f"\n  seed {seed}: {kills} kills in {time.monotonic() - began:.0f} s; {found}\n"
        )
    for name in ("durable_checked", "absent_checked", "bytes_checked", "held_checked"):
        assert found[name] > kills, f"the load was too thin to prove anything: {found}"


def test_kills_during_recovery_lose_nothing(tmp_path: Path) -> None:
    """The start is a moment like any other: killed while it recovers, it recovers the next time."""
    rng = random.Random(SEED)
    with (
        daemon_process(tmp_path / "data", memory=MEMORY, disk="2GiB") as daemon,
        working(daemon, SEED) as workers,
    ):
        try:
            time.sleep(0.5)
            for _ in range(min(6, KILLS)):
                daemon.kill()
                daemon.launch()
                time.sleep(rng.uniform(0.2, 0.7))
            daemon.kill()
            daemon.start()
            ask_all(workers, "check all")
        except BaseException as error:
            error.add_note(f"CTXSTORE_CRASH_SEED={SEED}\n{daemon.log[-4000:]}")
            raise


def test_a_store_made_before_the_daemon_works_once_it_is_there(tmp_path: Path) -> None:
    with daemon_process(tmp_path / "data") as daemon:
        daemon.kill()
        with connect(daemon.url, timeout_s=1.0) as store:
            assert store.stats()["node"] is None
            daemon.start()
            wait_until_up(store)
