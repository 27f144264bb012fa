"""What the store knows of each segment number.

Owns the phases and their records in the meta log. The store alone changes these states.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from ctxstore_daemon.engine.records import META_DTYPE, RecordArray

if TYPE_CHECKING:
    from ctxstore_daemon.engine.records import MetaKind


class SegmentPhase(Enum):
    """Life of a segment number."""

    UNBORN = "no file yet"
    DIRTY = "file without data, needs a header of a new generation"
    FREE = "synced header of a generation that has no data"
    OPEN = "takes groups"
    SEALED = "full, or of an earlier run"
    RECYCLING = "header being rewritten"
    RETIRED = "a write or sync failed: read only, for ever"
    FOREIGN = "not ours: never touched"


@dataclass(slots=True)
class SegmentState:
    """One segment number. Sequences are 0 where it holds no data."""

    segment: int
    phase: SegmentPhase
    generation: int = 0
    first_seq: int = 0
    last_seq: int = 0


@dataclass(slots=True)
class StoreState:
    """Counters since start, for metrics; `notes` are findings of the start for a person."""

    groups: int = 0
    group_bytes: int = 0
    groups_failed: int = 0
    extents_read: int = 0
    segments_recycled: int = 0
    segments_retired: int = 0
    notes: list[str] = field(default_factory=list)


def meta_row(kind: MetaKind, state: SegmentState, *, seq: int) -> RecordArray:
    """One meta-log record about a segment in its present generation."""
    row: RecordArray = np.zeros(1, META_DTYPE)
    row["kind"] = int(kind)
    row["segment"] = state.segment
    row["generation"] = state.generation
    row["seq"] = seq
    return row
