"""Watches what clients of a store see, from outside, and says when it cannot be right.

Owns the rules: never wrong bytes, nothing acknowledged is lost without a legal reason, what was
removed or has expired stays away, the first copy wins. It must not know the store's code: legal
losses come from a `LossOracle` that watches the device, and every payload is derived from its put.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np
import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

NS_PER_MS: Final = 1_000_000
NEVER_NS: Final = 2**63 - 1
TTL_SLACK_NS: Final = 25 * NS_PER_MS
"""Expiry is stored in whole milliseconds and rounded down each time a shard is written again."""


class HistoryViolation(AssertionError):
    """Clients saw what a correct store never shows."""


class ShardId(NamedTuple):
    """What a client names: a key in a namespace."""

    namespace: str
    key: bytes


class Level(IntEnum):
    """How much an acknowledgement promised."""

    MEMORY = 1
    """There until the node dies."""
    GROUP = 2
    """There after the node dies, too."""


class Outcome(Enum):
    """What is known of one put of one shard."""

    OPEN = "open"
    """Under way, or over with an unknown outcome: its bytes may turn up."""
    STORED = "stored"
    """Acknowledged as committed."""
    DISCARDED = "discarded"
    """Acknowledged as not stored: its bytes must never be seen."""


class Loss(Enum):
    """Why a shard may be gone, as the device saw it."""

    NONE = "none"
    RECLAIMED = "reclaimed"
    """Every copy stood in space that was reclaimed or evicted."""
    FAULT = "fault"
    """A fault that was injected hit it, or kept it from being written."""


class LossOracle(Protocol):
    """Knows from the device which shards may be gone."""

    def loss_of(self, shard: ShardId, since_ns: int) -> Loss:
        """The strongest excuse for the absence of a shard that was there at `since_ns` or later."""
        ...


class NoLosses:
    """The oracle of a run without pressure and faults: nothing may be gone."""

    def loss_of(self, shard: ShardId, since_ns: int) -> Loss:
        """Never an excuse."""
        del shard, since_ns
        return Loss.NONE


@lru_cache(maxsize=256)
def payload_of(shard: ShardId, version: int, length: int) -> npt.NDArray[np.uint8]:
    """The bytes of one put: any mix-up of key, namespace, put or length shows in them."""
    text = b"%s|%s|%d|%d" % (shard.namespace.encode(), shard.key, version, length)
    words = np.random.Generator(np.random.PCG64(xxhash.xxh3_64_intdigest(text)))
    return np.frombuffer(words.bytes(length), np.uint8)


@dataclass(slots=True, eq=False)
class AttemptState:
    """One put of one shard. `ended_ns` None: it may still take effect."""

    shard: ShardId
    version: int
    length: int
    ttl_ms: int
    level: Level
    began_ns: int
    ended_ns: int | None = None
    outcome: Outcome = Outcome.OPEN
    expires_high_ns: int = NEVER_NS
    ttl_ms_max: int = 0
    """Longest TTL that it was ever raised to; only meaningful while it has one."""

    def payload(self) -> npt.NDArray[np.uint8]:
        """Its bytes."""
        return payload_of(self.shard, self.version, self.length)


@dataclass(slots=True)
class DutyState:
    """The store owes this shard to everybody who asks from `since_ns` on."""

    level: Level
    began_ns: int
    """It was there at some moment between this one and `since_ns`."""
    since_ns: int
    identity: AttemptState | None
    """Which put's bytes; None: not known."""
    expires_low_ns: int
    durable_low_ns: int
    """Earliest expiry that also holds after a crash."""
    held_low_ns: int = -1


