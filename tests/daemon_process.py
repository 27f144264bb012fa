"""A real daemon in a process of its own, for tests: start, kill, restart on the same ports, stop.

Owns one data directory and three ports for its whole life. It must not know what is stored. Use
`daemon_process(...)` as a context manager: it leaves no process and no socket behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = Path(__file__).resolve().parent.parent
READY_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 40.0


class DaemonFailed(AssertionError):
    """The daemon did not do what the test needs; the message ends with its log."""


@dataclass(frozen=True)
class Endpoints:
    """What the daemon published."""

    control: str
    data: str
    http: str
    unix: str | None
    pid: int
    node_id: str
    version: str

    @property
    def url(self) -> str:
        """For `connect`."""
        return f"ctxstore://{self.control}"


class DaemonProcess:
    """One daemon, started again and again over the same directory and, by default, ports.

    `start` waits until it is ready; `kill` is SIGKILL, `stop` SIGTERM. Not thread-safe.
    """

    def __init__(
        self,
        directory: Path,
        *,
        memory: str = "64MiB",
        disk: str = "256MiB",
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.arguments = [
            *("--data-dir", str(directory), "--memory", memory, "--disk", disk),
            *arguments,
        ]
        self.environment = environment or {}
        self.endpoints: Endpoints | None = None
        self.process: subprocess.Popen[str] | None = None
        self._ports: tuple[int, int, int] | None = None
        self._log: list[str] = []
        self._reader: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Address for clients."""
        assert self.endpoints is not None, "not started yet"
        return self.endpoints.url

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self.process is not None, "not started yet"
        return self.process.pid

    @property
    def log(self) -> str:
        """Everything on its stderr, of all its starts."""
        return "".join(self._log)

    def start(self, *, timeout_s: float = READY_TIMEOUT_S) -> Endpoints:
        """Start and wait until ready. Raises DaemonFailed with the log."""
        process = self.launch()
        output = process.stdout
        assert output is not None, "a pipe was asked for"
        ready: list[str] = []
        waiter = threading.Thread(target=lambda: ready.append(output.readline()))
        waiter.start()
        waiter.join(timeout_s)
        if waiter.is_alive() or not ready or " ready" not in ready[0]:
            code = process.poll()
            self.kill()
            waiter.join()
            raise DaemonFailed(f"not ready (exit code {code}, said {ready})\n{self.log}")
        text = (self.directory / "endpoints.json").read_text(encoding="utf-8")
        self.endpoints = Endpoints(**json.loads(text))
        self._ports = tuple(  # type: ignore[assignment]
            int(address.rpartition(":")[2])
            for address in (self.endpoints.control, self.endpoints.data, self.endpoints.http)
        )
        return self.endpoints

    def launch(self) -> subprocess.Popen[str]:
        """Start without waiting, for daemons that are to refuse."""
        assert self.process is None or self.process.poll() is not None, "it runs already"
        self._forget()
        control, data, http = self._ports or (0, 0, 0)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "ctxstore_daemon", "serve"),
                *("--listen", f"127.0.0.1:{control}"),
                *("--data-listen", f"127.0.0.1:{data}"),
                *("--http-listen", f"127.0.0.1:{http}"),
                *self.arguments,
            ],
            cwd=ROOT,
            env=os.environ | self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read_log, args=(self.process,))
        self._reader.start()
        return self.process

    def wait(self, *, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Exit code, when it has ended by itself. Raises DaemonFailed when it does not."""
        assert self.process is not None, "not started yet"
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise DaemonFailed(f"still runs after {timeout_s} s\n{self.log}") from None
        self._forget()
        return code

    def kill(self) -> None:
        """SIGKILL and wait; fine when it has ended already."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._forget()

    def stop(self, *, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """SIGTERM and wait; the exit code."""
        assert self.process is not None, "not started yet"
        self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout_s=timeout_s)

    def restart(self, *, kill: bool = False) -> Endpoints:
        """End it (by SIGKILL if so wanted) and start it on the same ports."""
        if kill:
            self.kill()
        else:
            code = self.stop()
            if code != 0:
                raise DaemonFailed(f"exit code {code}\n{self.log}")
        return self.start()

    def pause(self) -> None:
        """SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def http(self, path: str) -> tuple[int, str]:
        """Status and body of a page on its HTTP port."""
        assert self.endpoints is not None, "not started yet"
        try:
            with urllib.request.urlopen(
                f"http://{self.endpoints.http}{path}", timeout=10
            ) as answer:
                return int(answer.status), answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def connect(self, *, unix: bool = False) -> socket.socket:
        """A bare connection to its control port, or to its unix socket."""
        assert self.endpoints is not None, "not started yet"
        if unix:
            assert self.endpoints.unix is not None, "no unix socket here"
            bare = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            bare.settimeout(10)
            try:
                bare.connect(self.endpoints.unix)
            except BaseException:
                bare.close()
                raise
            return bare
        host, _, port = self.endpoints.control.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=10)

    def wait_for_log(self, text: str, *, timeout_s: float = 10.0) -> None:
        """Until the log holds `text`. Raises DaemonFailed."""
        until = time.monotonic() + timeout_s
        while text not in self.log:
            if time.monotonic() > until:
                raise DaemonFailed(f"no {text!r} in the log\n{self.log}")
            time.sleep(0.01)

    def close(self) -> None:
        """Kill what still runs and remove its socket."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.resume()
        self.kill()
        if self.endpoints is not None and self.endpoints.unix is not None:
            Path(self.endpoints.unix).unlink(missing_ok=True)

    def _read_log(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None, "a pipe was asked for"
        for line in process.stderr:
            self._log.append(line)

    def _forget(self) -> None:
        if self._reader is not None:
            self._reader.join()
            self._reader = None
        if self.process is not None:
            for pipe in (self.process.stdout, self.process.stderr):
                if pipe is not None:
                    pipe.close()


@contextlib.contextmanager
def daemon_process(
    directory: Path,
    *,
    memory: str = "64MiB",
    disk: str = "256MiB",
    arguments: Sequence[str] = (),
    start: bool = True,
    environment: dict[str, str] | None = None,
) -> Iterator[DaemonProcess]:
    """A started daemon over `directory`; killed at the end if the test has not stopped it."""
    daemon = DaemonProcess(
        directory, memory=memory, disk=disk, arguments=arguments, environment=environment
    )
    try:
        if start:
            daemon.start()
        yield daemon
    finally:
        daemon.close()
