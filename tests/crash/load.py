"""Load of one client on a daemon that may die at any moment, and its account of what it was told.

Owns the mixture of operations. Works through a connected store that reconnects by itself; what the
answers mean is the oracle's.
"""

from __future__ import annotations

import json
import queue
import random
import sys
import threading
import time
import traceback
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ctxstore.errors import CtxStoreError, StaleView
from ctxstore.wire.messages import Lookup, PutResult
from tests.crash.oracle import Fate, Oracle, Violation
from tests.shards import is_payload_of, payload_of, shard_key, shard_length

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTHS: Final = (1, 77, 1024, 1025, 4096, 70_001, 262_144, 524_288, 2_097_152)
SHARED_SPACE: Final = 0
SHARED_KEYS: Final = 48
BYTES_MAX: Final = 110 * 1024 * 1024
"""Put by one worker in all: the daemon's disk must not need to evict."""

CHECK_BYTES: Final = 12 * 1024 * 1024
RETURNED_KEPT: Final = 16
DOWN_PAUSE_S: Final = 0.02
"""After an answer that says that the daemon is down: its start needs the processors."""

_PATTERN: Final = 0xA5


class LoadWorker:
    """Runs operations until told to stop; `commands` are "check", "check all" and "stop"."""

    def __init__(self, store: Any, *, space: int, seed: int) -> None:
        self.oracle = Oracle()
        self.done: Counter[str] = Counter()
        self._store = store
        self._space = space
        self._rng = random.Random(f"{seed}/{space}")
        self._number = 0
        self._bytes_left = BYTES_MAX
        self._known: list[bytes] = []
        self._returned: list[np.ndarray[Any, Any]] = []
        self._operations: list[tuple[Callable[[], None], int]] = [
            (self._put, 36),
            (self._put_shared, 4),
            (self._put_staged, 6),
            (self._get, 28),
            (self._view, 6),
            (self._remove, 7),
            (self._touch, 5),
            (self._hold, 3),
            (self._flush, 2),
            (self._ask, 4),
        ]

    def run(self, commands: queue.Queue[str], answer: Callable[[str], None]) -> None:
        """Work; every command is answered by "" or by what went wrong."""
        operations, weights = zip(*self._operations, strict=True)
        stopped = False
        try:
            while not stopped:
                try:
                    command = commands.get_nowait()
                except queue.Empty:
                    (operation,) = self._rng.choices(operations, weights)
                    self._attempt(operation)
                    continue
                if command.startswith("check"):
                    bytes_max = BYTES_MAX * 2 if command == "check all" else CHECK_BYTES
                    self.oracle.check(self._store, self._rng, bytes_max=bytes_max)
                    self._check_returned()
                stopped = command == "stop"
                answer("")
        finally:
            if not stopped:
                answer(f"worker {self._space}:\n{traceback.format_exc()}")

    def _attempt(self, operation: Callable[[], None]) -> None:
        name = operation.__name__.strip("_")
        try:
            operation()
            self.done[name] += 1
        except StaleView:
            self.done["stale"] += 1
        except CtxStoreError as error:
            if not error.retryable:
                raise
            self.done[f"{name} failed"] += 1
            time.sleep(DOWN_PAUSE_S)

    def _deadline(self) -> float:
        return self._rng.choice((*[2.0] * 10, 0.2, 0.01))

    # ------------------------------------------------------------------ operations

    def _new_keys(self) -> list[bytes]:
        rng = self._rng
        keys: list[bytes] = []
        for _ in range(rng.choice((1, 1, 2, 4, 8))):
            length = rng.choice(LENGTHS)
            if length > self._bytes_left:
                length = 1024
            self._bytes_left -= length if length > 1024 else 0
            self._number += 1
            keys.append(shard_key(self._space, self._number, length))
        known = self._own_keys(*Fate)
        if known and rng.random() < 0.2:
            again = known[0]
            if shard_length(again) <= max(1024, self._bytes_left):
                self._bytes_left -= shard_length(again)
                keys.append(again)
        return list(dict.fromkeys(keys))

    def _shared_key(self) -> bytes:
        number = self._rng.randrange(SHARED_KEYS)
        return shard_key(SHARED_SPACE, number, LENGTHS[number % len(LENGTHS)])

    def _put(self) -> None:
        keys = self._new_keys()
        self._judge_put(keys, [payload_of(key) for key in keys])

    def _put_shared(self) -> None:
        """A shard that every worker puts: the first copy wins, nobody removes it."""
        key = self._shared_key()
        began = time.monotonic()
        (result,) = self._store.put([key], [payload_of(key)], durability="group")
        self.done[f"put {result.name}"] += 1
        if result in (PutResult.COMMITTED, PutResult.EXISTS):
            self.oracle.put_answered(key, result, synced=True, began=began, ttl_s=None)

    def _put_staged(self) -> None:
        keys = self._new_keys()
        with self._store.alloc([shard_length(key) for key in keys], timeout_s=1.0) as staged:
            for key, memory in zip(keys, staged, strict=True):
                memory[:] = payload_of(key).data
            self._judge_put(keys, staged)

    def _judge_put(self, keys: list[bytes], buffers: Any) -> None:
        durability = self._rng.choice(("group", "group", "memory", None))
        ttl_s = self._rng.choice((None, None, None, 3600.0, 0.6))
        began = time.monotonic()
        results = self._store.put(
            keys, buffers, ttl_s=ttl_s, durability=durability, timeout_s=self._deadline()
        )
        for key, result in zip(keys, results, strict=True):
            self.done[f"put {result.name}"] += 1
            self.oracle.put_answered(
                key, result, synced=durability == "group", began=began, ttl_s=ttl_s
            )
        if set(results) == {PutResult.OVERLOADED}:
            time.sleep(DOWN_PAUSE_S)

    def _some_keys(self, *fates: Fate, most: int = 8) -> list[bytes]:
        """Up to `most` known keys; looking at all of them each time would be most of the load."""
        shards, known = self.oracle.shards, self._known
        if len(known) < len(shards):
            known += list(shards)[len(known) :]
        picked = [self._rng.choice(known) for _ in range(4 * most if known else 0)]
        found = [key for key in dict.fromkeys(picked) if shards[key].fate in fates]
        return found[: self._rng.randint(1, most)]

    def _get(self) -> None:
        keys = self._some_keys(*Fate)
        keys = list(dict.fromkeys([*keys, self._shared_key()]))
        spare = self._rng.choice((0, 0, 5))
        buffers = [np.full(shard_length(key) + spare, _PATTERN, np.uint8) for key in keys]
        began = time.monotonic()
        statuses = self._store.get_into(keys, buffers, timeout_s=self._deadline())
        for key, status, buffer in zip(keys, statuses, buffers, strict=True):
            self.done[f"get {status.name}"] += 1
            self.oracle.got(key, status, buffer, began)
            if status is Lookup.HIT and (buffer[shard_length(key) :] != _PATTERN).any():
                raise Violation(f"bytes behind the end of {key.hex()} were written")
            if status is not Lookup.HIT:
                # The caller uses its memory again at once; nothing may write there any more.
                buffer[:] = 0x3C
                self._returned.append(buffer)
        del self._returned[:-RETURNED_KEPT]
        if Lookup.HIT not in statuses:
            time.sleep(DOWN_PAUSE_S / 2)

    def _check_returned(self) -> None:
        for buffer in self._returned:
            if (buffer != 0x3C).any():
                raise Violation(f"a buffer of {len(buffer)} bytes was written after the verdict")

    def _view(self) -> None:
        keys = self._some_keys(Fate.DURABLE, Fate.VOLATILE, Fate.ABSENT)
        if not keys:
            return
        began = time.monotonic()
        with self._store.view(keys, timeout_s=self._deadline()) as views:
            for key, view in zip(keys, views, strict=True):
                if view is not None and not is_payload_of(key, view):
                    views.check()  # raises StaleView where the bytes are not vouched for
                    raise Violation(f"wrong bytes in a view of {key.hex()}")
            shown = [key for key, view in zip(keys, views, strict=True) if view is not None]
        for key in shown:
            self.oracle.seen(key, began)

    def _own_keys(self, *fates: Fate, most: int = 4) -> list[bytes]:
        keys = self._some_keys(*fates, most=most)
        return [key for key in keys if int.from_bytes(key[:4], "little") != SHARED_SPACE]

    def _remove(self) -> None:
        keys = self._own_keys(Fate.DURABLE, Fate.VOLATILE, Fate.ABSENT)
        if not keys:
            return
        self.oracle.removal_sent(keys)
        try:
            self._store.remove(keys, timeout_s=self._deadline())
        except CtxStoreError:
            self.oracle.removal_failed(keys)
            raise
        self.oracle.removal_answered(keys)

    def _touch(self) -> None:
        keys = self._own_keys(Fate.DURABLE)
        if not keys:
            return
        ttl_s = self._rng.choice((100.0, 5000.0))
        began = time.monotonic()
        applied: list[bool | None] = [None] * len(keys)
        try:
            applied = self._store.touch(keys, ttl_s=ttl_s, timeout_s=self._deadline()).tolist()
        finally:
            for key, done in zip(keys, applied, strict=True):
                self.oracle.touched(key, ttl_s, began=began, applied=done)

    def _hold(self) -> None:
        keys = self._own_keys(Fate.DURABLE)
        if not keys:
            return
        began = time.monotonic()
        applied = self._store.hold(keys, ttl_s=600, timeout_s=self._deadline())
        for key, done in zip(keys, applied.tolist(), strict=True):
            if done:
                self.oracle.shards[key].held_until = began + 600

    def _flush(self) -> None:
        keys = self.oracle.keys_of(Fate.VOLATILE)
        self._store.flush(timeout_s=2.0)
        if keys:
            there = self._store.exists(keys).tolist()
            self.oracle.flushed([key for key, found in zip(keys, there, strict=True) if found])

    def _ask(self) -> None:
        keys = self._some_keys(Fate.DURABLE, Fate.ABSENT)
        if keys:
            began = time.monotonic()
            for key, found in zip(keys, self._store.exists(keys).tolist(), strict=True):
                if found:
                    self.oracle.seen(key, began)
            self._store.match(keys)


def main() -> None:
    """A worker in a process of its own: commands on stdin, JSON answers on stdout."""
    from ctxstore_client import connect

    url, space, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    commands: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            commands.put(line.strip())

    threading.Thread(target=read, daemon=True).start()
    with connect(url, timeout_s=2.0) as store:
        worker = LoadWorker(store, space=space, seed=seed)

        def answer(text: str) -> None:
            document = {"text": text, "done": worker.done, "checked": worker.oracle.counts}
            sys.stdout.write(json.dumps(document) + "\n")
            sys.stdout.flush()

        worker.run(commands, answer)


if __name__ == "__main__":
    main()
