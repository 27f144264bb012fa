"""A daemon of the benchmark's own, in a temporary directory.

Owns starting, restarting and stopping it, and reading what it says about itself. It must stop
only the
process it started, and leave nothing behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import ctxstore_client

if TYPE_CHECKING:
    from types import TracebackType

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0


class BenchNode:
    """One `ctxstore_daemon serve` process. Use as a context manager; not thread-safe."""

    def __init__(
        self, directory: Path, *, memory: str, disk: str, options: tuple[str, ...] = ()
    ) -> None:
        self.data_dir = directory / "node"
        self._log_path = directory / "node.log"
        self._memory = memory
        self._disk = disk
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoints: dict[str, Any] = {}
        self.ready_s = 0.0

    @property
    def pid(self) -> int:
        """Process id of the running daemon."""
        assert self._process is not None, "the daemon is not running"
        return self._process.pid

    @property
    def address(self) -> str:
        """What `connect` takes."""
        return f"ctxstore://{self.endpoints['control']}"

    def start(self) -> None:
        """Start and wait until it says ready; `ready_s` is the time from spawn to ready."""
        command = [sys.executable, "-m", "ctxstore_daemon", "serve", "--data-dir"]
        command += [str(self.data_dir), "--memory", self._memory, "--disk", self._disk]
        command += ["--listen", "127.0.0.1:0", *self._options]
        self.data_dir.mkdir(parents=True, exist_ok=True)
        endpoints = self.data_dir / "endpoints.json"
        endpoints.unlink(missing_ok=True)
        started = time.perf_counter()
        with open(self._log_path, "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        while not endpoints.exists():
            if self._process.poll() is not None or time.perf_counter() - started > READY_TIMEOUT_S:
                self.kill()
                raise RuntimeError(f"the daemon did not start:\n{self.log()[-2000:]}")
            time.sleep(0.002)
        self.ready_s = time.perf_counter() - started
        self.endpoints = json.loads(endpoints.read_text(encoding="utf-8"))

    def wait_populated(self) -> None:
        """Wait until the arena's pages are there, so that page faults are not measured as
        copying."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        with ctxstore_client.connect(self.address) as store:
            while time.monotonic() < deadline:
                told = store.stats()["node"]
                if told["arena"]["populated_bytes"] >= told["engine"]["arena_bytes"]:
                    return
                time.sleep(0.05)
        raise TimeoutError("the arena was not populated in time")

    def restart(self) -> None:
        """Stop cleanly and start again over the same data: memory is empty, the disk is not."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """SIGTERM, then wait."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(STOP_TIMEOUT_S)
            self._process = None

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
            self._process = None

    def log(self) -> str:
        """All it has printed."""
        return self._log_path.read_text(encoding="utf-8", errors="replace")

    def metrics(self) -> str:
        """Its Prometheus page."""
        with urllib.request.urlopen(f"http://{self.endpoints['http']}/metrics", timeout=5) as page:
            return str(page.read().decode())

    def anonymous_bytes(self) -> int:
        """Resident private memory: heap and index, without arena and files."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is None:
            self.stop()
        self.kill()


def machine() -> dict[str, Any]:
    """The machine as far as it explains figures."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((x.split(":")[1].strip() for x in cpu.splitlines() if "model name" in x), "?")
    memory = Path("/proc/meminfo").read_text(encoding="ascii").split()[1]
    release = os.uname()
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory) / 1024**2, 1),
        "kernel": f"{release.sysname} {release.release} {release.machine}",
        "python": sys.version.split()[0],
    }
