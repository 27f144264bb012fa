"""What all parts of the engine share while one event is handled.

Owns the present moment, the instructions so far, sequence numbers, counters, connections,
deadlines, and the few changes of a row that touch several books at once (claim, publish, give up a
slot, drop). It must not know requests: puts, gets, write-behind and reclaim stand on it and on each
other's hooks.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from ctxstore import checksum
from ctxstore.limits import INLINE_BYTES_MAX, PAGE_BYTES
from ctxstore_daemon.engine.admission import AdmissionPolicy, AdmitAll
from ctxstore_daemon.engine.events import Instruction, Reply
from ctxstore_daemon.engine.eviction import INLINE_CLASS, EvictionPolicy, S3Fifo
from ctxstore_daemon.engine.index import (
    DETACHED,
    DIRTY,
    HELD,
    INLINE,
    LOADING,
    VISIBLE,
    WRITING,
    IndexState,
    Rows,
)
from ctxstore_daemon.engine.slabs import SlabsState, payload_pages
from ctxstore_daemon.engine.stats import CountersState

if TYPE_CHECKING:
    from collections.abc import Callable

    from ctxstore.seams import Now
    from ctxstore.wire import messages as wire
    from ctxstore_daemon.engine.settings import EngineSettings

NS_PER_S: Final = 1_000_000_000
NS_PER_MS: Final = 1_000_000
TTL_MS_MAX: Final = 2**63 // NS_PER_MS // 4
"""Longer TTLs are cut to this (73 years), so that sums of nanoseconds stay inside 64 bits."""


@dataclass(slots=True)
class ConnState:
    """One open connection. `leases` and `operations` are used as ordered sets."""

    ns: int
    leased_bytes: int = 0
    leases: dict[int, None] = field(default_factory=dict)
    operations: dict[Operation, None] = field(default_factory=dict)
    closing: bool = False


class Operation(ABC):
    """A request that could not be answered at once. Hashed by identity."""

    __slots__ = ("conn", "deadline_ns", "done", "rid")

    def __init__(self, conn: int, rid: int, deadline_ns: int) -> None:
        self.conn = conn
        self.rid = rid
        self.deadline_ns = deadline_ns
        self.done = False

    @abstractmethod
    def expire(self) -> None:
        """The deadline passed: answer with what is known."""

    @abstractmethod
    def abandon(self) -> None:
        """The connection is gone: nobody waits for an answer any more."""


class Core:
    """Shared state of the engine's parts; each part changes its own books and calls the methods
    here.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        generations: npt.NDArray[np.uint32],
        policy: Callable[[IndexState], EvictionPolicy] = S3Fifo,
        admission: AdmissionPolicy | None = None,
    ) -> None:
        self.settings = settings
        self.index = IndexState(
            namespaces=len(settings.namespaces), entries_max=settings.entries_max
        )
        self.slabs = SlabsState(generations, settings.arena_bytes)
        self.policy = policy(self.index)
        self.admission = admission or AdmitAll()
        self.counters = CountersState()
        self.conns: dict[int, ConnState] = {}
        self.inline_bytes = 0
        """Inline payloads in memory or on their way there."""
        self.ns_bytes = [0] * len(settings.namespaces)
        self.out: list[Instruction] = []
        self.now_ns = 0
        self.wall_ns = 0
        self.seq = 1
        self.stopping = False
        self.room_changed = True
        """A slot, entry or dirty byte became free since the waiting puts and gets last tried."""
        self.room_wanted = False
        """Somebody waits for room: dirty data is written without delay."""
        self.entries_wanted = False
        """The index is full of rows that are on disk: a reclaim has to make room."""
        self.on_drop: list[Callable[[int], None]] = []
        """Told before a row is forgotten, while its columns are still there."""
        self._next_id = 1
        self._deadlines: list[tuple[int, int, Operation]] = []

    # ------------------------------------------------------------ the moment

    def begin(self, now: Now) -> None:
        """A new event is handled at this moment."""
        self.now_ns = now.mono_ns
        self.wall_ns = now.wall_ns
        self.slabs.tick += 1
        self.out = []

    def emit(self, instruction: Instruction) -> None:
        """Add an instruction to what this event leads to."""
        self.out.append(instruction)

    def reply(self, conn: int, message: wire.Reply) -> None:
        """Answer on a control connection, if it is still there."""
        if conn in self.conns:
            self.out.append(Reply(conn, message))

    def new_id(self) -> int:
        """Number for a copy, read, group, meta append or lease."""
        self._next_id += 1
        return self._next_id - 1

    def next_seq(self) -> int:
        """Next of the one counter for births, groups and tombstones."""
        self.seq += 1
        return self.seq - 1

    # ------------------------------------------------------------ operations

    def start(self, operation: Operation) -> None:
        """Keep the operation until it is `done`, its deadline passes or its connection goes."""
        conn = self.conns.get(operation.conn)
        if conn is not None:
            conn.operations[operation] = None
        heapq.heappush(self._deadlines, (operation.deadline_ns, self.new_id(), operation))

    def finish(self, operation: Operation) -> None:
        """The operation has been answered, or nobody wants an answer."""
        operation.done = True
        conn = self.conns.get(operation.conn)
        if conn is not None:
            conn.operations.pop(operation, None)

    def expire_operations(self) -> None:
        """Let every operation past its deadline answer."""
        heap = self._deadlines
        while heap and (heap[0][2].done or heap[0][0] <= self.now_ns):
            operation = heapq.heappop(heap)[2]
            if not operation.done:
                operation.expire()

    def next_deadline(self) -> int | None:
        """When the next operation has to be answered."""
        heap = self._deadlines
        while heap and heap[0][2].done:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    # ------------------------------------------------------------ rows

    def expiry(self, ttl_ms: int) -> int:
        """Monotonic end of a TTL that starts now; 0 = never."""
        if not ttl_ms:
            return 2**63 - 1
        return self.now_ns + min(ttl_ms, TTL_MS_MAX) * NS_PER_MS

    def remaining_ms(self, row: int) -> int:
        """TTL left as it is stored: 0 = never expires, at least 1 otherwise."""
        expires = self.index.expires_ns_at[row]
        if expires == 2**63 - 1:
            return 0
        return max(1, (expires - self.now_ns) // NS_PER_MS)

    def claim(self, ns: int, key: bytes, length: int) -> int:
        """A new, invisible row for a payload on its way; counts against the quota."""
        row = self.index.allocate(ns, key)
        self.index.length_at[row] = length
        self.ns_bytes[ns] += length
        if length <= INLINE_BYTES_MAX:
            self.inline_bytes += length
        return row

    def place(self, row: int, page: int) -> None:
        """The row's payload is (or is about to be) in the slot at `page`."""
        self.index.slot_at[row] = page
        self.slabs.owner_at[page] = row

    def publish(self, row: int) -> None:
        """Commit: the row is seen from now on, and may be evicted once nothing keeps it."""
        index = self.index
        index.flags_at[row] |= VISIBLE
        self.enqueue(row)
        self.room_changed = True

    def enqueue(self, row: int) -> None:
        """Hand a row that has its payload in memory to the eviction policy."""
        page = self.index.slot_at[row]
        if page:
            self.policy.insert(row, self.slabs.slot_class(page))
        elif self.index.flags_at[row] & INLINE:
            self.policy.insert(row, INLINE_CLASS)

    def set_priority(self, row: int, priority: int) -> None:
        """Change the priority, also in the eviction queues."""
        queued = self.policy.contains(row)
        self.policy.discard(row)
        self.index.priority_at[row] = priority
        if queued:
            self.enqueue(row)

    def evictable(self, row: int) -> bool:
        """Whether the row's payload may leave memory now."""
        index = self.index
        flags = index.flags_at[row]
        if flags & (DIRTY | WRITING | LOADING | VISIBLE) != VISIBLE:
            return False
        if flags & INLINE:
            return not flags & HELD
        page = index.slot_at[row]
        if not page or self.slabs.pins_at[page]:
            return False
        return index.segment_at[row] >= 0 or not flags & HELD

    def evict(self, row: int) -> None:
        """Take an evictable row out of memory: demote it to its nvme copy, or forget it."""
        self.counters.evicted += 1
        if self.index.segment_at[row] >= 0 and not self.index.flags_at[row] & INLINE:
            self.counters.demoted += 1
            self.give_up_slot(row)
        else:
            self.drop(row)

    def give_up_slot(self, row: int) -> None:
        """The row's memory copy goes; readers that have it pinned may finish."""
        page = self.index.slot_at[row]
        if not page:
            return
        self.policy.discard(row)
        self.index.slot_at[row] = 0
        self.slabs.disown(page)
        self.room_changed = True

    def drop(self, row: int) -> None:
        """Forget the row on every tier. Copies on disk stay there as garbage until they are
        reclaimed.
        """
        for hook in self.on_drop:
            hook(row)
        self.give_up_slot(row)
        self.policy.discard(row)
        length = self.index.length_at[row]
        self.ns_bytes[self.index.ns_at[row]] -= length
        if length <= INLINE_BYTES_MAX:
            self.inline_bytes -= length
        self.index.release(row)
        self.room_changed = True

    def detach(self, row: int) -> None:
        """A removed row whose first group is still under way: unseen from now on, dropped
        afterwards.
        """
        self.index.detach(row)

    def is_detached(self, row: int) -> bool:
        """Whether `detach` was called for the row."""
        return bool(self.index.flags_at[row] & DETACHED)

    def seeds(self, rows: Rows) -> npt.NDArray[np.uint64]:
        """Checksum seed of each row's payload."""
        index = self.index
        seeds = np.zeros(len(rows), np.uint64)
        numbers = index.ns[rows]
        for ns in dict.fromkeys(numbers.tolist()):
            own = numbers == ns
            namespace = self.settings.namespaces[ns]
            seeds[own] = checksum.seeds(
                index.keys[rows[own]],
                ns_id=namespace.ns_id,
                incarnation=namespace.incarnation,
                lengths=index.length[rows[own]],
            )
        return seeds

    def payload_bytes(self, row: int) -> int:
        """What the row's payload takes in memory: whole pages, or an inline payload's length."""
        return self.page_bytes(row) or self.index.length_at[row]

    def page_bytes(self, row: int) -> int:
        """Bytes of the whole pages of the row's payload; 0 for inline rows."""
        if self.index.flags_at[row] & INLINE:
            return 0
        return payload_pages(self.index.length_at[row]) * PAGE_BYTES
