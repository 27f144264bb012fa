"""The real clock and the real source of random bytes, as seams."""

from __future__ import annotations

import random
import time

from ctxstore.seams import Now


class SystemClock:
    """`Clock` on CLOCK_MONOTONIC and CLOCK_REALTIME."""

    __slots__ = ()

    def now(self) -> Now:
        """Both clocks; thread-safe."""
        return Now(time.monotonic_ns(), time.time_ns())


def system_rng() -> random.SystemRandom:
    """`Rng` for jitter, ids and salts; from the kernel, so it may be used for secrets."""
    return random.SystemRandom()
