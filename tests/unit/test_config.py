"""Configuration: precedence, errors that name setting and source, relations, documents."""

import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest

import ctxstore.config
from ctxstore.config import (
    FLAGS,
    Address,
    DaemonConfig,
    DirectIO,
    DiskConfig,
    LogLevel,
    MemoryConfig,
    NamespaceConfig,
    NamespaceDurability,
    NodeConfig,
    PagePreference,
    configuration_markdown,
    defaults_toml,
    describe,
    load_config,
)
from ctxstore.errors import ConfigError
from ctxstore.limits import GIB, MIB
from ctxstore_daemon.segments.geometry import Geometry

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_said_gives_the_defaults():
    assert load_config() == DaemonConfig()
    assert load_config("", environment={}, flags={}) == DaemonConfig()


def test_every_kind_of_value():
    config = load_config(
        """
        [node]
        data_dir = "/data"
        log_level = "debug"
        shutdown_deadline_s = "250ms"
        [listen]
        control = "[::1]:0"
        [memory]
        cap_bytes = "1.5GiB"
        pages = "4k"
        [disk]
        cap_bytes = 1_000_000_000
        direct_io = "off"
        io_threads = 3
        [limits]
        lease_s_max = 5
        [namespaces.chat]
        durability = "group"
        quota_bytes = "2GiB"
        [namespaces."with.dot"]
        """
    )
    assert config.node.data_dir == "/data"
    assert config.node.log_level is LogLevel.DEBUG
    assert config.node.shutdown_deadline_s == 0.25
    assert config.listen.control == Address("::1", 0)
    assert config.memory.cap_bytes == 1536 * MIB
    assert config.memory.pages is PagePreference.SMALL
    assert config.disk == DiskConfig(cap_bytes=10**9, direct_io=DirectIO.OFF, io_threads=3)
    assert config.limits.lease_s_max == 5.0
    assert [space.name for space in config.namespaces] == ["default", "chat", "with.dot"]
    chat = config.namespace("chat")
    assert chat == NamespaceConfig(
        name="chat", durability=NamespaceDurability.GROUP, quota_bytes=2 * GIB
    )
    assert config.namespace("nobody") is None


def test_the_last_one_to_speak_wins():
    text = '[memory]\ncap_bytes = "1GiB"\n[disk]\nio_threads = 2\n[node]\nid = "file"'
    environment = {
        "CTXSTORED_MEMORY_CAP_BYTES": "2GiB",
        "CTXSTORED_DISK_IO_THREADS": "5",
        "CTXSTORE_ADDRESS": "not ours",
        "PATH": "/bin",
    }
    config = load_config(
        text, environment=environment, flags={"memory.cap_bytes": "3GiB", "node.data_dir": None}
    )
    assert config.memory.cap_bytes == 3 * GIB
    assert config.disk.io_threads == 5
    assert config.node.id == "file"
    assert config.node.data_dir == NodeConfig().data_dir


def test_namespace_by_flag():
    config = load_config(flags={"namespaces.a.b.durability": "group"})
    found = config.namespace("a.b")
    assert found is not None
    assert found.durability is NamespaceDurability.GROUP


