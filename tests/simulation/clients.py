"""A simulated client process: real plans, random operations, everything told to the checker.

Owns what one client does and what each answer claims. It must not know faults: those come from the
scenario, which may also kill the client at any moment.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from ctxstore.errors import CtxStoreError, StaleView
from ctxstore.testing.checkers import (
    HistoryViolation,
    Level,
    ShardId,
    find_duplicates,
)
from ctxstore.wire.messages import Lookup, PutResult
from ctxstore_client.ops import arguments, calls, control, lending
from tests.simulation.driver import OperationState, SimDriver, SimPool

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from ctxstore.keys import KeyArray
    from ctxstore.testing.checkers import AttemptState, HistoryChecker
    from ctxstore_client.ops.requests import ByteArray, Context, Plan
    from tests.simulation.watch import DeviceWatch

T = TypeVar("T")

ROOM_FILL: Final = 0xA5
"""Buffers hold this before a get: what lies behind the shard must still be it afterwards."""


@dataclass(frozen=True, slots=True)
class Habits:
    """What clients do, as weights; see `Client.step`."""

    sizes: tuple[int, ...] = (1, 17, 900, 1024, 1025, 4096, 9000, 40_000, 131_072, 262_144)
    ttl_share: float = 0.25
    ttl_ms: tuple[int, ...] = (300, 2000, 8000)
    group_share: float = 0.5
    pause_s: float = 0.05
    timeouts_s: tuple[float, ...] = (2.0, 2.0, 5.0, 0.005)
    weights: tuple[tuple[str, int], ...] = (
        ("put", 34),
        ("get", 30),
        ("view", 6),
        ("exists", 5),
        ("match", 4),
        ("stat", 4),
        ("remove", 4),
        ("touch", 3),
        ("hold", 3),
        ("flush", 3),
        ("prefetch", 3),
        ("staged", 3),
    )


class World:
    """What all clients of a run share."""

    def __init__(
        self, *, rng: Random, checker: HistoryChecker, watch: DeviceWatch, keys: int
    ) -> None:
        self.rng = rng
        self.checker = checker
        self.watch = watch
        self.keys = [rng.randbytes(16) for _ in range(keys)]
        self.versions = 0
        self.operations = 0
        self.results: dict[str, int] = {}
        self.node_steady = True
        """Nobody slowed, stopped or killed the node lately: it owes answers in time."""

    def next_version(self) -> int:
        """A number for a put of one shard."""
        self.versions += 1
        return self.versions

    def count(self, what: str) -> None:
        """One more of these."""
        self.results[what] = self.results.get(what, 0) + 1


class Client:
    """One process. `run` until cancelled, which is its death."""

    def __init__(self, world: World, pool: SimPool, habits: Habits, *, name: str) -> None:
        self.world = world
        self.pool = pool
        self.habits = habits
        self.name = name
        self.shard_bytes_max = 256 * 1024
        self._driver = SimDriver(pool)
        self._checker = world.checker
        self._rng = world.rng
        self._views: list[tuple[lending.Views, list[bytes | None]]] = []
        self._steps = {
            "put": self.put,
            "get": self.get,
            "view": self.view,
            "exists": self.exists,
            "match": self.match,
            "stat": self.stat,
            "remove": self.remove,
            "touch": self.touch,
            "hold": self.hold,
            "flush": self.flush,
            "prefetch": self.prefetch,
            "staged": self.staged,
        }

    async def run(self, steps: int) -> None:
        """Do random things."""
        names = [name for name, _ in self.habits.weights]
        weights = [weight for _, weight in self.habits.weights]
        try:
            for _ in range(steps):
                await asyncio.sleep(self._rng.expovariate(1 / self.habits.pause_s))
                (name,) = self._rng.choices(names, weights)
                await self._steps[name]()
        finally:
            self._drop_views()
            self.pool.close()

    def _drop_views(self) -> None:
        """A dead process closes nothing in good order."""
        self._views.clear()

    # ------------------------------------------------------------------------- plumbing

    def now_ns(self) -> int:
        """The clock of the checker."""
        return round(asyncio.get_running_loop().time() * 1e9)

    def shard(self, key: bytes) -> ShardId:
        """A key in this client's namespace."""
        return ShardId(self.pool.namespace, key)

    def pick(self, most: int, *, again: bool = False) -> list[bytes]:
        """Some keys; a few of them are named by everybody all the time."""
        rng, keys = self._rng, self.world.keys
        count = rng.randint(1, most)
        hot = max(4, len(keys) // 8)
        picked = [
            keys[rng.randrange(hot)] if rng.random() < 0.3 else rng.choice(keys)
            for _ in range(count)
        ]
        return picked if again else list(dict.fromkeys(picked))

    async def operate(
        self, name: str, plan_of: Callable[[Context], Plan[T]], timeout_s: float | None = None
    ) -> tuple[T | None, OperationState]:
        """Run one operation; None where it raised what operations may raise."""
        world = self.world
        limit_s = self._rng.choice(self.habits.timeouts_s) if timeout_s is None else timeout_s
        context = self._driver.context(limit_s)
        state = OperationState()
        world.operations += 1
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        steady, result, outcome = world.node_steady, None, "ok"
        try:
            result = await self._driver.run(plan_of(context), context, state)
        except CtxStoreError as error:
            state.disturbed = True
            state.raised = repr(error)
            outcome = type(error).__name__
        took_s = loop.time() - began_s
        if took_s > limit_s + 0.001:
            raise HistoryViolation(f"{name} took {took_s} s of {limit_s} s")
        if state.silent and steady and world.node_steady:
            raise HistoryViolation(f"{name}: no answer in {limit_s} s on {state.silent}")
        world.count(f"{name}:{outcome}")
        world.watch.note(self.name, name, outcome, loop.time(), state.clean)
        return result, state

    # ------------------------------------------------------------------------- put

    def _draft(self) -> tuple[list[bytes], list[int], int, Level]:
        rng, habits = self._rng, self.habits
        keys = self.pick(6, again=rng.random() < 0.15)
        lengths = [min(rng.choice(habits.sizes), self.shard_bytes_max) for _ in keys]
        ttl_ms = rng.choice(habits.ttl_ms) if rng.random() < habits.ttl_share else 0
        level = Level.GROUP if rng.random() < habits.group_share else Level.MEMORY
        return keys, lengths, ttl_ms, level

    def _begin(
        self, keys: list[bytes], lengths: list[int], ttl_ms: int, level: Level
    ) -> list[AttemptState]:
        now = self.now_ns()
        return [
            self._checker.put_begins(
                now,
                self.shard(key),
                version=self.world.next_version(),
                length=length,
                ttl_ms=ttl_ms,
                level=level,
            )
            for key, length in zip(keys, lengths, strict=True)
        ]

    def _options(self, ttl_ms: int, level: Level) -> calls.PutOptions:
        return calls.PutOptions(
            ttl_s=ttl_ms / 1000 if ttl_ms else None,
            priority=self._rng.randint(-2, 2),
            durability="group" if level is Level.GROUP else "memory",
            depth0=self._rng.randrange(50),
            cost_s=None,
        )

    async def put(self) -> list[PutResult] | None:
        """Put a batch, sometimes with duplicates."""
        keys, lengths, ttl_ms, level = self._draft()
        return await self.put_batch(keys, lengths, ttl_ms, level)

    async def put_batch(
        self,
        keys: list[bytes],
        lengths: list[int],
        ttl_ms: int,
        level: Level,
        *,
        timeout_s: float | None = None,
    ) -> list[PutResult] | None:
        """Put these."""
        attempts = self._begin(keys, lengths, ttl_ms, level)
        buffers = [a.payload().copy() for a in attempts]
        plan_for = calls.put_call(keys, buffers, self._options(ttl_ms, level), staged=[])
        results, state = await self.operate("put", plan_for, timeout_s)
        for buffer in buffers:
            buffer[:] = 0xEE  # the caller's again: a late reader would store this
        self._judge_put(keys, attempts, results, state)
        return results

    async def staged(self) -> None:
        """Put from buffers that lie in the daemon's staging."""
        keys, lengths, ttl_ms, level = self._draft()
        lengths = [min(length, 40_000) for length in lengths]
        sizes = np.array(lengths, np.int64)
        staged, _ = await self.operate("alloc", lambda c: lending.open_staged(c, sizes))
        if staged is None:
            return
        try:
            attempts = self._begin(keys, lengths, ttl_ms, level)
            arrays: list[ByteArray] = []
            for attempt, view in zip(attempts, staged, strict=True):
                assert view is not None, "every length has its buffer"
                array = np.frombuffer(view, np.uint8)
                array[:] = attempt.payload()
                arrays.append(array)
            plan_for = calls.put_call(keys, arrays, self._options(ttl_ms, level), staged=[staged])
            results, state = await self.operate("put", plan_for)
            del arrays[:], array
            self._judge_put(keys, attempts, results, state)
        finally:
            staged.close()

    def _judge_put(
        self,
        keys: list[bytes],
        attempts: list[AttemptState],
        results: list[PutResult] | None,
        state: OperationState,
    ) -> None:
        now = self.now_ns()
        checker = self._checker
        for first, later in find_duplicates(keys):
            if results is not None and state.clean:
                done = (PutResult.COMMITTED, PutResult.EXISTS)
                if results[first] in done and results[later] is PutResult.COMMITTED:
                    raise HistoryViolation("a key named twice in a batch was committed twice")
        for position, attempt in enumerate(attempts):
            result = None if results is None else results[position]
            self.world.count(f"put:{'raised' if result is None else result.name}")
            if result is PutResult.COMMITTED:
                checker.put_stored(now, attempt)
            elif result is PutResult.EXISTS:
                checker.put_existed(now, attempt, sure=state.clean)
            elif result is PutResult.OVERLOADED:
                checker.put_discarded(now, attempt)
            else:
                checker.put_unknown(now, attempt)

    # ------------------------------------------------------------------------- reads

    async def get(self) -> None:
        """Get a batch into buffers of all sizes."""
        await self.get_batch(self.pick(8, again=self._rng.random() < 0.1))

    async def get_batch(self, keys: list[bytes], *, timeout_s: float | None = None) -> list[Lookup]:
        """Get these and look at every byte."""
        rng = self._rng
        room = [
            self.shard_bytes_max if rng.random() < 0.8 else rng.choice(self.habits.sizes)
            for _ in keys
        ]
        buffers = [np.full(size, ROOM_FILL, np.uint8) for size in room]
        began = self.now_ns()
        plan_for = calls.get_call(keys, buffers, exact=False)
        results, state = await self.operate("get", plan_for, timeout_s)
        if results is None:
            raise HistoryViolation(f"a get raised {state.raised}: it does so only for misuse")
        now = self.now_ns()
        for key, buffer, result in zip(keys, buffers, results, strict=True):
            self.world.count(f"get:{result.name}")
            shard = self.shard(key)
            if result is Lookup.HIT:
                self._checker.saw_bytes(began, now, shard, buffer, fill=ROOM_FILL)
            elif result is Lookup.MISS and state.clean:
                self._checker.saw_absent(began, now, shard)
            elif result is Lookup.TOO_SMALL:
                self._checker.saw_present(began, now, shard)
        return results

    async def view(self) -> None:
        """Open a view and keep it for a while, over other operations."""
        if len(self._views) >= 2 or (self._views and self._rng.random() < 0.5):
            self._close_view(*self._views.pop(0))
            return
        keys = self.pick(5)
        rows: KeyArray = arguments.key_rows(keys)
        began = self.now_ns()
        views, state = await self.operate("view", lambda c: lending.open_view(c, rows))
        if views is None:
            return
        now = self.now_ns()
        copies: list[bytes | None] = []
        try:
            views.check()
        except StaleView:
            self._check_stale(state)
            return
        for key, view in zip(keys, views, strict=True):
            copies.append(None if view is None else bytes(view))
            if view is not None:
                data = np.frombuffer(bytes(view), np.uint8)
                self._checker.saw_bytes(began, now, self.shard(key), data)
        self._views.append((views, copies))

    def _check_stale(self, state: OperationState) -> None:
        if state.clean and self.world.node_steady:
            link_ok = all(not link.end.closed for link in self.pool.links)
            if link_ok:
                raise HistoryViolation("a view went stale while its lease was good")

    def _close_view(self, views: lending.Views, copies: list[bytes | None]) -> None:
        link: Any = views._link
        seen = [None if view is None else bytes(view) for view in views]
        healthy = link is not None and not link.end.closed
        try:
            views.close()
        except StaleView as error:
            if healthy:
                raise HistoryViolation(f"a view went stale under a lease: {error}") from error
            self.world.count("view:stale")
            return
        if seen != copies:
            raise HistoryViolation("bytes changed under an open view")
        self.world.count("view:closed")

    # ------------------------------------------------------------------------- metadata

    async def exists(self) -> None:
        """Ask for presence."""
        keys = self.pick(20)
        rows = arguments.key_rows(keys)
        began = self.now_ns()
        found, state = await self.operate("exists", lambda c: control.exists(c, rows))
        self._judge_mask(keys, found, state, began)

    async def match(self) -> None:
        """Ask for a prefix."""
        keys = self.pick(10)
        rows = arguments.key_rows(keys)
        began = self.now_ns()
        count, state = await self.operate("match", lambda c: control.match(c, rows))
        if count is None:
            return
        now = self.now_ns()
        for key in keys[:count]:
            self._checker.saw_present(began, now, self.shard(key))
        if state.clean and count < len(keys):
            self._checker.saw_absent(began, now, self.shard(keys[count]))

    async def stat(self) -> None:
        """Ask for lengths."""
        keys = self.pick(10)
        rows = arguments.key_rows(keys)
        began = self.now_ns()
        stats, state = await self.operate("stat", lambda c: control.stat(c, rows))
        if stats is None:
            return
        now = self.now_ns()
        for key, found in zip(keys, stats, strict=True):
            if found is not None:
                self._checker.saw_present(began, now, self.shard(key), length=found.length)
            elif state.clean:
                self._checker.saw_absent(began, now, self.shard(key))

    def _judge_mask(self, keys: list[bytes], mask: Any, state: OperationState, began: int) -> None:
        if mask is None:
            return
        now = self.now_ns()
        for key, present in zip(keys, mask.tolist(), strict=True):
            if present:
                self._checker.saw_present(began, now, self.shard(key))
            elif state.clean:
                self._checker.saw_absent(began, now, self.shard(key))

    # ------------------------------------------------------------------------- changes

    async def remove(self) -> None:
        """Remove a few."""
        await self.remove_keys(self.pick(3))

    async def remove_keys(self, keys: list[bytes]) -> None:
        """Remove these."""
        rows = arguments.key_rows(keys)
        began = self.now_ns()
        for key in keys:
            self._checker.remove_begins(began, self.shard(key))
        mask, _ = await self.operate(
            "remove", lambda c: control.masked(c, rows, control.remove_op())
        )
        now = self.now_ns()
        for key in keys:
            done = mask is not None
            self._checker.remove_ends(began, now, self.shard(key), acknowledged=done)

    async def touch(self) -> None:
        """Raise TTLs."""
        await self.touch_keys(self.pick(3), self._rng.choice((0, 500, 5000)))

    async def touch_keys(self, keys: list[bytes], ttl_ms: int) -> None:
        """Raise the TTLs of these."""
        rows = arguments.key_rows(keys)
        began = self.now_ns()
        for key in keys:
            self._checker.touch_begins(began, self.shard(key))
        mask, state = await self.operate(
            "touch", lambda c: control.masked(c, rows, control.touch_op(ttl_ms))
        )
        now = self.now_ns()
        for position, key in enumerate(keys):
            shard = self.shard(key)
            if mask is None:
                self._checker.touched(began, None, shard, ttl_ms=ttl_ms)
            else:
                ttl = ttl_ms if mask[position] else 0
                self._checker.touched(began, now, shard, ttl_ms=ttl)
        self._judge_mask(keys, mask, state, began)

    async def hold(self) -> None:
        """Hold a few, or let them go."""
        await self.hold_keys(self.pick(2), self._rng.choice((0, 1000, 4000)))

    async def hold_keys(self, keys: list[bytes], ttl_ms: int) -> None:
        """Hold these; 0 lets go."""
        rows = arguments.key_rows(keys)
        began = self.now_ns()
        mask, state = await self.operate(
            "hold", lambda c: control.masked(c, rows, control.hold_op(ttl_ms))
        )
        for position, key in enumerate(keys):
            if mask is None:
                self._checker.held(began, self.shard(key), ttl_ms=0)
            elif mask[position]:
                self._checker.held(began, self.shard(key), ttl_ms=ttl_ms)
        self._judge_mask(keys, mask, state, began)

    async def flush(self) -> bool:
        """Make everything durable."""
        began = self.now_ns()
        count, _ = await self.operate("flush", control.flush)
        if count is not None:
            self._checker.flushed(began)
        return count is not None

    async def prefetch(self) -> None:
        """Warm a few."""
        keys = self.pick(6)
        rows = arguments.key_rows(keys)
        await self.operate("prefetch", lambda c: control.prefetch(c, rows, 0))
