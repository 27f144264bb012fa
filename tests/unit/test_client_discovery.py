"""Addresses, the environment and endpoints files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import ctxstore_client
from ctxstore import errors
from ctxstore.errors import ConfigError
from ctxstore_client.discovery import (
    SharedMemory,
    TcpEndpoint,
    UnixEndpoint,
    environment_secret,
    parse_address,
    read_endpoints,
    resolve_target,
    split_host_port,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("address", "endpoints"),
    [
        ("ctxstore://127.0.0.1:7600", [TcpEndpoint("127.0.0.1", 7600)]),
        ("ctxstore://node-a", [TcpEndpoint("node-a", 7600)]),
        ("ctxstore://a:1,b:2/", [TcpEndpoint("a", 1), TcpEndpoint("b", 2)]),
        (" ctxstore://a , b:9 ", [TcpEndpoint("a", 7600), TcpEndpoint("b", 9)]),
        (
            "ctxstore://[::1]:7600,[fe80::2]",
            [TcpEndpoint("::1", 7600), TcpEndpoint("fe80::2", 7600)],
        ),
        ("unix:///run/ctxstore/n.sock", [UnixEndpoint("/run/ctxstore/n.sock")]),
    ],
)
def test_addresses(address: str, endpoints: list[object]) -> None:
    found = parse_address(address)
    assert list(found) == endpoints
    again = [parse_address(str(endpoint))[0] for endpoint in found]
    assert again == endpoints, "what is shown can be given again"


@pytest.mark.parametrize(
    "address",
    [
        "",
        "127.0.0.1:7600",
        "http://127.0.0.1",
        "ctxstore://",
        "ctxstore://:7600",
        "ctxstore://a:0",
        "ctxstore://a:65536",
        "ctxstore://a:port",
        "ctxstore://a:٣",
        "ctxstore://a,,b",
        "ctxstore://[::1",
        "ctxstore://[::1]7600",
        "unix://relative",
        "unix:///" + "x" * 120,
    ],
)
def test_malformed_addresses(address: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        parse_address(address)


def test_host_and_port() -> None:
    assert split_host_port("127.0.0.1:7601") == ("127.0.0.1", 7601)
    assert split_host_port("[::1]:7601") == ("::1", 7601)


def test_arguments_come_before_the_environment_and_that_before_defaults() -> None:
    env = {
        "CTXSTORE_ADDRESS": "ctxstore://env:1",
        "CTXSTORE_NAMESPACE": "team",
        "CTXSTORE_TOKEN": "secret",
    }
    target = resolve_target(environment=env)
    assert target.endpoints == (TcpEndpoint("env", 1),)
    assert (target.namespace, target.token) == ("team", "secret")
    target = resolve_target("ctxstore://arg:2", namespace="n", token="t", environment=env)
    assert target.endpoints == (TcpEndpoint("arg", 2),)
    assert (target.namespace, target.token) == ("n", "t")
    target = resolve_target(environment={})
    assert target.endpoints == (TcpEndpoint("127.0.0.1", 7600),)
    assert (target.namespace, target.token) == ("default", "")
    assert target.shm is SharedMemory.AUTO


def test_a_token_is_never_shown() -> None:
    assert "hush" not in repr(resolve_target(token="hush", environment={}))


@pytest.mark.parametrize("wrong", [{"shm": "yes"}, {"namespace": ""}, {"address": "x"}])
def test_malformed_arguments_are_value_errors(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        resolve_target(**wrong, environment={})


def test_the_secret() -> None:
    assert environment_secret({"CTXSTORE_SECRET": "s3"}) == b"s3"
    assert environment_secret({}) == b""


def _endpoints(pid: int) -> str:
    fields = {"control": "127.0.0.1:7600", "data": "127.0.0.1:7601", "http": "127.0.0.1:7602"}
    return json.dumps({**fields, "unix": None, "pid": pid, "node_id": "ab", "version": "0"})


def test_endpoints_files(tmp_path: Path) -> None:
    assert read_endpoints(tmp_path) is None
    (tmp_path / "endpoints.json").write_text(_endpoints(os.getpid()))
    found = read_endpoints(tmp_path)
    assert found is not None
    assert found.alive
    assert found.address == "ctxstore://127.0.0.1:7600"
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    (tmp_path / "endpoints.json").write_text(_endpoints(ended.pid))
    found = read_endpoints(tmp_path)
    assert found is not None
    assert not found.alive


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"control": 1', '{"control": "a", "pid": "x"}'])
def test_broken_endpoints_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "endpoints.json").write_text(text)
    with pytest.raises(ConfigError, match=r"endpoints\.json"):
        read_endpoints(tmp_path)


def test_every_error_that_may_be_raised_can_be_imported() -> None:
    """All but those of placement and of manifests, which no method of a store raises."""
    inner = {
        "PlacementError",
        "StaleEpoch",
        "LeaseExpired",
        "NotOwner",
        "ManifestError",
        "DataDirError",
    }
    known = {
        name
        for name, found in vars(errors).items()
        if isinstance(found, type) and issubclass(found, errors.CtxStoreError)
    }
    assert known - inner <= set(ctxstore_client.__all__)
    for name in known - inner:
        assert getattr(ctxstore_client, name) is getattr(errors, name)
    assert not ctxstore_client.StorageError.retryable
