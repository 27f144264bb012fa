"""Puts new chunks into the store behind the application's back, in prefix order.

Owns one thread per session, a bounded queue of jobs and the buffers in flight: the cells of a chunk
go first, its manifest only when every cell is in the store. Never raises into the thread that
generates: what could not be stored is counted. Must not know how tensors are generated.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ctxstore.wire.messages import PutResult
from ctxstore_client.integrations.transformers.cache import ByteArray, copy_cells_out

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ctxstore.keys import KeyArray
    from ctxstore_client.integrations.transformers.cache import LayerTensors
    from ctxstore_client.integrations.transformers.grid import ChunkGrid
    from ctxstore_client.ops.arguments import DurabilityName
    from ctxstore_client.store import Store
    from ctxstore_client.tickets import Ticket

log = logging.getLogger(__name__)

JOBS_MAX: Final = 4
"""Contexts that may wait: each keeps its tensors alive, more would crowd the model's memory."""

CHUNKS_IN_FLIGHT_MAX: Final = 2
"""One chunk is copied out while the one before it travels."""

ATTEMPTS_MAX: Final = 4
"""Tries of a put that was surely not stored (OVERLOADED), with doubling pauses."""

_PAUSE_FIRST_S: Final = 0.05
_STORED: Final = frozenset({PutResult.COMMITTED, PutResult.EXISTS, PutResult.DEGRADED})
_WAIT_MARGIN_S: Final = 1.0
"""A ticket is waited for this much longer than its put may take, so that its buffers come back."""


@dataclass(frozen=True, slots=True)
class PutOptions:
    """How chunks are put; the meanings are those of `store.put`."""

    durability: DurabilityName | None
    ttl_s: float | None
    priority: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class OffloadJob:
    """The new chunks of one context, from its chunk `first_chunk` on."""

    first_chunk: int
    cell_keys: KeyArray
    """(chunks * cells, 16), chunk by chunk."""
    manifest_keys: KeyArray
    """(chunks, 16)."""
    manifests: Sequence[bytes]
    layers: Sequence[LayerTensors]
    chunk_cost_s: float | None
    """What computing one chunk took; None where nobody measured it."""

    @property
    def chunks(self) -> int:
        """Number of chunks to store."""
        return len(self.manifests)


@dataclass(frozen=True, slots=True)
class OffloadStats:
    """What became of the chunks so far. Chunks still waiting or travelling are `pending`."""

    pending_chunks: int = 0
    stored_chunks: int = 0
    stored_bytes: int = 0
    failed_chunks: int = 0
    """Not stored: the store refused them, was full, slow or away, or the queue was full."""


@dataclass(slots=True)
class _Flight:
    """One chunk whose cells are travelling."""

    index: int
    buffers: Sequence[ByteArray]
    ticket: Ticket[list[PutResult]]


