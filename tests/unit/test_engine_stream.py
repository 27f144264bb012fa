"""Stories of data connections: offers, payloads, sends, and what is left when they die."""

from __future__ import annotations

import numpy as np
import pytest

from ctxstore import checksum
from ctxstore.limits import MIB, PAGE_BYTES
from ctxstore.wire.messages import WANTED, Durability, Lookup, PutResult
from ctxstore_daemon.engine import events
from tests.unit.engine_shell import NS, FakeShell, S, key, payload

HIT, MISS = Lookup.HIT, Lookup.MISS
COMMITTED, EXISTS = PutResult.COMMITTED, PutResult.EXISTS


@pytest.fixture
def shell():
    shell = FakeShell()
    shell.connect()
    yield shell
    shell.let_go()
    shell.audit()


def offer(shell, numbers, length=8192, conn=1, timeout_s=1.0, **options):
    message = shell.make_put(numbers, length, offsets=[], **options)
    shell.event(events.StreamPutArrived(conn, message, shell.now_ns + int(timeout_s * S)))
    return message.rid, shell.offers.get((conn, message.rid))


def send(shell, rid, numbers, conn=1, ok=None):
    found = shell.offers[conn, rid]
    wanted = [n for n, v in zip(numbers, found.verdicts, strict=True) if v == WANTED]
    sums, inline = [], b""
    for n, at, length, seed in zip(
        wanted, found.slot_offsets.tolist(), found.lengths.tolist(), found.seeds.tolist(),
        strict=True,
    ):  # fmt: skip
        data = payload(n, length)
        if at < 0:
            inline += data.tobytes()
        else:
            shell.arena[at : at + length] = data
        sums.append(checksum.checksum(data, seed))
    good = np.array(ok if ok is not None else [True] * len(wanted), np.bool_)
    shell.event(events.PayloadDone(conn, rid, good, np.array(sums, np.uint64), inline))
    result = shell.finished.get((conn, rid))
    return None if result is None else result.tolist()


def stream_get(shell, numbers, *, capacity=1 << 20, exact=False, conn=1, timeout_s=1.0):
    rid = shell.rid()
    capacities = np.full(len(numbers), capacity, np.uint32)
    keys = b"".join(map(key, numbers))
    deadline = shell.now_ns + int(timeout_s * S)
    shell.event(events.StreamGetArrived(conn, rid, keys, capacities, exact, deadline))
    return rid, shell.sends.get((conn, rid))


def check_send(shell, sent, numbers):
    for i, n in enumerate(numbers):
        entry = sent.entries[i]
        if entry["status"] != HIT:
            assert sent.slot_offsets[i] == -1
            assert sent.inline_offsets[i] == -1
            continue
        length = int(entry["length"])
        if sent.slot_offsets[i] >= 0:
            data = shell.arena[sent.slot_offsets[i] :][:length]
        else:
            data = np.frombuffer(sent.inline, np.uint8)[sent.inline_offsets[i] :][:length]
        assert np.array_equal(data, payload(n, length))
        expected = checksum.shard_checksum(
            np.ascontiguousarray(data), key=key(n), ns_id=NS.ns_id, incarnation=0
        )
        assert entry["sum"] == expected
    return sent.entries["status"].tolist()


def test_offer_send_commit(shell):
    shell.put([2])
    rid, found = offer(shell, [1, 2, 3, 1], lengths=[5000, 8192, 300, 5000])
    assert found.verdicts.tolist() == [WANTED, EXISTS, WANTED, EXISTS]
    assert found.slot_offsets[1] == -1
    assert found.slot_bytes.tolist() == [8192, 0]
    assert send(shell, rid, [1, 2, 3, 1]) == [COMMITTED, EXISTS, COMMITTED, EXISTS]
    rid, sent = stream_get(shell, [1, 2, 3, 9])
    assert check_send(shell, sent, [1, 2, 3, 9]) == [HIT, HIT, HIT, MISS]
    shell.event(events.StreamGetDone(1, rid))


def test_an_offer_without_wanted_keys_is_final(shell):
    shell.put([1])
    rid, found = offer(shell, [1])
    assert found.verdicts.tolist() == [EXISTS]
    assert (1, rid) not in shell.finished
    assert not shell.machine.puts.in_flight


def test_a_payload_that_failed_is_refused_and_its_slot_comes_back(shell):
    rid, _ = offer(shell, [1, 2])
    used = shell.machine.core.slabs.used_pages
    assert send(shell, rid, [1, 2], ok=[False, True]) == [PutResult.REFUSED, COMMITTED]
    assert shell.machine.core.slabs.used_pages == used - 2
    assert shell.exists([1, 2]) == [0, 1]


