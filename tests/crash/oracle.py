"""What one writer was told about its shards, and whether a store still keeps to it.

Owns the rules of the failure model as an outsider sees them. One oracle has one writer: nobody else
puts, removes or touches its keys. It must not cause load.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ctxstore.errors import DeadlineExceeded, TransportError
from ctxstore.wire.messages import Lookup, PutResult
from tests.shards import first_difference, is_payload_of, shard_length

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

SLACK_S: Final = 0.5
"""Clocks of two processes, rounding to milliseconds, and a test machine that is busy."""

UP_TIMEOUT_S: Final = 20.0


class Fate(Enum):
    """What must be true of a shard after the daemon was killed now."""

    UNKNOWN = "may be there or not"
    VOLATILE = "acknowledged in memory: may be lost by a kill, not otherwise"
    DURABLE = "acknowledged after a sync: must be there"
    ABSENT = "removed, or surely not stored: must not be there"


@dataclass(slots=True)
class ShardState:
    """One key. Times are monotonic seconds of this machine."""

    fate: Fate = Fate.UNKNOWN
    tainted: bool = False
    """An operation on it ended without an answer and may take effect at any time."""
    lives_until: float = math.inf
    """Its TTL ends no earlier."""
    gone_by: float = math.inf
    """Its TTL ends no later."""
    held_until: float = 0.0
    promise: str = ""
    """What was acknowledged last, for messages."""


class Violation(AssertionError):
    """The store broke a promise."""


class Oracle:
    """Tell it every answer; `check` a store that is up. Not thread-safe."""

    def __init__(self) -> None:
        self.shards: dict[bytes, ShardState] = {}
        self.counts = dict.fromkeys(
            ("durable_checked", "absent_checked", "bytes_checked", "volatile_lost", "held_checked"),
            0,
        )

    def keys_of(self, *fates: Fate) -> list[bytes]:
        """Known keys with one of these fates, oldest first."""
        return [key for key, state in self.shards.items() if state.fate in fates]

    # ------------------------------------------------------------------ answers

    def put_answered(
        self, key: bytes, result: PutResult, *, synced: bool, began: float, ttl_s: float | None
    ) -> None:
        """One result of a put that was sent at `began`."""
        known = key in self.shards
        state = self.shards.setdefault(key, ShardState())
        now = time.monotonic()
        lives, gone = (
            (math.inf, math.inf) if ttl_s is None else (began + ttl_s - SLACK_S, now + ttl_s)
        )
        if result is PutResult.OVERLOADED:
            if not known:
                state.fate = Fate.ABSENT
            return
        if result is PutResult.TIMEOUT:
            state.tainted = True
            state.gone_by = max(state.gone_by, gone) if known else gone
            if state.fate is not Fate.DURABLE:
                state.fate = Fate.UNKNOWN
            return
        if result is PutResult.REFUSED:
            raise Violation(f"a put of {key.hex()} was refused although there is room")
        if result is PutResult.EXISTS:
            self._existed(key, known=known, synced=synced, lives=lives, gone=gone)
        else:
            if state.fate is Fate.DURABLE and not state.tainted and now < state.lives_until:
                raise Violation(f"{key.hex()} was lost: a put over it was committed")
            state.lives_until, state.gone_by = lives, gone
            state.held_until = 0.0
        state.promise = f"put {'group' if synced else 'memory'} {result.name} at {now:.3f}"
        if state.tainted:
            state.fate = Fate.UNKNOWN
        elif synced:
            state.fate = Fate.DURABLE
        elif state.fate is not Fate.DURABLE or result is PutResult.COMMITTED:
            state.fate = Fate.VOLATILE

    def _existed(self, key: bytes, *, known: bool, synced: bool, lives: float, gone: float) -> None:
        """The longer TTL of what is there and what was put now holds; for sure if it was synced."""
        state = self.shards[key]
        if state.fate is Fate.ABSENT and not state.tainted:
            raise Violation(f"{key.hex()} exists, but it was removed or never stored")
        if synced:
            state.lives_until = max(state.lives_until, lives) if known else lives
        elif not known:
            state.lives_until = -math.inf
        state.gone_by = max(state.gone_by, gone) if known else math.inf

    def removal_sent(self, keys: Sequence[bytes]) -> None:
        """From here until the answer nothing is known."""
        for key in keys:
            self.shards[key].fate = Fate.UNKNOWN

    def removal_answered(self, keys: Sequence[bytes]) -> None:
        """Acknowledged: they must never be seen again."""
        for key in keys:
            state = self.shards[key]
            state.fate = Fate.UNKNOWN if state.tainted else Fate.ABSENT

    def removal_failed(self, keys: Sequence[bytes]) -> None:
        """No answer: it may take effect at any time."""
        for key in keys:
            self.shards[key].tainted = True

    def touched(self, key: bytes, ttl_s: float, *, began: float, applied: bool | None) -> None:
        """A longer TTL was asked for; `applied` None: no answer came."""
        state = self.shards[key]
        if applied is not False:
            state.gone_by = max(state.gone_by, time.monotonic() + ttl_s)
        if applied:
            state.lives_until = max(state.lives_until, began + ttl_s - SLACK_S)

    def flushed(self, keys: Sequence[bytes]) -> None:
        """A flush that began after these were committed was acknowledged, and they are there still.

        Without the second half it could be the flush of a daemon that never had them: it was
        started after they were lost.
        """
        for key in keys:
            state = self.shards[key]
            if state.fate is Fate.VOLATILE:
                state.fate = Fate.DURABLE
                state.promise += f", flush at {time.monotonic():.3f}"

    def got(self, key: bytes, status: Lookup, buffer: np.ndarray[Any, Any], began: float) -> None:
        """Judge one verdict of a get and its buffer. Raises Violation."""
        if status is not Lookup.HIT:
            return
        length = shard_length(key)
        if not is_payload_of(key, buffer[:length]):
            raise Violation(
                f"wrong bytes for {key.hex()}: {first_difference(key, buffer[:length])}"
            )
        self.seen(key, began)

    def seen(self, key: bytes, began: float) -> None:
        """The store showed this shard to a request sent at `began`. Raises Violation."""
        state = self.shards.get(key)
        if state is None or state.tainted:
            return
        if state.fate is Fate.ABSENT:
            raise Violation(f"{key.hex()} is back, but it was removed or never stored")
        if began > state.gone_by + SLACK_S:
            late_s = began - state.gone_by
            raise Violation(f"{key.hex()} is there {late_s:.2f} s after its TTL ended")

    # ------------------------------------------------------------------ after a restart

    def check(self, store: Any, rng: random.Random, *, bytes_max: int) -> None:
        """Compare all that is known with a store that is up and nobody kills. Raises Violation.

        Volatile shards that are gone are forgotten: the next check must not find them back.
        """
        wait_until_up(store)
        self._check_absent(store)
        durable = [
            key
            for key in self.keys_of(Fate.DURABLE)
            if self.shards[key].lives_until > time.monotonic() + UP_TIMEOUT_S
        ]
        self._check_stat(store, durable)
        rng.shuffle(durable)
        self._check_bytes(store, _up_to(durable, bytes_max))
        for key in self.keys_of(Fate.VOLATILE):
            buffer = np.zeros(shard_length(key), np.uint8)
            began = time.monotonic()
            (status,) = store.get_into([key], [buffer])
            self.got(key, status, buffer, began)
            if status is Lookup.MISS:
                self.counts["volatile_lost"] += 1
                self.shards[key].fate = Fate.UNKNOWN
        store.ping()  # a daemon that went away meanwhile would make misses of all

    def _check_absent(self, store: Any) -> None:
        now = time.monotonic()
        absent = [
            key
            for key, state in self.shards.items()
            if not state.tainted and (state.fate is Fate.ABSENT or state.gone_by + SLACK_S < now)
        ]
        if not absent:
            return
        found = store.exists(absent)
        self.counts["absent_checked"] += len(absent)
        if found.any():
            key = absent[int(np.flatnonzero(found)[0])]
            raise Violation(
                f"{int(found.sum())} removed or expired shards are back, first {key.hex()}: "
                f"{self.shards[key]}, {store.explain([key])}"
            )

    def _check_stat(self, store: Any, keys: list[bytes]) -> None:
        if not keys:
            return
        lost: list[bytes] = []
        for key, found in zip(keys, store.stat(keys), strict=True):
            state = self.shards[key]
            now = time.monotonic()
            if found is None:
                lost.append(key)
                continue
            if found.length != shard_length(key):
                raise Violation(f"{key.hex()} has {found.length} bytes, not {shard_length(key)}")
            ttl_s = math.inf if found.ttl_s is None else found.ttl_s
            if not state.lives_until - now - SLACK_S <= ttl_s <= state.gone_by - now + SLACK_S:
                raise Violation(f"{key.hex()} lives {ttl_s} s more at {now}: {state}")
            if state.held_until > now + SLACK_S:
                self.counts["held_checked"] += 1
                if not found.held:
                    raise Violation(f"the hold on {key.hex()} is gone: {state}")
        self.counts["durable_checked"] += len(keys)
        if lost:
            raise Violation(
                f"{len(lost)} of {len(keys)} shards put with group are lost, first "
                f"{lost[0].hex()}: {self.shards[lost[0]]}, {store.explain([lost[0]])}"
            )

    def _check_bytes(self, store: Any, keys: list[bytes]) -> None:
        for first in range(0, len(keys), 8):
            batch = keys[first : first + 8]
            buffers = [np.zeros(shard_length(key), np.uint8) for key in batch]
            for _ in range(50):
                began = time.monotonic()
                statuses = store.get_into(batch, buffers)
                busy = [s for s in statuses if s in (Lookup.OVERLOADED, Lookup.TIMEOUT)]
                if not busy:
                    break
                time.sleep(0.02)
            for key, status, buffer in zip(batch, statuses, buffers, strict=True):
                if status is not Lookup.HIT:
                    raise Violation(
                        f"{key.hex()} was put with group and is a {status.name} now: "
                        f"{self.shards[key]}, {store.explain([key])}"
                    )
                self.got(key, status, buffer, began)
                self.counts["bytes_checked"] += len(buffer)


def wait_until_up(store: Any) -> None:
    """Until the store answers. Raises Violation when it does not reconnect."""
    until = time.monotonic() + UP_TIMEOUT_S
    while True:
        try:
            store.ping()
        except (TransportError, DeadlineExceeded) as error:
            if time.monotonic() > until:
                raise Violation(f"no reconnect in {UP_TIMEOUT_S:.0f} s: {error}") from error
            time.sleep(0.01)
        else:
            return


def _up_to(keys: list[bytes], bytes_max: int) -> list[bytes]:
    chosen: list[bytes] = []
    for key in keys:
        bytes_max -= shard_length(key)
        if bytes_max < 0:
            break
        chosen.append(key)
    return chosen
