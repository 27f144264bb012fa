"""Slots of the arena: which pages are free, who owns a slot, who still uses it.

Owns slabs (runs of 2 MiB chunks cut into equal slots), generations, owners and pins. It must not
know keys, tiers or policies: it never evicts, it only says which slab would free room. Everything
is in 4 KiB pages from the start of the arena; page 0 belongs to the generation table, so it stands
for "no slot".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from ctxstore.limits import HUGE_PAGE_BYTES, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK_PAGES: Final = HUGE_PAGE_BYTES // PAGE_BYTES
CHUNK_SHIFT: Final = CHUNK_PAGES.bit_length() - 1
NO_ROW: Final = 0
"""Owner of a slot that is free, or was given up while pinned."""

_UNUSED: Final = 2**63 - 1
_TAIL_FRACTION: Final = 1 / 16
_SLAB_CHUNKS_MORE: Final = 8
_WINDOWS_MAX: Final = 512
"""Places tried in one search for a run of chunks to clear."""

_SLAB_ARENA_FRACTION: Final = 16

Pages = npt.NDArray[np.int64]


def payload_pages(length: int) -> int:
    """Whole pages that `length` bytes fill."""
    return (length + PAGE_BYTES - 1) // PAGE_BYTES


def slot_pages(length: int) -> int:
    """Pages of the slot class for a payload: rounding wastes at most 1/16 of it (and the last
    page).
    """
    pages = payload_pages(length)
    if pages <= 16:
        return pages
    step = 1 << ((pages - 1).bit_length() - 5)
    return (pages + step - 1) // step * step


def table_pages(arena_pages: int) -> int:
    """Pages that the generation table takes from the arena's start: whole chunks."""
    table_bytes = arena_pages * 4
    return (table_bytes + HUGE_PAGE_BYTES - 1) // HUGE_PAGE_BYTES * CHUNK_PAGES


class SlabState:
    """A run of chunks cut into equal slots. `free` has a set bit for each free slot."""

    __slots__ = ("chunks", "first_chunk", "first_page", "free", "pages", "slots", "used")

    def __init__(self, first_chunk: int, chunks: int, pages: int) -> None:
        self.first_chunk = first_chunk
        self.chunks = chunks
        self.first_page = first_chunk * CHUNK_PAGES
        self.pages = pages
        self.slots = chunks * CHUNK_PAGES // pages
        self.free = (1 << self.slots) - 1
        self.used = 0

    def used_pages(self) -> list[int]:
        """First pages of the slots in use, ascending."""
        free = self.free
        return [self.first_page + i * self.pages for i in range(self.slots) if not (free >> i) & 1]


