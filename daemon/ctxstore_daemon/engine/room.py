"""Room in the arena and in the index: takes what is free, else lets the policy make more.

Owns the order of means: free slots, evicting in the class, clearing a cold slab of another class.
It must not wait: when nothing may go now, it returns less than was asked for, and says that room is
wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ctxstore_daemon.engine.eviction import INLINE_CLASS
from ctxstore_daemon.engine.slabs import CHUNK_PAGES, SlabState

if TYPE_CHECKING:
    from ctxstore_daemon.engine.core import Core
    from ctxstore_daemon.engine.extents import ExtentsState

_SLABS_TRIED_MAX: Final = 32
_INLINE_VICTIMS: Final = 8
_BALANCE_EVERY: Final = 8
"""Searches between two comparisons of the own class with the coldest slab of all."""


class Room:
    """Allocates slots and entries for puts and promotions."""

    def __init__(self, core: Core, extents: ExtentsState) -> None:
        self._core = core
        self._extents = extents
        self._searches = 0

    def slots(self, pages: int, count: int) -> list[int]:
        """Up to `count` slots of the class; fewer when the rest is pinned, leased or not yet
        written.
        """
        slabs = self._core.slabs
        found = slabs.allocate(pages, count)
        while len(found) < count:
            if not self._evict_for(pages, count - len(found)):
                self._core.room_wanted = True
                break
            found += slabs.allocate(pages, count - len(found))
        return found

    def give_back(self, pages: list[int]) -> None:
        """Undo `slots` for slots that nobody was given. That is no news to those who wait: what
        was evicted for them has been told.
        """
        for page in pages:
            self._core.slabs.disown(page)

    def inline(self, length: int) -> bool:
        """Whether there is room for an inline payload, maybe after evicting others.

        Nothing reads an inline payload back from disk: one that is evicted is forgotten, though a
        copy in a segment comes back after a restart.
        """
        core = self._core
        while core.inline_bytes + length > core.settings.inline_bytes_max:
            victims = core.policy.victims(INLINE_CLASS, _INLINE_VICTIMS, core.evictable)
            if not victims:
                core.room_wanted = True
                return False
            for row in victims:
                core.evict(row)
        return True

    def entry(self) -> bool:
        """Whether the index has a row left.

        With segments to reclaim, a reclaim has to free rows. Else a row is forgotten; where it has
        a copy in the one segment there is, that comes back after a restart, as a cache may.
        """
        core = self._core
        if not core.index.full:
            return True
        if self._extents.disk_ok and self._extents.sealed():
            core.entries_wanted = True
            return False
        for slot_class in (INLINE_CLASS, *core.slabs.classes()):
            for row in core.policy.victims(slot_class, 1, core.evictable):
                core.counters.evicted += 1
                core.drop(row)
                return True
        core.room_wanted = True
        return False

    def _evict_for(self, pages: int, count: int) -> bool:
        self._searches += 1
        if self._searches % _BALANCE_EVERY == 0 and self._clear_colder(pages):
            return True
        core = self._core
        victims = core.policy.victims(pages, count, core.evictable)
        for row in victims:
            core.evict(row)
        return bool(victims) or self._clear(pages)

    def _clear_colder(self, pages: int) -> bool:
        """Take a slab from another class when it is the coldest of all: sizes in use change over
        time.
        """
        slabs = self._core.slabs
        coldest = slabs.coldest(1)
        if not coldest or coldest[0].pages == pages or pages > CHUNK_PAGES:
            return False
        slab = coldest[0]
        if slabs.chunk_use[slab.first_chunk] >= slabs.coldest_use(pages):
            return False
        return self._clear_all([slab])

    def _clear(self, pages: int) -> bool:
        if pages > CHUNK_PAGES:
            return any(map(self._clear_all, self._core.slabs.windows(pages)))
        coldest = self._core.slabs.coldest(_SLABS_TRIED_MAX)
        return any(self._clear_all([slab]) for slab in coldest if slab.pages != pages)

    def _clear_all(self, slabs: list[SlabState]) -> bool:
        """Evict everything in these slabs, or nothing."""
        core = self._core
        rows: list[int] = []
        for slab in slabs:
            for page in slab.used_pages():
                row = core.slabs.owner_at[page]
                if not row or not core.evictable(row):
                    return False
                rows.append(row)
        if not rows:
            return False
        depth = core.index.depth_at
        for row in sorted(rows, key=lambda r: -depth[r]):
            core.evict(row)
        core.counters.slabs_cleared += len(slabs)
        return True
