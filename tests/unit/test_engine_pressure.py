"""Stories of an engine short of room: eviction, waiting, leases, quotas, caps."""

from __future__ import annotations

import numpy as np
import pytest

from ctxstore.limits import MIB
from ctxstore.wire import messages as wire
from ctxstore.wire.messages import Durability, Lookup, PutResult
from ctxstore_daemon.engine import events
from ctxstore_daemon.engine.settings import NamespaceSettings
from tests.unit.engine_shell import MS, NS, OTHER, FakeShell, S, key

HIT, MISS = Lookup.HIT, Lookup.MISS
COMMITTED, EXISTS = PutResult.COMMITTED, PutResult.EXISTS


@pytest.fixture
def shell():
    # 8 chunks of 2 MiB for slots, behind one for the generations.
    shell = FakeShell(arena_bytes=18 * MIB, lease_fraction=0.5)
    shell.connect()
    yield shell
    shell.let_go()
    shell.audit()


def test_more_than_memory_goes_to_nvme_and_comes_back(shell):
    for start in range(0, 24, 2):
        assert shell.put([start, start + 1], MIB) == [COMMITTED] * 2
    assert shell.exists(range(24)) == [1] * 24
    for n in range(24):
        assert shell.read([n]) == [HIT]
    stats = shell.machine.stats()
    assert stats.counters["demoted"] > 0
    assert stats.counters["promoted"] > 0
    assert stats.arena_used_bytes <= 16 * MIB


def test_dirty_shards_are_not_evicted(shell):
    shell.hold_back = (events.WriteGroup,)
    assert shell.put(list(range(8)), MIB) == [COMMITTED] * 8
    assert shell.put([100, 101], MIB, timeout_s=0.5) is None
    shell.advance(S)
    assert shell.replies[1, 2][0].result_column.tolist() == [PutResult.OVERLOADED] * 2
    assert shell.exists(range(8)) == [1] * 8


def test_a_put_that_waits_for_room_goes_on_when_dirty_data_is_written(shell):
    shell.hold_back = (events.WriteGroup,)
    shell.put(list(range(8)), MIB)
    assert shell.put([100, 101], MIB) is None
    shell.let_go()
    assert shell.replies[1, 2][0].result_column.tolist() == [COMMITTED] * 2


def test_what_is_being_copied_counts_as_write_behind(shell):
    shell.connect(2)
    shell.hold_back = (events.CopyIn, events.WriteGroup)
    assert shell.put(list(range(6)), MIB) is None
    assert shell.put(list(range(10, 16)), MIB, conn=2) is None
    copying = sum(len(copy.items) for copy in shell.machine.puts.copies.values())
    assert copying == 8, "half of the arena may wait for the disk"
    assert shell.machine.writeback.claimed_bytes == 8 * MIB
    shell.let_go()
    assert shell.machine.writeback.claimed_bytes == 0
    assert shell.replies[1, 1][0].result_column.tolist() == [COMMITTED] * 6
    assert shell.replies[2, 2][0].result_column.tolist() == [COMMITTED] * 6


def test_too_many_waiting_puts_are_overloaded():
    shell = FakeShell(arena_bytes=18 * MIB, waiting_puts_max=2)
    shell.connect()
    shell.hold_back = (events.WriteGroup,)
    shell.put(list(range(8)), MIB)
    assert shell.put([100], MIB) is None
    assert shell.put([101], MIB) is None
    assert shell.put([102], MIB) == [PutResult.OVERLOADED]


def test_leased_slots_are_not_reused_before_the_release():
    shell = FakeShell(arena_bytes=18 * MIB, lease_fraction=1.0, dirty_fraction=1.0)
    shell.connect()
    for n in range(16):
        shell.put([n], MIB, durability=Durability.GROUP)
    assert shell.get(list(range(16))) == [HIT] * 16
    kept = shell.last_get
    assert shell.put([50], MIB, timeout_s=0.2) is None
    shell.advance(S)
    assert shell.replies[1, shell._rid][0].result_column.tolist() == [PutResult.OVERLOADED]
    assert shell.check_get(kept, list(range(16))) == [HIT] * 16
    assert shell.put([51], MIB) is None
    shell.release(reply=kept)
    assert shell.replies[1, shell._rid][0].result_column.tolist() == [COMMITTED]
    shell.audit()


