"""Documents made from the configuration classes, so that they cannot drift from them.

Owns the commented defaults file, the reference page and the text printed at start. Writes nothing:
it returns text.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

from ctxstore.config.loading import (
    ENVIRONMENT_PREFIX,
    FLAGS,
    NAMESPACES,
    SECTIONS,
    variable_of,
)
from ctxstore.config.sections import DEFAULT_NAMESPACE, DaemonConfig, NamespaceConfig
from ctxstore.config.values import allowed, is_setting, setting_of, show_toml, show_value
from ctxstore.units import describe_size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from dataclasses import Field

_DERIVED_SIZES: Final = (
    "arena_bytes",
    "inline_bytes_max",
    "staging_bytes_max",
    "staging_connection_bytes",
    "lease_connection_bytes_max",
    "segment_bytes",
    "group_bytes_max",
    "write_behind_bytes_max",
    "shard_bytes_max",
)


def defaults_toml() -> str:
    """The commented defaults file: every setting, with the value it has when nothing is said."""
    lines = [
        "# Every setting of the daemon with its default. A file given to `serve --config` needs",
        "# only what differs. Environment variables override the file, flags override both.",
        "# Sizes: 4GiB, 512MiB, 1.5GB or bytes. Durations: 250ms, 10s, 5m or seconds.",
    ]
    for name, section in SECTIONS.items():
        lines += ["", f"# {_summary(section)}", f"[{name}]"]
        for described in fields(section):
            lines += _commented(described)
    lines += ["", f"# {_summary(NamespaceConfig)}", f"[{NAMESPACES}.{DEFAULT_NAMESPACE}]"]
    for described in _namespace_fields():
        lines += _commented(described)
    return "\n".join(lines) + "\n"


def configuration_markdown() -> str:
    """The reference page docs/configuration.md."""
    flag_of = {flag.key: flag.name for flag in FLAGS}
    lines = [
        "# Configuration",
        "",
        "Generated from the classes in `ctxstore/config`; `make docs` writes it again.",
        "",
        "`ctxstore serve` reads the file given by `--config`, then environment variables that",
        f"begin with `{ENVIRONMENT_PREFIX}`, then flags; the last one to speak wins. Every setting",
        "can be given as `--set section.name=value`; some have a flag of their own. Unknown names",
        "are errors, and so are values that do not fit together. What is in force is printed at",
        "start. A copy of all defaults, with comments, is `ctxstore/defaults.toml`.",
        "",
        "Sizes are written as `4GiB`, `512MiB`, `1.5GB` or bytes, durations as `250ms`, `10s`,",
        "`5m` or seconds. The client reads other variables (`CTXSTORE_ADDRESS` and its like).",
    ]
    for name, section in SECTIONS.items():
        lines += ["", f"## {name}", "", _summary(section), "", *_HEADING]
        for described in fields(section):
            key = f"{name}.{described.name}"
            lines.append(_row(described, flag=flag_of.get(key, ""), variable=variable_of(key)))
    lines += ["", f"## {NAMESPACES}.NAME", "", _summary(NamespaceConfig), "", *_HEADING]
    lines += [_row(described, flag="", variable="") for described in _namespace_fields()]
    lines += ["", "## What follows from them", "", "| size | meaning | with the defaults |"]
    lines.append("|---|---|---|")
    defaults = DaemonConfig()
    for name in _DERIVED_SIZES:
        doc = _summary(getattr(DaemonConfig, name))
        lines.append(f"| {name} | {doc} | {describe_size(getattr(defaults, name))} |")
    return "\n".join(lines) + "\n"


def describe(config: DaemonConfig) -> list[str]:
    """The configuration in force, one `section.name=value` a line, derived sizes at the end."""
    lines: list[str] = []
    for name, section in SECTIONS.items():
        values = getattr(config, name)
        for described in fields(section):
            shown = show_value(setting_of(described), getattr(values, described.name))
            lines.append(f"{name}.{described.name}={shown}")
    for namespace in config.namespaces:
        for described in _namespace_fields():
            shown = show_value(setting_of(described), getattr(namespace, described.name))
            lines.append(f"{NAMESPACES}.{namespace.name}.{described.name}={shown}")
    lines += [f"derived.{name}={getattr(config, name)}" for name in _DERIVED_SIZES]
    lines.append(f"derived.data_address={config.data_address}")
    lines.append(f"derived.http_address={config.http_address}")
    return lines


_HEADING: Final = (
    "| setting | default | accepts | flag, variable | meaning |",
    "|---|---|---|---|---|",
)


def _row(described: Field[Any], *, flag: str, variable: str) -> str:
    about = setting_of(described)
    default = show_value(about, described.default)
    names = ", ".join(f"`{name}`" for name in (flag, variable) if name)
    shown = f"`{default}`" if default else "empty"
    return f"| `{described.name}` | {shown} | {allowed(about)} | {names} | {about.doc} |"


def _commented(described: Field[Any]) -> list[str]:
    about = setting_of(described)
    value = show_toml(about, described.default)
    return [f"# {about.doc}", f"{described.name} = {value}"]


def _namespace_fields() -> Iterator[Field[Any]]:
    return (described for described in fields(NamespaceConfig) if is_setting(described))


def _summary(documented: object) -> str:
    text = documented.__doc__ or ""
    return text.strip().split("\n\n")[0].replace("\n    ", " ")
