"""Who may have how much staging, and when it may go.

Owns the budget over all connections and the life of each connection's staging: it stays mapped
until the connection is gone and no copy out of it runs. It must not map memory itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ctxstore import limits

if TYPE_CHECKING:
    from collections.abc import Callable

StagingArray = npt.NDArray[np.uint8]


class StagingBudgetState:
    """Bytes of staging handed out, never above the cap."""

    __slots__ = ("connection_bytes_max", "total_bytes", "used_bytes")

    def __init__(self, total_bytes: int, *, connection_bytes_max: int) -> None:
        self.total_bytes = total_bytes
        self.connection_bytes_max = connection_bytes_max
        self.used_bytes = 0

    def grant(self, wanted_bytes: int) -> int:
        """Take up to `wanted_bytes` in whole pages; 0 when there is nothing left to give."""
        free = self.total_bytes - self.used_bytes
        granted = min(wanted_bytes, self.connection_bytes_max, free)
        granted -= granted % limits.PAGE_BYTES
        granted = max(0, granted)
        self.used_bytes += granted
        return granted

    def give_back(self, count_bytes: int) -> None:
        """Return what `grant` gave, once its memory is gone."""
        self.used_bytes -= count_bytes
        assert self.used_bytes >= 0, "more staging returned than was granted"


@dataclass(frozen=True, slots=True)
class StagingGrant:
    """The staging of one connection.

    `release` is called exactly once; it gives the memory back, perhaps in a thread, and then calls
    its argument on the loop's thread.
    """

    data: StagingArray
    release: Callable[[Callable[[], None]], None]
