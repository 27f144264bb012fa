"""A real daemon, driven by bare wire messages: life cycle, every path of put and get, restarts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ctxstore.limits import INLINE_BYTES_MAX, KIB, MIB
from ctxstore.wire import messages as wire
from tests.daemon_process import ROOT, DaemonProcess, daemon_process
from tests.raw_client import (
    TIMEOUT_US,
    RawData,
    connect_tcp,
    connect_unix,
    some_keys,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMITTED, EXISTS = wire.PutResult.COMMITTED, wire.PutResult.EXISTS


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with daemon_process(tmp_path / "data") as running:
        yield running


def _payloads(*lengths: int) -> list[bytes]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, length, np.uint8).tobytes() for length in lengths]


def test_ready_means_published_and_gone_means_withdrawn(daemon: DaemonProcess) -> None:
    endpoints = daemon.endpoints
    assert endpoints is not None
    assert endpoints.pid == daemon.pid
    assert len(endpoints.node_id) == 32
    assert endpoints.unix is not None
    assert Path(endpoints.unix).is_socket()
    assert daemon.http("/healthz")[0] == 200
    assert daemon.http("/readyz")[0] == 200
    status, page = daemon.http("/metrics")
    assert status == 200
    assert "ctxstore_entries 0.0" in page
    assert "process_resident_memory_bytes" in page
    assert daemon.http("/nothing")[0] == 404
    assert daemon.stop() == 0
    assert not (daemon.directory / "endpoints.json").exists()
    assert not Path(endpoints.unix).exists()
    assert "node_stopped" in daemon.log


def test_put_and_get_over_shared_memory(daemon: DaemonProcess) -> None:
    keys = some_keys(5)
    payloads = _payloads(1, INLINE_BYTES_MAX, INLINE_BYTES_MAX + 1, 64 * KIB, MIB + 3)
    with connect_unix(daemon) as client:
        assert client.ok.arena_bytes > 0
        assert client.put(keys, payloads) == [COMMITTED] * 5
        assert client.put(keys, payloads) == [EXISTS] * 5
        assert client.get(keys) == payloads
        assert client.get(some_keys(1, space=9)) == [wire.Lookup.MISS]
        assert client.exists([*keys, *some_keys(1, space=9)]) == [True] * 5 + [False]
        assert client.ask(wire.Ping(client.rid()), wire.CountReply).count == 0
        stats = client.stats()
        assert stats["engine"]["entries"] == 5  # type: ignore[index]


def test_put_and_get_over_tcp(daemon: DaemonProcess) -> None:
    keys = some_keys(4)
    payloads = _payloads(100, 5000, 64 * KIB, 2 * MIB)
    with connect_tcp(daemon) as client, RawData(client) as data:
        assert client.ok.arena_bytes == 0
        assert client.ok.staging_bytes == 0
        assert data.get(keys) == [wire.Lookup.MISS] * 4
        assert data.put(keys, payloads) == [COMMITTED] * 4
        assert data.put(keys, payloads) == [EXISTS] * 4
        assert data.get(keys) == payloads
        small = data.get(keys, capacity=5000)
        assert small == [*payloads[:2], wire.Lookup.TOO_SMALL, wire.Lookup.TOO_SMALL]
        assert data.get(keys, capacity=5000, exact=True)[:2] == [wire.Lookup.MISS, payloads[1]]
    with connect_unix(daemon) as client:
        assert client.get(keys) == payloads


def test_a_payload_damaged_on_its_way_is_sent_once_more(daemon: DaemonProcess) -> None:
    keys, payloads = some_keys(3), _payloads(100, 5000, 70_000)
    with connect_tcp(daemon) as client, RawData(client) as data:
        assert data.put(keys, payloads, spoil=2) == [COMMITTED] * 3
        assert data.get(keys) == payloads
        other = some_keys(1, space=3)
        assert data.put(other, payloads[1:2], spoil=2) == [wire.PutResult.REFUSED]
        assert data.get(other) == [wire.Lookup.MISS]


@pytest.mark.parametrize("kill", [False, True])
def test_what_was_committed_with_group_survives(daemon: DaemonProcess, kill: bool) -> None:
    keys, payloads = some_keys(6), _payloads(10, 1000, 5000, 64 * KIB, 300_000, MIB)
    with connect_unix(daemon) as client:
        assert client.put(keys, payloads, durability=wire.Durability.GROUP) == [COMMITTED] * 6
        before = client.ok
    first = daemon.endpoints
    second = daemon.restart(kill=kill)
    assert first is not None
    assert second.control == first.control
    assert second.node_id == first.node_id
    with connect_unix(daemon) as client:
        assert client.ok.boot_id != before.boot_id
        assert client.get(keys) == payloads
        removed = wire.Remove(client.rid(), TIMEOUT_US, keys[0])
        assert client.ask(removed, wire.MaskReply).mask == b"\x01"
    daemon.restart(kill=True)
    with connect_tcp(daemon) as client, RawData(client) as data:
        assert data.get(keys) == [wire.Lookup.MISS, *payloads[1:]]


def test_a_clean_stop_keeps_what_was_only_in_memory(daemon: DaemonProcess) -> None:
    keys, payloads = some_keys(3), _payloads(2000, 20_000, 200_000)
    with connect_unix(daemon) as client:
        assert client.put(keys, payloads, durability=wire.Durability.MEMORY) == [COMMITTED] * 3
    daemon.restart()
    with connect_unix(daemon) as client:
        assert client.get(keys) == payloads


def test_sigint_ends_it_too(daemon: DaemonProcess) -> None:
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGINT)
    assert daemon.wait() == 0


def test_flush_and_verify_report_progress(daemon: DaemonProcess) -> None:
    keys, payloads = some_keys(20), _payloads(*[30_000] * 20)
    with connect_unix(daemon) as client:
        client.put(keys, payloads)
        client.put(some_keys(2000, space=1), _payloads(*[100] * 2000))
        client.ask(wire.Flush(client.rid(), TIMEOUT_US), wire.CountReply)
        reply = client.ask(wire.Verify(client.rid(), TIMEOUT_US, 0), wire.VerifyReply)
        while not reply.done:
            found = client.receive()
            assert isinstance(found, wire.VerifyReply)
            reply = found
        assert (reply.shards, reply.damaged, reply.unreadable, reply.total) == (2020, 0, 0, 2020)
        assert reply.checked_bytes >= 20 * 30_000 + 2000 * 100
        assert client.ask(wire.Ping(client.rid()), wire.CountReply).count == 0


def test_a_second_daemon_is_refused(daemon: DaemonProcess) -> None:
    with daemon_process(daemon.directory, start=False) as second:
        second.launch()
        assert second.wait() == 1
        assert f"in use by process {daemon.pid}" in second.log
    with connect_tcp(daemon) as client:
        assert client.ok.node_id.hex() == daemon.endpoints.node_id  # type: ignore[union-attr]
    assert (daemon.directory / "endpoints.json").exists()


def test_a_taken_port_is_told(daemon: DaemonProcess, tmp_path: Path) -> None:
    assert daemon.endpoints is not None
    arguments = ["--listen", daemon.endpoints.control]
    with daemon_process(tmp_path / "other", arguments=arguments, start=False) as second:
        second.launch()
        assert second.wait() == 2
        assert f"cannot listen on {daemon.endpoints.control} for control" in second.log


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--memory", "4TiB"], "of memory this machine"),
        (["--memory", "1MiB"], "is below 32MiB"),
        (["--disk", "1MiB"], "is below 32MiB"),
        (["--listen", "0.0.0.0:0"], "no credentials yet"),
        (["--listen", "127.0.0.1"], "not an address"),
        (["--set", "memory.capbytes=1"], "did you mean 'memory.cap_bytes'"),
        (["--set", "nonsense"], "write --set section.name=value"),
        (["--config", "/nowhere.toml"], "No such file"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
)
def test_usage_errors_are_told_at_once(tmp_path: Path, arguments: list[str], text: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ctxstore_daemon", "serve"),
            *("--data-dir", str(tmp_path / "d"), "--listen", "127.0.0.1:0"),
            *arguments,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "d" / "endpoints.json").exists()


def test_verify_off_line(daemon: DaemonProcess) -> None:
    keys, payloads = some_keys(8), _payloads(*[50_000] * 8)
    with connect_unix(daemon) as client:
        client.put(keys, payloads, durability=wire.Durability.GROUP)

    def verify() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(sys.executable, "-m", "ctxstore_daemon", "verify", "--json"),
                str(daemon.directory),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    busy = verify()
    assert busy.returncode == 1
    assert "in use by process" in busy.stderr
    daemon.stop()
    good = verify()
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["damaged"] == 0
    segment = _with_payload(daemon.directory, payloads[3])
    data = bytearray(segment.read_bytes())
    at = data.find(payloads[3])
    data[at + 17] ^= 1
    segment.write_bytes(data)
    bad = verify()
    assert bad.returncode == 1
    assert json.loads(bad.stdout)["damaged"] == 1
    daemon.start()
    with connect_unix(daemon) as client:
        found = client.get(keys)
        assert found[3] is wire.Lookup.MISS
        assert found[:3] + found[4:] == payloads[:3] + payloads[4:]


def _with_payload(directory: Path, payload: bytes) -> Path:
    return next(
        path for path in sorted(directory.glob("segment-*")) if payload in path.read_bytes()
    )


def test_a_stopped_process_is_no_worse_for_it(daemon: DaemonProcess) -> None:
    keys, payloads = some_keys(1), _payloads(100_000)
    with connect_unix(daemon) as client:
        client.put(keys, payloads)
        daemon.pause()
        client.send(wire.Get(client.rid(), 1000, keys[0]))
        time.sleep(0.3)
        daemon.resume()
        reply = client.receive()
        assert isinstance(reply, wire.GetReply)
        assert client.get(keys) == payloads


def test_what_is_in_force_is_printed_at_start(daemon: DaemonProcess) -> None:
    assert "memory.cap_bytes=64MiB" in daemon.log
    daemon.wait_for_log("ready control=127.0.0.1:")
    assert f"pid={os.getpid()}" not in daemon.log
