"""Doing harm to the files of a stopped daemon, by what docs/disk-format.md says of them.

Owns finding the place: a payload by its bytes, a structure by its magic. It must not use the
code under test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from tests.shards import payload_of

if TYPE_CHECKING:
    from pathlib import Path

PAGE: Final = 4096
GROUP_MAGIC: Final = b"CTXGROUP"
FOOTER_MAGIC: Final = b"CTXFOOTR"


@dataclass(frozen=True)
class Place:
    """A position in a file."""

    path: Path
    offset: int


def segments(directory: Path) -> list[Path]:
    """Segment files by number."""
    return sorted(directory.glob("segment-*.ctx"))


def meta_logs(directory: Path) -> list[Path]:
    """The log and its mirror."""
    return sorted(directory.glob("meta-*.log"))


def find_payload(directory: Path, key: bytes) -> Place:
    """Where the newest copy of a shard's payload begins, inline ones included."""
    needle = payload_of(key).tobytes()
    for path in reversed(segments(directory)):
        at = path.read_bytes().find(needle)
        if at >= 0:
            return Place(path, at)
    raise AssertionError(f"no payload of {key.hex()} in {directory}")


def find_group(place: Place) -> Place:
    """The header of the group that holds the extent at `place`."""
    data = place.path.read_bytes()
    at = place.offset // PAGE * PAGE
    while data[at : at + 8] != GROUP_MAGIC:
        at -= PAGE
        assert at > 0, "no group header before the extent"
    return Place(place.path, at)


def find_trailer(path: Path) -> Place | None:
    """The last page of a segment that has a footer."""
    at = path.stat().st_size - PAGE
    with path.open("rb") as file:
        file.seek(at)
        return Place(path, at) if file.read(8) == FOOTER_MAGIC else None


def flip(place: Place, *, by: int = 0) -> None:
    """Change one bit of the byte `by` bytes after `place`."""
    with place.path.open("r+b") as file:
        file.seek(place.offset + by)
        byte = file.read(1)
        assert byte, f"{place} + {by} is behind the end of the file"
        file.seek(place.offset + by)
        file.write(bytes([byte[0] ^ 0x40]))


def used_bytes(path: Path) -> int:
    """Bytes of a log up to the last one that is not zero."""
    data = np.fromfile(path, np.uint8)
    return int(np.flatnonzero(data)[-1]) + 1
