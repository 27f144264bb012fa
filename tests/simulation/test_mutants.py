"""Broken stores must be caught: each mutant breaks one promise, and the checkers have to say so.

Owns the mutants. A simulation whose checkers cannot fail proves nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ctxstore.testing.checkers import HistoryViolation
from ctxstore.testing.disk import SimDisk, SimFile
from ctxstore.wire import messages as wire
from ctxstore_daemon.engine import events, recovery
from ctxstore_daemon.engine.core import Core
from ctxstore_daemon.engine.index import VISIBLE, IndexState
from ctxstore_daemon.engine.leases import LeasesState
from ctxstore_daemon.engine.reclaim import ReclaimState
from ctxstore_daemon.engine.slabs import SlabsState
from ctxstore_daemon.segments.metalog import MetaLog
from tests.simulation.profiles import PROFILES, Profile
from tests.simulation.scenario import simulate
from tests.simulation.watch import WatchedMachine

if TYPE_CHECKING:
    from ctxstore.seams import Now

pytestmark = pytest.mark.sim

SEEDS = 10
"""A mutant may hide for some seeds, not for so many."""


def profile(name: str) -> Profile:
    return next(profile for profile in PROFILES if profile.name == name)


def caught(kind: str, **broken: Any) -> str:
    """What the first seed that noticed said; fails when none does."""
    for seed in range(SEEDS):
        try:
            simulate(seed, profile(kind), **broken)
        except BaseException as error:
            found = _violation(error)
            if found is None:
                raise
            return str(found)
    pytest.fail(f"{SEEDS} seeds of {kind} saw nothing")


def _violation(error: BaseException) -> HistoryViolation | None:
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_violation, error.exceptions)), None)
    return error if isinstance(error, HistoryViolation) else None


# ---------------------------------------------------------------- disk and recovery


class LyingDisk(SimDisk):
    """Says that it has synced what segments were given."""

    async def open(self, name: str, *, create: bool = False, direct: bool = True) -> SimFile:
        file = await super().open(name, create=create, direct=direct)

        async def lie() -> None:
            """Nothing reaches the medium."""

        if name.startswith("segment-"):
            file.fdatasync = lie  # type: ignore[method-assign]
        return file

    def crash(self, *args: Any, **kwargs: Any) -> SimDisk:
        after = super().crash(*args, **kwargs)
        after.__class__ = LyingDisk
        return after


def test_a_disk_that_lies_about_its_syncs() -> None:
    assert "GROUP" in caught("calm", disk_class=LyingDisk)


def test_removals_forgotten_by_recovery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_bury", lambda copies, meta: None)

    assert "which had been removed" in caught("small")


def test_removals_acknowledged_before_they_are_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    append = MetaLog.append

    async def unsynced(self: MetaLog, records: Any, **options: Any) -> None:
        await append(self, records, **(options | {"sync": False}))

    monkeypatch.setattr(MetaLog, "append", unsynced)

    # Either a removed shard is back, or recovery finds the log too short and drops everything.
    assert "GROUP" in caught("small")


def test_ttl_forgotten_by_recovery(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(core: Core, copies: Any, meta: Any) -> Any:
        del core, meta
        return np.full(len(copies.records), 2**63 - 1, np.int64)

    monkeypatch.setattr(recovery, "_expiry", never)

    assert "expired" in caught("clock")


# ---------------------------------------------------------------- memory


def test_slots_reused_under_their_old_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    _unbumped(monkeypatch)

    assert "generation" in caught("pressure")


def _unbumped(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SlabsState._free

    def without(self: SlabsState, page: int) -> None:
        before = self.generations[page].copy()
        free(self, page)
        self.generations[page] = before

    monkeypatch.setattr(SlabsState, "_free", without)


def test_leases_that_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    grant = LeasesState.grant

    def unpinned(self: LeasesState, conn: int, pages: Any, kept_bytes: int) -> int:
        lease = grant(self, conn, pages, kept_bytes)
        self.leases[lease].pages = pages[:0]
        self._core.slabs.unpin_batch(pages)
        return lease

    monkeypatch.setattr(LeasesState, "grant", unpinned)

    assert "still reads" in caught("demotion")


def test_leases_that_end_and_keep_their_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    end = LeasesState._end

    def leaking(self: LeasesState, lease: int, state: Any) -> None:
        self._core.slabs.pin_batch(state.pages)
        end(self, lease, state)

    monkeypatch.setattr(LeasesState, "_end", leaking)

    assert "audit" in caught("network")


# ---------------------------------------------------------------- answers


class Crossed(WatchedMachine):
    """Copies the bytes of neighbours in a batch into each other's slots."""

    def handle(self, event: events.Event, now: Now) -> list[events.Instruction]:
        orders = super().handle(event, now)
        for order in orders:
            if isinstance(order, events.CopyIn) and len(order.lengths) > 1:
                order.staging_offsets[:] = np.roll(order.staging_offsets, 1)
        return orders


def test_bytes_of_another_key() -> None:
    assert "nobody ever put" in caught("calm", machine_class=Crossed)


def test_expired_shards_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def visible(self: IndexState, rows: Any, now_ns: int) -> Any:
        del now_ns
        return (self.flags[rows] & VISIBLE).astype(np.bool_)

    monkeypatch.setattr(IndexState, "visible", visible)

    assert "expired" in caught("clock")


def test_a_held_shard_is_reclaimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReclaimState, "_choose", lambda self, segment: [])

    assert "reclaimed" in caught("pressure")


def test_deadlines_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Core, "expire_operations", lambda self: None)

    assert "no answer" in caught("slow")


class Forgetful(WatchedMachine):
    """Drops a stored shard now and then, as a bug of the index would."""

    steps = 0

    def handle(self, event: events.Event, now: Now) -> list[events.Instruction]:
        orders = super().handle(event, now)
        self.steps += 1
        rows = [row for row in range(1, self.core.index.high) if self.core.evictable(row)]
        if rows and self.steps % 200 == 0:
            self.core.drop(rows[0])
        return orders


def test_a_shard_lost_for_no_reason() -> None:
    assert "gone, though" in caught("small", machine_class=Forgetful)


class Eager(WatchedMachine):
    """Answers a put of a stored key as if its bytes had been taken."""

    def handle(self, event: events.Event, now: Now) -> list[events.Instruction]:
        orders = super().handle(event, now)
        return [self._bent(order) for order in orders]

    def _bent(self, order: events.Instruction) -> events.Instruction:
        if isinstance(order, events.Reply) and isinstance(order.message, wire.PutReply):
            results = bytes(order.message.results).replace(b"\x01", b"\x00")
            return events.Reply(order.conn, wire.PutReply(order.message.rid, results))
        return order


def test_a_second_copy_called_committed() -> None:
    assert "committed, though" in caught("calm", machine_class=Eager)


def test_a_cap_passed() -> None:
    class Bursting(WatchedMachine):
        def stats(self) -> Any:
            stats = super().stats()
            object.__setattr__(stats, "arena_used_bytes", stats.arena_bytes + 1)
            return stats

    assert "above the cap" in caught("calm", machine_class=Bursting)