def test_default_namespace_can_be_configured():
    config = load_config('[namespaces.default]\ndurability = "group"')
    assert config.namespaces == (
        NamespaceConfig(name="default", durability=NamespaceDurability.GROUP),
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[memory]\ncap_byte = 1", "unknown setting 'memory.cap_byte'; did you mean 'memory.cap"),
        ("[memori]\n", "unknown section 'memori'; did you mean 'memory'"),
        ("nonsense = 1", "unknown section 'nonsense'"),
        ("memory = 4", "memory is a table, not 4"),
        ("[memory", "not TOML"),
        ("[memory]\ncap_bytes = true", r"memory.cap_bytes \(configuration file\): not a size"),
        ('[memory]\ncap_bytes = "4GX"', "unknown unit 'GX'"),
        ('[memory]\ncap_bytes = "1MiB"', "1MiB is below 32MiB"),
        ('[memory]\npages = "big"', "'big' is none of: auto, huge, thp, 4k"),
        ("[disk]\nio_threads = 0", "0 is below 1"),
        ("[disk]\nio_threads = 257", "257 is above 256"),
        ("[disk]\nio_threads = 1.5", "not a whole number: 1.5"),
        ("[disk]\nio_threads = true", "not a whole number"),
        ("[node]\nid = 5", "not a text: 5"),
        ('[node]\nid = "a\\nb"', "line break"),
        ('[node]\ndata_dir = ""', "data_dir is empty"),
        ("[node]\nshutdown_deadline_s = -1", "finite number of seconds"),
        ('[node]\nshutdown_deadline_s = "2h"', "2h is above 1h"),
        ('[listen]\ncontrol = "7600"', "not an address"),
        ('[listen]\ncontrol = ""', "must not be empty"),
        ("[listen]\ncontrol = 7600", "not an address"),
        ('[listen]\ncontrol = "127.0.0.1:70000"', "above 65535"),
        ('[listen]\ncontrol = "::1:7600"', r"write IPv6 as \[::1\]:7600"),
        ('[namespaces.chat]\ndurabilty = "group"', "did you mean 'namespaces.chat.durability'"),
        ("[namespaces]\nchat = 1", "namespaces.chat is a table"),
        ('[namespaces.chat]\nname = "x"', "unknown setting 'namespaces.chat.name'"),
        ('[namespaces.""]\n', "a name has 1 to 255"),
    ],
)  # fmt: skip
def test_bad_files_are_answered_clearly(text, reason):
    with pytest.raises(ConfigError, match=reason):
        load_config(text)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        (
            "CTXSTORED_MEMORY_CAP",
            "1",
            "unknown environment variable.*did you mean 'CTXSTORED_MEMORY_CAP_BYTES'",
        ),
        ("CTXSTORED_DISK_IO_THREADS", "many", r"\(CTXSTORED_DISK_IO_THREADS\): not a whole"),
        ("CTXSTORED_LISTEN_CONTROL", "0.0.0.0:7600", "no credentials"),
    ],
)
def test_bad_variables_are_named(variable, value, reason):
    with pytest.raises(ConfigError, match=reason):
        load_config(environment={variable: value})


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("memory.cap_bytes", "lots", r"memory.cap_bytes \(--memory\): not a size"),
        ("disk.io_threads", "x", r"\(--set disk.io_threads\)"),
        ("disk.io_thread", "1", r"did you mean 'disk.io_threads'\? \(--set disk.io_thread\)"),
        ("disc.io_threads", "1", "unknown section 'disc'; did you mean 'disk'"),
        ("namespaces.chat", "1", r"write namespaces.NAME.SETTING"),
    ],
)
def test_bad_flags_are_named(key, value, reason):
    with pytest.raises(ConfigError, match=reason):
        load_config(flags={key: value})


# -- relations


@pytest.mark.parametrize(
    "address", ["0.0.0.0:7600", "192.168.1.5:1", "[::]:7600", "example.org:7600", "[2001:db8::1]:1"]
)
@pytest.mark.parametrize("which", ["control", "data", "http"])
def test_listening_beyond_loopback_is_refused(which, address):
    with pytest.raises(ConfigError, match=rf"listen.{which}: .* no credentials yet"):
        load_config(flags={f"listen.{which}": address, "listen.unix": "off"})


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.3.2.1:9", "[::1]:9", "localhost:9"])
def test_loopback_is_fine(address):
    assert str(load_config(flags={"listen.control": address}).listen.control) == address


def test_ports_follow_the_control_port():
    config = load_config(flags={"listen.control": "127.0.0.1:9000"})
    assert (str(config.data_address), str(config.http_address)) == (
        "127.0.0.1:9001",
        "127.0.0.1:9002",
    )
    free = load_config(flags={"listen.control": "127.0.0.1:0", "listen.http": "127.0.0.1:80"})
    assert (free.data_address.port, free.http_address.port) == (0, 80)
    with pytest.raises(ConfigError, match="no room for port 65536"):
        load_config(flags={"listen.control": "127.0.0.1:65535"})


def test_lease_check_is_below_the_lease():
    with pytest.raises(ConfigError, match=r"lease_check_s.*must be below.*lease_s_max"):
        load_config(flags={"limits.lease_s_max": "1s", "limits.lease_check_s": "1s"})


def test_memory_beyond_the_machine_is_refused():
    load_config(flags={"memory.cap_bytes": "8GiB"}, physical_memory_bytes=8 * GIB)
    with pytest.raises(ConfigError, match=r"8 GiB is more than the 7 GiB of memory this machine"):
        load_config(flags={"memory.cap_bytes": "8GiB"}, physical_memory_bytes=7 * GIB)


