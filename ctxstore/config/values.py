"""Values of single settings: how each kind is read from text and written back.

Owns the kinds and their bounds. Knows no setting by name; a bad value is a plain `ValueError`, to
which the loader adds the setting and where it came from.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import Field, dataclass, replace
from enum import Enum
from typing import Any, Final, cast

from ctxstore.units import format_duration, format_size, parse_duration, parse_size

PORT_MAX: Final = 65_535
_METADATA_KEY: Final = "setting"


class ValueKind(Enum):
    """How a setting's text is to be read."""

    TEXT = "text"
    COUNT = "number"
    SIZE = "size"
    SECONDS = "duration"
    ADDRESS = "host:port"
    CHOICE = "one of"


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. Port 0 takes a free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read "127.0.0.1:7600" or "[::1]:7600". Raises `ValueError`."""
        host, colon, port = text.rpartition(":")
        if not colon or not host or not port.isascii() or not port.isdigit():
            raise ValueError(f"not an address: {text!r}; write for example 127.0.0.1:7600")
        if int(port) > PORT_MAX:
            raise ValueError(f"port {port} is above {PORT_MAX}")
        if host.startswith("[") != host.endswith("]") or (":" in host and host[0] != "["):
            raise ValueError(f"not an address: {text!r}; write IPv6 as [::1]:7600")
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it. Names other than localhost count as not."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def next_port(self, step: int) -> Address:
        """Same host, port + step; a free port stays a free port."""
        if self.port and self.port + step > PORT_MAX:
            raise ValueError(f"port {self.port} leaves no room for port {self.port + step}")
        return Address(self.host, self.port + step if self.port else 0)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a field's metadata says about it."""

    kind: ValueKind
    doc: str
    low: float | None = None
    high: float | None = None
    choices: type[Enum] | None = None


def about(
    kind: ValueKind, doc: str, *, low: float | None = None, high: float | None = None
) -> Mapping[str, object]:
    """Metadata that makes a dataclass field a setting."""
    return {_METADATA_KEY: Setting(kind, doc, low, high)}


def is_setting(described: Field[Any]) -> bool:
    """Whether a dataclass field is a setting."""
    return _METADATA_KEY in described.metadata


def setting_of(described: Field[Any]) -> Setting:
    """The setting a dataclass field describes; a choice takes its choices from the default."""
    found = described.metadata[_METADATA_KEY]
    assert isinstance(found, Setting)
    if found.kind is not ValueKind.CHOICE:
        return found
    return replace(found, choices=type(described.default))


def read_value(of: Setting, raw: object) -> object:
    """The typed value of a setting's text or TOML value. Raises `ValueError`."""
    if of.kind is ValueKind.CHOICE:
        return _read_choice(of, raw)
    if of.kind in (ValueKind.TEXT, ValueKind.ADDRESS):
        return _read_text(of, raw)
    value = _read_number(of.kind, raw)
    if of.low is not None and value < of.low:
        raise ValueError(f"{show_value(of, value)} is below {_show_bound(of, of.low)}")
    if of.high is not None and value > of.high:
        raise ValueError(f"{show_value(of, value)} is above {_show_bound(of, of.high)}")
    return value


def show_value(of: Setting, value: object) -> str:
    """Text of a value, which `read_value` reads back."""
    if isinstance(value, Enum):
        return str(value.value)
    if of.kind is ValueKind.SIZE:
        return format_size(cast("int", value))
    if of.kind is ValueKind.SECONDS:
        return format_duration(cast("float", value))
    return "" if value is None else str(value)


def show_toml(of: Setting, value: object) -> str:
    """Value as a TOML literal."""
    text = show_value(of, value)
    if of.kind is ValueKind.COUNT:
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def allowed(of: Setting) -> str:
    """What a setting accepts, in a few words for documents."""
    if of.choices is not None:
        return ", ".join(f"`{choice.value}`" for choice in of.choices)
    bounds = [
        f"{word} {_show_bound(of, bound)}"
        for word, bound in (("from", of.low), ("to", of.high))
        if bound is not None
    ]
    return " ".join((of.kind.value, *bounds))


def as_table(raw: object, *, what: str) -> Mapping[str, object]:
    """A TOML table. Raises `ValueError` for anything else."""
    if not isinstance(raw, Mapping):
        raise ValueError(f"{what} is a table, not {raw!r}")
    return cast("Mapping[str, object]", raw)


def _read_choice(of: Setting, raw: object) -> Enum:
    assert of.choices is not None
    for choice in of.choices:
        if choice.value == raw or choice is raw:
            return choice
    known = ", ".join(str(choice.value) for choice in of.choices)
    raise ValueError(f"{raw!r} is none of: {known}")


def _read_text(of: Setting, raw: object) -> str | Address | None:
    if of.kind is ValueKind.ADDRESS:
        if isinstance(raw, Address) or raw is None:
            return raw
        if not isinstance(raw, str):
            raise ValueError(f"not an address: {raw!r}; write for example 127.0.0.1:7600")
        return Address.parse(raw) if raw else None
    if not isinstance(raw, str):
        raise ValueError(f"not a text: {raw!r}")
    if "\0" in raw or "\n" in raw:
        raise ValueError(f"{raw!r} holds a line break or a zero byte")
    return raw


def _read_number(kind: ValueKind, raw: object) -> float:
    if kind is ValueKind.SIZE:
        return parse_size(cast("str | int", raw))
    if kind is ValueKind.SECONDS:
        return parse_duration(cast("str | float", raw))
    if isinstance(raw, str) and raw.strip().isascii() and raw.strip().isdigit():
        return int(raw)
    if isinstance(raw, bool) or not isinstance(raw, int):
        raise ValueError(f"not a whole number: {raw!r}")
    return raw


def _show_bound(of: Setting, bound: float) -> str:
    return show_value(of, bound if of.kind is ValueKind.SECONDS else int(bound))
