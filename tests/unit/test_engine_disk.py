"""Stories of the nvme tier: faults, full disks, reclaim, removal, holds, doubt, stop."""

from __future__ import annotations

import numpy as np
import pytest

from ctxstore.errors import DeadlineExceeded, Overloaded, StorageError
from ctxstore.limits import MIB
from ctxstore.wire import messages as wire
from ctxstore.wire.messages import Durability, Lookup, PutResult
from ctxstore_daemon.engine import events
from ctxstore_daemon.engine.records import MetaKind
from tests.unit.engine_shell import MS, FakeShell, S, key

HIT, MISS = Lookup.HIT, Lookup.MISS
COMMITTED, EXISTS = PutResult.COMMITTED, PutResult.EXISTS
GROUP = Durability.GROUP


@pytest.fixture
def shell():
    shell = FakeShell()
    shell.connect()
    yield shell
    shell.let_go()
    shell.audit()


def small(**changes):
    """Segments of 1 MiB, 12 of them; memory for three."""
    base = {"segment_bytes": MIB, "disk_bytes": 12 * MIB, "arena_bytes": 6 * MIB}
    shell = FakeShell(**(base | changes))
    shell.connect()
    return shell


def ask(shell, kind, numbers, *more, timeout_s=1.0):
    message = kind(shell.rid(), 0, b"".join(map(key, numbers)), *more)
    replies = shell.request(message, timeout_s=timeout_s)
    return replies[0] if replies else None


def demote_all(shell):
    core = shell.machine.core
    for row in np.flatnonzero(core.index.slot[: core.index.high]).tolist():
        if core.evictable(row):
            core.evict(row)


# ------------------------------------------------------------------ faults


def test_failed_group_refuses_and_forgets(shell):
    shell.group_fault = "device"
    assert shell.put([1, 2], durability=GROUP) == [PutResult.REFUSED] * 2
    assert shell.exists([1, 2]) == [0, 0]
    shell.group_fault = ""
    assert shell.put([1, 2], durability=GROUP) == [COMMITTED] * 2


def test_memory_put_survives_a_failed_group_in_memory(shell):
    shell.group_fault = "device"
    shell.put([1])
    shell.advance(3 * S)
    assert shell.read([1]) == [HIT]
    assert shell.machine.stats().counters["write_given_up"] == 1
    assert shell.machine.stats().dirty_shards == 0


def test_memory_put_is_written_to_another_segment(shell):
    shell.group_fault = "device"
    shell.hold_back = (events.WriteGroup,)
    shell.put([1])
    shell.advance(S)
    shell.step(shell.pending.popleft())
    shell.group_fault = ""
    shell.let_go()
    assert shell.put([1], durability=GROUP) == [EXISTS]


def test_all_segments_retired_leaves_a_memory_only_node(shell):
    shell.group_fault = "device"
    for n in range(8):
        shell.put([n], durability=GROUP)
    assert not shell.machine.stats().disk_ok
    assert shell.put([20], durability=GROUP) == [PutResult.REFUSED]
    assert shell.put([20]) == [COMMITTED]
    for n in range(30, 80):
        assert shell.put([n], MIB) == [COMMITTED]
    assert shell.exists([20, 79]) == [0, 1]


def test_a_put_waiting_for_room_goes_on_when_the_disk_dies():
    shell = FakeShell(arena_bytes=18 * MIB, dirty_fraction=1.0, group_shards_max=1)
    shell.connect()
    shell.connect(2)
    shell.hold_back = (events.WriteGroup,)
    assert shell.put(list(range(8)), MIB) == [COMMITTED] * 8
    assert shell.put(list(range(8, 16)), MIB) == [COMMITTED] * 8
    assert shell.put(list(range(100, 104)), MIB) is None
    waiting = shell._rid
    group = next(i for i in shell.pending if isinstance(i, events.WriteGroup))
    shell.pending.clear()
    (written,) = group.batch.records["key"].tobytes()[15::16]
    assert shell.get([written], conn=2) == [HIT], "the shard of the group itself may not go"
    shell.event(events.SegmentsChanged(free=0, usable=0))
    shell.event(events.GroupFailed(group.group_id, full=False, reason="EIO"))
    assert (1, waiting) in shell.replies, "all others may be evicted now"
    assert shell.replies[1, waiting][0].result_column.tolist() == [COMMITTED] * 4
    shell.audit()


