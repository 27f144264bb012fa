"""The history checker on short histories written by hand: what it accepts, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from ctxstore.testing.checkers import (
    AttemptState,
    HistoryChecker,
    HistoryViolation,
    Level,
    Loss,
    ShardId,
    find_duplicates,
    payload_of,
)

SHARD = ShardId("default", b"k" * 16)
S = 1_000_000_000


class Excuse:
    """An oracle with one answer."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def loss_of(self, shard: ShardId, since_ns: int) -> Loss:
        del shard, since_ns
        return self.loss


def begun(
    checker: HistoryChecker,
    now: int,
    *,
    version: int = 1,
    ttl_ms: int = 0,
    level: Level = Level.GROUP,
) -> AttemptState:
    return checker.put_begins(now, SHARD, version=version, length=100, ttl_ms=ttl_ms, level=level)


def stored(
    checker: HistoryChecker,
    at_s: int = 1,
    *,
    version: int = 1,
    ttl_ms: int = 0,
    level: Level = Level.GROUP,
) -> AttemptState:
    attempt = begun(checker, at_s * S, version=version, ttl_ms=ttl_ms, level=level)
    checker.put_stored(at_s * S + 1, attempt)
    return attempt


def removed(checker: HistoryChecker, at_s: int, *, acknowledged: bool = True) -> None:
    checker.remove_begins(at_s * S, SHARD)
    checker.remove_ends(at_s * S, at_s * S + 1, SHARD, acknowledged=acknowledged)


def test_payloads_differ_by_everything_that_names_them() -> None:
    other = ShardId("second", SHARD.key)
    same = payload_of(SHARD, 1, 100)

    assert np.array_equal(same, payload_of(SHARD, 1, 100))
    for different in (
        payload_of(other, 1, 100),
        payload_of(SHARD, 2, 100),
        payload_of(SHARD, 1, 101),
    ):
        assert not np.array_equal(same, different[:100])


def test_bytes_that_were_put_are_fine() -> None:
    checker = HistoryChecker()
    attempt = stored(checker)

    checker.saw_bytes(2 * S, 2 * S + 1, SHARD, attempt.payload())
    roomy = np.full(300, 9, np.uint8)
    roomy[:100] = attempt.payload()
    checker.saw_bytes(2 * S, 2 * S + 1, SHARD, roomy, fill=9)

    roomy[200] = 0
    with pytest.raises(HistoryViolation, match="nobody ever put"):
        checker.saw_bytes(2 * S, 2 * S + 1, SHARD, roomy, fill=9)


def test_one_wrong_bit_is_seen() -> None:
    checker = HistoryChecker()
    data = stored(checker).payload().copy()
    data[50] ^= 1

    with pytest.raises(HistoryViolation, match="nobody ever put"):
        checker.saw_bytes(2 * S, 2 * S + 1, SHARD, data)


def test_a_put_that_was_called_overloaded_must_not_show() -> None:
    checker = HistoryChecker()
    attempt = begun(checker, S)
    checker.put_discarded(S + 1, attempt)

    with pytest.raises(HistoryViolation, match="not stored"):
        checker.saw_bytes(2 * S, 2 * S + 1, SHARD, attempt.payload())


def test_a_put_of_unknown_outcome_may_show_or_not() -> None:
    checker = HistoryChecker()
    attempt = begun(checker, S)
    checker.put_unknown(S + 1, attempt)

    checker.saw_absent(2 * S, 2 * S + 1, SHARD)
    checker.saw_bytes(3 * S, 3 * S + 1, SHARD, attempt.payload())


def test_an_acknowledged_shard_is_owed() -> None:
    checker = HistoryChecker()
    stored(checker)

    assert checker.owed(2 * S) == [SHARD]
    with pytest.raises(HistoryViolation, match="gone, though"):
        checker.saw_absent(2 * S, 2 * S + 1, SHARD)


def test_nothing_is_owed_to_who_asked_before_the_acknowledgement() -> None:
    checker = HistoryChecker()
    stored(checker)

    checker.saw_absent(S - 5, 2 * S, SHARD)


@pytest.mark.parametrize("loss", [Loss.RECLAIMED, Loss.FAULT])
def test_a_loss_with_an_excuse_is_fine(loss: Loss) -> None:
    checker = HistoryChecker(Excuse(loss))
    stored(checker)

    checker.saw_absent(2 * S, 2 * S + 1, SHARD)


def test_pressure_is_no_excuse_for_a_held_shard_until_the_hold_ends() -> None:
    oracle = Excuse(Loss.RECLAIMED)
    checker = HistoryChecker(oracle)
    stored(checker)
    checker.held(2 * S, SHARD, ttl_ms=5000)

    with pytest.raises(HistoryViolation):
        checker.saw_absent(3 * S, 3 * S + 1, SHARD)
    checker.saw_absent(8 * S, 8 * S + 1, SHARD)