def test_namespaces_are_consistent():
    with pytest.raises(ConfigError, match="always exists"):
        DaemonConfig(namespaces=())
    with pytest.raises(ConfigError, match="twice"):
        DaemonConfig(namespaces=(NamespaceConfig(name="default"),) * 2)


def test_names_are_bounded():
    with pytest.raises(ConfigError, match="more than 255"):
        load_config(flags={"node.cluster_id": "x" * 256})


def test_too_small_a_memory_is_refused():
    with pytest.raises(ConfigError, match="no room for a shard"):
        DaemonConfig(memory=MemoryConfig(cap_bytes=8 * MIB))


@pytest.mark.parametrize("memory", [32 * MIB, 100 * MIB + 1, GIB, 4 * GIB, 1000 * GIB])
@pytest.mark.parametrize("disk", [32 * MIB, 100 * MIB + 1, 4 * GIB, 20 * GIB, 10_000 * GIB])
def test_derived_sizes_hold_together(memory, disk):
    config = DaemonConfig(memory=MemoryConfig(cap_bytes=memory), disk=DiskConfig(cap_bytes=disk))
    assert config.arena_bytes + config.staging_bytes_max + config.inline_bytes_max <= memory
    assert config.inline_bytes_max == memory // 16
    assert config.staging_bytes_max <= memory / 8
    assert 0 < config.staging_connection_bytes * 4 <= config.staging_bytes_max
    assert config.arena_bytes % (2 * MIB) == config.staging_bytes_max % (2 * MIB) == 0
    assert config.segment_bytes <= min(256 * MIB, disk / 16)
    assert config.segment_bytes == Geometry.for_disk(disk).segment_bytes
    assert config.shard_bytes_max == min(
        64 * MIB,
        config.segment_bytes // 4,
        config.staging_connection_bytes,
        config.lease_connection_bytes_max,
    )
    assert config.shard_bytes_max <= config.group_bytes_max or config.group_bytes_max == 64 * MIB
    assert config.write_behind_bytes_max <= memory / 4


# -- documents


def test_defaults_file_is_the_classes():
    assert (ROOT / "ctxstore" / "defaults.toml").read_text() == defaults_toml()
    assert load_config(defaults_toml()) == DaemonConfig()


def test_defaults_file_names_every_setting():
    document = tomllib.loads(defaults_toml())
    for section in fields(DaemonConfig):
        if section.name != "namespaces":
            names = {field.name for field in fields(getattr(DaemonConfig(), section.name))}
            assert set(document[section.name]) == names
    assert set(document["namespaces"]["default"]) == {"durability", "quota_bytes"}


def test_configuration_page_is_the_classes():
    """`make docs` writes it again."""
    assert (ROOT / "docs" / "configuration.md").read_text() == configuration_markdown()


def test_flags_stand_for_settings():
    values = {"--data-dir": "/x", "--memory": "64MiB", "--disk": "64MiB", "--node-id": "n"}
    addresses = {name: "127.0.0.1:0" for name in ("--listen", "--data-listen", "--http-listen")}
    others = {"--unix": "off", "--pages": "4k", "--direct-io": "off", "--log-level": "error"}
    every = {**values, **addresses, **others, "--cluster-id": "c"}
    assert {flag.name for flag in FLAGS} == set(every)
    config = load_config(flags={flag.key: every[flag.name] for flag in FLAGS})
    shown = describe(config)
    for flag in FLAGS:
        assert f"{flag.key}={every[flag.name]}" in shown


def test_description_can_be_read_back():
    config = load_config(
        '[namespaces.chat]\nquota_bytes = 5000\n[memory]\ncap_bytes = "100MB"\n'
        "[durability]\ngroup_delay_s = 0.0005\nflush_interval_s = 0.1"
    )
    lines = [line for line in describe(config) if not line.startswith("derived.")]
    flags = dict(line.split("=", 1) for line in lines)
    assert load_config(flags=flags) == config


def test_settings_are_frozen():
    config = DaemonConfig()
    with pytest.raises(AttributeError):
        config.memory.cap_bytes = 5  # type: ignore[misc]
    changed = replace(config, node=replace(config.node, id="n"))
    assert changed.node.id == "n"
    assert ctxstore.config.DaemonConfig() == config
