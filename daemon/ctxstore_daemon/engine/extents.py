"""The nvme tier as the engine sees it: segments, their readers, and whether the disk works.

Owns segment states, and the meaning of losing one copy on disk. It must not know the format or the
file of a segment: `segments` does. Which row lives where stands in the index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ctxstore_daemon.engine.index import DIRTY, INLINE, LOADING, NO_SEGMENT, WRITING, Rows

if TYPE_CHECKING:
    from ctxstore_daemon.engine.core import Core


@dataclass(slots=True)
class SegmentState:
    """A segment with data. `readers` counts extents of it in running ReadExtents."""

    segment: int
    generation: int
    last_seq: int
    readers: int = 0
    recycling: bool = False


class ExtentsState:
    """Segments in the order in which they were first written, and the free ones by number."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.segments: dict[int, SegmentState] = {}
        self.free = 0
        self.usable = 0
        self.known = False
        """SegmentsChanged has been heard; until then the disk is taken to be fine."""
        self.newest = NO_SEGMENT
        """Segment that takes data: never reclaimed."""
        self.failed_reason = ""

    @property
    def disk_ok(self) -> bool:
        """Whether new groups can be made durable."""
        return self._core.settings.disk_bytes > 0 and (self.usable > 0 or not self.known)

    def written(self, segment: int, generation: int, seq: int) -> None:
        """A group went there."""
        state = self.segments.get(segment)
        if state is None or state.generation != generation:
            # Not in place of the old entry: order of the dict is order of first data.
            self.segments.pop(segment, None)
            self.segments[segment] = SegmentState(segment, generation, seq)
        else:
            state.last_seq = seq
        self.newest = segment

    def rows_in(self, segment: int) -> Rows:
        """Rows that have their copy on disk there, ascending."""
        index = self._core.index
        return np.flatnonzero(index.segment[: index.high] == segment)

    def lose_copy(self, row: int) -> None:
        """The copy on disk is gone or damaged: without one in memory the shard is gone too."""
        core = self._core
        index = core.index
        index.segment_at[row] = NO_SEGMENT
        flags = index.flags_at[row]
        if flags & (INLINE | DIRTY | WRITING) or index.slot_at[row]:
            return
        if not flags & LOADING:
            core.drop(row)

    def sealed(self) -> list[SegmentState]:
        """Segments that may be reclaimed, first in first."""
        return [
            state
            for state in self.segments.values()
            if state.segment != self.newest and not state.recycling
        ]

    def oldest_sealed(self) -> SegmentState | None:
        """Next to be reclaimed; None when there is only the open one."""
        return next(iter(self.sealed()), None)