def test_lease_share_of_a_connection(shell):
    for n in range(10):
        shell.put([n], MIB)
    statuses = shell.get(list(range(10)))
    assert statuses == [HIT] * 8 + [Lookup.OVERLOADED] * 2
    first = shell.last_get
    assert shell.get([0]) == [Lookup.OVERLOADED]
    shell.release(reply=first)
    assert shell.get([0]) == [HIT]


def test_leases_end_with_the_connection(shell):
    shell.put([1], MIB)
    shell.get([1])
    shell.disconnect()
    assert not shell.machine.leases.leases
    assert not shell.machine.core.slabs.pins.any()


def test_a_lease_kept_too_long_closes_the_connection(shell):
    shell.put([1], MIB)
    shell.get([1])
    shell.advance(59 * S)
    assert not shell.closed
    shell.advance(2 * S)
    assert 1 in shell.closed
    assert shell.machine.core.slabs.pins.any(), "a mapped reader may still look"
    shell.disconnect()
    assert not shell.machine.core.slabs.pins.any()


def test_generation_moves_before_a_slot_is_reused(shell):
    shell.put([1], MIB, durability=Durability.GROUP)
    shell.read([1])
    row = shell.last_get.rows[0]
    for n in range(2, 40):
        shell.put([n], MIB)
    page = int(row["offset"]) // 4096
    assert shell.machine.core.slabs.generations[page] != row["generation"]


def test_low_priority_goes_first(shell):
    shell.put([1, 2], MIB, priority=[0, 5], durability=Durability.GROUP)
    for n in range(3, 40):
        shell.put([n], MIB, priority=1)
    in_memory = [bool(shell.machine.core.index.slot[row]) for row in (1, 2)]
    assert in_memory == [False, True]


def test_children_go_before_parents():
    shell = FakeShell(arena_bytes=18 * MIB, disk_bytes=0)
    shell.connect()
    shell.put(list(range(16)), MIB, depth=list(range(16)))
    shell.put([50, 51, 52], MIB, depth=0)
    assert shell.exists(range(16)) == [1] * 13 + [0] * 3


def test_children_of_a_long_prefix_go_before_its_parents():
    shell = FakeShell(arena_bytes=18 * MIB, disk_bytes=0)
    shell.connect()
    shell.put(list(range(512)), 32 * 1024, depth=list(range(512)))
    shell.put(list(range(1000, 1100)), 32 * 1024, depth=0)
    assert shell.exists(range(512)) == [1] * 412 + [0] * 100


def test_inline_shards_without_room_in_the_reply_lease_nothing():
    shell = FakeShell(inline_reply_bytes_max=1500)
    shell.connect()
    shell.put([1, 2, 3], lengths=[1000, 1000, 5000])
    assert shell.get([1, 2, 3]) == [HIT, Lookup.OVERLOADED, HIT]
    assert shell.machine.stats().leased_bytes == 8192


def test_another_slot_class_takes_over_the_memory(shell):
    for n in range(16):
        shell.put([n], MIB)
    for n in range(100, 160):
        assert shell.put([n], 256 * 1024) == [COMMITTED]
    for n in range(200, 206):
        assert shell.put([n], 5 * MIB) == [COMMITTED]
    assert shell.read([205]) == [HIT]
    assert shell.machine.stats().counters["slabs_cleared"] > 0


def test_puts_use_only_what_is_populated():
    shell = FakeShell(grow=False)
    shell.connect()
    assert shell.put([1], timeout_s=0.1) is None
    shell.event(events.ArenaGrew(4 * MIB))
    assert shell.replies[1, 1][0].result_column.tolist() == [COMMITTED]


def test_quota_refuses_and_gives_back():
    small = NamespaceSettings("small", 77, quota_bytes=10_000)
    shell = FakeShell(namespaces=(NS, small))
    shell.connect(1, ns=1)
    assert shell.put([1, 2], 6000) == [COMMITTED, PutResult.REFUSED]
    message = wire.Remove(shell.rid(), 0, key(1))
    assert shell.request(message)[0].mask_column.tolist() == [1]
    assert shell.put([2], 6000) == [COMMITTED]
    shell.audit()


def test_namespaces_do_not_see_each_other(shell):
    shell.connect(2, ns=1)
    shell.put([1])
    assert shell.exists([1], conn=2) == [0]
    assert shell.put([1], conn=2) == [COMMITTED]