class Offloader:
    """A queue of contexts and the thread that stores them.

    `submit` never blocks on the store. `wait` returns when everything submitted before has been
    decided. `close` stops taking jobs, gives running ones their time and ends the thread; it is
    idempotent. All methods may be called from any thread.
    """

    def __init__(self, store: Store, grid: ChunkGrid, options: PutOptions) -> None:
        self._store = store
        self._grid = grid
        self._options = options
        self._changed = threading.Condition()
        self._jobs: deque[OffloadJob] = deque()
        self._busy = False
        self._closing = threading.Event()
        self._stats = OffloadStats()
        self._thread: threading.Thread | None = None
        self._spare: list[list[ByteArray]] = []

    @property
    def stats(self) -> OffloadStats:
        """Counters, all of one moment."""
        with self._changed:
            return self._stats

    def submit(self, job: OffloadJob) -> bool:
        """Queue a job; False when it was dropped because the queue is full or closed."""
        if job.chunks == 0:
            return True
        with self._changed:
            if self._closing.is_set() or len(self._jobs) >= JOBS_MAX:
                self._count(failed_chunks=job.chunks)
                return False
            self._jobs.append(job)
            self._count(pending_chunks=job.chunks)
            if self._thread is None:
                # A daemon thread: an application that forgets to close still exits.
                self._thread = threading.Thread(
                    target=self._run, name="ctxstore-offload", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()
        return True

    def wait(self, timeout_s: float) -> bool:
        """Wait until no job is queued or running; False when that took longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Let submitted jobs finish within `timeout_s`, then stop; False if some were given up."""
        finished = self.wait(timeout_s)
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            # What it waits for has a deadline of its own, and no pause outlives `_closing`.
            thread.join(self._options.timeout_s + 2 * _WAIT_MARGIN_S)
        return finished

    def _count(self, **changes: int) -> None:
        """Add to counters; the caller holds the lock."""
        now = {name: getattr(self._stats, name) + change for name, change in changes.items()}
        self._stats = replace(self._stats, **now)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing.is_set())
                if self._closing.is_set():
                    dropped = sum(job.chunks for job in self._jobs)
                    self._jobs.clear()
                    self._count(pending_chunks=-dropped, failed_chunks=dropped)
                    self._changed.notify_all()
                    return
                job = self._jobs.popleft()
                self._busy = True
            stored = 0
            try:
                stored = self._store_job(job)
            except Exception:  # whatever the store does, the thread lives on
                log.warning("event=offload_failed first_chunk=%d", job.first_chunk, exc_info=True)
            # The tensors are let go of before anybody is told that the job is over.
            chunks, first = job.chunks, job.first_chunk
            del job
            with self._changed:
                self._busy = False
                self._count(
                    pending_chunks=-chunks,
                    stored_chunks=stored,
                    stored_bytes=stored * self._grid.chunk_bytes,
                    failed_chunks=chunks - stored,
                )
                self._changed.notify_all()
            if stored < chunks:
                log.warning(
                    "event=offload_incomplete first_chunk=%d chunks=%d stored=%d",
                    first, chunks, stored,
                )  # fmt: skip

    def _store_job(self, job: OffloadJob) -> int:
        """Store chunks in prefix order; returns how many got their manifest.

        The first chunk that cannot be stored ends the job: without it later ones have no use.
        """
        flights: deque[_Flight] = deque()
        stored = 0
        try:
            for index in range(job.chunks):
                if len(flights) == CHUNKS_IN_FLIGHT_MAX:
                    if not self._land(job, flights[0]):
                        return stored
                    flights.popleft()
                    stored += 1
                if self._closing.is_set():
                    return stored
                flights.append(self._launch(job, index))
            while flights:
                if not self._land(job, flights[0]):
                    return stored
                flights.popleft()
                stored += 1
            return stored
        finally:
            # Only after an early end: the buffers of these flights are never used again.
            for flight in flights:
                flight.ticket.cancel()

    def _launch(self, job: OffloadJob, index: int) -> _Flight:
        """Copy one chunk out of the tensors and send its cells on their way."""
        buffers = self._spare.pop() if self._spare else self._grid.new_buffers()
        copy_cells_out(
            job.layers,
            self._grid.spans,
            buffers,
            first_token=(job.first_chunk + index) * self._grid.chunk_tokens,
            tokens=self._grid.chunk_tokens,
        )
        ticket = self._store.submit_put(
            self._cells_of(job, index), buffers, **self._put_options(job, index, len(buffers))
        )
        return _Flight(index, buffers, ticket)

    def _land(self, job: OffloadJob, flight: _Flight) -> bool:
        """Wait for a chunk's cells, then make the chunk visible. True when both worked."""
        results = flight.ticket.wait(self._options.timeout_s + _WAIT_MARGIN_S)
        keys = self._cells_of(job, flight.index)
        options = self._put_options(job, flight.index, len(keys))
        complete = self._settle(results, lambda: self._store.put(keys, flight.buffers, **options))
        self._spare.append(list(flight.buffers))
        if not complete:
            return False
        manifest = np.frombuffer(job.manifests[flight.index], np.uint8)
        key = job.manifest_keys[flight.index : flight.index + 1]

        def put_manifest() -> list[PutResult]:
            return self._store.put(
                key, [manifest], **self._put_options(job, flight.index, len(key))
            )

        return self._settle(put_manifest(), put_manifest)

    def _settle(self, results: Sequence[PutResult], again: Callable[[], list[PutResult]]) -> bool:
        """Repeat a put while the store is merely full; True when all of it is stored."""
        pause_s = _PAUSE_FIRST_S
        for _ in range(ATTEMPTS_MAX - 1):
            if PutResult.OVERLOADED not in results or self._closing.wait(pause_s):
                break
            results = again()
            pause_s *= 2
        return all(result in _STORED for result in results)

    def _cells_of(self, job: OffloadJob, index: int) -> KeyArray:
        cells = len(self._grid.spans)
        return job.cell_keys[index * cells : (index + 1) * cells]

    def _put_options(self, job: OffloadJob, index: int, count: int) -> dict[str, Any]:
        options = self._options
        return {
            "durability": options.durability,
            "ttl_s": options.ttl_s,
            "priority": options.priority,
            # One depth for all: a single value would count up from key to key.
            "depth0": [job.first_chunk + index] * count,
            "cost_s": job.chunk_cost_s,
            "timeout_s": options.timeout_s,
        }
