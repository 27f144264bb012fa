"""A store in this process with the real one's signatures, whose every fault a test can choose.

For faults that a real daemon cannot be made to show at will; everything else runs against the real
one.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from ctxstore.keys import KeyArray, key_list
from ctxstore.wire.messages import Lookup, PutResult

if TYPE_CHECKING:
    from collections.abc import Sequence


class MemoryTicket:
    """A put that runs in a thread of its own until `release` is set."""

    def __init__(self, work: Any, release: threading.Event) -> None:
        self._results: list[PutResult] = []
        self._error: Exception | None = None

        def run() -> None:
            release.wait(20)
            try:
                self._results = work()
            except Exception as error:  # noqa: BLE001 - told to whoever waits
                self._error = error

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> list[PutResult]:
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._results

    def cancel(self) -> None:
        self._thread.join()


class MemoryStore:
    """`raises` makes every call raise; `lookups` and `put_results` overrule single keys."""

    def __init__(self) -> None:
        self.shards: dict[bytes, bytes] = {}
        self.order: list[bytes] = []
        self.raises: Exception | None = None
        self.get_raises_at_call: int | None = None
        self.gets = 0
        self.lookups: dict[bytes, Lookup] = {}
        self.put_results: dict[bytes, list[PutResult]] = {}
        self.release = threading.Event()
        self.release.set()

    def match(self, keys: KeyArray, *, timeout_s: float | None = None) -> int:
        self._fault()
        for count, key in enumerate(key_list(keys)):
            if key not in self.shards:
                return count
        return len(keys)

    def get_into(
        self,
        keys: KeyArray,
        buffers: Sequence[np.ndarray],
        *,
        timeout_s: float | None = None,
        exact: bool = False,
    ) -> list[Lookup]:
        self._fault()
        self.gets += 1
        if self.gets == self.get_raises_at_call:
            raise ConnectionResetError
        return [self._get(k, b, exact) for k, b in zip(key_list(keys), buffers, strict=True)]

    def _get(self, key: bytes, buffer: np.ndarray, exact: bool) -> Lookup:
        if key in self.lookups:
            buffer[:] = 0xEE  # a buffer that is no hit has undefined content
            return self.lookups[key]
        if key not in self.shards or (exact and len(self.shards[key]) != len(buffer)):
            return Lookup.MISS
        buffer[:] = np.frombuffer(self.shards[key], np.uint8)
        return Lookup.HIT

    def put(self, keys: KeyArray, buffers: Sequence[Any], **_: Any) -> list[PutResult]:
        self._fault()
        return [self._put(k, b) for k, b in zip(key_list(keys), buffers, strict=True)]

    def _put(self, key: bytes, buffer: Any) -> PutResult:
        if self.put_results.get(key):
            return self.put_results[key].pop(0)
        if key in self.shards:
            return PutResult.EXISTS
        self.shards[key] = bytes(memoryview(buffer))
        self.order.append(key)
        return PutResult.COMMITTED

    def submit_put(self, keys: KeyArray, buffers: Sequence[Any], **options: Any) -> MemoryTicket:
        self._fault()
        return MemoryTicket(lambda: self.put(keys, buffers, **options), self.release)

    def _fault(self) -> None:
        if self.raises is not None:
            raise self.raises