def test_index_cap_forgets_what_is_only_in_memory():
    shell = FakeShell(entries_max=20, disk_bytes=0)
    shell.connect()
    for n in range(60):
        assert shell.put([n], 5000 if n % 2 else 100) == [COMMITTED]
    assert shell.machine.core.index.count == 20
    shell.audit()


def test_index_cap_reclaims_when_everything_is_on_disk():
    shell = FakeShell(entries_max=200, segment_bytes=MIB, disk_bytes=16 * MIB, arena_bytes=6 * MIB)
    shell.connect()
    for n in range(300):
        assert shell.put([n], 64 * 1024) is not None
        shell.advance(MS)
    assert shell.machine.core.index.count <= 200
    assert shell.exists([299]) == [1]
    assert shell.machine.stats().counters["reclaimed_segments"] > 0
    shell.audit()


def test_get_waits_for_room_and_is_overloaded_without(shell):
    shell.put([1], 2 * MIB, durability=Durability.GROUP)
    for n in [*range(30, 60), *range(10, 26)]:
        shell.put([n], MIB)
    assert not shell.machine.core.index.slot[1]
    shell.connect(2)
    assert shell.get(list(range(18, 26))) == [HIT] * 8
    shell.get(list(range(10, 18)), conn=2)
    kept = shell.last_get
    shell.connect(3)
    assert shell.get([1], conn=3, timeout_s=0.3) is None
    shell.advance(S)
    reply = shell.replies[3, shell._rid][0]
    assert reply.rows["status"].tolist() == [Lookup.OVERLOADED]
    assert shell.get([1], conn=3) is None
    shell.release(conn=2, reply=kept)
    reply = shell.replies[3, shell._rid][0]
    assert shell.check_get(reply, [1]) == [HIT]


def _full_of_leases(shell, *, small=False):
    """Shards 1 (2 MiB) and 2, 3 (8 KiB) are on nvme only, and what is in memory may not go; with
    `small`, there are free slots for 8 KiB.
    """
    shell.put([1], 2 * MIB, durability=Durability.GROUP)
    shell.put([2, 3], 8192, durability=Durability.GROUP)
    for row in (1, 2, 3):
        shell.machine.core.evict(row)
    if small:
        shell.put([4], 8192)
        assert shell.get([4]) == [HIT]
    numbers = range(10, 24 if small else 26)
    for n in numbers:
        assert shell.put([n], MIB, durability=Durability.GROUP) == [COMMITTED]
    shell.connect(2)
    shell.connect(3)
    half = len(numbers) // 2
    kept = []
    for conn, part in ((1, numbers[:half]), (2, numbers[half:])):
        assert shell.get(list(part), conn=conn) == [HIT] * half
        kept.append(shell.last_get)
    return kept[0]


def test_a_get_goes_before_a_prefetch_that_waits_for_room(shell):
    kept = _full_of_leases(shell)
    prefetch = wire.Prefetch(shell.rid(), 0, b"".join(map(key, [1, 2])), 5_000_000)
    assert shell.request(prefetch)[0].count == 2
    assert shell.get([3], conn=3, timeout_s=5.0) is None
    waiting = shell._rid
    shell.hold_back = (events.ReadExtents,)
    shell.release(1, reply=kept)
    reads = [i.lengths.tolist() for i in shell.pending if isinstance(i, events.ReadExtents)]
    assert reads[0][0] == 8192, "the get is served first"
    shell.let_go()
    assert shell.check_get(shell.replies[3, waiting][0], [3]) == [HIT]
    assert shell.machine.core.index.slot[1], "the prefetch is served afterwards"
    assert not shell.machine.loads.waiting


def test_a_prefetch_goes_on_when_the_get_before_it_gives_up(shell):
    _full_of_leases(shell, small=True)
    assert shell.get([1], conn=3, timeout_s=0.5) is None
    prefetch = wire.Prefetch(shell.rid(), 0, key(2), 5_000_000)
    assert shell.request(prefetch)[0].count == 1
    assert not shell.machine.core.index.slot[2], "a get waits for room"
    shell.advance(S)
    assert shell.machine.core.index.slot[2]


def test_one_slot_class_without_room_does_not_stop_another(shell):
    kept = _full_of_leases(shell, small=True)
    assert shell.get([1], conn=3, timeout_s=5.0) is None
    waiting = shell._rid
    assert shell.get([2, 3], conn=3) == [HIT] * 2
    shell.release(1, reply=kept)
    assert shell.check_get(shell.replies[3, waiting][0], [1]) == [HIT]