def test_group_put_over_a_memory_copy_is_refused_when_the_disk_failed(shell):
    shell.put([1])
    shell.event(events.SegmentsChanged(0, 0))
    assert shell.put([1], durability=GROUP) == [PutResult.REFUSED]
    assert shell.put([1]) == [EXISTS]


def test_no_disk_at_all():
    shell = FakeShell(disk_bytes=0)
    shell.connect()
    assert shell.put([1]) == [COMMITTED]
    assert shell.put([2], durability=GROUP) == [PutResult.REFUSED]
    assert ask(shell, wire.Remove, [1]).mask_column.tolist() == [1]
    assert shell.request(wire.Flush(shell.rid(), 0))[0].count == 0
    assert not shell.meta
    shell.audit()


def test_full_disk_without_anything_to_reclaim():
    shell = FakeShell()
    shell.connect()
    shell.group_fault = "full"
    assert shell.put([1], durability=GROUP) == [PutResult.REFUSED]
    assert shell.put([2]) == [COMMITTED]
    shell.advance(2 * S)
    assert shell.machine.stats().dirty_shards == 0
    shell.audit()


def test_damaged_extent_is_a_miss_and_quarantined(shell):
    shell.put([1, 2], durability=GROUP)
    demote_all(shell)
    segment = shell.disk[0]
    next(iter(segment.pages.values()))[5] ^= 1
    assert shell.read([1, 2]) == [MISS, HIT]
    assert shell.machine.stats().counters["quarantined"] == 1
    assert any((m["kind"] == MetaKind.QUARANTINE).any() for m in shell.meta)
    assert shell.restart().machine.core.index.count == 1
    assert shell.put([1], durability=GROUP) == [COMMITTED]
    assert shell.restart().machine.core.index.count == 2


def test_unreadable_extent_is_a_miss_and_can_be_replaced(shell):
    shell.put([1], durability=GROUP)
    demote_all(shell)
    page = next(iter(shell.disk[0].pages))
    shell.read_fault[0, page] = int(events.ReadStatus.FAILED)
    assert shell.read([1]) == [MISS]
    assert shell.put([1]) == [COMMITTED]


def test_lost_segment(shell):
    shell.put([1, 2], durability=GROUP)
    demote_all(shell)
    shell.put([3], durability=GROUP)
    shell.event(events.SegmentLost(0, "deleted"))
    assert shell.exists([1, 2, 3]) == [0, 0, 1]
    assert shell.read([3]) == [HIT]


def test_get_times_out_while_the_disk_is_slow(shell):
    shell.put([1, 2], durability=GROUP)
    demote_all(shell)
    shell.put([3])
    shell.hold_back = (events.ReadExtents,)
    assert shell.get([1, 3], timeout_s=0.1) is None
    shell.connect(2)
    assert shell.get([1], conn=2, timeout_s=9) is None
    shell.advance(S)
    assert shell.replies[1, shell._rid - 1][0].rows["status"].tolist() == [Lookup.TIMEOUT, HIT]
    shell.let_go()
    assert shell.check_get(shell.replies[2, shell._rid][0], [1]) == [HIT]
    assert shell.reads == 1, "both gets wait for one read"


def test_shard_removed_while_it_is_read(shell):
    shell.put([1], durability=GROUP)
    demote_all(shell)
    shell.hold_back = (events.ReadExtents,)
    assert shell.get([1]) is None
    assert ask(shell, wire.Remove, [1]).mask_column.tolist() == [1]
    shell.let_go()
    assert shell.replies[1, 2][0].rows["status"].tolist() == [MISS]
    assert shell.machine.core.slabs.used_pages == 0


# ------------------------------------------------------------------ removal


def test_removed_is_gone_for_good(shell):
    shell.put([1, 2], durability=GROUP)
    assert ask(shell, wire.Remove, [1, 9]).mask_column.tolist() == [1, 0]
    assert shell.exists([1, 2]) == [0, 1]
    after = shell.restart()
    after.connect()
    assert after.exists([1, 2]) == [0, 1]
    assert after.put([1], durability=GROUP) == [COMMITTED]
    again = after.restart()
    again.connect()
    assert again.read([1]) == [HIT]


