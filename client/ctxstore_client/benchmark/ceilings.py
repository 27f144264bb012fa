"""What the machine itself can do: memory copy, loopback TCP, disk.

Owns the ceilings. iperf3 and fio are used when they are installed, small built-in loops
otherwise; every
ceiling names which. Servers started here bind to loopback and end with the call that started them.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ctxstore_client.benchmark.harness import Sample, own_cpu_s

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1024 * 1024
TOOL_TIMEOUT_S = 120.0


def copy_ceiling(total_bytes: int) -> Callable[[], Sample]:
    """`np.copyto` of one warm buffer into another, `total_bytes` long."""
    source = np.full(total_bytes, 7, np.uint8)
    target = np.zeros(total_bytes, np.uint8)

    def run() -> Sample:
        cpu, start = own_cpu_s(), time.perf_counter()
        np.copyto(target, source)
        wall = time.perf_counter() - start
        return Sample(wall, total_bytes, own_cpu_s() - cpu)

    return run


def free_port() -> int:
    """A loopback TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- TCP


class TcpCeiling:
    """Loopback streams without any store: `iperf3 -P2`, or two pairs of blocking sockets."""

    def __init__(self, streams: int = 2, seconds: float = 1.0) -> None:
        self._streams = streams
        self._seconds = seconds
        self.name = "iperf3" if shutil.which("iperf3") else "built-in sockets"

    def __call__(self) -> Sample:
        """One timed pass; CPU of both ends is counted."""
        return self._iperf3() if self.name == "iperf3" else self._sockets()

    def _iperf3(self) -> Sample:
        port = free_port()
        server = subprocess.Popen(
            ["iperf3", "-s", "-1", "-B", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_for_port(port)
            report = _run_json(
                [
                    "iperf3",
                    "-c",
                    "127.0.0.1",
                    "-p",
                    str(port),
                    "-P",
                    str(self._streams),
                    "-t",
                    str(max(1, round(self._seconds))),
                    "-J",
                ]
            )
        finally:
            server.terminate()
            server.wait(TOOL_TIMEOUT_S)
        end = report["end"]
        wall = float(end["sum_received"]["seconds"])
        used = end["cpu_utilization_percent"]
        cpu = (float(used["host_total"]) + float(used["remote_total"])) / 100 * wall
        return Sample(wall, int(end["sum_received"]["bytes"]), cpu)

    def _sockets(self) -> Sample:
        moved = [0] * self._streams
        pairs = [_tcp_pair() for _ in range(self._streams)]
        stop_at = time.perf_counter() + self._seconds
        threads = [
            thread
            for index, (sender, receiver) in enumerate(pairs)
            for thread in (
                threading.Thread(target=_send_until, args=(sender, stop_at)),
                threading.Thread(target=_receive_all, args=(receiver, moved, index)),
            )
        ]
        cpu, start = own_cpu_s(), time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return Sample(time.perf_counter() - start, sum(moved), own_cpu_s() - cpu)


def _wait_for_port(port: int) -> None:
    """iperf3 takes one test and no probe connection, so ask the kernel instead of connecting."""
    needle = f"0100007F:{port:04X} 00000000:0000 0A"
    deadline = time.monotonic() + TOOL_TIMEOUT_S
    while time.monotonic() < deadline:
        if needle in Path("/proc/net/tcp").read_text(encoding="ascii"):
            return
        time.sleep(0.005)
    raise TimeoutError(f"iperf3 did not listen on port {port}")


def _run_json(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return dict(json.loads(done.stdout[done.stdout.index("{") :]))


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    return sender, receiver


def _send_until(sock: socket.socket, stop_at: float) -> None:
    payload = memoryview(bytearray(2 * MIB))
    with sock:
        while time.perf_counter() < stop_at:
            sock.sendall(payload)


def _receive_all(sock: socket.socket, moved: list[int], index: int) -> None:
    target = memoryview(bytearray(2 * MIB))
    with sock:
        while got := sock.recv_into(target):
            moved[index] += got


# ---------------------------------------------------------------- disk


class DiskCeiling:
    """Random O_DIRECT reads or sequential writes of one file: fio at queue depth 32, or threads.

    The file lies beside the daemon's data so that both use one file system. `huge` asks fio for
    buffers on
    2 MiB pages, which is fair only when the daemon's arena has them too.
    """

    def __init__(self, directory: Path, file_bytes: int, *, huge: bool) -> None:
        self.path = directory / "ceiling.dat"
        self.file_bytes = file_bytes
        self.huge = huge
        self.name = "fio io_uring" if shutil.which("fio") else "built-in preadv threads"
        self._engine = "io_uring"

    def prepare(self) -> None:
        """Write the file once, so that reads touch real blocks."""
        block = mmap.mmap(-1, 8 * MIB)
        block.write(os.urandom(8 * MIB))
        with open(self.path, "wb", buffering=0) as out:
            for _ in range(self.file_bytes // (8 * MIB)):
                out.write(block)
            os.fsync(out.fileno())
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        block.close()

    def read(self, block_bytes: int, seconds: float = 1.5) -> Sample:
        """Random reads of `block_bytes`."""
        if self.name.startswith("fio"):
            return self._fio("randread", block_bytes, "--time_based", f"--runtime={seconds}")
        return self._threads(block_bytes, seconds)

    def write(self, block_bytes: int, total_bytes: int) -> Sample:
        """Sequential writes of `total_bytes` over the file, one sync at the end."""
        if self.name.startswith("fio"):
            return self._fio("write", block_bytes, "--end_fsync=1", size=total_bytes)
        return self._write_threads(block_bytes, total_bytes)

    def _fio(self, kind: str, block_bytes: int, *options: str, size: int | None = None) -> Sample:
        command = ["fio", "--name=ceiling", f"--filename={self.path}", f"--rw={kind}"]
        command += [f"--bs={block_bytes}", "--iodepth=32", "--direct=1", "--invalidate=0"]
        command += [f"--size={size or self.file_bytes}", "--output-format=json", "--thread"]
        command += [f"--ioengine={self._engine}", "--overwrite=1", *options]
        if self.huge:
            command.append("--mem=mmaphuge")
        try:
            report = _run_json(command)
        except RuntimeError:
            if self._engine != "io_uring":
                raise
            self._engine, self.name = "libaio", "fio libaio"
            return self._fio(kind, block_bytes, *options, size=size)
        job = report["jobs"][0]
        side = job["write" if kind == "write" else "read"]
        wall = float(job["job_runtime"]) / 1000 if kind == "write" else side["runtime"] / 1000
        cpu = (float(job["usr_cpu"]) + float(job["sys_cpu"])) / 100 * wall
        return Sample(wall, int(side["io_bytes"]), cpu)

    def _threads(self, block_bytes: int, seconds: float) -> Sample:
        stop_at = time.perf_counter() + seconds
        blocks = self.file_bytes // block_bytes

        def worker(seed: int) -> int:
            rng, moved = np.random.default_rng(seed), 0
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
            with mmap.mmap(-1, block_bytes) as buffer:
                while time.perf_counter() < stop_at:
                    moved += os.preadv(fd, [buffer], int(rng.integers(blocks)) * block_bytes)
            os.close(fd)
            return moved

        cpu, start = own_cpu_s(), time.perf_counter()
        with ThreadPoolExecutor(8) as pool:
            moved = sum(pool.map(worker, range(8)))
        return Sample(time.perf_counter() - start, moved, own_cpu_s() - cpu)

    def _write_threads(self, block_bytes: int, total_bytes: int) -> Sample:
        fd = os.open(self.path, os.O_WRONLY | os.O_DIRECT)
        cpu, start = own_cpu_s(), time.perf_counter()
        with mmap.mmap(-1, block_bytes) as buffer, ThreadPoolExecutor(8) as pool:
            offsets = range(0, total_bytes, block_bytes)
            moved = sum(pool.map(lambda offset: os.pwritev(fd, [buffer], offset), offsets))
            os.fdatasync(fd)
        wall = time.perf_counter() - start
        os.close(fd)
        return Sample(wall, moved, own_cpu_s() - cpu)
