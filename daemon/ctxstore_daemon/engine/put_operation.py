"""One put under way: its columns, and what is decided of each key so far.

Owns the record only. It must not decide anything: `puts` moves it on, and is told through it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore_daemon.engine.core import Operation
from ctxstore_daemon.engine.index import split_keys
from ctxstore_daemon.engine.writeback import DurableWaiter

if TYPE_CHECKING:
    from ctxstore.wire import messages as wire
    from ctxstore_daemon.engine.puts import PutsState

OPEN: Final = 253
"""Result of an item that is not decided; never leaves the engine."""


class PutOperation(Operation, DurableWaiter):
    """One put. Columns are lists, one value per key; `rows` is 0 unless this put writes the key."""

    __slots__ = (
        "claimed_bytes", "copies", "cost", "depth", "first_of", "group", "lengths", "logs", "names",
        "ns", "offered", "offsets", "open", "priority", "puts", "queued", "raised", "results",
        "rows", "stream", "todo", "ttl_ms", "waited",
        "was_offered",
    )  # fmt: skip

    def __init__(
        self, puts: PutsState, *, conn: int, ns: int, message: wire.Put, deadline_ns: int,
        stream: bool, group: bool,
    ) -> None:  # fmt: skip
        super().__init__(conn, message.rid, deadline_ns)
        n = message.count
        self.puts = puts
        self.ns = ns
        self.stream = stream
        self.group = group
        self.names = split_keys(message.keys)
        self.lengths: list[int] = message.length_column.tolist()
        self.offsets: list[int] = message.offset_column.tolist()
        self.ttl_ms: list[int] = np.broadcast_to(message.ttl_ms_column, n).tolist()
        self.priority: list[int] = np.broadcast_to(message.priority_column, n).tolist()
        self.depth: list[int] = np.broadcast_to(message.depth_column, n).tolist()
        self.cost: list[float] = np.broadcast_to(message.cost_column, n).tolist()
        self.results = [OPEN] * n
        self.rows = [0] * n
        self.open = n
        """Items whose result is not decided."""
        self.copies = 0
        self.offered: list[int] = []
        """Stream: items with a slot, in key order once offered."""
        self.todo: deque[int] = deque()
        """Items to look at (again)."""
        self.first_of: dict[int, int] = {}
        """Duplicate item to the first item with its key."""
        self.raised: list[int] = []
        """Rows whose TTL was raised and not logged yet."""
        self.logs = 0
        self.claimed_bytes = 0
        self.queued = False
        self.waited = False
        """Some of it found no room before."""
        self.was_offered = False
        """Stream: an offer with WANTED went out, so a PutFinished has to follow."""

    def decide(self, item: int, result: int) -> None:
        """Give an open item its result."""
        if self.results[item] == OPEN:
            self.results[item] = int(result)
            self.open -= 1

    def durable(self, item: int, ok: bool) -> None:
        self.puts.item_durable(self, item, ok)

    def expire(self) -> None:
        self.puts.expire(self)

    def abandon(self) -> None:
        self.puts.abandon(self)
