"""A clock that tests can set.

Owns the two times a node sees. The monotonic one follows the event loop; the wall clock can jump
and run fast or slow, as clocks of real machines do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ctxstore.seams import Now

if TYPE_CHECKING:
    import asyncio

WALL_START_NS: Final = 1_700_000_000_000_000_000
"""Wall time when the clock is made: some day in 2023."""

_NS: Final = 1_000_000_000


class SimClock:
    """`Clock` on an event loop (virtual or real), or on hand-set time when there is none."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop | None = None, *, wall_ns: int = WALL_START_NS
    ) -> None:
        self._loop = loop
        self._manual_ns = 1000 * _NS
        self._wall_anchor_ns = wall_ns
        self._mono_anchor_ns = self._mono_ns()
        self._rate = 1.0

    def now(self) -> Now:
        """Monotonic and wall time in one reading."""
        mono = self._mono_ns()
        elapsed = round((mono - self._mono_anchor_ns) * self._rate)
        return Now(mono, self._wall_anchor_ns + elapsed)

    def pass_time(self, seconds: float) -> None:
        """Let time pass on a clock without a loop."""
        assert self._loop is None, "the loop's time passes by itself"
        self._manual_ns += round(seconds * _NS)

    def jump_wall(self, seconds: float) -> None:
        """Set the wall clock forward or back; the monotonic one does not move."""
        self._anchor()
        self._wall_anchor_ns += round(seconds * _NS)

    def skew_wall(self, rate: float) -> None:
        """From now on let the wall clock run at `rate` seconds a second."""
        self._anchor()
        self._rate = rate

    def _anchor(self) -> None:
        now = self.now()
        self._mono_anchor_ns, self._wall_anchor_ns = now.mono_ns, now.wall_ns

    def _mono_ns(self) -> int:
        return self._manual_ns if self._loop is None else round(self._loop.time() * _NS)
