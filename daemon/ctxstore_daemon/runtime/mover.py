"""Copies and hashes payload off the loop's thread.

Owns the thread pool. It must not know what the bytes are. `np.copyto` and xxh3 drop the GIL, so the
control path keeps its latency while these run.
"""

from __future__ import annotations

import asyncio
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore.checksum import checksum

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from ctxstore.seams import ByteBuffer, CopyJob

INLINE_BYTES: Final = 32 * 1024
"""Up to here the hop to a thread costs more than the copy."""

SHARE_BYTES_MIN: Final = 8 * 1024 * 1024
"""A batch is split over threads only into shares of at least this size."""


class ThreadMover:
    """`Mover` on threads. `close` waits for what runs; a cancelled copy runs on until then."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ctxstore-mover")

    async def copy_in(self, jobs: Sequence[CopyJob]) -> list[int]:
        """Checksums in order of `jobs`."""
        total = sum(job.length for job in jobs)
        if total <= INLINE_BYTES:
            return _copy_all(jobs)
        loop = asyncio.get_running_loop()
        shares = [
            loop.run_in_executor(self._pool, _copy_all, share)
            for share in _split(jobs, min(self._threads, max(1, total // SHARE_BYTES_MIN)))
        ]
        return [value for share in await asyncio.gather(*shares) for value in share]

    def close(self) -> None:
        """Wait for running copies and end the threads. Idempotent."""
        self._pool.shutdown(wait=True)


def _copy_all(jobs: Sequence[CopyJob]) -> list[int]:
    sums: list[int] = []
    for job in jobs:
        slot = _array(job.slot)
        own = slot[: job.length]
        if job.source is not None:
            np.copyto(own, _array(job.source)[: job.length])
        slot[job.length :] = 0
        sums.append(checksum(own, job.seed))
    return sums


def _array(buffer: ByteBuffer) -> npt.NDArray[np.uint8]:
    if isinstance(buffer, np.ndarray):
        return buffer
    return np.frombuffer(buffer, np.uint8) if len(buffer) else np.zeros(0, np.uint8)


def _split(jobs: Sequence[CopyJob], parts: int) -> list[Sequence[CopyJob]]:
    """Contiguous shares of about the same number of bytes, none empty."""
    ends = np.cumsum([job.length for job in jobs])
    goals = ends[-1] * np.arange(1, parts) / parts
    cuts = [0, *np.searchsorted(ends, goals, side="left").tolist(), len(jobs)]
    return [jobs[a:b] for a, b in itertools.pairwise(cuts) if b > a]