def test_removal_is_answered_when_durable(shell):
    shell.put([1])
    shell.hold_back = (events.AppendMeta,)
    assert ask(shell, wire.Remove, [1]) is None
    assert shell.exists([1]) == [0]
    assert shell.put([1]) == [COMMITTED], "a new birth"
    shell.let_go()
    assert shell.replies[1, 2][0].mask_column.tolist() == [1]
    assert shell.exists([1]) == [1]


def test_removal_that_is_not_logged_in_time(shell):
    shell.hold_back = (events.AppendMeta,)
    ask(shell, wire.Remove, [1])
    shell.advance(2 * S)
    assert shell.replies[1, 1][0].code == DeadlineExceeded.code


def test_removal_when_the_meta_log_fails(shell):
    shell.put([1])
    shell.meta_ok = False
    assert ask(shell, wire.Remove, [1]).code == StorageError.code


def stones(shell) -> int:
    return sum(int((part["kind"] == MetaKind.TOMBSTONE).sum()) for part in shell.meta)


def test_removal_with_a_full_meta_log_changes_nothing(shell):
    shell.put([1, 2], durability=GROUP)
    shell.meta_room = 2
    refused = ask(shell, wire.Remove, [1, 2, 9])
    assert refused.code == Overloaded.code
    assert "--disk" in refused.message
    assert shell.exists([1, 2]) == [1, 1]
    assert not stones(shell), "all or none"
    assert ask(shell, wire.Remove, [1, 2]).mask_column.tolist() == [1, 1]
    assert ask(shell, wire.Remove, [1]).code == Overloaded.code
    assert shell.meta_reserved == 0


def test_removal_waits_for_room_no_longer_than_its_caller(shell):
    shell.put([1, 2], durability=GROUP)
    shell.hold_back = (events.ReserveMeta,)
    assert ask(shell, wire.Remove, [1]) is None
    assert shell.exists([1]) == [1], "not before the log has room"
    shell.advance(2 * S)
    assert shell.replies[1, 2][0].code == DeadlineExceeded.code
    shell.let_go()
    assert shell.exists([1]) == [1], "not after its caller has been told"
    assert shell.meta_reserved == 0
    assert not stones(shell)


def test_removal_of_a_group_put_under_way(shell):
    shell.hold_back = (events.WriteGroup,)
    shell.put([1], durability=GROUP)
    assert ask(shell, wire.Remove, [1]).mask_column.tolist() == [1]
    shell.let_go()
    assert shell.replies[1, 1][0].result_column.tolist() == [COMMITTED]
    assert shell.exists([1]) == [0]
    assert shell.restart().machine.core.index.count == 0


# ------------------------------------------------------------------ reclaim and holds


def test_reclaim_frees_segments_first_in_first_out():
    shell = small()
    for n in range(60):
        assert shell.put([n], 200 * 1024, durability=GROUP) == [COMMITTED]
    alive = shell.exists(range(60))
    assert alive[59] == 1
    assert alive[0] == 0
    assert alive == sorted(alive)
    assert shell.machine.extents.free >= 1
    shell.audit()


def test_reclaim_keeps_what_is_held_and_what_was_read():
    shell = small()
    shell.put([1, 2, 3], 200 * 1024, durability=GROUP)
    assert ask(shell, wire.Hold, [1], 3_600_000).mask_column.tolist() == [1]
    demote_all(shell)
    assert shell.read([2]) == [HIT]
    for n in range(10, 60):
        assert shell.put([n], 200 * 1024, durability=GROUP) == [COMMITTED]
    assert shell.machine.stats().counters["reclaimed_segments"] >= 1
    assert shell.exists([1, 2, 3]) == [1, 1, 0]
    demote_all(shell)
    for n in range(60, 180):
        assert shell.put([n], 200 * 1024, durability=GROUP) == [COMMITTED]
    assert shell.exists([1, 2]) == [1, 0], "read once keeps it for one round"
    assert shell.read([1]) == [HIT]
    after = shell.restart(segment_bytes=MIB, disk_bytes=12 * MIB, arena_bytes=6 * MIB)
    after.connect()
    assert after.read([1]) == [HIT]
    assert after.machine.stats().holds == 1
    shell.audit()
    after.audit()


