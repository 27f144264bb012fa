"""Eviction policies on their own: who goes first, and that nothing is lost or named twice."""

from __future__ import annotations

import numpy as np
import pytest

from ctxstore_daemon.engine.eviction import LEVELS, Lru, S3Fifo, level_of
from ctxstore_daemon.engine.index import IndexState
from tests.unit.engine_shell import key

CLASS = 8


def make(policy, count, **columns):
    index = IndexState(namespaces=1, entries_max=100_000)
    made = policy(index)
    rows = [index.allocate(0, key(n)) for n in range(count)]
    for name, values in columns.items():
        getattr(index, name)[1 : count + 1] = values
    for row in rows:
        made.insert(row, CLASS)
    return index, made, rows


def anything(row):
    return True


@pytest.mark.parametrize("policy", [S3Fifo, Lru])
def test_every_row_goes_once(policy):
    _, made, rows = make(policy, 500)
    gone: list[int] = []
    while found := made.victims(CLASS, 7, anything):
        gone += found
    assert sorted(gone) == rows


@pytest.mark.parametrize("policy", [S3Fifo, Lru])
def test_only_what_may_go_goes(policy):
    _, made, _ = make(policy, 100)
    found = made.victims(CLASS, 10, lambda row: row % 10 == 0)
    assert sorted(found) == list(range(10, 101, 10))
    assert len(made.victims(CLASS, 100, anything)) == 90


@pytest.mark.parametrize("policy", [S3Fifo, Lru])
def test_lower_priority_goes_first(policy):
    index, made, rows = make(policy, 100, priority=np.arange(100) % 3 - 1)
    gone = made.victims(CLASS, 100, anything)
    assert index.priority[gone].tolist() == sorted(index.priority[rows].tolist())


@pytest.mark.parametrize("policy", [S3Fifo, Lru])
def test_every_priority_there_is_costs_no_more_queues(policy):
    priorities = np.arange(-(2**15), 2**15)
    np.random.default_rng(1).shuffle(priorities)
    index, made, rows = make(policy, len(priorities), priority=priorities)
    per_level = {S3Fifo: 2, Lru: 1}[policy]
    assert len(made.queues) == 1 + LEVELS * per_level
    made.insert(index.allocate(0, key(99_999)), CLASS + 1)
    assert len(made.queues) == 1 + 2 * LEVELS * per_level, "one set for each class"
    gone: list[int] = []
    while found := made.victims(CLASS, 1000, anything):
        gone += found
    assert sorted(gone) == rows
    levels = [level_of(priority) for priority in index.priority[gone].tolist()]
    assert levels == sorted(levels)


def test_levels_follow_the_order_of_priorities():
    levels = [level_of(priority) for priority in range(-(2**15), 2**15)]
    assert levels == sorted(levels)
    assert set(levels) == set(range(LEVELS))
    assert len({level_of(priority) for priority in (-4, -2, -1, 0, 1, 2, 4)}) == 7


@pytest.mark.parametrize("policy", [S3Fifo, Lru])
def test_children_go_before_parents_of_the_same_age(policy):
    index, made, _ = make(policy, 16, depth=np.arange(16))
    assert index.depth[made.victims(CLASS, 16, anything)].tolist() == list(range(15, -1, -1))


@pytest.mark.parametrize("policy", [S3Fifo, Lru])
def test_discarded_rows_are_not_named(policy):
    _, made, rows = make(policy, 50)
    for row in rows[::2]:
        made.discard(row)
        made.discard(row)
    assert sorted(made.victims(CLASS, 50, anything)) == rows[1::2]
    assert not any(made.contains(row) for row in rows)


def test_lru_keeps_what_was_read_last():
    _, made, rows = make(Lru, 100)
    made.touch(np.array(rows[:20], np.int64))
    assert not set(made.victims(CLASS, 60, anything)) & set(rows[:20])


def test_s3_fifo_keeps_what_is_read_through_a_scan():
    index, made, rows = make(S3Fifo, 100)
    hot = np.array(rows[:30], np.int64)
    made.touch(hot)
    for n in range(1000, 3000):
        if n % 10 == 0:
            made.touch(hot)
        made.victims(CLASS, 1, anything)
        made.insert(index.allocate(0, key(n)), CLASS)
    kept = sum(made.contains(row) for row in rows[:30])
    assert kept == 30


def test_s3_fifo_remembers_what_it_evicted_from_probation():
    index, made, _ = make(S3Fifo, 100)
    (first,) = made.victims(CLASS, 1, anything)
    name = index.key(first)
    index.release(first)
    again = index.allocate(0, name)
    made.insert(again, CLASS)
    gone: list[int] = []
    while len(gone) < 90:
        gone += made.victims(CLASS, 1, anything)
    assert again not in gone, "a ghost goes to the main queue"


def test_rows_beyond_the_first_arrays():
    index, made, _ = make(S3Fifo, 10_000)
    made.touch(np.array([10_000], np.int64))
    assert index.capacity > 10_000
    assert len(made.victims(CLASS, 10_000, anything)) >= 9_000
