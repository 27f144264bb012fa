"""One interface for every medium that keeps shards.

Owns the contract between tiers and whoever moves shards among them. It must not decide what is
moved. `ctxstore.testing.tier_suite` is the conformance suite that every tier passes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ctxstore_daemon.engine.events import Statuses
    from ctxstore_daemon.engine.records import RecordArray

LOCATION_DTYPE = np.dtype(
    [
        ("segment", "<u4"),
        ("generation", "<u4"),
        ("page", "<u4"),  # first 4 KiB page, of the segment or of the arena
        ("length", "<u4"),  # payload bytes
        ("seed", "<u8"),
        ("checksum", "<u8"),
    ]
)
"""Where a shard stands and how its bytes are known to be right. Opaque to callers."""

Locations = npt.NDArray[np.void]
"""(n,) of LOCATION_DTYPE."""

Pages = npt.NDArray[np.uint8]
"""Whole 4 KiB pages at an aligned address; when written, zero after the payload."""


class Tier(ABC):
    """Keeps shards until they are freed. Calls may overlap on one event loop.

    A cancelled `write` may have taken effect: its space comes back only with the tier's end.
    Buffers of a cancelled call must stay untouched until `close` has returned.
    """

    @property
    @abstractmethod
    def room_bytes(self) -> int:
        """Bytes that can surely be written now, headers not counted."""

    @abstractmethod
    async def write(self, records: RecordArray, payloads: Sequence[Pages]) -> Locations:
        """Store shards (RECORD_DTYPE, none inline), all of them or none; durable where the tier is.

        Raises OutOfSpace or DeviceError.
        """

    @abstractmethod
    async def read(self, locations: Locations, buffers: Sequence[Pages]) -> Statuses:
        """Fill buffers; a ReadStatus for each. Those not OK have undefined content.

        A freed location is FAILED: it never yields the bytes of another shard.
        """

    @abstractmethod
    async def free(self, locations: Locations) -> None:
        """Give shards up. No read of them may be running."""

    @abstractmethod
    async def close(self) -> None:
        """Release what the tier holds. Idempotent."""