def test_death_in_the_middle_of_a_put(shell):
    shell.connect(2)
    rid, _ = offer(shell, [1, 2], conn=2)
    shell.event(events.ConnClosed(2))
    assert shell.machine.core.slabs.used_pages == 4, "the thread may still be receiving"
    send(shell, rid, [1, 2], conn=2, ok=[False, False])
    assert shell.machine.core.slabs.used_pages == 0
    assert shell.machine.core.index.count == 0


def test_a_waiting_writer_sends_its_own_bytes_when_the_first_dies(shell):
    shell.connect(2)
    rid, _ = offer(shell, [1], conn=2)
    assert shell.put([1]) is None
    shell.event(events.ConnClosed(2))
    send(shell, rid, [1], conn=2, ok=[False])
    assert shell.replies[1, shell._rid][0].result_column.tolist() == [COMMITTED]


def test_an_offer_waits_for_a_key_in_flight(shell):
    shell.connect(2)
    first, _ = offer(shell, [1], conn=2)
    second, found = offer(shell, [1, 5])
    assert found is None
    send(shell, first, [1], conn=2)
    assert shell.offers[1, second].verdicts.tolist() == [EXISTS, WANTED]
    assert send(shell, second, [1, 5]) == [EXISTS, COMMITTED]


def test_an_offer_that_waits_too_long(shell):
    shell.connect(2)
    first, _ = offer(shell, [1], conn=2)
    second, found = offer(shell, [1, 5], timeout_s=0.1)
    assert found is None
    shell.advance(S)
    assert shell.offers[1, second].verdicts.tolist() == [PutResult.TIMEOUT, PutResult.OVERLOADED]
    assert not len(shell.offers[1, second].lengths)
    send(shell, first, [1], conn=2)


def test_group_put_is_finished_after_its_sync(shell):
    rid, _ = offer(shell, [1], durability=Durability.GROUP)
    shell.hold_back = (events.WriteGroup,)
    assert send(shell, rid, [1]) is None
    assert shell.exists([1]) == [0]
    shell.let_go()
    assert shell.finished[1, rid].tolist() == [COMMITTED]


def test_group_put_past_its_deadline(shell):
    rid, _ = offer(shell, [1], durability=Durability.GROUP, timeout_s=0.2)
    shell.hold_back = (events.WriteGroup,)
    send(shell, rid, [1])
    shell.advance(S)
    assert shell.finished[1, rid].tolist() == [PutResult.TIMEOUT]
    shell.let_go()
    assert shell.exists([1]) == [1]


def test_too_small_and_exact(shell):
    shell.put([1, 2], lengths=[5000, 8000])
    _, sent = stream_get(shell, [1, 2], capacity=5000)
    assert sent.entries["status"].tolist() == [HIT, Lookup.TOO_SMALL]
    assert sent.entries["length"].tolist() == [5000, 8000]
    _, sent = stream_get(shell, [1, 2], capacity=8000, exact=True)
    assert sent.entries["status"].tolist() == [MISS, HIT]


def test_pins_of_a_send_outlive_the_connection(shell):
    shell.connect(2)
    shell.put([1])
    rid, sent = stream_get(shell, [1], conn=2)
    page = int(sent.slot_offsets[0]) // PAGE_BYTES
    shell.event(events.ConnClosed(2))
    shell.machine.core.drop(1)
    assert shell.machine.core.slabs.pins[page] == 1
    shell.event(events.StreamGetDone(2, rid))
    assert shell.machine.core.slabs.used_pages == 0


def test_a_put_takes_at_most_its_share(shell):
    count = shell.machine.leases.share_bytes // MIB + 3
    numbers = list(range(count))
    rid, found = offer(shell, numbers, length=MIB)
    assert found.verdicts.tolist().count(WANTED) == count - 3
    assert found.verdicts.tolist().count(PutResult.OVERLOADED) == 3
    send(shell, rid, numbers)
    _, sent = stream_get(shell, numbers)
    assert sent.entries["status"].tolist().count(HIT) == count - 3


def test_sends_count_against_the_share(shell):
    count = shell.machine.leases.share_bytes // MIB
    for n in range(count + 1):
        shell.put([n], MIB)
    rid, sent = stream_get(shell, list(range(count + 1)))
    assert sent.entries["status"].tolist() == [HIT] * count + [Lookup.OVERLOADED]
    shell.event(events.StreamGetDone(1, rid))
    _, sent = stream_get(shell, [count])
    assert sent.entries["status"].tolist() == [HIT]
