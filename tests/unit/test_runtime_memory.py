"""Arena, staging and mover on real memory: what clients can and cannot do with descriptors."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ctxstore import limits
from ctxstore.checksum import checksum
from ctxstore.config import PagePreference
from ctxstore.errors import OutOfSpace
from ctxstore.seams import CopyJob
from ctxstore_daemon.runtime.arena import FIRST_STEP_BYTES, Arena
from ctxstore_daemon.runtime.memfd import MemoryFile, PageKind, page_ladder
from ctxstore_daemon.runtime.mover import INLINE_BYTES, ThreadMover
from ctxstore_daemon.runtime.staging import StagingPool, create_staging, release_staging

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 96 * limits.MIB
LADDER = page_ladder(PagePreference.AUTO)


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(SIZE, kinds=LADDER)
    yield made
    made.close()


def _passed_on(fd: int) -> int:
    """The descriptor as another process would get it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [fd])
        return socket.recv_fds(theirs, 1, 1)[1][0]


def test_clients_read_the_arena_and_never_write_it(arena: Arena) -> None:
    arena.populate_step()
    fd = _passed_on(arena.fd)
    try:
        with mmap.mmap(fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ) as theirs:
            arena.data[5 * limits.MIB] = 77
            assert theirs[5 * limits.MIB] == 77
        with pytest.raises(PermissionError):
            mmap.mmap(fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        for size in (0, SIZE - limits.HUGE_PAGE_BYTES, SIZE + limits.HUGE_PAGE_BYTES):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_TRUNC)
    finally:
        os.close(fd)


def test_a_client_cannot_map_it_writable_through_proc(arena: Arena) -> None:
    fd = os.open(f"/proc/self/fd/{arena.fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(fd, SIZE)
    finally:
        os.close(fd)


def test_the_watermark_grows_to_the_end(arena: Arena) -> None:
    seen = [arena.populated_bytes]
    while not arena.complete:
        seen.append(arena.populate_step())
    assert seen[0] == 0
    assert seen[1] > FIRST_STEP_BYTES, "the generation table comes on top of the first step"
    assert seen[-1] == SIZE
    assert seen == sorted(set(seen))


def test_generations_are_the_first_bytes_of_the_arena(arena: Arena) -> None:
    arena.populate_step()
    assert len(arena.generations) == SIZE // limits.PAGE_BYTES
    arena.generations[3] = 0x01020304
    assert arena.data[12:16].tobytes() == b"\x04\x03\x02\x01"


def test_without_huge_pages_the_arena_falls_back() -> None:
    # More than any machine reserves, yet an address range that can be mapped.
    arena = Arena(1 << 44, kinds=(PageKind.HUGETLB, PageKind.SMALL))
    assert arena.kind is PageKind.SMALL
    assert arena.huge_bytes() == 0
    arena.close()


def test_a_ladder_that_ends_says_why() -> None:
    with pytest.raises(OutOfSpace, match="hugetlb"):
        Arena(1 << 44, kinds=(PageKind.HUGETLB,))


def test_preferences_make_ladders() -> None:
    assert page_ladder(PagePreference.SMALL) == (PageKind.SMALL,)
    assert page_ladder(PagePreference.HUGE)[0] is PageKind.HUGETLB
    assert PageKind.HUGETLB not in page_ladder(PagePreference.TRANSPARENT)


def test_staging_is_written_by_both_and_resized_by_neither() -> None:
    staging = create_staging(limits.MIB)
    fd = _passed_on(staging.fd)
    try:
        with mmap.mmap(fd, limits.MIB) as theirs:
            theirs[7] = 9
            assert staging.data[7] == 9
            for size in (0, limits.PAGE_BYTES, 2 * limits.MIB):
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, size)
            # Truncation refused, every byte can still be read: no SIGBUS.
            assert int(staging.data.sum()) == 9
    finally:
        os.close(fd)
        release_staging(staging)


def test_released_staging_gives_its_pages_back_under_a_client_map() -> None:
    staging = create_staging(limits.MIB)
    staging.data[:] = 1
    fd = _passed_on(staging.fd)
    try:
        with mmap.mmap(fd, limits.MIB) as theirs:
            assert os.fstat(fd).st_blocks > 0
            release_staging(staging)
            assert os.fstat(fd).st_blocks == 0
            assert theirs[0] == 0
    finally:
        os.close(fd)


def test_staging_pool_makes_and_returns() -> None:
    async def body() -> None:
        pool = StagingPool()
        file, grant = await pool.create(limits.MIB)
        file.close_descriptor()
        grant.data[:3] = (1, 2, 3)
        gone = asyncio.Event()
        grant.release(gone.set)
        await gone.wait()
        pool.close()

    asyncio.run(body())


def test_a_view_outlives_its_closed_file() -> None:
    file = MemoryFile("test", limits.MIB, kind=PageKind.SMALL, seals=0)
    view = file.data[:16]
    file.close()
    file.close()
    view[:] = 5
    assert view.sum() == 80


@pytest.mark.parametrize("length", [1, 1000, INLINE_BYTES, 3 * limits.MIB + 5])
def test_mover_copies_pads_and_hashes(length: int) -> None:
    rng = np.random.default_rng(length)
    slot_bytes = -(-length // limits.PAGE_BYTES) * limits.PAGE_BYTES
    sources = [rng.integers(0, 256, length, np.uint8) for _ in range(7)]
    slots = [np.full(slot_bytes, 0xEE, np.uint8) for _ in sources]
    jobs = [
        CopyJob(source=source, slot=slot, length=length, seed=index)
        for index, (source, slot) in enumerate(zip(sources, slots, strict=True))
    ]
    mover = ThreadMover(3)
    try:
        sums = asyncio.run(mover.copy_in(jobs))
    finally:
        mover.close()
    for index, (source, slot) in enumerate(zip(sources, slots, strict=True)):
        assert np.array_equal(slot[:length], source)
        assert not slot[length:].any()
        assert sums[index] == checksum(source, index)


def test_mover_hashes_what_is_already_there() -> None:
    slot = np.arange(limits.PAGE_BYTES, dtype=np.uint8)
    expected = checksum(slot[:100].copy(), 42)
    job = CopyJob(source=None, slot=slot.data, length=100, seed=42)
    mover = ThreadMover(1)
    try:
        assert asyncio.run(mover.copy_in([job])) == [expected]
    finally:
        mover.close()
    assert not slot[100:].any()


def test_mover_takes_no_jobs() -> None:
    mover = ThreadMover(1)
    try:
        assert asyncio.run(mover.copy_in([])) == []
    finally:
        mover.close()
