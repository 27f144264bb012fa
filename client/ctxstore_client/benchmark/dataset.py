"""Keys and payloads of the benchmark, and the check that what came back is what went in.

Owns the data only. Payloads are random, so no compression or zero-page trick below us can flatter
a figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt


class WrongBytes(AssertionError):
    """A read returned something else than was put. No figure counts after this."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """`keys` is (n, 16), `payloads` (n, length); row i of one belongs to row i of the other."""

    keys: npt.NDArray[np.uint8]
    payloads: npt.NDArray[np.uint8]

    @classmethod
    def make(cls, count: int, length: int, seed: int) -> Dataset:
        """Random keys and payloads, the same for the same seed."""
        rng = np.random.default_rng(seed)
        keys = rng.integers(0, 256, (count, 16), np.uint8)
        words = rng.integers(0, 2**63, (count, length // 8), np.int64)
        return cls(keys, words.view(np.uint8).reshape(count, length))

    @property
    def total_bytes(self) -> int:
        """Payload bytes of all shards."""
        return int(self.payloads.nbytes)

    def rekeyed(self, seed: int) -> Dataset:
        """The same payloads under fresh keys, for a put that is not answered EXISTS."""
        rng = np.random.default_rng((seed, 1))
        return Dataset(rng.integers(0, 256, self.keys.shape, np.uint8), self.payloads)

    def batches(self, size: int) -> Iterator[Dataset]:
        """Consecutive parts of at most `size` shards."""
        for start in range(0, len(self.keys), size):
            yield Dataset(self.keys[start : start + size], self.payloads[start : start + size])

    def shuffled(self, seed: int) -> Dataset:
        """The same shards in another order."""
        order = np.random.default_rng(seed).permutation(len(self.keys))
        return Dataset(self.keys[order], self.payloads[order])

    def check(self, got: Sequence[object]) -> None:
        """Compare every byte. Raises WrongBytes."""
        for index, buffer in enumerate(got):
            if buffer is None:
                raise WrongBytes(f"shard {index} is missing: enlarge --memory or --disk")
            row = np.frombuffer(buffer, np.uint8)  # type: ignore[call-overload]
            if not np.array_equal(row, self.payloads[index]):
                raise WrongBytes(f"shard {index} came back with other bytes")
