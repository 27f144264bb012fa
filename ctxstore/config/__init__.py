"""Settings of the daemon: frozen sections, read from TOML text, then environment, then flags.

Owns every setting's name, default, meaning and check, and the documents made from them. Pure: it
is given texts and mappings, opens no file and asks the machine nothing.
"""

from ctxstore.config.documents import configuration_markdown, defaults_toml, describe
from ctxstore.config.loading import ENVIRONMENT_PREFIX, FLAGS, Flag, load_config
from ctxstore.config.sections import (
    DaemonConfig,
    DirectIO,
    DiskConfig,
    DurabilityConfig,
    LimitsConfig,
    ListenConfig,
    LogLevel,
    MemoryConfig,
    MemoryPolicy,
    NamespaceConfig,
    NamespaceDurability,
    NodeConfig,
    PagePreference,
    PoliciesConfig,
)
from ctxstore.config.values import Address

__all__ = [
    "ENVIRONMENT_PREFIX",
    "FLAGS",
    "Address",
    "DaemonConfig",
    "DirectIO",
    "DiskConfig",
    "DurabilityConfig",
    "Flag",
    "LimitsConfig",
    "ListenConfig",
    "LogLevel",
    "MemoryConfig",
    "MemoryPolicy",
    "NamespaceConfig",
    "NamespaceDurability",
    "NodeConfig",
    "PagePreference",
    "PoliciesConfig",
    "configuration_markdown",
    "defaults_toml",
    "describe",
    "load_config",
]
