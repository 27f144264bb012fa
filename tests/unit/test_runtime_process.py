"""What a daemon process does around its node: lock, addresses, sockets, log lines, HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import uvloop

from ctxstore.config import Address
from ctxstore.errors import ConfigError, DataDirError
from ctxstore_daemon.runtime import host
from ctxstore_daemon.runtime.datadir import (
    ENDPOINTS_NAME,
    LOCK_NAME,
    DataDirLock,
    Endpoints,
    publish_endpoints,
    withdraw_endpoints,
)
from ctxstore_daemon.runtime.http import (
    CONNECTIONS_MAX,
    REQUEST_BYTES_MAX,
    HttpServerState,
    Page,
    respond,
)
from ctxstore_daemon.runtime.sockets import (
    address_of,
    bind_tcp,
    bind_unix,
    candidate_directories,
    remove_socket,
)
from ctxstore_daemon.telemetry.log import (
    REPEATS_MAX,
    WINDOW_S,
    LineFormatter,
    RepeatFilter,
    event_log,
)

if TYPE_CHECKING:
    from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

NODE = bytes(range(16))

# ---------------------------------------------------------------------------- data directory


def test_the_lock_makes_the_directory_and_keeps_others_out(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    lock = DataDirLock(directory, create=True)
    assert (directory / LOCK_NAME).read_text() == f"{os.getpid()}\n"
    with pytest.raises(DataDirError, match=f"in use by process {os.getpid()}"):
        DataDirLock(directory, create=True)
    lock.release()
    lock.release()
    DataDirLock(directory, create=False).release()


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib, time\n"
        "from ctxstore_daemon.runtime.datadir import DataDirLock\n"
        "lock = DataDirLock(pathlib.Path(sys.argv[1]), create=True)\n"
        "sys.stdout.write('locked\\n'); sys.stdout.flush(); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "d")], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(DataDirError, match=str(holder.pid)):
            DataDirLock(tmp_path / "d", create=False)
        holder.kill()
    DataDirLock(tmp_path / "d", create=False).release()


def test_directories_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataDirError, match="does not exist"):
        DataDirLock(tmp_path / "no" / "where", create=True)
    with pytest.raises(DataDirError, match="does not exist"):
        DataDirLock(tmp_path / "nowhere", create=False)
    file = tmp_path / "file"
    file.touch()
    for create in (True, False):
        with pytest.raises(DataDirError, match="not a directory"):
            DataDirLock(file, create=create)


def test_endpoints_appear_whole_and_go(tmp_path: Path) -> None:
    endpoints = Endpoints("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", None, 7, "ab", "0.1")
    publish_endpoints(tmp_path, endpoints)
    assert os.listdir(tmp_path) == [ENDPOINTS_NAME]
    read = json.loads((tmp_path / ENDPOINTS_NAME).read_text())
    assert read["control"] == "127.0.0.1:1"
    assert read["unix"] is None
    assert set(read) == {"control", "data", "http", "unix", "pid", "node_id", "version"}
    withdraw_endpoints(tmp_path)
    withdraw_endpoints(tmp_path)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------- sockets


def test_a_taken_port_is_a_clear_error() -> None:
    with bind_tcp(Address("127.0.0.1", 0), what="control") as taken:
        host_name, _, port = address_of(taken).rpartition(":")
        assert host_name == "127.0.0.1"
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} for data"):
            bind_tcp(Address("127.0.0.1", int(port)), what="data")


def test_ipv6_addresses_keep_their_brackets() -> None:
    try:
        bound = bind_tcp(Address("::1", 0), what="control")
    except ConfigError:
        pytest.skip("no IPv6 on this machine")
    with bound:
        assert address_of(bound).startswith("[::1]:")


def test_the_socket_stands_in_a_private_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    found = bind_unix("auto", NODE)
    assert found is not None
    bound, path = found
    with bound:
        assert path == tmp_path / "ctxstore" / f"{NODE.hex()[:16]}.sock"
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        bound.listen(1)
        # A daemon over a copy of the directory must not take the name from a living one.
        second = bind_unix("auto", NODE)
        assert second is not None
        with second[0]:
            assert second[1] == path.with_name(f"{NODE.hex()[:16]}-{os.getpid()}.sock")
        remove_socket(second[1])
    # Left behind by a killed daemon: taken over.
    assert path.exists()
    third = bind_unix("auto", NODE)
    assert third is not None
    third[0].close()
    assert third[1] == path


def test_a_directory_of_others_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "ctxstore").mkdir(mode=0o777)
    (tmp_path / "ctxstore").chmod(0o777)
    found = bind_unix("auto", NODE)
    if found is not None:
        with found[0]:
            assert tmp_path not in found[1].parents
        remove_socket(found[1])


def test_order_of_directories() -> None:
    found = list(candidate_directories({"XDG_RUNTIME_DIR": "/run/user/7"}, 7))
    assert [str(path) for path in found] == [
        "/run/user/7/ctxstore",
        "/run/ctxstore",
        "/tmp/ctxstore-7",
    ]
    assert len(list(candidate_directories({}, 0))) == 2


def test_given_unix_paths(tmp_path: Path) -> None:
    assert bind_unix("off", NODE) is None
    path = tmp_path / "x.sock"
    found = bind_unix(str(path), NODE)
    assert found is not None
    with found[0] as bound:
        bound.listen(1)
        with pytest.raises(ConfigError, match="served by another"):
            bind_unix(str(path), NODE)
    with pytest.raises(ConfigError, match="at most 107"):
        bind_unix("/tmp/" + "x" * 110, NODE)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="no socket"):
        bind_unix(str(tmp_path / "file"), NODE)
    with pytest.raises(ConfigError, match="cannot listen"):
        bind_unix(str(tmp_path / "none" / "x.sock"), NODE)


def test_memory_above_the_machine_is_refused() -> None:
    there = host.memory_bytes()
    host.check_memory(there)
    with pytest.raises(ConfigError, match="of memory this machine"):
        host.check_memory(there + 1)


# ---------------------------------------------------------------------------- log lines


def _record(event: str, created: float, **fields: object) -> logging.LogRecord:
    record = logging.makeLogRecord(
        {"name": "ctxstore_daemon.x", "levelno": logging.WARNING, "levelname": "WARNING"}
    )
    record.created = created
    record.msg = event
    record.event = event
    return record


def test_lines_are_events_with_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        event_log("ctxstore_daemon.test").info(
            "opened", conn=7, node=b"\x01\xff", path="a b", share=0.5, none=None
        )
    (record,) = caplog.records
    assert record.getMessage() == 'opened conn=7 node=01ff path="a b" share=0.5 none=None'
    line = LineFormatter().format(record)
    assert line.endswith(f"info ctxstore_daemon.test {record.getMessage()}")
    assert line[10] == "T"
    assert line[23] == "Z"


def test_a_field_cannot_forge_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        event_log("ctxstore_daemon.test").info("hello", client='x\n2026 error "fake" a=b')
    assert "\n" not in caplog.records[0].getMessage()
    assert caplog.records[0].getMessage().count('"') == 4, "inner quotes are escaped"


def test_repeats_are_kept_back_and_counted() -> None:
    repeats = RepeatFilter()
    let_through = [repeats.filter(_record("broken", 1000.0 + i / 100)) for i in range(20)]
    assert sum(let_through) == REPEATS_MAX
    assert repeats.filter(_record("other", 1000.5)), "other events have windows of their own"
    later = _record("broken", 1000.0 + WINDOW_S)
    assert repeats.filter(later)
    assert LineFormatter().format(later).endswith(f"kept_back={20 - REPEATS_MAX}")


def test_repeats_survive_a_clock_that_jumps_back() -> None:
    repeats = RepeatFilter()
    assert repeats.filter(_record("broken", 5000.0))
    assert repeats.filter(_record("broken", 10.0))


# ---------------------------------------------------------------------------- HTTP

PAGES = {"/healthz": lambda: Page(200, b"ok\n"), "/readyz": lambda: Page(503, b"no\n")}


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /healthz HTTP/1.1", 200),
        (b"GET /healthz?x=1 HTTP/1.0", 200),
        (b"HEAD /healthz HTTP/1.1", 200),
        (b"GET /readyz HTTP/1.1", 503),
        (b"GET /other HTTP/1.1", 404),
        (b"POST /healthz HTTP/1.1", 405),
        (b"GET /healthz", 400),
        (b"\xff\x00\x01", 400),
        (b"GET /healthz GOPHER/1", 400),
    ],
)
def test_http_answers(request_line: bytes, status: int) -> None:
    answer = respond(request_line + b"\r\nHost: x\r\n\r\n", PAGES)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
    assert len(body) == (0 if request_line.startswith(b"HEAD") else length)


@pytest.mark.leaks_ok(reason="libuv keeps its signal pipe for the life of the process")
@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_http_server_over_a_socket(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def body() -> None:
        loop = asyncio.get_running_loop()
        state = HttpServerState(PAGES)
        server = await loop.create_server(state.protocol, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        reader, writer = await asyncio.open_connection(*address)
        for byte in b"GET /healthz HTTP/1.1\r\n\r\n":  # cut anywhere
            writer.write(bytes((byte,)))
            await writer.drain()
        assert (await reader.read()).endswith(b"\r\n\r\nok\n")
        writer.close()
        await writer.wait_closed()
        # A head without an end is cut off at its bound, not collected for ever.
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET / HTTP/1.1\r\n" + b"x" * REQUEST_BYTES_MAX)
        assert b" 431 " in await reader.read()
        writer.close()
        # Silent connections are bounded.
        silent = [await asyncio.open_connection(*address) for _ in range(CONNECTIONS_MAX)]
        with pytest.raises(OSError):  # noqa: PT011 - reset or end, as the kernel pleases
            await _ask_until_refused(address)
        state.close()
        for reader, writer in silent:
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(body())


async def _ask_until_refused(address: tuple[str, int]) -> None:
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(b"GET /healthz HTTP/1.1\r\n\r\n")
        if not await reader.read():
            raise ConnectionResetError
    finally:
        writer.close()


def test_sockets_are_not_inherited() -> None:
    with bind_tcp(Address("127.0.0.1", 0), what="control") as bound:
        assert not os.get_inheritable(bound.fileno())
        assert isinstance(bound, socket.socket)
