"""Where a store is: addresses, what the environment says, and endpoints files.

Owns the grammar of addresses. Reads the environment and small files, but never opens a connection:
whether a daemon answers there is the pool's business.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ctxstore.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_PORT: Final = 7600
DEFAULT_ADDRESS: Final = f"ctxstore://127.0.0.1:{DEFAULT_PORT}"
DEFAULT_NAMESPACE: Final = "default"

ENV_ADDRESS: Final = "CTXSTORE_ADDRESS"
ENV_NAMESPACE: Final = "CTXSTORE_NAMESPACE"
ENV_TOKEN: Final = "CTXSTORE_TOKEN"
ENV_SECRET: Final = "CTXSTORE_SECRET"

_UNIX_PATH_BYTES_MAX: Final = 107  # sun_path has 108 bytes with its zero


class SharedMemory(Enum):
    """Whether shards may travel through mapped memory of a daemon on this host."""

    AUTO = "auto"
    """Map the arena where the daemon is on this host, use sockets elsewhere."""
    REQUIRE = "require"
    """A daemon that cannot share memory with this process is an error."""
    OFF = "off"
    """Always use sockets."""


@dataclass(frozen=True, slots=True)
class TcpEndpoint:
    """A control port of a daemon."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ctxstore://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixEndpoint:
    """A control socket of a daemon on this host."""

    path: str

    def __str__(self) -> str:
        return f"unix://{self.path}"


Endpoint = TcpEndpoint | UnixEndpoint


@dataclass(frozen=True, slots=True)
class Target:
    """Everything needed to say hello: endpoints in the order to try, and credentials."""

    endpoints: tuple[Endpoint, ...]
    namespace: str = DEFAULT_NAMESPACE
    token: str = field(default="", repr=False)
    cluster_id: str = ""
    shm: SharedMemory = SharedMemory.AUTO


def parse_address(address: str) -> tuple[Endpoint, ...]:
    """Endpoints of `ctxstore://host:port[,host:port...]` or `unix:///path`, in order.

    The port defaults to 7600; IPv6 hosts stand in brackets. Raises ConfigError (a ValueError).
    """
    text = address.strip()
    if text.startswith("unix://"):
        path = text.removeprefix("unix://")
        if not path.startswith("/"):
            raise ConfigError(f"address {address!r}: write unix:///absolute/path")
        if len(os.fsencode(path)) > _UNIX_PATH_BYTES_MAX:
            raise ConfigError(f"address {address!r}: the path is longer than 107 bytes")
        return (UnixEndpoint(path),)
    if not text.startswith("ctxstore://"):
        raise ConfigError(
            f"address {address!r}: write ctxstore://host:port[,host:port] or unix:///path"
        )
    hosts = [part.strip() for part in text.removeprefix("ctxstore://").rstrip("/").split(",")]
    return tuple(_tcp_endpoint(part, address) for part in hosts)


def split_host_port(text: str) -> tuple[str, int]:
    """("127.0.0.1", 7601) of "127.0.0.1:7601"; brackets of IPv6 are taken off.

    Raises ConfigError.
    """
    endpoint = _tcp_endpoint(text, text)
    return endpoint.host, endpoint.port


def _tcp_endpoint(part: str, address: str) -> TcpEndpoint:
    if part.startswith("["):
        host, closed, rest = part[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise ConfigError(f"address {address!r}: {part!r} is not [host]:port")
        port_text = rest[1:]
    else:
        host, _, port_text = part.partition(":")
    if not host:
        raise ConfigError(f"address {address!r}: {part!r} names no host")
    if not port_text:
        return TcpEndpoint(host, DEFAULT_PORT)
    if not port_text.isascii() or not port_text.isdigit() or not 0 < int(port_text) < 65536:
        raise ConfigError(f"address {address!r}: {port_text!r} is not a port (1 .. 65535)")
    return TcpEndpoint(host, int(port_text))


def resolve_target(
    address: str | None = None,
    *,
    namespace: str | None = None,
    token: str | None = None,
    cluster_id: str = "",
    shm: str | SharedMemory = SharedMemory.AUTO,
    environment: Mapping[str, str] | None = None,
) -> Target:
    """Arguments first, then the environment, then the defaults. Raises ConfigError."""
    env = os.environ if environment is None else environment
    try:
        mode = SharedMemory(shm)
    except ValueError as error:
        raise ConfigError(f"shm={shm!r}: one of auto, require, off") from error
    name = namespace if namespace is not None else env.get(ENV_NAMESPACE) or DEFAULT_NAMESPACE
    if not name:
        raise ConfigError("the namespace is empty")
    return Target(
        endpoints=parse_address(address or env.get(ENV_ADDRESS) or DEFAULT_ADDRESS),
        namespace=name,
        token=token if token is not None else env.get(ENV_TOKEN, ""),
        cluster_id=cluster_id,
        shm=mode,
    )


def environment_secret(environment: Mapping[str, str] | None = None) -> bytes:
    """The secret that key chains of this process are bound to; empty when none is set."""
    env = os.environ if environment is None else environment
    return env.get(ENV_SECRET, "").encode()


@dataclass(frozen=True, slots=True)
class EndpointsFile:
    """What a daemon wrote into `endpoints.json` of its data directory."""

    control: str
    data: str
    http: str
    unix: str | None
    pid: int
    node_id: str
    version: str

    @property
    def address(self) -> str:
        """What `connect` takes to reach that daemon."""
        return f"ctxstore://{self.control}"

    @property
    def alive(self) -> bool:
        """Whether the process that wrote the file still runs."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


def read_endpoints(data_dir: str | Path) -> EndpointsFile | None:
    """The endpoints of the daemon on `data_dir`; None when there is no file.

    Raises ConfigError when the file cannot be read or is not what a daemon writes.
    """
    path = Path(data_dir) / "endpoints.json"
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        return EndpointsFile(
            control=str(found["control"]),
            data=str(found["data"]),
            http=str(found["http"]),
            unix=None if found.get("unix") is None else str(found["unix"]),
            pid=int(found["pid"]),
            node_id=str(found["node_id"]),
            version=str(found["version"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