class SlabsState:
    """Allocator over the whole arena.

    A slot is free when nobody owns it and nobody has it pinned; its generation moves on at that
    moment, so before any reuse, whatever the next slot over these pages looks like. `pins` and
    `owner` are indexed by first page; `pins_at` and `owner_at` are the same memory for single
    accesses.
    """

    def __init__(self, generations: npt.NDArray[np.uint32], arena_bytes: int) -> None:
        pages = arena_bytes // PAGE_BYTES
        if len(generations) < pages:
            raise ValueError(f"{len(generations)} generations for {pages} pages")
        self.generations = generations
        self.pages_total = pages
        self.chunks_total = pages // CHUNK_PAGES
        self.first_chunk = table_pages(pages) // CHUNK_PAGES
        self.pins = np.zeros(pages, np.uint32)
        self.owner = np.zeros(pages, np.int32)
        self.pins_at = self.pins.data
        self.owner_at = self.owner.data
        self.chunk_use = np.full(self.chunks_total, _UNUSED, np.int64)
        """Engine tick of the last allocation or hit, per chunk in a slab."""
        self.tick = 0
        self.used_pages = 0
        self._slab_at: list[SlabState | None] = [None] * self.chunks_total
        self._free_chunks = 0
        self._populated_chunks = self.first_chunk
        self._partial: dict[int, dict[int, SlabState]] = {}
        self._hand = 0

    @property
    def usable_bytes(self) -> int:
        """Bytes that slots may take once everything is populated."""
        return max(0, self.chunks_total - self.first_chunk) * HUGE_PAGE_BYTES

    @property
    def populated_bytes(self) -> int:
        """Bytes that slots may take now."""
        return (self._populated_chunks - self.first_chunk) * HUGE_PAGE_BYTES

    def grow(self, populated_bytes: int) -> None:
        """Slots may now lie in the first `populated_bytes` of the arena."""
        chunks = min(populated_bytes // HUGE_PAGE_BYTES, self.chunks_total)
        for chunk in range(self._populated_chunks, chunks):
            self._free_chunks |= 1 << chunk
        self._populated_chunks = max(chunks, self._populated_chunks)

    def fits_ever(self, pages: int) -> bool:
        """Whether a slot of this class can exist in the arena at all."""
        return -(-pages // CHUNK_PAGES) <= self.chunks_total - self.first_chunk

    # ------------------------------------------------------------ allocate and free

    def allocate(self, pages: int, count: int) -> list[int]:
        """Up to `count` slots of the class `pages`, ascending inside a slab; their owner is not set
        yet.
        """
        found: list[int] = []
        partial = self._partial.setdefault(pages, {})
        while len(found) < count:
            slab = next(iter(partial.values()), None) or self._carve(pages)
            if slab is None:
                break
            self._take(slab, count - len(found), found)
            if not slab.free:
                partial.pop(slab.first_chunk, None)
        self.used_pages += pages * len(found)
        return found

    def _take(self, slab: SlabState, count: int, found: list[int]) -> None:
        self.chunk_use[slab.first_chunk : slab.first_chunk + slab.chunks] = self.tick
        free = slab.free
        for _ in range(min(count, slab.slots - slab.used)):
            low = free & -free
            free ^= low
            found.append(slab.first_page + (low.bit_length() - 1) * slab.pages)
            slab.used += 1
        slab.free = free

    def _carve(self, pages: int) -> SlabState | None:
        least = -(-pages // CHUNK_PAGES)
        for chunks in dict.fromkeys((self._slab_chunks(pages), least)):
            first = self._find_run(chunks)
            if first < 0:
                continue
            slab = SlabState(first, chunks, pages)
            self._free_chunks &= ~(((1 << chunks) - 1) << first)
            for chunk in range(first, first + chunks):
                self._slab_at[chunk] = slab
            self._partial[pages][first] = slab
            return slab
        return None

    def _slab_chunks(self, pages: int) -> int:
        """Chunks of a slab, so that what is left behind the last slot is at most 1/16."""
        least = -(-pages // CHUNK_PAGES)
        most = max(least, (self.chunks_total - self.first_chunk) // _SLAB_ARENA_FRACTION)
        for chunks in range(least, min(most, least + _SLAB_CHUNKS_MORE) + 1):
            total = chunks * CHUNK_PAGES
            if total % pages <= total * _TAIL_FRACTION:
                return chunks
        return least

    def _find_run(self, chunks: int) -> int:
        """First chunk of the lowest run of free chunks, or -1."""
        runs, have = self._free_chunks, 1
        while have < chunks and runs:
            shift = min(have, chunks - have)
            runs &= runs >> shift
            have += shift
        return (runs & -runs).bit_length() - 1 if runs else -1

    def slot_bytes(self, page: int) -> int:
        """Size of the slot that starts at `page`."""
        slab = self._slab_at[page >> CHUNK_SHIFT]
        assert slab is not None, "no slot here"
        return slab.pages * PAGE_BYTES

    def slot_class(self, page: int) -> int:
        """Class (pages of a slot) of the slot that starts at `page`."""
        slab = self._slab_at[page >> CHUNK_SHIFT]
        assert slab is not None, "no slot here"
        return slab.pages

    def disown(self, page: int) -> bool:
        """The owner gives the slot up. True when it became free now, False while pins keep it."""
        self.owner_at[page] = NO_ROW
        if self.pins_at[page]:
            return False
        self._free(page)
        return True

    def _free(self, page: int) -> None:
        slab = self._slab_at[page >> CHUNK_SHIFT]
        assert slab is not None, "free of a slot that is not there"
        index, rest = divmod(page - slab.first_page, slab.pages)
        bit = 1 << index
        assert rest == 0, "free of a page that starts no slot"
        assert not slab.free & bit, "slot freed twice"
        # Wraps at 2**32 by itself; np.uint32 would warn on a scalar.
        self.generations[page] = (int(self.generations[page]) + 1) & 0xFFFFFFFF
        slab.free |= bit
        slab.used -= 1
        self.used_pages -= slab.pages
        partial = self._partial[slab.pages]
        if slab.used:
            partial[slab.first_chunk] = slab
            return
        partial.pop(slab.first_chunk, None)
        for chunk in range(slab.first_chunk, slab.first_chunk + slab.chunks):
            self._slab_at[chunk] = None
            self._free_chunks |= 1 << chunk
            self.chunk_use[chunk] = _UNUSED

    # ------------------------------------------------------------ pins

    def pin(self, page: int) -> None:
        """One more user of the slot's bytes."""
        self.pins_at[page] += 1

    def unpin(self, page: int) -> bool:
        """One user fewer. True when that made the slot free or evictable."""
        left = self.pins_at[page] - 1
        self.pins_at[page] = left
        if left:
            return False
        if self.owner_at[page] == NO_ROW:
            self._free(page)
        return True

    def pin_batch(self, pages: Pages) -> None:
        """Pin each page once per occurrence."""
        np.add.at(self.pins, pages, 1)

    def unpin_batch(self, pages: Pages) -> None:
        """Undo `pin_batch`; frees slots that nobody owns any more."""
        np.subtract.at(self.pins, pages, 1)
        loose = pages[(self.pins[pages] == 0) & (self.owner[pages] == NO_ROW)]
        for page in dict.fromkeys(loose.tolist()):
            self._free(page)

    def used_at(self, pages: Pages) -> None:
        """Mark slots as used now: their slabs are not the coldest."""
        self.chunk_use[pages >> CHUNK_SHIFT] = self.tick

    # ------------------------------------------------------------ which slab to clear

    def slabs(self) -> list[SlabState]:
        """All slabs, ascending."""
        return [
            slab
            for chunk, slab in enumerate(self._slab_at)
            if slab is not None and slab.first_chunk == chunk
        ]

    def classes(self) -> list[int]:
        """Classes that were ever used, in the order of their first use."""
        return list(self._partial)

    def coldest(self, count: int) -> list[SlabState]:
        """Up to `count` slabs, longest unused first."""
        near = min(count * 4, self.chunks_total)
        order = np.argpartition(self.chunk_use, near - 1)[:near]
        found: dict[int, SlabState] = {}
        for chunk in order[np.lexsort((order, self.chunk_use[order]))].tolist():
            slab = self._slab_at[chunk]
            if slab is not None:
                found.setdefault(slab.first_chunk, slab)
                if len(found) >= count:
                    break
        return list(found.values())

    def coldest_use(self, pages: int) -> int:
        """Tick of the last use of the coldest slab of this class; very large when it has none."""
        own = [slab.first_chunk for slab in self._slab_at if slab and slab.pages == pages]
        return int(self.chunk_use[own].min()) if own else _UNUSED

    def windows(self, pages: int) -> Iterator[list[SlabState]]:
        """For a slot of several chunks: runs of chunks that would do, as the slabs to clear.

        Each call starts behind the place of the last one, so that searches take turns over the
        arena.
        """
        chunks = -(-pages // CHUNK_PAGES)
        span = self._populated_chunks - chunks + 1 - self.first_chunk
        if span <= 0:
            return
        start = self._hand
        self._hand = (start + min(span, _WINDOWS_MAX)) % span
        for step in range(min(span, _WINDOWS_MAX)):
            first = self.first_chunk + (start + step) % span
            slabs: dict[int, SlabState] = {}
            for slab in self._slab_at[first : first + chunks]:
                if slab is not None:
                    slabs[slab.first_chunk] = slab
            yield list(slabs.values())

    # ------------------------------------------------------------ invariants

    def audit(self) -> list[str]:
        """What is wrong with the books; empty when all is well."""
        wrong: list[str] = []
        used = 0
        covered = 0
        for slab in self.slabs():
            held = slab.used_pages()
            used += len(held) * slab.pages
            covered |= ((1 << slab.chunks) - 1) << slab.first_chunk
            if len(held) != slab.used:
                wrong.append(f"slab {slab.first_chunk}: used {slab.used}, counted {len(held)}")
            wrong.extend(
                f"slot {page}: in use, but neither owned nor pinned"
                for page in held
                if self.owner_at[page] == NO_ROW and not self.pins_at[page]
            )
            partial = slab.first_chunk in self._partial.get(slab.pages, {})
            if partial != bool(slab.free):
                wrong.append(f"slab {slab.first_chunk}: partial list is wrong")
        if used != self.used_pages:
            wrong.append(f"used pages {self.used_pages}, counted {used}")
        populated = ((1 << self._populated_chunks) - 1) & ~((1 << self.first_chunk) - 1)
        if covered | self._free_chunks != populated or covered & self._free_chunks:
            wrong.append("chunks are lost, or both free and in use")
        return wrong
