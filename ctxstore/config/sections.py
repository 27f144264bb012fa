"""The sections of a daemon's configuration and the relations between their settings.

Owns defaults, docs and checks; a `DaemonConfig` that exists is consistent. Must not read texts
(`loading` does) nor ask the machine for anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from ctxstore import limits
from ctxstore.config.values import Address, ValueKind, about
from ctxstore.errors import ConfigError
from ctxstore.units import describe_size

DEFAULT_NAMESPACE: Final = "default"
DISK_BYTES_MIN: Final = 32 * limits.MIB
"""Eight segments of the smallest useful size and the meta log."""
MEMORY_BYTES_MIN: Final = 32 * limits.MIB
STAGING_CONNECTIONS_MIN: Final = 4
"""Connections that can have staging at once, however small the memory."""
_SEGMENT_UNIT: Final = 64 * limits.KIB


class LogLevel(Enum):
    """How much is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class PagePreference(Enum):
    """Pages of the arena; a preference that cannot be had falls back to the next one."""

    AUTO = "auto"
    HUGE = "huge"
    TRANSPARENT = "thp"
    SMALL = "4k"


class DirectIO(Enum):
    """Whether segments are opened with O_DIRECT."""

    AUTO = "auto"
    OFF = "off"


class MemoryPolicy(Enum):
    """What leaves the memory tier first."""

    S3FIFO = "s3fifo"


