"""Starts that must fail: an exit code, one clear line on stderr, nothing left behind.

1 is "failed", 2 is "you asked for what cannot be". A traceback is neither.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from typing import TYPE_CHECKING, Final

import pytest
import xxhash

from ctxstore_client import connect
from tests.daemon_process import DaemonProcess, daemon_process
from tests.faults.nodes import hits, make_keys, put_all

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FAILED: Final = 1
USAGE: Final = 2

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


def refusal(daemon: DaemonProcess, code: int) -> str:
    """What a start that must fail says on its last line."""
    logged = len(daemon.log)
    process = daemon.launch()
    assert process.stdout is not None, "a pipe was asked for"
    said = process.stdout.read()
    assert daemon.wait(timeout_s=20) == code, daemon.log
    text = daemon.log[logged:]
    assert "Traceback" not in text, text
    assert " ready" not in said, said
    lines = [line for line in text.splitlines() if line.strip()]
    assert lines, "it says why"
    assert not (daemon.directory / "endpoints.json").exists()
    return lines[-1]


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """The directory mounted over itself, read-only, for the length of the block."""
    steps = (["--bind", str(directory)], ["-o", "remount,bind,ro", "none"])
    with contextlib.ExitStack() as stack:
        for options in steps:
            done = subprocess.run(
                ["mount", *options, str(directory)], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                pytest.skip(f"cannot mount here: {done.stderr.strip()}")
            if "--bind" in options:
                umount = ["umount", "-l", str(directory)]
                stack.callback(subprocess.run, umount, check=True)
        yield


@needs_root
@pytest.mark.root
def test_a_read_only_data_dir(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    keys = make_keys(1, 3, 5000)
    with daemon_process(directory) as daemon, connect(daemon.url) as store:
        put_all(store, keys, durability="group")
        daemon.stop()
        with read_only(directory):
            said = refusal(daemon, FAILED)
            assert str(directory) in said
            assert "not writable" in said or "read-only" in said.lower(), said
        daemon.start()
        assert all(hits(store, keys))


@needs_root
@pytest.mark.root
def test_an_empty_read_only_data_dir(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    with read_only(directory), daemon_process(directory, start=False) as daemon:
        assert str(directory) in refusal(daemon, FAILED)
    assert not list(directory.iterdir())


def test_a_data_dir_without_a_parent(tmp_path: Path) -> None:
    directory = tmp_path / "nothing" / "here" / "data"
    with daemon_process(directory, start=False) as daemon:
        said = refusal(daemon, FAILED)
    assert str(directory.parent) in said
    assert "does not exist" in said
    assert not directory.parent.exists(), "a mistyped path is not created"


def test_a_file_where_the_data_dir_should_be(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("precious")
    with daemon_process(path, start=False) as daemon:
        process = daemon.launch()
        assert process.wait(20) == FAILED
        daemon.kill()
        assert "not a directory" in daemon.log
        assert "Traceback" not in daemon.log
    assert path.read_text() == "precious"


def test_a_data_dir_in_use_by_another_daemon(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    with (
        daemon_process(directory) as first,
        daemon_process(directory, start=False) as second,
        connect(first.url) as store,
    ):
        published = (directory / "endpoints.json").read_bytes()
        process = second.launch()
        assert process.wait(20) == FAILED
        second.kill()
        assert "Traceback" not in second.log
        assert f"in use by process {first.pid}" in second.log
        assert "--data-dir" in second.log
        assert (directory / "endpoints.json").read_bytes() == published, "not its to delete"
        keys = make_keys(1, 2, 5000)
        put_all(store, keys, durability="group")
        assert all(hits(store, keys))


def test_a_data_dir_of_a_newer_format(tmp_path: Path) -> None:
    with daemon_process(tmp_path / "data") as daemon:
        daemon.stop()
        identity = daemon.directory / "IDENTITY"
        text = identity.read_text()
        head, _, rest = text.partition("\n")
        title, _, version = head.partition(": ")
        body = f"{title}: {int(version) + 1}\n{rest.rpartition('checksum: ')[0]}"
        changed = f"{body}checksum: {xxhash.xxh3_64_intdigest(body.encode()):016x}\n"
        identity.write_text(changed)
        before = {path.name: path.stat().st_mtime_ns for path in daemon.directory.iterdir()}
        said = refusal(daemon, FAILED)
        assert "newer" in said
        assert "upgrade" in said
        after = {path.name: path.stat().st_mtime_ns for path in daemon.directory.iterdir()}
        assert {name for name in before if before[name] != after.get(name)} <= {"LOCK"}
        identity.write_text(text)
        daemon.start()


def test_a_data_dir_of_another_cluster(tmp_path: Path) -> None:
    with daemon_process(tmp_path / "data") as daemon:
        daemon.stop()
        daemon.arguments += ["--cluster-id", "elsewhere"]
        said = refusal(daemon, FAILED)
        assert "elsewhere" in said
        assert "belongs to cluster" in said


@pytest.mark.parametrize("flag", ["--listen", "--data-listen", "--http-listen"])
def test_a_port_in_use(tmp_path: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with daemon_process(tmp_path / "data", arguments=[flag, address], start=False) as daemon:
            said = refusal(daemon, USAGE)
    assert address in said
    assert "--listen" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--memory", "64TiB"], ["--memory", "64", "this machine"]),
        (["--memory", "1MiB"], ["memory"]),
        (["--memory", "a lot"], ["memory", "a lot"]),
        (["--disk", "1MiB"], ["disk"]),
        (["--listen", "0.0.0.0:0"], ["127.0.0.1", "0.0.0.0"]),
        (["--data-listen", "0.0.0.0:0"], ["127.0.0.1", "0.0.0.0"]),
        (["--http-listen", "[::]:0"], ["127.0.0.1", "[::]"]),
        (["--set", "memory.cap_byte=1GiB"], ["cap_byte", "cap_bytes"]),
        (["--set", "nonsense=1"], ["nonsense"]),
        (["--log-level", "loud"], ["loud", "info"]),
        (["--nonsense"], ["--nonsense"]),
        (["--config", "/nonexistent/ctxstore.toml"], ["/nonexistent/ctxstore.toml"]),
        (["--unix", "/tmp/" + "x" * 120], ["unix", "107"]),
    ],
    ids=lambda value: " ".join(value)[:40] if value and value[0].startswith("--") else "",
)
def test_a_configuration_that_cannot_be(
    tmp_path: Path, arguments: list[str], expected: list[str]
) -> None:
    with daemon_process(tmp_path / "data", arguments=arguments, start=False) as daemon:
        said = refusal(daemon, USAGE)
    for word in expected:
        assert word in said, said


def test_an_unknown_key_in_the_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "ctxstore.toml"
    file.write_text("[memory]\ncap_bites = '1GiB'\n")
    with daemon_process(
        tmp_path / "data", arguments=["--config", str(file)], start=False
    ) as daemon:
        said = refusal(daemon, USAGE)
    assert "cap_bites" in said
    assert "cap_bytes" in said


def test_an_unknown_variable_in_the_environment(tmp_path: Path) -> None:
    with daemon_process(
        tmp_path / "data", environment={"CTXSTORED_MEMORY_CAP": "1GiB"}, start=False
    ) as daemon:
        assert "CTXSTORED_MEMORY_CAP" in refusal(daemon, USAGE)


def test_endpoints_of_a_killed_daemon_do_not_outlive_the_next_failed_start(
    tmp_path: Path,
) -> None:
    with daemon_process(tmp_path / "data") as daemon:
        daemon.kill()
        assert (daemon.directory / "endpoints.json").exists(), "SIGKILL leaves it"
        daemon.arguments += ["--cluster-id", "elsewhere"]
        refusal(daemon, FAILED)
