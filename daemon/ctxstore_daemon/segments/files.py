"""Open segment files, by number.

Owns the bound on descriptors: files are opened on demand, kept, and the longest unused is closed.
It must not look into them.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from ctxstore.seams import Disk, DiskFile

OPEN_FILES_MAX: Final = 256
"""Descriptors kept for segments; 64 GiB of full-size ones, far below the usual limit of 1024."""

_NAME: Final = re.compile(r"segment-(\d{6})\.ctx")


def segment_name(segment: int) -> str:
    """File name of a segment."""
    return f"segment-{segment:06d}.ctx"


def segment_of(name: str) -> int | None:
    """Number of the segment that a file holds; None for any other file."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


@dataclass(slots=True)
class _OpenState:
    users: int = 0
    file: DiskFile | None = None
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)


class SegmentFiles:
    """Use `with_file`; a file in use is never closed. Any number of tasks."""

    def __init__(self, disk: Disk, *, open_max: int = OPEN_FILES_MAX) -> None:
        self._disk = disk
        self._open_max = open_max
        self._entries: OrderedDict[int, _OpenState] = OrderedDict()

    @asynccontextmanager
    async def with_file(self, segment: int) -> AsyncGenerator[DiskFile, None]:
        """The segment's file, open until the block ends. Raises StorageError when it is gone."""
        entry = self._entries.get(segment)
        if entry is None:
            entry = self._entries[segment] = _OpenState()
        self._entries.move_to_end(segment)
        entry.users += 1
        try:
            async with entry.opening:
                if entry.file is None:
                    entry.file = await self._disk.open(segment_name(segment))
            yield entry.file
        finally:
            entry.users -= 1
            if entry.file is None and not entry.users and self._entries.get(segment) is entry:
                del self._entries[segment]
            await self._trim()

    async def forget(self, segment: int) -> None:
        """Close the segment's file, if it is open: the next user opens it anew."""
        entry = self._entries.pop(segment, None)
        if entry is not None and entry.file is not None:
            await entry.file.close()

    async def close(self) -> None:
        """Close all. No user may be left."""
        while self._entries:
            segment = next(iter(self._entries))
            await self.forget(segment)

    async def _trim(self) -> None:
        while len(self._entries) > self._open_max:
            idle = next((s for s, e in self._entries.items() if not e.users), None)
            if idle is None:
                return
            await self.forget(idle)
