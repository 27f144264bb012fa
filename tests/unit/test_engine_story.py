"""Stories of one engine: what a client sees of puts, gets, durability and time."""

from __future__ import annotations

import pytest

from ctxstore.limits import MIB
from ctxstore.wire import messages as wire
from ctxstore.wire.messages import Durability, Lookup, PutResult
from ctxstore_daemon.engine import events
from tests.unit.engine_shell import MS, FakeShell, S, key

HIT, MISS = Lookup.HIT, Lookup.MISS
COMMITTED, EXISTS = PutResult.COMMITTED, PutResult.EXISTS


@pytest.fixture
def shell():
    shell = FakeShell()
    shell.connect()
    yield shell
    shell.let_go()
    shell.audit()


def test_what_was_put_is_got(shell):
    assert shell.put([1, 2, 3]) == [COMMITTED] * 3
    assert shell.get([1, 9, 3]) == [HIT, MISS, HIT]
    assert shell.exists([1, 2, 3, 4]) == [1, 1, 1, 0]


def test_inline_and_zero_bytes(shell):
    assert shell.put([1, 2, 3], lengths=[0, 700, 5000]) == [COMMITTED] * 3
    assert shell.get([1, 2, 3]) == [HIT] * 3
    assert shell.machine.core.index.inline_bytes == 700


def test_duplicates_in_a_batch(shell):
    assert shell.put([5, 5, 6, 5]) == [COMMITTED, EXISTS, COMMITTED, EXISTS]
    assert shell.put([5, 7]) == [EXISTS, COMMITTED]


def test_memory_put_is_written_behind_within_the_interval(shell):
    shell.put([1])
    assert not shell.disk
    shell.advance(S)
    assert shell.machine.stats().dirty_shards == 0
    assert sum(len(b.records) for s in shell.disk.values() for _, b in s.groups) == 1


def test_group_put_is_visible_only_after_its_sync(shell):
    shell.hold_back = (events.WriteGroup,)
    assert shell.put([1], durability=Durability.GROUP) is None
    assert shell.exists([1]) == [0]
    shell.let_go()
    assert shell.exists([1]) == [1]
    assert shell.replies[1, 1][0].result_column.tolist() == [COMMITTED]


def test_group_put_over_a_copy_in_memory_waits_for_that_copy(shell):
    shell.put([1])
    shell.hold_back = (events.WriteGroup,)
    assert shell.put([1, 2], durability=Durability.GROUP) is None
    shell.let_go()
    assert shell.replies[1, 2][0].result_column.tolist() == [EXISTS, COMMITTED]
    assert shell.put([1], durability=Durability.GROUP) == [EXISTS]


def test_restart_keeps_what_was_synced(shell):
    shell.put([1, 2, 3], lengths=[100, 5000, 1 * MIB], durability=Durability.GROUP)
    after = shell.restart()
    after.connect()
    assert after.get([1, 2, 3]) == [HIT] * 3
    assert after.reads == 1
    assert after.machine.core.seq > shell.machine.core.seq
    after.audit()


def test_second_writer_waits_and_then_finds_it_there(shell):
    shell.connect(2)
    shell.hold_back = (events.CopyIn,)
    assert shell.put([1]) is None
    assert shell.put([1, 2], conn=2) is None
    shell.let_go()
    assert shell.replies[2, 2][0].result_column.tolist() == [EXISTS, COMMITTED]


def test_second_writer_sends_its_own_bytes_when_the_first_fails(shell):
    shell.connect(2)
    shell.hold_back = (events.WriteGroup,)
    assert shell.put([1], durability=Durability.GROUP) is None
    assert shell.put([1], conn=2) is None
    shell.group_fault = "device"
    shell.let_go()
    assert shell.replies[1, 1][0].result_column.tolist() == [PutResult.REFUSED]
    assert shell.replies[2, 2][0].result_column.tolist() == [COMMITTED]


def test_waiting_for_another_writer_ends_at_the_deadline(shell):
    shell.connect(2)
    shell.hold_back = (events.CopyIn,)
    shell.put([1])
    assert shell.put([1], conn=2, timeout_s=0.1) is None
    shell.advance(100 * MS)
    assert shell.replies[2, 2][0].result_column.tolist() == [PutResult.TIMEOUT]


def test_too_large_is_refused(shell):
    message = shell.make_put([1, 2], lengths=[9 * MIB, 4096])
    replies = shell.request(message)
    assert replies[0].result_column.tolist() == [PutResult.REFUSED, COMMITTED]


def test_match_counts_leading_keys(shell):
    shell.put([0, 1, 2, 4])
    for numbers, count in (([0, 1, 2], 3), ([0, 1, 2, 3, 4], 3), ([9, 1], 0)):
        message = wire.Match(shell.rid(), 0, b"".join(map(key, numbers)))
        assert shell.request(message)[0].count == count
