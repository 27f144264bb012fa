"""How batches are cut, how a staging is handed out, and which copies are joined."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxstore import limits
from ctxstore_client.breaker import BACKOFF_S_MAX, BREAKER_FAILURES, BreakerState
from ctxstore_client.ops.arguments import addresses, put_columns
from ctxstore_client.ops.batches import (
    RingState,
    cut_by_bytes,
    run_starts,
    slot_sizes,
    spanning,
    staged_sizes,
)
from ctxstore_client.ops.transfers import STREAM_BYTES_MIN, split_evenly

PAGE = limits.PAGE_BYTES


@given(
    st.lists(st.integers(1, 10_000), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(1, 30_000),
)
def test_pieces_keep_their_bounds_and_miss_nothing(
    sizes: list[int], keys_max: int, bytes_max: int
) -> None:
    indices = np.arange(len(sizes)) * 3
    column = np.array(sizes, np.int64)
    pieces = cut_by_bytes(indices, column, keys_max=keys_max, bytes_max=bytes_max)
    assert np.array_equal(np.concatenate(pieces), indices)
    for piece in pieces:
        total = int(column[piece // 3].sum())
        assert 1 <= len(piece) <= keys_max
        assert total <= bytes_max or len(piece) == 1


def test_no_piece_of_nothing() -> None:
    nothing = np.empty(0, np.int64)
    assert cut_by_bytes(nothing, nothing, keys_max=4, bytes_max=4) == []


def test_sizes_in_staging_and_slots() -> None:
    lengths = np.array([1, 64, 65, 4095, 4096, 4097], np.int64)
    assert staged_sizes(lengths).tolist() == [64, 64, 128, 4096, 4096, 8192]
    assert slot_sizes(lengths).tolist() == [PAGE] * 5 + [2 * PAGE]


@given(
    st.integers(1, 12),
    st.lists(st.one_of(st.integers(1, 6 * PAGE), st.none()), max_size=80),
)
def test_a_ring_never_lends_the_same_bytes_twice(pages: int, steps: list[int | None]) -> None:
    size = pages * PAGE
    ring = RingState(size)
    lent: deque[range] = deque()
    for step in steps:
        if step is None:
            if lent:
                ring.give_back_oldest()
                lent.popleft()
            continue
        offset = ring.take(step)
        rounded = -(-step // PAGE) * PAGE
        if offset is None:
            assert lent or rounded > size, "an empty ring refuses only what can never fit"
            continue
        taken = range(offset, offset + rounded)
        assert offset % PAGE == 0
        assert taken.stop <= size
        assert all(taken.stop <= other.start or other.stop <= taken.start for other in lent)
        lent.append(taken)


def test_copies_are_joined_only_where_both_sides_are_neighbours() -> None:
    block = np.zeros((4, 100), np.uint8)
    rows = list(block)
    begins = addresses(rows)
    lengths = np.full(4, 100, np.int64)
    offsets = np.array([1000, 1100, 1200, 5000], np.int64)
    assert run_starts(offsets, begins, lengths).tolist() == [0, 3]
    assert run_starts(offsets, begins[::-1].copy(), lengths).tolist() == [0, 1, 2, 3]
    short = np.array([100, 90, 100, 100], np.int64)
    assert run_starts(offsets, begins, short).tolist() == [0, 2, 3]
    whole = spanning(rows[0], int(begins[0]), 300, rows)
    whole[:] = 5
    assert block[:3].min() == 5
    assert block[3].max() == 0
    assert spanning(rows[0], int(begins[0]), 40, rows).size == 40


def test_split_evenly() -> None:
    indices = np.arange(32)
    big = np.full(32, STREAM_BYTES_MIN // 8, np.int64)
    assert [len(part) for part in split_evenly(indices, big, 2)] == [16, 16]
    assert [len(part) for part in split_evenly(indices, big // 4, 2)] == [32]
    one_large = np.array([STREAM_BYTES_MIN * 4, 1, 1], np.int64)
    parts = split_evenly(np.arange(3), one_large, 2)
    assert np.concatenate(parts).tolist() == [0, 1, 2]
    assert [len(part) for part in parts] == [1, 2]
    assert len(split_evenly(np.arange(1), one_large[:1], 2)) == 1


def test_options_of_a_put_as_columns() -> None:
    columns = put_columns(
        3, ttl_s=[None, 0.0001, 2], priority=5, durability="group", depth0=7, cost_s=[1, None, 0.5]
    )
    assert columns.ttl_ms.tolist() == [0, 1, 2000], "a short time to live is not none at all"
    assert columns.priority.tolist() == [5]
    assert columns.depth.tolist() == [7, 8, 9]
    assert columns.cost.tolist()[::2] == [1.0, 0.5]
    assert np.isnan(columns.cost[1])
    some = columns.rows(np.array([2, 0]))
    assert some.ttl_ms.tolist() == [2000, 0]
    assert some.depth.tolist() == [9, 7]
    assert some.priority.tolist() == [5]


@pytest.mark.parametrize("failures", [1, 2, 5, 40])
def test_backoff_grows_and_is_bounded(failures: int) -> None:
    breaker = BreakerState(lambda: 0.5)
    for _ in range(failures):
        breaker.fail(100.0)
    assert 100.0 < breaker.closed_at_s <= 100.0 + BACKOFF_S_MAX
    breaker.succeed()
    assert (breaker.failures, breaker.closed_at_s) == (0, 0.0)


def test_single_time_outs_do_not_open_the_circuit() -> None:
    breaker = BreakerState(lambda: 0.5)
    for _ in range(BREAKER_FAILURES - 1):
        breaker.time_out(100.0)
    assert breaker.closed_at_s == 0.0
    breaker.time_out(100.0)
    assert breaker.closed_at_s > 100.0
