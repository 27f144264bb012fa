"""What every tier must do, as a class of tests to inherit.

Owns the checks; the tier's own test module says how to open one. A subclass named `Test...`
overrides the three hooks and gets every test.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import numpy as np

from ctxstore.errors import OutOfSpace
from ctxstore.limits import PAGE_BYTES
from ctxstore.testing.loop import run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager

    import numpy.typing as npt

OK = 0
"""ReadStatus of a whole and verified shard; everything else is no hit."""


class TierSuite:
    """Hooks: `open_tier`, `records`, and `damage` where the medium can be damaged."""

    def open_tier(self) -> AbstractAsyncContextManager[Any]:
        """A new, empty tier with room for at least 2 MiB; closed at the block's end."""
        raise NotImplementedError

    def records(self, payloads: Sequence[bytes]) -> Any:
        """Shard records, with true checksums, for payloads under keys of their own."""
        raise NotImplementedError

    async def damage(self, tier: Any, location: Any) -> bool:
        """Change a stored byte of a shard; False where the tier's bytes never leave memory."""
        raise NotImplementedError

    # -------------------------------------------------------------------------- tests

    def test_shards_come_back_in_any_order(self) -> None:
        async def scene() -> None:
            async with self.open_tier() as tier:
                rng = random.Random(1)
                payloads = [rng.randbytes(n) for n in (1, 4095, 4096, 4097, 70_000, 12_345)]
                locations = await self._write(tier, payloads)
                assert len(locations) == len(payloads)
                order = [3, 0, 5, 2, 1, 4, 3]
                found = await self._read(tier, locations[order], spare_pages=1)
                assert found == [payloads[index] for index in order]

        run(scene())

    def test_nothing_to_do_is_done(self) -> None:
        async def scene() -> None:
            async with self.open_tier() as tier:
                locations = await self._write(tier, [b"x"])
                assert len(await tier.read(locations[:0], [])) == 0
                await tier.free(locations[:0])
                assert await self._read(tier, locations) == [b"x"]

        run(scene())

    def test_freed_shards_are_never_mistaken_for_others(self) -> None:
        async def scene() -> None:
            async with self.open_tier() as tier:
                rng = random.Random(2)
                alive: list[tuple[bytes, Any]] = []
                freed: list[tuple[bytes, Any]] = []
                for _ in range(60):
                    payloads = [rng.randbytes(rng.randint(1, 60_000)) for _ in range(4)]
                    locations = await self._write(tier, payloads)
                    alive += [(p, locations[i : i + 1]) for i, p in enumerate(payloads)]
                    while len(alive) > 8:
                        payload, location = alive.pop(0)
                        await tier.free(location)
                        freed.append((payload, location))
                for payload, location in freed:
                    found = await self._read(tier, location)
                    # It may still be there; what it may not be is anything else.
                    assert found[0] in (None, payload)
                for payload, location in alive:
                    assert await self._read(tier, location) == [payload]

        run(scene())

    def test_a_full_tier_says_so_and_keeps_what_it_has(self) -> None:
        async def scene() -> None:
            async with self.open_tier() as tier:
                rng = random.Random(3)
                kept: list[tuple[bytes, Any]] = []
                try:
                    for _ in range(10_000):
                        payload = rng.randbytes(100_000)
                        kept.append((payload, await self._write(tier, [payload])))
                except OutOfSpace:
                    pass
                else:
                    raise AssertionError("a tier has an end")
                assert kept
                for payload, location in kept:
                    assert await self._read(tier, location) == [payload]
                for _, location in kept:
                    await tier.free(location)
                again = [rng.randbytes(100_000) for _ in range(max(1, len(kept) // 2))]
                for payload in again:
                    assert await self._read(tier, await self._write(tier, [payload])) == [payload]

        run(scene())

    def test_a_batch_that_does_not_fit_leaves_no_trace(self) -> None:
        async def scene() -> None:
            async with self.open_tier() as tier:
                first = await self._write(tier, [b"first"])
                room = tier.room_bytes
                assert room > 0
                huge = [bytes(PAGE_BYTES)] * (200_000_000 // PAGE_BYTES // 200)
                try:
                    for _ in range(200):
                        await self._write(tier, huge)
                except OutOfSpace:
                    pass
                else:
                    raise AssertionError("200 MB fit where 2 MiB were asked for")
                assert await self._read(tier, first) == [b"first"]

        run(scene())

    def test_reads_and_writes_overlap(self) -> None:
        async def scene() -> None:
            async with self.open_tier() as tier:
                rng = random.Random(4)
                payloads = [rng.randbytes(20_000) for _ in range(8)]
                locations = await self._write(tier, payloads)

                async def reading() -> None:
                    for _ in range(5):
                        assert await self._read(tier, locations) == payloads

                async def writing() -> None:
                    for _ in range(5):
                        more = [rng.randbytes(9_000)]
                        assert await self._read(tier, await self._write(tier, more)) == more

                async with asyncio.TaskGroup() as group:
                    for work in (reading(), writing(), reading(), writing()):
                        group.create_task(work)

        run(scene())

    def test_damage_is_noticed_and_hits_one_shard_only(self) -> None:
        async def scene() -> None:
            async with self.open_tier() as tier:
                payloads = [bytes([n]) * 5000 for n in range(5)]
                locations = await self._write(tier, payloads)
                if await self.damage(tier, locations[2]):
                    found = await self._read(tier, locations)
                    assert found[2] is None
                    assert found[:2] + found[3:] == payloads[:2] + payloads[3:]

        run(scene())

    def test_close_may_be_called_again(self) -> None:
        async def scene() -> None:
            async with self.open_tier() as tier:
                await self._write(tier, [b"x"])
                await tier.close()
                await tier.close()

        run(scene())

    # -------------------------------------------------------------------------- shared steps

    async def _write(self, tier: Any, payloads: Sequence[bytes]) -> Any:
        return await tier.write(self.records(payloads), [_pages(payload) for payload in payloads])

    async def _read(self, tier: Any, locations: Any, *, spare_pages: int = 0) -> list[bytes | None]:
        lengths = [int(location["length"]) for location in locations]
        buffers = [_blank(length + spare_pages * PAGE_BYTES) for length in lengths]
        statuses = await tier.read(locations, buffers)
        assert len(statuses) == len(locations)
        return [
            buffer[:length].tobytes() if status == OK else None
            for buffer, length, status in zip(buffers, lengths, statuses, strict=True)
        ]


def _blank(size: int) -> npt.NDArray[np.uint8]:
    """Whole pages at an aligned address, full of bytes that nobody stored."""
    pages = -(-size // PAGE_BYTES) * PAGE_BYTES
    raw = np.full(pages + PAGE_BYTES, 0xEE, np.uint8)
    address: int = raw.__array_interface__["data"][0]
    return raw[-address % PAGE_BYTES :][:pages]


def _pages(payload: bytes) -> npt.NDArray[np.uint8]:
    pages = _blank(len(payload))
    pages[: len(payload)] = np.frombuffer(payload, np.uint8)
    pages[len(payload) :] = 0
    return pages
