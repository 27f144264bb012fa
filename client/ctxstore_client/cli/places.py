"""What a command was pointed at: an address, or the data directory of a daemon.

Owns that distinction. It must not connect.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ctxstore.errors import ConfigError
from ctxstore_client.discovery import EndpointsFile, read_endpoints


class Place(NamedTuple):
    """Where to look: `address` is None for the environment's, `directory` None for an address."""

    address: str | None
    directory: Path | None
    endpoints: EndpointsFile | None

    @property
    def served(self) -> bool:
        """Whether a daemon can be asked."""
        return self.directory is None or (self.endpoints is not None and self.endpoints.alive)


def place_of(given: str | None) -> Place:
    """Interpret an ADDRESS or DIR argument. Raises ConfigError for what is neither."""
    if given is None:
        return Place(None, None, None)
    if "://" in given:
        return Place(given, None, None)
    directory = Path(given)
    if not directory.is_dir():
        raise ConfigError(f"{given} is neither an address (ctxstore://...) nor a directory")
    endpoints = read_endpoints(directory)
    return Place(endpoints.address if endpoints else None, directory, endpoints)
