"""Reclaim when the file system is full long before the cap."""

from __future__ import annotations

from ctxstore.limits import MIB
from ctxstore.wire.messages import Durability, Lookup, PutResult
from ctxstore_daemon.engine import events
from tests.unit.engine_shell import FakeShell

GROUP = Durability.GROUP


class CrampedShell(FakeShell):
    """Room for two segments, whatever the cap says; nobody knows before the third is asked for."""

    known = False

    def _free(self) -> list[int]:
        return [segment for segment in super()._free() if segment < 2]

    def _announce(self) -> None:
        free = len(self._free()) if self.known else 10
        changed = events.SegmentsChanged(free=free, usable=12)
        self.pending.extend(self.machine.handle(changed, self.now))

    def answer(self, event) -> None:
        super().answer(event)
        if isinstance(event, events.GroupFailed):
            self.known = True
            self._announce()


def test_survivors_give_way_when_there_is_no_room_to_copy_them_to():
    shell = CrampedShell(segment_bytes=MIB, disk_bytes=12 * MIB, arena_bytes=6 * MIB)
    shell.connect()
    shell._announce()
    for n in range(4):
        assert shell.put([n], 200 * 1024, durability=GROUP) == [PutResult.COMMITTED]
    assert shell.read(range(4)) == [Lookup.HIT] * 4

    for n in range(10, 40):
        assert shell.put([n], 200 * 1024, durability=GROUP) == [PutResult.COMMITTED]

    assert shell.machine.stats().counters["reclaimed_segments"] > 2
    shell.audit()