@dataclass(slots=True)
class _ShardState:
    attempts: list[AttemptState] = field(default_factory=list)
    removals: list[tuple[int, int]] = field(default_factory=list)
    """(began, ended) of acknowledged removals."""
    removals_open: int = 0
    raising: list[int] = field(default_factory=list)
    """Beginnings of puts and touches under way, which may raise the TTL of what is there."""
    raises: list[tuple[int, int]] = field(default_factory=list)
    """(latest moment, TTL) of everything that may have raised the TTL of what was there."""
    duty: DutyState | None = None

    def undisturbed_since(self, began_ns: int) -> bool:
        """Whether no removal can have taken effect after `began_ns`."""
        if self.removals_open:
            return False
        return all(ended < began_ns for _, ended in self.removals)


class HistoryChecker:
    """Told of every operation as it begins and ends; raises HistoryViolation at the first lie.

    Times are nanoseconds of one monotonic clock. Observations count only where the store itself
    answered: what a client concludes from a broken connection is nobody's claim.
    """

    def __init__(self, oracle: LossOracle | None = None) -> None:
        self._oracle = oracle or NoLosses()
        self._shards: dict[ShardId, _ShardState] = {}
        self._jumped_ns = -1
        """Last start after a jump of the wall clock: TTLs from before it mean little."""
        self.observations = 0
        """Claims that were compared with the history."""
        self.duties_checked = 0
        """Observations of shards that were owed."""

    # ------------------------------------------------------------------------- puts

    def put_begins(
        self, now_ns: int, shard: ShardId, *, version: int, length: int, ttl_ms: int, level: Level
    ) -> AttemptState:
        """A client is about to put `payload_of(shard, version, length)`."""
        attempt = AttemptState(shard, version, length, ttl_ms, level, now_ns, ttl_ms_max=ttl_ms)
        state = self._state(shard)
        state.attempts.append(attempt)
        state.raising.append(now_ns)
        return attempt

    def put_stored(self, now_ns: int, attempt: AttemptState) -> None:
        """COMMITTED came back."""
        attempt.ended_ns = now_ns
        attempt.outcome = Outcome.STORED
        if attempt.ttl_ms:
            attempt.expires_high_ns = now_ns + attempt.ttl_ms * NS_PER_MS + TTL_SLACK_NS
        state = self._state(attempt.shard)
        state.raising.remove(attempt.began_ns)
        for when_ns, ttl_ms in state.raises:
            if when_ns >= attempt.began_ns:
                _raise_attempt(attempt, when_ns, ttl_ms)
        self._refuse_second_copy(state, attempt, now_ns)
        if state.undisturbed_since(attempt.began_ns):
            low = _expiry_low(attempt.began_ns, attempt.ttl_ms)
            state.duty = DutyState(attempt.level, attempt.began_ns, now_ns, attempt, low, low)

    def put_existed(self, now_ns: int, attempt: AttemptState, *, sure: bool) -> None:
        """EXISTS came back. `sure`: the store saw this put only once, so its bytes were dropped."""
        attempt.ended_ns = now_ns
        if sure:
            attempt.outcome = Outcome.DISCARDED
        state = self._state(attempt.shard)
        state.raising.remove(attempt.began_ns)
        self._raise_high(state, attempt.began_ns, now_ns, attempt.ttl_ms)
        if not state.undisturbed_since(attempt.began_ns):
            return
        low = _expiry_low(attempt.began_ns, attempt.ttl_ms)
        duty = state.duty
        if duty is None or duty.expires_low_ns <= now_ns:
            state.duty = DutyState(
                attempt.level, attempt.began_ns, now_ns, None, low, attempt.began_ns
            )
        else:
            duty.level = max(duty.level, attempt.level)
            duty.expires_low_ns = max(duty.expires_low_ns, low)

    def put_discarded(self, now_ns: int, attempt: AttemptState) -> None:
        """OVERLOADED came back: surely not stored."""
        self._state(attempt.shard).raising.remove(attempt.began_ns)
        attempt.ended_ns = now_ns
        attempt.outcome = Outcome.DISCARDED

    def put_unknown(self, now_ns: int, attempt: AttemptState) -> None:
        """No answer, or one that promises nothing: the bytes may turn up until the node dies."""
        del now_ns
        state = self._state(attempt.shard)
        state.raising.remove(attempt.began_ns)
        self._raise_high(state, attempt.began_ns, None, attempt.ttl_ms)

    def flushed(self, began_ns: int) -> None:
        """A flush that began then was acknowledged: what was owed before is durable now."""
        for state in self._shards.values():
            duty = state.duty
            if duty is not None and duty.since_ns <= began_ns:
                duty.level = Level.GROUP

    # ------------------------------------------------------------------------- other changes

    def remove_begins(self, now_ns: int, shard: ShardId) -> None:
        """From now on the shard may vanish."""
        del now_ns
        state = self._state(shard)
        state.removals_open += 1
        state.duty = None

    def remove_ends(
        self, began_ns: int, now_ns: int, shard: ShardId, *, acknowledged: bool
    ) -> None:
        """The removal is over; without acknowledgement it may still happen until the node dies."""
        state = self._state(shard)
        if acknowledged:
            state.removals_open -= 1
            state.removals.append((began_ns, now_ns))

    def touch_begins(self, now_ns: int, shard: ShardId) -> None:
        """From now on the TTL may be raised."""
        self._state(shard).raising.append(now_ns)

    def touched(self, began_ns: int, now_ns: int | None, shard: ShardId, *, ttl_ms: int) -> None:
        """The TTL was raised to `ttl_ms` from some moment between on; None: perhaps, some day."""
        state = self._state(shard)
        state.raising.remove(began_ns)
        if not ttl_ms:
            return
        self._raise_high(state, began_ns, now_ns, ttl_ms)
        duty = state.duty
        if duty is not None and now_ns is not None and now_ns < duty.expires_low_ns:
            duty.expires_low_ns = max(duty.expires_low_ns, _expiry_low(began_ns, ttl_ms))

    def held(self, began_ns: int, shard: ShardId, *, ttl_ms: int) -> None:
        """A hold was acknowledged: until it ends no pressure may take the shard. 0 ends it."""
        duty = self._state(shard).duty
        if duty is not None and duty.since_ns <= began_ns:
            duty.held_low_ns = began_ns + ttl_ms * NS_PER_MS if ttl_ms else -1

    def node_died(self, now_ns: int, *, clean: bool) -> None:
        """The node stopped. `clean`: it wrote down everything before."""
        for shard, state in self._shards.items():
            state.removals_open = 0
            for began_ns in state.raising:  # of clients that died, or do not know yet
                self._raise_high(state, began_ns, None, 0)
            for attempt in state.attempts:
                if attempt.ended_ns is None:
                    attempt.ended_ns = now_ns
            duty = state.duty
            if duty is None or clean:
                continue
            if duty.level < Level.GROUP:
                state.duty = None
                continue
            duty.expires_low_ns = duty.durable_low_ns
            if self._oracle.loss_of(shard, duty.began_ns) is Loss.RECLAIMED:
                # Only its copy in memory was left to be held.
                duty.held_low_ns = -1

    def node_started(self, now_ns: int, *, clock_jumped: bool) -> None:
        """The node is back. After a jump of the wall clock a TTL may start again, or be over."""
        if not clock_jumped:
            return
        self._jumped_ns = now_ns
        for state in self._shards.values():
            for attempt in state.attempts:
                if attempt.expires_high_ns != NEVER_NS:
                    again = now_ns + attempt.ttl_ms_max * NS_PER_MS + TTL_SLACK_NS
                    attempt.expires_high_ns = max(attempt.expires_high_ns, again)
            duty = state.duty
            if duty is None:
                continue
            duty.held_low_ns = -1
            if duty.expires_low_ns != NEVER_NS:
                state.duty = None

    # ------------------------------------------------------------------------- observations

    def saw_bytes(
        self,
        began_ns: int,
        now_ns: int,
        shard: ShardId,
        data: npt.NDArray[np.uint8],
        *,
        fill: int | None = None,
    ) -> None:
        """A get or view showed these bytes; with `fill` some more of that value may follow."""
        self.observations += 1
        state = self._state(shard)
        matching = [a for a in state.attempts if _is_payload(a, data, fill)]
        if not matching:
            raise HistoryViolation(f"{_name(shard)}: {len(data)} bytes that nobody ever put there")
        possible = [a for a in matching if self._why_impossible(state, a, began_ns, now_ns) is None]
        if not possible:
            reason = self._why_impossible(state, matching[0], began_ns, now_ns)
            raise HistoryViolation(
                f"{_name(shard)}: the bytes of put {matching[0].version}, {reason}"
            )
        self._note_identity(state, possible, began_ns, now_ns)

    def saw_present(
        self, began_ns: int, now_ns: int, shard: ShardId, *, length: int | None = None
    ) -> None:
        """exists, match or stat said that the shard is there (with this length)."""
        self.observations += 1
        state = self._state(shard)
        reasons = [self._why_impossible(state, a, began_ns, now_ns) for a in state.attempts]
        possible = [a for a, why in zip(state.attempts, reasons, strict=True) if why is None]
        if not possible:
            known = "; ".join(
                f"put {a.version} {why}" for a, why in zip(state.attempts, reasons, strict=True)
            )
            raise HistoryViolation(f"{_name(shard)}: said to be there, but {known or 'never put'}")
        if length is not None and all(a.length != length for a in possible):
            lengths = sorted({a.length for a in possible})
            raise HistoryViolation(f"{_name(shard)}: length {length}, put were {lengths}")

    def saw_absent(self, began_ns: int, now_ns: int, shard: ShardId) -> None:
        """The store itself said that the shard is not there."""
        self.observations += 1
        state = self._state(shard)
        duty = self._duty_of(state, began_ns, now_ns)
        if duty is None:
            return
        loss = self._oracle.loss_of(shard, duty.began_ns)
        if loss is Loss.NONE or (loss is Loss.RECLAIMED and now_ns < duty.held_low_ns):
            raise HistoryViolation(
                f"{_name(shard)}: gone, though {_describe(duty)}; excuse: {loss.value}"
            )
        state.duty = None

    def owed(self, now_ns: int) -> list[ShardId]:
        """Shards that must be there now, unless the oracle excuses them; in order of first use."""
        return [
            shard
            for shard, state in self._shards.items()
            if self._duty_of(state, now_ns, now_ns) is not None
        ]

    def known(self) -> list[ShardId]:
        """Every shard that was ever named, in order of first use."""
        return list(self._shards)

    # ------------------------------------------------------------------------- rules

    def _state(self, shard: ShardId) -> _ShardState:
        state = self._shards.get(shard)
        if state is None:
            state = self._shards[shard] = _ShardState()
        return state

    def _duty_of(self, state: _ShardState, began_ns: int, now_ns: int) -> DutyState | None:
        duty = state.duty
        if duty is None or duty.since_ns > began_ns or now_ns >= duty.expires_low_ns:
            return None
        self.duties_checked += 1
        return duty

    def _why_impossible(
        self, state: _ShardState, attempt: AttemptState, began_ns: int, now_ns: int
    ) -> str | None:
        """Why nobody who asked between these moments may see this put; None: he may."""
        if attempt.outcome is Outcome.DISCARDED:
            return "which was answered as not stored"
        if attempt.began_ns > now_ns:
            return "which had not begun"
        if attempt.expires_high_ns < began_ns and not any(
            raise_ns <= attempt.expires_high_ns for raise_ns in state.raising
        ):
            late_ms = (began_ns - attempt.expires_high_ns) / NS_PER_MS
            return f"which had expired {late_ms:.0f} ms ago"
        if attempt.ended_ns is not None:
            for removal_began, removal_ended in state.removals:
                if attempt.ended_ns <= removal_began and removal_ended <= began_ns:
                    return "which had been removed"
        return None

    def _note_identity(
        self, state: _ShardState, possible: list[AttemptState], began_ns: int, now_ns: int
    ) -> None:
        """The bytes shown must be those that were owed, and are owed from now on."""
        seen = possible[0] if len(possible) == 1 else None
        duty = self._duty_of(state, began_ns, now_ns)
        if duty is None:
            fixed = seen is not None and (not seen.ttl_ms or seen.began_ns > self._jumped_ns)
            if (
                seen is not None
                and fixed
                and state.duty is None
                and (state.undisturbed_since(began_ns))
            ):
                low = _expiry_low(seen.began_ns, seen.ttl_ms)
                state.duty = DutyState(Level.MEMORY, began_ns, now_ns, seen, low, low)
            return
        if duty.identity is None:
            duty.identity = seen
            return
        if duty.identity in possible:
            return
        if self._oracle.loss_of(duty.identity.shard, duty.began_ns) is Loss.NONE:
            raise HistoryViolation(
                f"{_name(duty.identity.shard)}: shows put {possible[0].version}, "
                f"though {_describe(duty)}"
            )
        state.duty = None

    def _refuse_second_copy(self, state: _ShardState, attempt: AttemptState, now_ns: int) -> None:
        duty = self._duty_of(state, attempt.began_ns, now_ns)
        if duty is None or duty.identity is attempt:
            return
        if self._oracle.loss_of(attempt.shard, duty.began_ns) is Loss.NONE:
            raise HistoryViolation(
                f"{_name(attempt.shard)}: put {attempt.version} committed, though {_describe(duty)}"
            )

    def _raise_high(
        self, state: _ShardState, began_ns: int, now_ns: int | None, ttl_ms: int
    ) -> None:
        """Every put that may be alive lives at most until its own end or the raised one."""
        when_ns = NEVER_NS if now_ns is None else now_ns
        state.raises.append((when_ns, ttl_ms))
        for attempt in state.attempts:
            if attempt.expires_high_ns >= began_ns:
                _raise_attempt(attempt, when_ns, ttl_ms)


