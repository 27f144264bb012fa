"""A mover that copies at once, on the caller's thread.

Owns nothing. For simulation and tests, where determinism counts and time does not.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from ctxstore.checksum import checksum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ctxstore.seams import CopyJob


class InlineMover:
    """`Mover` without threads. `delay_s` of loop time pass before each batch is copied."""

    def __init__(self, *, delay_s: float = 0.0) -> None:
        self._delay_s = delay_s

    async def copy_in(self, jobs: Sequence[CopyJob]) -> list[int]:
        """Checksums in order of `jobs`. Gives the loop a turn first, as a thread would."""
        await asyncio.sleep(self._delay_s)
        return [_copy_one(job) for job in jobs]


def _copy_one(job: CopyJob) -> int:
    slot = np.frombuffer(job.slot, np.uint8)
    own = slot[: job.length]
    if job.source is not None:
        np.copyto(own, np.frombuffer(job.source, np.uint8, count=job.length))
    slot[job.length :] = 0
    return checksum(own, job.seed)
