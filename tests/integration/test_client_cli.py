"""The `ctxstore` command against real daemons: status, verify, serve, help and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from ctxstore_client import connect
from ctxstore_client.cli import main
from tests.daemon_process import DaemonProcess, daemon_process
from tests.shards import payload_of, shard_key

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMAND = "import sys; from ctxstore_client.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with daemon_process(tmp_path_factory.mktemp("cli") / "node") as process:
        with connect(process.url) as store:
            keys = [shard_key(5, number, 5000) for number in range(10)]
            store.put(keys, [payload_of(key) for key in keys], durability="group")
        yield process


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own: some of them become another program."""
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_status_for_people(daemon: DaemonProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", daemon.url]) == 0
    out = capsys.readouterr().out
    assert daemon.url in out
    assert "10 of at most" in out
    assert "serving" in out
    assert "preadv threads" in out


def test_status_for_tools(daemon: DaemonProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(daemon.directory), "--json"]) == 0
    (node,) = json.loads(capsys.readouterr().out)["nodes"]
    assert node["reachable"] is True
    assert node["node"]["engine"]["entries"] == 10
    assert node["node"]["disk"]["io_engine"] == "preadv threads"
    assert isinstance(node["node"]["disk"]["direct_io"], bool)
    assert node["ping_us"] > 0


def test_status_of_several_nodes_of_which_one_is_gone(
    daemon: DaemonProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", f"{daemon.url},127.0.0.1:1", "--timeout", "1"]) == 1
    out = capsys.readouterr().out
    assert "serving" in out
    assert "not reachable: cannot connect to ctxstore://" in out, "the reason comes first"
    assert "refused" in out


def test_the_environment_names_the_node(
    daemon: DaemonProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTXSTORE_ADDRESS", daemon.url)
    assert main(["status"]) == 0
    assert daemon.url in capsys.readouterr().out


def test_verify_a_running_node(daemon: DaemonProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", daemon.url]) == 0
    assert "0 damaged, 0 unreadable" in capsys.readouterr().out
    assert main(["verify", str(daemon.directory), "--json", "--rate", "1GiB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["damaged"] == 0
    assert found["done"] is True


def test_verify_a_stopped_node_and_find_damage(tmp_path: Path) -> None:
    with daemon_process(tmp_path / "node") as daemon:
        with connect(daemon.url) as store:
            keys = [shard_key(6, number, 50_000) for number in range(10)]
            store.put(keys, [payload_of(key) for key in keys], durability="group")
        daemon.stop()
        directory = str(daemon.directory)
        well = run("verify", directory, "--quiet")
        assert well.returncode == 0, well.stderr
        (segment,) = [p for p in daemon.directory.glob("segment-*") if _holds(p, keys[0])]
        image = bytearray(segment.read_bytes())
        at = image.index(payload_of(keys[4]).tobytes()[:4096])
        image[at + 100] ^= 1
        segment.write_bytes(image)
        damaged = run("verify", directory, "--quiet", "--json")
        assert damaged.returncode == 1, damaged.stdout + damaged.stderr
        assert main(["status", directory]) == 1


def _holds(path: Path, key: bytes) -> bool:
    return payload_of(key).tobytes()[:4096] in path.read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["status", "--nonsense"],
        ["status", "/nowhere/at/all"],
        ["status", "http://x"],
        ["status", "--timeout", "0"],
        ["verify", "--rate", "fast"],
        ["bench", "nothing"],
        ["demo", "--turns", "many"],
    ],
    ids=" ".join,
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code: object
    try:
        code = main(arguments)
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "status", "verify", "bench", "demo"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*([command] if command else []), "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "ctxstore" in out
    if command in ("", "status", "verify"):
        assert f"ctxstore {command}".strip() in out.split("options:")[0]


def test_serve_becomes_the_daemon() -> None:
    shown = run("serve", "--help")
    assert shown.returncode == 0
    assert "--data-dir" in shown.stdout
    refused = run("serve", "--memory", "lots")
    assert refused.returncode == 2
    assert refused.stderr


def test_a_node_that_is_not_there_is_a_failure_not_a_traceback() -> None:
    for arguments in (["status", "ctxstore://127.0.0.1:1"], ["verify", "ctxstore://127.0.0.1:1"]):
        done = run(*arguments)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
