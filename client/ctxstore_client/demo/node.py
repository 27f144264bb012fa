"""The demo's own daemon: a real `ctxstore serve` process that is started, killed and started again.

Owns one child process and its data directory. Talks to the daemon only through the files and
signals that the command documents.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

COMMAND: Final = "import sys; from ctxstore_client.cli import main; sys.exit(main())"
"""The `ctxstore` command of this very interpreter, wherever its script is installed."""

READY_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.02
_STOP_TIMEOUT_S: Final = 30.0
_LOG_LINES_SHOWN: Final = 15


class NodeFailed(Exception):
    """The daemon did not start; the text holds the end of its log."""


class DemoNode:
    """A daemon on loopback, its data and its log in `directory`.

    `listen` is HOST:PORT; port 0 takes free ones. `start` returns when the daemon is ready. `kill`
    is SIGKILL, `stop` is SIGTERM. Not thread-safe.
    """

    def __init__(
        self,
        directory: Path,
        *,
        memory: str = "512MiB",
        disk: str = "4GiB",
        listen: str = "127.0.0.1:0",
    ) -> None:
        self.data_dir = directory / "data"
        self._log = directory / "daemon.log"
        self._arguments = [
            sys.executable,
            "-c",
            COMMAND,
            "serve",
            *("--data-dir", str(self.data_dir)),
            *("--memory", memory),
            *("--disk", disk),
            *("--listen", listen),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the running daemon."""
        if self._process is None:
            raise NodeFailed("the daemon is not running")
        return self._process.pid

    def start(self) -> str:
        """Start the daemon and wait until it is ready; returns its address for `connect`."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        until = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < until:
            endpoints = self._endpoints()
            if endpoints is not None:
                return f"ctxstore://{endpoints['control']}"
            if self._process.poll() is not None:
                raise NodeFailed(
                    f"the daemon ended with {self._process.returncode}:\n{self._tail()}"
                )
            time.sleep(_POLL_S)
        self.kill()
        raise NodeFailed(f"the daemon was not ready in {READY_TIMEOUT_S:.0f} s:\n{self._tail()}")

    def kill(self) -> None:
        """SIGKILL: the daemon gets no chance to write anything more."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """SIGTERM, and SIGKILL where that takes too long."""
        if self._process is None:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_TIMEOUT_S)
            self._process = None
        self.kill()

    def _endpoints(self) -> dict[str, Any] | None:
        """What the ready daemon wrote; None while it has not, or an earlier one did."""
        try:
            endpoints = json.loads((self.data_dir / "endpoints.json").read_text())
        except (OSError, ValueError):
            return None
        return endpoints if endpoints.get("pid") == self.pid else None

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES_SHOWN:]
        return os.linesep.join(f"  {line}" for line in lines)