def _raise_attempt(attempt: AttemptState, when_ns: int, ttl_ms: int) -> None:
    if attempt.expires_high_ns == NEVER_NS or when_ns == NEVER_NS or not ttl_ms:
        attempt.expires_high_ns = NEVER_NS
        return
    raised = when_ns + ttl_ms * NS_PER_MS + TTL_SLACK_NS
    attempt.expires_high_ns = max(attempt.expires_high_ns, raised)
    attempt.ttl_ms_max = max(attempt.ttl_ms_max, ttl_ms)


def _expiry_low(began_ns: int, ttl_ms: int) -> int:
    """Earliest legal expiry of what was stored at or after `began_ns`."""
    return began_ns + ttl_ms * NS_PER_MS - TTL_SLACK_NS if ttl_ms else NEVER_NS


def _is_payload(attempt: AttemptState, data: npt.NDArray[np.uint8], fill: int | None) -> bool:
    length = attempt.length
    if length > len(data) or (fill is None and length != len(data)):
        return False
    if not np.array_equal(attempt.payload(), data[:length]):
        return False
    return bool((data[length:] == fill).all())


def _name(shard: ShardId) -> str:
    return f"{shard.namespace}/{shard.key.hex()}"


def _describe(duty: DutyState) -> str:
    whose = "somebody's put" if duty.identity is None else f"put {duty.identity.version}"
    return f"{whose} was acknowledged as {duty.level.name} at {duty.since_ns / 1e9:.6f} s"


def find_duplicates(keys: Iterable[bytes]) -> list[tuple[int, int]]:
    """(first position, later position) of every key that a batch names more than once."""
    first: dict[bytes, int] = {}
    pairs: list[tuple[int, int]] = []
    for position, key in enumerate(keys):
        if key in first:
            pairs.append((first[key], position))
        else:
            first[key] = position
    return pairs
