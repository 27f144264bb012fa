"""From texts to a DaemonConfig: TOML, then environment, then flags; the last one to speak wins.

Owns names of environment variables and flags, and every error about them. Given texts only: it
opens no file and reads no environment.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from ctxstore.config.sections import (
    DEFAULT_NAMESPACE,
    DaemonConfig,
    DiskConfig,
    DurabilityConfig,
    LimitsConfig,
    ListenConfig,
    MemoryConfig,
    NamespaceConfig,
    NodeConfig,
    PoliciesConfig,
)
from ctxstore.config.values import as_table, is_setting, read_value, setting_of
from ctxstore.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ENVIRONMENT_PREFIX: Final = "CTXSTORED_"
"""With a D, so that the client's CTXSTORE_ADDRESS and its like never meet the daemon's settings."""

NAMESPACES: Final = "namespaces"

Section = (
    type[NodeConfig]
    | type[ListenConfig]
    | type[MemoryConfig]
    | type[DiskConfig]
    | type[DurabilityConfig]
    | type[PoliciesConfig]
    | type[LimitsConfig]
)

SECTIONS: Final[Mapping[str, Section]] = {
    "node": NodeConfig,
    "listen": ListenConfig,
    "memory": MemoryConfig,
    "disk": DiskConfig,
    "durability": DurabilityConfig,
    "policies": PoliciesConfig,
    "limits": LimitsConfig,
}


@dataclass(frozen=True, slots=True)
class Flag:
    """A command-line flag of `serve` and the setting it stands for."""

    name: str
    key: str
    metavar: str


FLAGS: Final = (
    Flag("--data-dir", "node.data_dir", "DIR"),
    Flag("--memory", "memory.cap_bytes", "SIZE"),
    Flag("--disk", "disk.cap_bytes", "SIZE"),
    Flag("--listen", "listen.control", "HOST:PORT"),
    Flag("--data-listen", "listen.data", "HOST:PORT"),
    Flag("--http-listen", "listen.http", "HOST:PORT"),
    Flag("--unix", "listen.unix", "PATH"),
    Flag("--node-id", "node.id", "NAME"),
    Flag("--cluster-id", "node.cluster_id", "NAME"),
    Flag("--pages", "memory.pages", "KIND"),
    Flag("--direct-io", "disk.direct_io", "MODE"),
    Flag("--log-level", "node.log_level", "LEVEL"),
)
"""Every other setting is reached by `--set section.name=value`."""


def load_config(
    toml_text: str = "",
    *,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
    physical_memory_bytes: int | None = None,
) -> DaemonConfig:
    """The configuration that these sources give, checked as a whole.

    `environment` may be the whole environment; names without our prefix are not looked at.
    `flags` maps setting keys ("memory.cap_bytes", "namespaces.chat.durability") to values; None
    values are skipped. Raises `ConfigError` naming setting and source.
    """
    given: dict[str, dict[str, object]] = {name: {} for name in SECTIONS}
    spaces: dict[str, dict[str, object]] = {DEFAULT_NAMESPACE: {}}
    _take_toml(toml_text, given, spaces)
    for name in sorted(environment or {}):
        if name.startswith(ENVIRONMENT_PREFIX):
            assert environment is not None
            key = _key_of_variable(name)
            _take(key, environment[name], name, given=given, spaces=spaces)
    for key, raw in (flags or {}).items():
        if raw is not None:
            _take(key, raw, _flag_name(key), given=given, spaces=spaces)
    sections: dict[str, Any] = {name: SECTIONS[name](**_untyped(given[name])) for name in SECTIONS}
    namespaces = tuple(
        NamespaceConfig(name=name, **_untyped(values)) for name, values in spaces.items()
    )
    config = DaemonConfig(**sections, namespaces=namespaces)
    if physical_memory_bytes is not None:
        config.check_machine(physical_memory_bytes=physical_memory_bytes)
    return config


def _take_toml(
    text: str, given: dict[str, dict[str, object]], spaces: dict[str, dict[str, object]]
) -> None:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration file is not TOML: {error}") from error
    for section, raw in document.items():
        if section != NAMESPACES and section not in SECTIONS:
            raise ConfigError(_unknown("section", section, (*SECTIONS, NAMESPACES)))
        for name, value in _table(raw, section).items():
            if section != NAMESPACES:
                key = f"{section}.{name}"
                _take(key, value, "configuration file", given=given, spaces=spaces)
                continue
            spaces.setdefault(name, {})
            for inner, inner_value in _table(value, f"{NAMESPACES}.{name}").items():
                _take_namespace(name, inner, inner_value, "configuration file", spaces=spaces)


def _take(
    key: str,
    raw: object,
    source: str,
    *,
    given: dict[str, dict[str, object]],
    spaces: dict[str, dict[str, object]],
) -> None:
    section, _, name = key.partition(".")
    if section == NAMESPACES:
        space, dot, inner = name.rpartition(".")
        if not dot or not space:
            raise ConfigError(f"{key} ({source}): write namespaces.NAME.SETTING")
        _take_namespace(space, inner, raw, source, spaces=spaces)
        return
    if section not in SECTIONS:
        raise ConfigError(f"{_unknown('section', section, (*SECTIONS, NAMESPACES))} ({source})")
    known = {described.name: described for described in fields(SECTIONS[section])}
    if name not in known:
        every = [f"{part}.{field.name}" for part in SECTIONS for field in fields(SECTIONS[part])]
        raise ConfigError(f"{_unknown('setting', key, every)} ({source})")
    try:
        given[section][name] = read_value(setting_of(known[name]), raw)
    except ValueError as error:
        raise ConfigError(f"{key} ({source}): {error}") from error
    if given[section][name] is None and known[name].default is not None:
        raise ConfigError(f"{key} ({source}): must not be empty")


def _take_namespace(
    space: str, name: str, raw: object, source: str, *, spaces: dict[str, dict[str, object]]
) -> None:
    known = {
        described.name: described for described in fields(NamespaceConfig) if is_setting(described)
    }
    key = f"{NAMESPACES}.{space}.{name}"
    if name not in known:
        every = [f"{NAMESPACES}.{space}.{other}" for other in known]
        raise ConfigError(f"{_unknown('setting', key, every)} ({source})")
    try:
        value = read_value(setting_of(known[name]), raw)
    except ValueError as error:
        raise ConfigError(f"{key} ({source}): {error}") from error
    spaces.setdefault(space, {})[name] = value


def _key_of_variable(name: str) -> str:
    """CTXSTORED_MEMORY_CAP_BYTES -> memory.cap_bytes; namespaces are not set by variables."""
    known = {
        variable_of(f"{section}.{field.name}"): f"{section}.{field.name}"
        for section in SECTIONS
        for field in fields(SECTIONS[section])
    }
    if name not in known:
        raise ConfigError(_unknown("environment variable", name, known))
    return known[name]


def variable_of(key: str) -> str:
    """Environment variable of a setting."""
    return ENVIRONMENT_PREFIX + key.replace(".", "_").upper()


def _flag_name(key: str) -> str:
    return next((flag.name for flag in FLAGS if flag.key == key), f"--set {key}")


def _table(raw: object, what: str) -> Mapping[str, object]:
    try:
        return as_table(raw, what=what)
    except ValueError as error:
        raise ConfigError(f"{error} (configuration file)") from error


def _untyped(values: Mapping[str, object]) -> dict[str, Any]:
    return dict(values)


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"unknown {what} {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
