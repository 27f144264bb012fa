"""Which shards leave memory first.

Owns the queues of rows that are in memory, one set per slot class and level of priority: lower
levels always go first, and among what is due together the deeper chunk goes before its parent. It
must not free anything: it names victims, and asks the caller whether a row may go now (pins,
leases, unwritten data).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from ctxstore_daemon.engine.index import IndexState, Rows

Evictable = Callable[[int], bool]

INLINE_CLASS: Final = 0
"""Queue class of inline rows, which have no slot."""

_LEVEL_MAX: Final = 15
LEVELS: Final = 2 * _LEVEL_MAX + 1
"""Levels of priority: clients choose priorities freely, and each level costs queues."""

_FREQUENCY_MAX: Final = 3
_SMALL_FRACTION: Final = 0.1
_WINDOW: Final = 32
"""Rows that are due together, among which depth decides."""

_SCAN_MAX: Final = 1024
"""Rows looked at in one search, so that a queue full of pinned rows cannot stall the node."""

_GHOSTS_MAX: Final = 65_536
"""Remembered keys; about 200 bytes each."""


def level_of(priority: int) -> int:
    """Level of a priority, 0 to LEVELS - 1: by sign and power of two, so 0 and ±1 stand alone, ±2
    and ±3 go together, ±4 to ±7, and so on.
    """
    size = min(abs(priority).bit_length(), _LEVEL_MAX)
    return _LEVEL_MAX + (size if priority > 0 else -size)


class LinksState:
    """Doubly linked rows, for all queues of a policy: a row is in at most one."""

    __slots__ = ("_after", "_before", "_queue", "after_at", "before_at", "capacity", "queue_at")

    def __init__(self) -> None:
        self.capacity = 0
        self._after = np.zeros(0, np.int32)
        self._before = np.zeros(0, np.int32)
        self._queue = np.zeros(0, np.int32)
        self.reserve(1)

    def reserve(self, capacity: int) -> None:
        """Follow the growth of the index."""
        if capacity <= self.capacity:
            return
        grown = []
        for old in (self._after, self._before, self._queue):
            column = np.zeros(capacity, old.dtype)
            column[: self.capacity] = old
            grown.append(column)
        self._after, self._before, self._queue = grown
        self.after_at = self._after.data
        self.before_at = self._before.data
        self.queue_at = self._queue.data
        self.capacity = capacity


class QueueState:
    """A FIFO of rows with removal from anywhere. `oldest` is where victims come from."""

    __slots__ = ("count", "links", "newest", "number", "oldest")

    def __init__(self, links: LinksState, number: int) -> None:
        self.links = links
        self.number = number
        self.oldest = 0
        self.newest = 0
        self.count = 0

    def push(self, row: int) -> None:
        """Append as the newest."""
        links = self.links
        links.queue_at[row] = self.number
        links.before_at[row] = self.newest
        links.after_at[row] = 0
        if self.newest:
            links.after_at[self.newest] = row
        else:
            self.oldest = row
        self.newest = row
        self.count += 1

    def push_oldest(self, row: int) -> None:
        """Put in front: the next to be looked at."""
        links = self.links
        links.queue_at[row] = self.number
        links.before_at[row] = 0
        links.after_at[row] = self.oldest
        if self.oldest:
            links.before_at[self.oldest] = row
        else:
            self.newest = row
        self.oldest = row
        self.count += 1

    def remove(self, row: int) -> None:
        """Take out from wherever it is."""
        links = self.links
        before, after = links.before_at[row], links.after_at[row]
        if before:
            links.after_at[before] = after
        else:
            self.oldest = after
        if after:
            links.before_at[after] = before
        else:
            self.newest = before
        links.queue_at[row] = 0
        self.count -= 1

    def rows(self) -> list[int]:
        """Oldest first."""
        found, row = [], self.oldest
        while row:
            found.append(row)
            row = self.links.after_at[row]
        return found


class EvictionPolicy(ABC):
    """Order of eviction. Rows are inserted when they come to memory and discarded when they leave
    it.
    """

    def __init__(self, index: IndexState) -> None:
        self.index = index
        self.links = LinksState()
        self.queues: list[QueueState] = [QueueState(self.links, 0)]

    @abstractmethod
    def insert(self, row: int, slot_class: int) -> None:
        """The row is in memory now, in a slot of this class; its priority stands in the index."""

    @abstractmethod
    def touch(self, rows: Rows) -> None:
        """These rows were read (rows that are in no queue are allowed)."""

    @abstractmethod
    def victims(self, slot_class: int, count: int, evictable: Evictable) -> list[int]:
        """Take out up to `count` rows of the class that may go, in the order they should go."""

    def discard(self, row: int) -> None:
        """The row left memory, or its priority is about to change. Fine if it is in no queue."""
        if row < self.links.capacity and (number := self.links.queue_at[row]):
            self.queues[number].remove(row)

    def contains(self, row: int) -> bool:
        """Whether the row is in a queue."""
        return row < self.links.capacity and self.links.queue_at[row] != 0

    def _new_queue(self) -> QueueState:
        queue = QueueState(self.links, len(self.queues))
        self.queues.append(queue)
        return queue

    def _deepest_first(self, due: list[int]) -> list[int]:
        """Children before parents; at the same depth, what is cheaper to recompute goes first."""
        depth, cost = self.index.depth_at, self.index.cost_s_at
        return sorted(due, key=lambda r: (-depth[r], 0.0 if cost[r] != cost[r] else cost[r]))


class _Level:
    """The two queues of one (class, level) of S3-FIFO."""

    __slots__ = ("main", "small")

    def __init__(self, small: QueueState, main: QueueState) -> None:
        self.small = small
        self.main = main


class S3Fifo(EvictionPolicy):
    """S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023).

    A tenth of the rows is on probation in a small queue; what is read twice there moves to the main
    queue, what is not leaves and is remembered as a ghost; a ghost that comes back goes to the main
    queue at once. The main queue gives each row as many further rounds as it was read, up to three.
    """

    def __init__(self, index: IndexState) -> None:
        super().__init__(index)
        self._levels: dict[int, list[_Level]] = {}
        self._frequency = np.zeros(1, np.uint8)
        self._frequency_at = self._frequency.data
        self._ghosts: OrderedDict[tuple[int, bytes], None] = OrderedDict()

    def insert(self, row: int, slot_class: int) -> None:
        if row >= self.links.capacity:
            self._reserve()
        levels = self._levels.get(slot_class)
        if levels is None:
            levels = [_Level(self._new_queue(), self._new_queue()) for _ in range(LEVELS)]
            self._levels[slot_class] = levels
        level = levels[level_of(self.index.priority_at[row])]
        self._frequency_at[row] = 0
        ghost = (self.index.ns_at[row], self.index.key(row))
        if ghost in self._ghosts:
            del self._ghosts[ghost]
            level.main.push(row)
        else:
            level.small.push(row)

    def _reserve(self) -> None:
        self.links.reserve(self.index.capacity)
        frequency = np.zeros(self.index.capacity, np.uint8)
        frequency[: len(self._frequency)] = self._frequency
        self._frequency = frequency
        self._frequency_at = frequency.data

    def touch(self, rows: Rows) -> None:
        if self.links.capacity < self.index.capacity:
            self._reserve()
        frequency = self._frequency
        frequency[rows] = np.minimum(frequency[rows] + 1, _FREQUENCY_MAX)

    def victims(self, slot_class: int, count: int, evictable: Evictable) -> list[int]:
        chosen: list[int] = []
        for level in self._levels.get(slot_class, ()):
            while len(chosen) < count and (level.small.count or level.main.count):
                found = self._due(level, count - len(chosen), evictable)
                if not found:
                    break
                chosen += found
            if len(chosen) >= count:
                break
        return chosen

    def _due(self, level: _Level, count: int, evictable: Evictable) -> list[int]:
        """Next victims of one level, at most `count`; others that were due stay first in line."""
        due: list[int] = []
        origin: dict[int, QueueState] = {}
        scans = min(_SCAN_MAX, 4 * (level.small.count + level.main.count))
        while len(due) < max(count, _WINDOW) and scans > 0:
            scans -= 1
            small = level.small.count > _SMALL_FRACTION * (level.small.count + level.main.count)
            queue = level.small if small else level.main
            row = queue.oldest
            if not row:
                break
            queue.remove(row)
            reads = self._frequency_at[row]
            if not evictable(row):
                queue.push(row)
            elif small and reads > 1:
                self._frequency_at[row] = 0
                level.main.push(row)
            elif not small and reads > 0:
                self._frequency_at[row] = reads - 1
                level.main.push(row)
            else:
                due.append(row)
                origin[row] = queue
        chosen = self._deepest_first(due)[:count]
        going = dict.fromkeys(chosen)
        for row in reversed(due):
            if row not in going:
                origin[row].push_oldest(row)
        for row in chosen:
            if origin[row] is level.small:
                self._remember(row)
        return chosen

    def _remember(self, row: int) -> None:
        self._ghosts[(self.index.ns_at[row], self.index.key(row))] = None
        if len(self._ghosts) > min(max(_WINDOW, self.index.count), _GHOSTS_MAX):
            self._ghosts.popitem(last=False)


class Lru(EvictionPolicy):
    """Least recently used, as the yardstick for better policies."""

    def __init__(self, index: IndexState) -> None:
        super().__init__(index)
        self._levels: dict[int, list[QueueState]] = {}

    def insert(self, row: int, slot_class: int) -> None:
        self.links.reserve(self.index.capacity)
        levels = self._levels.get(slot_class)
        if levels is None:
            levels = self._levels[slot_class] = [self._new_queue() for _ in range(LEVELS)]
        levels[level_of(self.index.priority_at[row])].push(row)

    def touch(self, rows: Rows) -> None:
        for row in rows.tolist():
            if row < self.links.capacity and (number := self.links.queue_at[row]):
                self.queues[number].remove(row)
                self.queues[number].push(row)

    def victims(self, slot_class: int, count: int, evictable: Evictable) -> list[int]:
        chosen: list[int] = []
        for queue in self._levels.get(slot_class, ()):
            due: list[int] = []
            row = queue.oldest
            for _ in range(min(queue.count, _SCAN_MAX)):
                if len(due) >= max(count - len(chosen), _WINDOW):
                    break
                if evictable(row):
                    due.append(row)
                row = self.links.after_at[row]
            for victim in self._deepest_first(due)[: count - len(chosen)]:
                queue.remove(victim)
                chosen.append(victim)
            if len(chosen) >= count:
                break
        return chosen
