"""The circuit breaker: how long nobody is made to wait for a node that failed just now.

Owns what counts as failing and the backoff. It must not know connections, nor read a clock: the
pool tells it what happened and when, under its lock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ctxstore.errors import TransportError

if TYPE_CHECKING:
    from collections.abc import Callable

BACKOFF_S_MIN: Final = 0.02
BACKOFF_S_MAX: Final = 1.0
BREAKER_FAILURES: Final = 3
"""Failures in a row after which nobody is made to wait for another try."""

SILENT: Final = "no answer in time"
"""Why a circuit is open when nothing else is known."""


class CircuitOpen(TransportError):
    """Nothing was tried: the node failed just now."""


@dataclass(slots=True)
class BreakerState:
    """Failures in a row, and until when nobody tries again."""

    random: Callable[[], float]
    """A number of [0, 1), so that many clients do not return at once."""
    failures: int = 0
    closed_at_s: float = 0.0
    reason: str = SILENT

    def check(self, now_s: float) -> None:
        """Raises CircuitOpen, with what went wrong, while nobody is to try again."""
        if self.failures and now_s < self.closed_at_s:
            raise CircuitOpen(
                f"{self.reason} (failures in a row: {self.failures}; trying again soon)"
            )

    def fail(self, now_s: float) -> None:
        """Back off exponentially, with jitter."""
        self.failures += 1
        delay = min(BACKOFF_S_MAX, BACKOFF_S_MIN * 2 ** min(self.failures - 1, 16))
        self.closed_at_s = now_s + delay * (0.5 + self.random() / 2)

    def time_out(self, now_s: float) -> None:
        """A connection stood and nothing came: only several of these say something of the node."""
        if self.failures + 1 >= BREAKER_FAILURES:
            self.fail(now_s)
        else:
            self.failures += 1

    def succeed(self) -> None:
        """A connection was made, or an operation answered."""
        self.failures = 0
        self.closed_at_s = 0.0
        self.reason = SILENT
