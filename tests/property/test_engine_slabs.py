"""The slot allocator against a model of pages: no overlap, no loss, no reuse unnoticed."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ctxstore.limits import HUGE_PAGE_BYTES, MIB, PAGE_BYTES
from ctxstore_daemon.engine.slabs import (
    CHUNK_PAGES,
    SlabsState,
    payload_pages,
    slot_pages,
    table_pages,
)

CHUNKS = 12


@given(st.integers(1, 64 * MIB))
def test_a_slot_holds_its_payload_and_wastes_little(length):
    pages = slot_pages(length)
    assert payload_pages(length) <= pages <= payload_pages(length) * (1 + 1 / 16)
    assert slot_pages(pages * PAGE_BYTES) == pages, "a class is its own class"


@settings(max_examples=60)
@given(st.integers(1, CHUNK_PAGES * 2))
def test_a_full_arena_of_one_class_wastes_at_most_an_eighth(pages):
    pages = slot_pages(pages * PAGE_BYTES)
    arena = 600 * HUGE_PAGE_BYTES
    slabs = SlabsState(np.zeros(arena // PAGE_BYTES, np.uint32), arena)
    slabs.grow(arena)
    found = slabs.allocate(pages, 10**9)
    # What a last slab of several chunks leaves over does not count: another class takes it.
    left = len(slabs.allocate(1, 10**9))
    assert len(found) * pages + left >= slabs.usable_bytes // PAGE_BYTES * 7 / 8


def test_a_batch_lies_in_one_piece():
    arena = 40 * HUGE_PAGE_BYTES
    slabs = SlabsState(np.zeros(arena // PAGE_BYTES, np.uint32), arena)
    slabs.grow(arena)
    pages = slabs.allocate(512, 32)
    assert np.all(np.diff(pages) == 512)
    assert pages[0] == table_pages(arena // PAGE_BYTES)


class SlabStory(RuleBasedStateMachine):
    """Slots are allocated, owned, pinned, disowned and unpinned in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = CHUNKS * HUGE_PAGE_BYTES
        self.generations = np.zeros(self.arena // PAGE_BYTES, np.uint32)
        self.slabs = SlabsState(self.generations, self.arena)
        self.slabs.grow(4 * HUGE_PAGE_BYTES)
        self.populated = 4
        self.slots: dict[int, int] = {}
        self.pins: dict[int, int] = {}
        self.owned: set[int] = set()
        self.seen: dict[int, tuple[int, int]] = {}
        """Slot start to (generation, pages) under which a reader once knew it."""

    @rule(length=st.integers(1, 5 * MIB), count=st.integers(1, 40))
    def allocate(self, length, count) -> None:
        pages = slot_pages(length)
        for slot in self.slabs.allocate(pages, count):
            self.slots[slot] = pages
            self.owned.add(slot)
            self.slabs.owner_at[slot] = 1
            for start, (generation, size) in self.seen.items():
                if start < slot + pages and slot < start + size:
                    assert self.generations[start] != generation, "a stale reader would not notice"

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), batch=st.booleans())
    def pin(self, data, batch) -> None:
        slot = data.draw(st.sampled_from(sorted(self.owned)))
        self.pins[slot] = self.pins.get(slot, 0) + 1
        self.seen[slot] = (int(self.generations[slot]), self.slots[slot])
        if batch:
            self.slabs.pin_batch(np.array([slot, slot], np.int64))
            self.pins[slot] += 1
        else:
            self.slabs.pin(slot)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data) -> None:
        slot = data.draw(st.sampled_from(sorted(self.pins)))
        if self.pins[slot] >= 2:
            self.slabs.unpin_batch(np.array([slot, slot], np.int64))
            self.pins[slot] -= 2
        else:
            self.slabs.unpin(slot)
            self.pins[slot] -= 1
        if not self.pins[slot]:
            del self.pins[slot]
            if slot not in self.owned:
                del self.slots[slot]

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def disown(self, data) -> None:
        slot = data.draw(st.sampled_from(sorted(self.owned)))
        self.owned.discard(slot)
        free = self.slabs.disown(slot)
        assert free == (slot not in self.pins)
        if free:
            del self.slots[slot]

    @rule()
    def grow(self) -> None:
        self.populated = min(self.populated + 1, CHUNKS)
        self.slabs.grow(self.populated * HUGE_PAGE_BYTES)

    @invariant()
    def books(self) -> None:
        assert not self.slabs.audit()
        ends = 0
        for slot, pages in sorted(self.slots.items()):
            assert slot >= ends, "slots overlap"
            ends = slot + pages
        assert ends <= self.populated * CHUNK_PAGES
        assert min(self.slots, default=CHUNK_PAGES) >= CHUNK_PAGES, "inside the generation table"
        assert self.slabs.used_pages == sum(self.slots.values())

    @invariant()
    def leased_slots_keep_their_generation(self) -> None:
        for slot in self.pins:
            assert self.seen[slot][0] == self.generations[slot]

    def teardown(self) -> None:
        for slot, count in list(self.pins.items()):
            self.slabs.unpin_batch(np.full(count, slot, np.int64))
        for slot in sorted(self.owned):
            self.slabs.disown(slot)
        assert self.slabs.used_pages == 0
        assert not self.slabs.slabs()
        most = (self.populated - 1) * CHUNK_PAGES
        assert len(self.slabs.allocate(1, 10**9)) == most, "everything can be had again"


SlabStory.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestSlabStory = SlabStory.TestCase