def test_inline_payloads_have_a_cap_and_leave_by_priority():
    shell = FakeShell(inline_bytes_max=100_000)
    shell.connect()
    group = Durability.GROUP
    assert shell.put(list(range(50)), 1000, priority=5, durability=group) == [COMMITTED] * 50
    for n in range(100, 400, 10):
        assert shell.put(list(range(n, n + 10)), 1000, durability=group) == [COMMITTED] * 10
        assert shell.machine.stats().inline_bytes <= 100_000
    assert shell.exists(range(50)) == [1] * 50
    assert 40 <= sum(shell.exists(range(100, 400))) <= 50
    assert shell.put(list(range(600, 900)), 1000, timeout_s=10.0) == [COMMITTED] * 300
    assert shell.machine.stats().inline_bytes <= 100_000
    shell.advance(S)
    assert shell.put([500], 8192) == [COMMITTED], "the arena is another room"
    shell.audit()
    after = shell.restart(inline_bytes_max=20_000)
    after.connect()
    assert 15_000 < after.machine.stats().inline_bytes <= 20_000
    after.audit()


def test_inline_payloads_that_are_not_on_disk_make_others_wait():
    shell = FakeShell(inline_bytes_max=100_000, arena_bytes=18 * MIB)
    shell.connect()
    shell.hold_back = (events.WriteGroup,)
    assert shell.put(list(range(100)), 1000) == [COMMITTED] * 100
    assert shell.machine.stats().dirty_bytes == 100_000
    assert shell.put([200], 1000, timeout_s=0.5) is None
    shell.advance(S)
    assert shell.replies[1, shell._rid][0].result_column.tolist() == [PutResult.OVERLOADED]
    assert shell.put([201], 1000) is None
    shell.let_go()
    assert shell.replies[1, shell._rid][0].result_column.tolist() == [COMMITTED]
    shell.audit()


def test_inline_payload_of_one_reply_is_bounded():
    shell = FakeShell(inline_reply_bytes_max=2500)
    shell.connect()
    shell.put([1, 2, 3], 1000)
    assert shell.get([1, 2, 3]) == [HIT, HIT, Lookup.OVERLOADED]


def test_ttl_ends_a_shard_and_exists_raises_it(shell):
    shell.put([1, 2, 3], ttl_ms=[1000, 1000, 0], durability=Durability.GROUP)
    assert shell.put([2], ttl_ms=5000) == [EXISTS]
    assert shell.put([3], ttl_ms=10) == [EXISTS]
    shell.advance(2 * S)
    assert shell.exists([1, 2, 3]) == [0, 1, 1]
    after = shell.restart()
    after.connect()
    assert after.exists([1, 2, 3]) == [0, 1, 1]
    after.advance(6 * S)
    assert after.exists([2, 3]) == [0, 1]
    assert after.machine.core.index.count == 1


def test_expired_key_can_be_put_again(shell):
    shell.put([1], ttl_ms=1000)
    shell.now_ns += 2 * S
    assert shell.get([1]) == [MISS]
    assert shell.put([1]) == [COMMITTED]


def test_restart_keeps_accounting():
    shell = FakeShell()
    shell.connect(2, ns=1)
    shell.put([1, 2], 6000, conn=2)
    after = shell.restart(namespaces=(NS, OTHER))
    assert after.machine.core.ns_bytes == [0, 12_000]


def test_cut_of_clock_jumps_at_restart(shell):
    shell.put([1], ttl_ms=60_000, durability=Durability.GROUP)
    shell.wall_ns -= 3600 * S
    after = shell.restart()
    after.connect()
    message = wire.Stat(after.rid(), 0, key(1))
    assert after.request(message)[0].rows["ttl_ms"][0] == 60_000


def test_stat(shell):
    shell.put([1, 2], lengths=[100, 5000], ttl_ms=[0, 9000])
    rows = shell.request(wire.Stat(shell.rid(), 0, b"".join(map(key, (1, 2, 3)))))[0].rows
    assert rows["length"].tolist() == [100, 5000, 0]
    assert rows["tier"].tolist() == [wire.StatTier.INLINE, wire.StatTier.MEMORY, 0]
    assert rows["ttl_ms"].tolist() == [0, 9000, 0]
    assert np.all(rows["flags"] == 0)
