"""A real daemon that is stopped or killed while clients put and get as fast as they can."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ctxstore.errors import ProtocolError, TransportError
from ctxstore.limits import MIB
from ctxstore.wire import messages as wire
from tests.daemon_process import DaemonProcess, daemon_process
from tests.raw_client import RawData, connect_tcp, connect_unix

if TYPE_CHECKING:
    from pathlib import Path

_ENDED = (TransportError, ProtocolError, OSError, AssertionError)
"""What a raw client runs into when its daemon goes; the checks come afterwards."""


def _payload(key: bytes) -> bytes:
    return key * (1 + int.from_bytes(key[:2], "little") % 3000)


def _put_over_shm(daemon: DaemonProcess, done: dict[bytes, None], stop: threading.Event) -> None:
    try:
        with connect_unix(daemon, staging_bytes=2 * MIB) as client:
            while not stop.is_set():
                keys = [os.urandom(16) for _ in range(8)]
                payloads = [_payload(key) for key in keys]
                results = client.put(keys, payloads, durability=wire.Durability.GROUP)
                for key, result in zip(keys, results, strict=True):
                    if result is wire.PutResult.COMMITTED:
                        done[key] = None
                for key, found in zip(keys, client.get(keys), strict=True):
                    assert found == _payload(key) or isinstance(found, wire.Lookup)
    except _ENDED:
        return


def _put_over_tcp(daemon: DaemonProcess, stop: threading.Event) -> None:
    try:
        with connect_tcp(daemon) as client, RawData(client) as data:
            while not stop.is_set():
                keys = [os.urandom(16) for _ in range(4)]
                data.put(keys, [_payload(key) for key in keys])
                for key, found in zip(keys, data.get(keys), strict=True):
                    assert found == _payload(key) or isinstance(found, wire.Lookup)
    except _ENDED:
        return


@pytest.mark.parametrize("kill", [False, True], ids=["term", "kill"])
def test_nothing_acknowledged_is_lost(tmp_path: Path, kill: bool) -> None:
    # Small enough to live through it all without reclaim: nothing may be missing for room.
    with daemon_process(tmp_path / "data", memory="128MiB", disk="2GiB") as daemon:
        done: dict[bytes, None] = {}
        for _ in range(2):
            stop = threading.Event()
            with ThreadPoolExecutor(4) as pool:
                work = [pool.submit(_put_over_shm, daemon, done, stop) for _ in range(2)]
                work += [pool.submit(_put_over_tcp, daemon, stop) for _ in range(2)]
                time.sleep(0.7)
                began = time.monotonic()
                if kill:
                    daemon.kill()
                else:
                    assert daemon.stop() == 0, daemon.log
                    assert time.monotonic() - began < 10
                stop.set()
                for future in work:
                    future.result()
            daemon.start()
        assert "Traceback" not in daemon.log
        assert len(done) > 20
        keys = list(done)
        with connect_unix(daemon) as client:
            for at in range(0, len(keys), 64):
                part = keys[at : at + 64]
                for key, found in zip(part, client.get(part), strict=True):
                    assert found == _payload(key), f"{key.hex()} was acknowledged"
            reply = client.ask(wire.Verify(client.rid(), 10_000_000, 0), wire.VerifyReply)
            while not reply.done:
                message = client.receive()
                assert isinstance(message, wire.VerifyReply)
                reply = message
            assert (reply.damaged, reply.unreadable) == (0, 0)


def test_ping_stays_quick_while_bulk_streams(tmp_path: Path) -> None:
    with daemon_process(tmp_path / "data", memory="256MiB", disk="256MiB") as daemon:
        keys = [os.urandom(16) for _ in range(8)]
        payload = np.random.default_rng(1).integers(0, 256, MIB, np.uint8).tobytes()
        stop = threading.Event()

        def stream() -> None:
            with connect_tcp(daemon) as client, RawData(client) as data:
                data.put(keys, [payload] * len(keys))
                while not stop.is_set():
                    data.get(keys)

        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(stream)
            with connect_tcp(daemon) as client:
                times = []
                for _ in range(300):
                    began = time.perf_counter()
                    client.ask(wire.Ping(client.rid()), wire.CountReply)
                    times.append(time.perf_counter() - began)
            stop.set()
            work.result()
        # Generous: the machine may be busy. Bulk on the loop would cost a multiple of this.
        assert sorted(times)[150] < 0.02