class NamespaceDurability(Enum):
    """When a put is acknowledged unless it says otherwise."""

    MEMORY = "memory"
    GROUP = "group"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """Who this node is and how the process behaves."""

    data_dir: str = field(
        default="ctxstore-data",
        metadata=about(
            ValueKind.TEXT,
            "Directory of segments, meta log and endpoints.json; made if missing, one daemon each.",
        ),
    )
    id: str = field(
        default="",
        metadata=about(
            ValueKind.TEXT,
            "Name of this node. Empty: drawn at the first start and kept in the data directory.",
        ),
    )
    cluster_id: str = field(
        default="ctxstore",
        metadata=about(ValueKind.TEXT, "Clients that name another cluster are refused."),
    )
    log_level: LogLevel = field(
        default=LogLevel.INFO,
        metadata=about(ValueKind.CHOICE, "Least severe messages that are logged on stderr."),
    )
    shutdown_deadline_s: float = field(
        default=30.0,
        metadata=about(
            ValueKind.SECONDS,
            "After SIGTERM, what is still in flight by then fails, and the rest is synced.",
            low=0.1,
            high=3600,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenConfig:
    """Addresses. Beyond loopback is refused until credentials exist."""

    control: Address = field(
        default=Address("127.0.0.1", 7600),
        metadata=about(ValueKind.ADDRESS, "Control connections. Port 0 takes a free port."),
    )
    data: Address | None = field(
        default=None,
        metadata=about(
            ValueKind.ADDRESS, "Data connections. Empty: the control host and the next port."
        ),
    )
    http: Address | None = field(
        default=None,
        metadata=about(
            ValueKind.ADDRESS,
            "Health and metrics. Empty: the control host and the port after the next.",
        ),
    )
    unix: str = field(
        default="auto",
        metadata=about(
            ValueKind.TEXT,
            'Path of the unix socket. "auto": in the runtime directory; "off": none, '
            "clients on this host then use TCP.",
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """The memory tier."""

    cap_bytes: int = field(
        default=4 * limits.GIB,
        metadata=about(
            ValueKind.SIZE,
            "Hard cap of arena, all staging and inline payloads together (the index is bounded by "
            "entries_max).",
            low=MEMORY_BYTES_MIN,
        ),
    )
    pages: PagePreference = field(
        default=PagePreference.AUTO,
        metadata=about(
            ValueKind.CHOICE, "Pages of the arena: 2 MiB ones cut the CPU cost of reads and copies."
        ),
    )
    staging_connection_bytes_max: int = field(
        default=128 * limits.MIB,
        metadata=about(
            ValueKind.SIZE,
            "Most staging for one connection; also a quarter of all staging, an eighth of the cap.",
            low=limits.MIB,
            high=4 * limits.GIB,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskConfig:
    """The nvme tier."""

    cap_bytes: int = field(
        default=20 * limits.GIB,
        metadata=about(
            ValueKind.SIZE, "Hard cap of every file in the data directory.", low=DISK_BYTES_MIN
        ),
    )
    direct_io: DirectIO = field(
        default=DirectIO.AUTO,
        metadata=about(
            ValueKind.CHOICE,
            "auto: O_DIRECT where the file system has it; off: through the page cache.",
        ),
    )
    io_threads: int = field(
        default=8,
        metadata=about(ValueKind.COUNT, "Threads that read and write segments.", low=1, high=256),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DurabilityConfig:
    """When bytes reach the disk."""

    flush_interval_s: float = field(
        default=1.0,
        metadata=about(
            ValueKind.SECONDS,
            "A shard put with durability memory is on disk at most this much later.",
            low=0.001,
            high=3600,
        ),
    )
    group_shards_max: int = field(
        default=256,
        metadata=about(
            ValueKind.COUNT,
            "Shards in one group commit: one write, one fdatasync.",
            low=1,
            high=limits.GROUP_SHARDS_MAX,
        ),
    )
    group_bytes_max: int = field(
        default=64 * limits.MIB,
        metadata=about(
            ValueKind.SIZE,
            "Bytes in one group commit, at most half a segment; a longer shard goes alone.",
            low=limits.MIB,
        ),
    )
    group_delay_s: float = field(
        default=0.002,
        metadata=about(
            ValueKind.SECONDS,
            "How long a group waits for more shards before it is written.",
            high=1.0,
        ),
    )
    write_behind_bytes_max: int = field(
        default=512 * limits.MIB,
        metadata=about(
            ValueKind.SIZE,
            "Bytes in memory that are not on disk yet; also at most a quarter of the memory cap.",
            low=limits.MIB,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PoliciesConfig:
    """Choices among measured policies."""

    memory_policy: MemoryPolicy = field(
        default=MemoryPolicy.S3FIFO,
        metadata=about(ValueKind.CHOICE, "Eviction from the memory tier."),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """Bounds an operator may change."""

    entries_max: int = field(
        default=2_000_000,
        metadata=about(
            ValueKind.COUNT,
            "Shards in the index, some 260 bytes of memory each, outside the memory cap.",
            low=1000,
            high=100_000_000,
        ),
    )
    connections_max: int = field(
        default=4096,
        metadata=about(
            ValueKind.COUNT, "Control and data connections together.", low=2, high=100_000
        ),
    )
    lease_s_max: float = field(
        default=60.0,
        metadata=about(
            ValueKind.SECONDS,
            "A lease kept longer ends, and with it the connection that held it.",
            low=0.05,
            high=86_400,
        ),
    )
    lease_check_s: float = field(
        default=1.0,
        metadata=about(
            ValueKind.SECONDS,
            "How often leases are checked; below lease_s_max.",
            low=0.01,
            high=3600,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceConfig:
    """One namespace. `default` always exists; a client that names an unknown one is refused."""

    name: str
    durability: NamespaceDurability = field(
        default=NamespaceDurability.MEMORY,
        metadata=about(
            ValueKind.CHOICE,
            "When a put is acknowledged: memory = visible, written behind; group = synced.",
        ),
    )
    quota_bytes: int = field(
        default=0,
        metadata=about(
            ValueKind.SIZE,
            "Most payload bytes on this node, on any tier; 0 sets no quota. A put beyond it is "
            "REFUSED: a namespace at its quota never evicts, room comes from TTLs and removals.",
            low=0,
        ),
    )

    def __post_init__(self) -> None:
        size = len(self.name.encode())
        if not 1 <= size <= limits.NAME_BYTES_MAX or not self.name.isprintable():
            raise ConfigError(
                f"namespace {self.name!r}: a name has 1 to {limits.NAME_BYTES_MAX} printable bytes"
            )


def _default_namespaces() -> tuple[NamespaceConfig, ...]:
    return (NamespaceConfig(name=DEFAULT_NAMESPACE),)


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """A consistent configuration, and the sizes that follow from it. Raises `ConfigError`."""

    node: NodeConfig = field(default_factory=NodeConfig)
    listen: ListenConfig = field(default_factory=ListenConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    disk: DiskConfig = field(default_factory=DiskConfig)
    durability: DurabilityConfig = field(default_factory=DurabilityConfig)
    policies: PoliciesConfig = field(default_factory=PoliciesConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    namespaces: tuple[NamespaceConfig, ...] = field(default_factory=_default_namespaces)

    def __post_init__(self) -> None:
        if self.limits.lease_check_s >= self.limits.lease_s_max:
            raise ConfigError(
                f"limits.lease_check_s ({self.limits.lease_check_s}) must be below "
                f"limits.lease_s_max ({self.limits.lease_s_max})"
            )
        for name, address in (
            ("control", self.listen.control),
            ("data", self.data_address),
            ("http", self.http_address),
        ):
            if not address.is_loopback:
                raise ConfigError(
                    f"listen.{name}: {address} is reachable from other machines and there are "
                    "no credentials yet; listen on 127.0.0.1 or [::1]"
                )
        names = [namespace.name for namespace in self.namespaces]
        if len(set(names)) != len(names):
            raise ConfigError(f"a namespace is configured twice: {sorted(names)}")
        if DEFAULT_NAMESPACE not in names:
            raise ConfigError(f"the namespace {DEFAULT_NAMESPACE!r} always exists")
        self._check_sizes()

    def _check_sizes(self) -> None:
        node = self.node
        for name, value in (("id", node.id), ("cluster_id", node.cluster_id)):
            if len(value.encode()) > limits.NAME_BYTES_MAX:
                raise ConfigError(f"node.{name} has more than {limits.NAME_BYTES_MAX} bytes")
        if not node.data_dir:
            raise ConfigError("node.data_dir is empty")
        if self.shard_bytes_max < limits.PAGE_BYTES:
            raise ConfigError(
                f"memory.cap_bytes: {describe_size(self.memory.cap_bytes)} leaves no room for "
                "a shard in staging"
            )

    def check_machine(self, *, physical_memory_bytes: int) -> None:
        """Raise `ConfigError` where the machine cannot hold what is configured."""
        if self.memory.cap_bytes > physical_memory_bytes:
            raise ConfigError(
                f"memory.cap_bytes: {describe_size(self.memory.cap_bytes)} is more than the "
                f"{describe_size(physical_memory_bytes)} of memory this machine has; "
                "lower --memory"
            )

    def namespace(self, name: str) -> NamespaceConfig | None:
        """The namespace of that name, or None."""
        return next((found for found in self.namespaces if found.name == name), None)

    @property
    def data_address(self) -> Address:
        """Where data connections are accepted."""
        return self.listen.data or self._beside(1)

    @property
    def http_address(self) -> Address:
        """Where health and metrics are served."""
        return self.listen.http or self._beside(2)

    @property
    def staging_bytes_max(self) -> int:
        """Staging of all connections together: an eighth of the memory cap, whole huge pages."""
        share = int(self.memory.cap_bytes * limits.STAGING_MEMORY_FRACTION)
        return _round_down(share, limits.HUGE_PAGE_BYTES)

    @property
    def staging_connection_bytes(self) -> int:
        """Staging granted to one connection at most, whole pages."""
        share = self.staging_bytes_max // STAGING_CONNECTIONS_MIN
        return _round_down(min(self.memory.staging_connection_bytes_max, share), limits.PAGE_BYTES)

    @property
    def arena_bytes(self) -> int:
        """Size of the arena: the memory cap less staging and inline payloads, whole huge pages."""
        rest = self.memory.cap_bytes - self.staging_bytes_max - self.inline_bytes_max
        return _round_down(rest, limits.HUGE_PAGE_BYTES)

    @property
    def inline_bytes_max(self) -> int:
        """Payload bytes of inline shards (1 KiB and less), which lie outside the arena."""
        return int(self.memory.cap_bytes * limits.INLINE_MEMORY_FRACTION)

    @property
    def lease_connection_bytes_max(self) -> int:
        """Bytes one connection's leases may keep."""
        return int(self.arena_bytes * limits.LEASE_ARENA_FRACTION)

    @property
    def segment_bytes(self) -> int:
        """Segment size of a new data directory: min(256 MiB, a sixteenth of the disk cap).

        An existing directory keeps its own; the node announces the shard limit of both.
        """
        wanted = _round_down(self.disk.cap_bytes // 16, _SEGMENT_UNIT)
        return min(limits.SEGMENT_BYTES_MAX, max(limits.SEGMENT_BYTES_MIN, wanted))

    @property
    def shard_bytes_max(self) -> int:
        """Largest shard of this node, announced in the hello."""
        return min(
            limits.SHARD_BYTES_MAX,
            self.segment_bytes // 4,
            self.staging_connection_bytes,
            self.lease_connection_bytes_max,
        )

    @property
    def group_bytes_max(self) -> int:
        """Bytes of one group commit: the setting, but at most half a segment."""
        return min(self.durability.group_bytes_max, self.segment_bytes // 2)

    @property
    def write_behind_bytes_max(self) -> int:
        """Bytes not yet on disk: the setting, but at most a quarter of the memory cap."""
        return min(self.durability.write_behind_bytes_max, self.memory.cap_bytes // 4)

    def _beside(self, step: int) -> Address:
        try:
            return self.listen.control.next_port(step)
        except ValueError as error:
            raise ConfigError(f"listen.control: {error}") from error


def _round_down(count: int, unit: int) -> int:
    return count // unit * unit