def test_reclaim_waits_for_readers():
    shell = small()
    shell.put([1], 200 * 1024, durability=GROUP)
    demote_all(shell)
    shell.hold_back = (events.ReadExtents,)
    assert shell.get([1], timeout_s=60) is None
    for n in range(10, 70):
        shell.put([n], 200 * 1024, durability=GROUP, timeout_s=0.1)
    assert shell.disk[0].generation == 1
    shell.let_go()
    assert shell.check_get(shell.replies[1, 2][0], [1]) == [HIT]
    for n in range(70, 80):
        shell.put([n], 200 * 1024, durability=GROUP)
    assert shell.disk[0].generation > 1
    shell.release(reply=shell.replies[1, 2][0])
    shell.audit()


def test_inline_shards_leave_with_their_segment():
    shell = small()
    shell.put([1], 500, durability=GROUP)
    for n in range(10, 80):
        shell.put([n], 200 * 1024, durability=GROUP)
    assert shell.exists([1]) == [0]
    assert shell.machine.core.index.inline_bytes == 0
    shell.audit()


def test_holds_have_a_share(shell):
    shell.put(list(range(40)), 1000)
    for n in range(100, 105):
        shell.put([n], 8 * MIB, durability=GROUP, timeout_s=9)
    assert ask(shell, wire.Hold, [100, 101, 102, 103], 1000).mask_column.tolist() == [1] * 4
    assert ask(shell, wire.Hold, [104], 1000).code == Overloaded.code
    shell.advance(2 * S)
    assert ask(shell, wire.Hold, [104], 1000).mask_column.tolist() == [1]
    assert ask(shell, wire.Hold, [104], 0).mask_column.tolist() == [1]
    assert shell.machine.stats().held_bytes == 0


def test_held_shards_are_not_forgotten_without_a_disk():
    shell = FakeShell(disk_bytes=0, arena_bytes=18 * MIB)
    shell.connect()
    shell.put([1], MIB)
    assert ask(shell, wire.Hold, [1], 3_600_000).mask_column.tolist() == [1]
    for n in range(10, 60):
        shell.put([n], MIB)
    assert shell.read([1]) == [HIT]
    shell.advance(3601 * S)
    for n in range(60, 110):
        shell.put([n], MIB)
    assert shell.exists([1]) == [0]


def test_holds_that_are_renewed_leave_nothing_behind(shell):
    shell.put([1, 2])
    holds = shell.machine.holds
    for _ in range(500):
        ask(shell, wire.Hold, [1], 60_000)
        shell.advance(MS)
    ask(shell, wire.Hold, [2], 1_000)
    assert len(holds._heap) <= 2 * 2 + 64
    shell.advance(2 * S)
    assert len(holds.ends) == 1, "the short hold ended"
    shell.advance(60 * S)
    assert not holds.ends
    assert not holds._heap


def test_touch_raises_the_ttl(shell):
    shell.put([1], ttl_ms=1000, durability=GROUP)
    assert ask(shell, wire.Touch, [1, 2], 60_000).mask_column.tolist() == [1, 0]
    shell.advance(10 * S)
    assert shell.exists([1]) == [1]
    after = shell.restart()
    after.connect()
    assert after.exists([1]) == [1]
    after.advance(60 * S)
    assert after.exists([1]) == [0]


# ------------------------------------------------------------------ flush, prefetch, doubt, stop


def test_flush(shell):
    shell.put([1, 2, 3])
    shell.hold_back = (events.WriteGroup,)
    message = wire.Flush(shell.rid(), 0)
    assert shell.request(message) == []
    shell.let_go()
    assert shell.replies[1, message.rid][0].count == 3
    assert len(shell.restart().machine.core.index.maps[0]) == 3
    assert shell.request(wire.Flush(shell.rid(), 0))[0].count == 0


def test_flush_of_many_groups(shell):
    shell.hold_back = (events.WriteGroup,)
    for n in range(0, 600, 100):
        shell.put(list(range(n, n + 100)), 100)
    message = wire.Flush(shell.rid(), 0)
    assert not shell.request(message)
    shell.put([1000])
    shell.let_go()
    assert shell.replies[1, message.rid][0].count == 600
    assert shell.restart().machine.core.index.count >= 600


def test_flush_that_fails(shell):
    shell.put([1])
    shell.group_fault = "device"
    assert shell.request(wire.Flush(shell.rid(), 0))[0].code == StorageError.code


