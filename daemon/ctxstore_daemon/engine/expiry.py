"""Expiry: shards leave by time.

Owns the sweep over the index. Lookups never see an expired row, so the sweep only gives room back;
it goes over a part of the rows at a time, by column, and must not take long in one event.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ctxstore_daemon.engine.core import NS_PER_S, Core
from ctxstore_daemon.engine.index import VISIBLE

_ROWS_PER_SWEEP: Final = 65_536
_DROPPED_PER_SWEEP: Final = 512
_INTERVAL_NS: Final = NS_PER_S


class ExpiryState:
    """Where the sweep stands."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._next_row = 1
        self._due_ns = 0

    def sweep(self) -> None:
        """Drop expired rows of the next part of the index, if it is time."""
        core = self._core
        index = core.index
        if core.now_ns < self._due_ns:
            return
        start = self._next_row if self._next_row < index.high else 1
        part = slice(start, min(start + _ROWS_PER_SWEEP, index.high))
        expired = (index.expires_ns[part] <= core.now_ns) & ((index.flags[part] & VISIBLE) != 0)
        rows = (np.flatnonzero(expired) + start).tolist()
        for row in rows[:_DROPPED_PER_SWEEP]:
            core.counters.expired += 1
            core.drop(row)
        more = len(rows) > _DROPPED_PER_SWEEP
        self._next_row = rows[_DROPPED_PER_SWEEP] if more else part.stop
        self._due_ns = core.now_ns if more else core.now_ns + _INTERVAL_NS

    def next_sweep(self) -> int:
        """When `sweep` has something to do."""
        return self._due_ns