def test_a_crash_takes_what_was_only_in_memory() -> None:
    checker = HistoryChecker()
    stored(checker, level=Level.MEMORY)
    checker.node_died(2 * S, clean=False)

    checker.saw_absent(3 * S, 3 * S + 1, SHARD)


@pytest.mark.parametrize("how", ["group", "flush", "clean"])
def test_a_crash_takes_nothing_durable(how: str) -> None:
    checker = HistoryChecker()
    stored(checker, level=Level.GROUP if how == "group" else Level.MEMORY)
    if how == "flush":
        checker.flushed(2 * S)
    checker.node_died(3 * S, clean=how == "clean")

    with pytest.raises(HistoryViolation):
        checker.saw_absent(4 * S, 4 * S + 1, SHARD)


def test_removed_stays_removed() -> None:
    checker = HistoryChecker()
    attempt = stored(checker)
    removed(checker, 2)

    checker.saw_absent(3 * S, 3 * S + 1, SHARD)
    with pytest.raises(HistoryViolation, match="removed"):
        checker.saw_bytes(4 * S, 4 * S + 1, SHARD, attempt.payload())
    with pytest.raises(HistoryViolation, match="removed"):
        checker.saw_present(4 * S, 4 * S + 1, SHARD)


def test_a_put_after_the_removal_is_another_matter() -> None:
    checker = HistoryChecker()
    stored(checker)
    removed(checker, 2)
    second = stored(checker, 3, version=2)

    checker.saw_bytes(4 * S, 4 * S + 1, SHARD, second.payload())


def test_an_unacknowledged_removal_may_have_happened_or_not() -> None:
    checker = HistoryChecker()
    attempt = stored(checker)
    removed(checker, 2, acknowledged=False)

    checker.saw_bytes(3 * S, 3 * S + 1, SHARD, attempt.payload())
    checker.saw_absent(4 * S, 4 * S + 1, SHARD)


def test_time_to_live_is_kept_on_both_sides() -> None:
    checker = HistoryChecker()
    attempt = stored(checker, ttl_ms=5000)

    with pytest.raises(HistoryViolation, match="gone"):
        checker.saw_absent(4 * S, 4 * S + 1, SHARD)
    checker.saw_absent(6 * S + S // 2, 6 * S + S // 2 + 1, SHARD)
    with pytest.raises(HistoryViolation, match="expired"):
        checker.saw_bytes(7 * S, 7 * S + 1, SHARD, attempt.payload())


def test_a_raised_time_to_live_counts() -> None:
    checker = HistoryChecker()
    attempt = stored(checker, ttl_ms=5000)
    checker.touch_begins(2 * S, SHARD)
    checker.touched(2 * S, 2 * S + 1, SHARD, ttl_ms=60_000)

    checker.saw_bytes(50 * S, 50 * S + 1, SHARD, attempt.payload())
    with pytest.raises(HistoryViolation, match="expired"):
        checker.saw_bytes(63 * S, 63 * S + 1, SHARD, attempt.payload())


def test_a_jump_of_the_clock_may_give_a_whole_time_to_live_again_after_a_restart() -> None:
    checker = HistoryChecker()
    attempt = stored(checker, ttl_ms=5000)
    checker.node_died(4 * S, clean=False)
    checker.node_started(5 * S, clock_jumped=True)

    checker.saw_bytes(9 * S, 9 * S + 1, SHARD, attempt.payload())
    checker.saw_absent(9 * S, 9 * S + 1, SHARD)
    with pytest.raises(HistoryViolation, match="expired"):
        checker.saw_bytes(11 * S, 11 * S + 1, SHARD, attempt.payload())


def test_the_first_copy_wins() -> None:
    checker = HistoryChecker()
    stored(checker)
    second = begun(checker, 2 * S, version=2)

    with pytest.raises(HistoryViolation, match="committed, though"):
        checker.put_stored(2 * S + 1, second)


def test_other_bytes_than_those_that_are_owed() -> None:
    checker = HistoryChecker()
    stored(checker)
    second = begun(checker, 2 * S, version=2)
    checker.put_unknown(2 * S + 1, second)

    with pytest.raises(HistoryViolation, match="shows put 2"):
        checker.saw_bytes(3 * S, 3 * S + 1, SHARD, second.payload())


def test_lengths_are_compared() -> None:
    checker = HistoryChecker()
    stored(checker)

    checker.saw_present(2 * S, 2 * S + 1, SHARD, length=100)
    with pytest.raises(HistoryViolation, match="length 99"):
        checker.saw_present(2 * S, 2 * S + 1, SHARD, length=99)


def test_duplicates_are_found_in_order() -> None:
    assert find_duplicates([b"a", b"b", b"a", b"a"]) == [(0, 2), (0, 3)]