def test_prefetch_promotes(shell):
    shell.put([1, 2, 3], durability=GROUP)
    demote_all(shell)
    assert ask(shell, wire.Prefetch, [1, 2, 9], 0).count == 2
    reads = shell.reads
    assert shell.read([1, 2]) == [HIT, HIT]
    assert shell.reads == reads


def scrub(shell):
    message = wire.Verify(shell.rid(), 1_000_000, 0)
    shell.request(message)
    for _ in range(10):
        replies = shell.replies.get((1, message.rid), [])
        if replies and replies[-1].done:
            return replies[-1]
        assert shell.machine.next_wakeup_ns() <= shell.now_ns
        shell.advance(1000)
    raise AssertionError("the scrub does not end")


@pytest.mark.parametrize("durability", [GROUP, Durability.MEMORY])
def test_verify_hashes_inline_shards(shell, durability):
    shell.put(list(range(1400)), 60, durability=durability)
    shell.put([2000, 2001], durability=GROUP)
    last = scrub(shell)
    assert (last.done, last.shards, last.total, last.damaged) == (True, 1402, 1402, 0)
    assert last.checked_bytes > 1400 * 60
    index = shell.machine.core.index
    row = index.find(0, key(700))
    index.inline[row] = b"!" + index.inline[row][1:]
    last = scrub(shell)
    assert (last.done, last.shards, last.damaged) == (True, 1402, 1)
    assert shell.exists([699, 700, 701]) == [1, 0, 1]
    assert scrub(shell).damaged == 0


def test_report_of_a_good_copy_changes_nothing(shell):
    shell.put([1], durability=GROUP)
    sums = np.array([shell.machine.core.index.checksum[1]], np.uint64).tobytes()
    shell.request(wire.Report(0, key(1), sums))
    assert shell.read([1]) == [HIT]
    assert shell.machine.stats().counters["reports_confirmed"] == 0


def test_report_of_a_bad_copy_in_memory(shell):
    shell.put([1], durability=GROUP)
    index = shell.machine.core.index
    sums = np.array([index.checksum[1]], np.uint64).tobytes()
    shell.arena[int(index.slot[1]) * 4096] ^= 1
    shell.request(wire.Report(0, key(1), sums))
    assert shell.machine.stats().counters["reports_confirmed"] == 1
    assert shell.read([1]) == [HIT], "the copy on disk is good"


def test_report_of_a_bad_copy_on_disk(shell):
    shell.put([1], durability=GROUP)
    demote_all(shell)
    next(iter(shell.disk[0].pages.values()))[0] ^= 1
    sums = np.array([shell.machine.core.index.checksum[1]], np.uint64).tobytes()
    shell.request(wire.Report(0, key(1), sums))
    assert shell.exists([1]) == [0]


def test_verify_counts_damage(shell):
    shell.put(list(range(100)), durability=GROUP)
    next(iter(shell.disk[0].pages.values()))[0] ^= 1
    shell.read_fault[0, sorted(shell.disk[0].pages)[5]] = int(events.ReadStatus.FAILED)
    last = shell.request(wire.Verify(shell.rid(), 1_000_000, 0))[-1]
    assert last.done
    assert (last.shards, last.total, last.damaged, last.unreadable) == (100, 100, 1, 1)
    assert shell.exists([0]) == [1], "the copy in memory is good and is written again"
    shell.advance(S)
    assert shell.request(wire.Verify(shell.rid(), 1_000_000, 0))[-1].damaged == 0


def test_verify_keeps_to_its_rate(shell):
    shell.put(list(range(128)), durability=GROUP)
    message = wire.Verify(shell.rid(), 10_000_000, 512 * 1024)
    replies = shell.request(message)
    assert not any(reply.done for reply in replies)
    shell.advance(3 * S)
    replies = shell.replies[1, message.rid]
    assert replies[-1].done
    assert len(replies) >= 3


def test_stop_flushes(shell):
    shell.hold_back = (events.WriteGroup,)
    shell.put([1])
    shell.event(events.Stopping())
    assert shell.put([2]) == [PutResult.OVERLOADED]
    assert not shell.machine.quiescent
    shell.let_go()
    assert shell.machine.quiescent
    assert shell.restart().machine.core.index.count == 1


def test_sequence_numbers_are_never_used_again(shell):
    shell.put([1])
    top = shell.machine.core.seq
    after = FakeShell(recovered=shell.recovered())
    assert after.machine.core.seq > top + 1000
