"""The asyncio face: the public methods as coroutines over the plans of the sync face.

Owns the signatures, the checks of arguments, and the tasks of tickets. It must not know messages,
sockets or connections: every method builds a plan and hands it to the driver.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from ctxstore.errors import (
    ClosedError,
    DeadlineExceeded,
    ForkedError,
    Overloaded,
    TransportError,
)
from ctxstore.wire.messages import Lookup, PutResult
from ctxstore_client.aio import AsyncDriver, all_over
from ctxstore_client.discovery import SharedMemory, Target, resolve_target
from ctxstore_client.ops import arguments, control, lending
from ctxstore_client.ops.calls import PutOptions, get_call, prefetch_call, put_call
from ctxstore_client.pool import Pool
from ctxstore_client.store import TIMEOUT_S
from ctxstore_client.tickets import TICKETS_MAX

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
    from types import TracebackType

    import numpy as np
    import numpy.typing as npt

    from ctxstore.keys import Keys
    from ctxstore.wire.messages import VerifyReply
    from ctxstore_client.ops.arguments import Buffers, DurabilityName
    from ctxstore_client.ops.calls import PlanFor
    from ctxstore_client.ops.control import ShardStat

__all__ = ["AsyncStore", "AsyncTicket", "connect_async"]

T = TypeVar("T")


class _Connecting:
    """What `connect_async` returns: await it, or enter it with `async with`."""

    def __init__(self, make: Callable[[], Coroutine[Any, Any, AsyncStore]]) -> None:
        self._make = make
        self._store: AsyncStore | None = None

    def __await__(self) -> Any:
        return self._make().__await__()

    async def __aenter__(self) -> AsyncStore:
        self._store = await self._make()
        return self._store

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._store is not None, "left without having been entered"
        await self._store.close()


def connect_async(
    address: str | None = None,
    *,
    namespace: str | None = None,
    token: str | None = None,
    shm: str | SharedMemory = SharedMemory.AUTO,
    timeout_s: float = TIMEOUT_S,
    cluster_id: str = "",
) -> _Connecting:
    """`connect` for asyncio: `store = await connect_async(...)`, or `async with` it.

    Arguments and errors are those of `connect`; malformed arguments raise at once.
    """
    target = resolve_target(
        address, namespace=namespace, token=token, cluster_id=cluster_id, shm=shm
    )
    limit_s = arguments.default_timeout_of(timeout_s)

    async def make() -> AsyncStore:
        store = AsyncStore(target, timeout_s=limit_s)
        try:
            await store.ping()
        except (TransportError, DeadlineExceeded, Overloaded):
            pass
        except BaseException:
            await store.close()
            raise
        return store

    return _Connecting(make)


class AsyncTicket(Generic[T]):
    """An operation that goes on as a task of the loop; the rules are those of `Ticket`."""

    def __init__(self, task: asyncio.Task[T], if_cancelled: Callable[[], T]) -> None:
        self._task = task
        self._if_cancelled = if_cancelled

    def done(self) -> bool:
        """Whether the result is there."""
        return self._task.done()

    async def wait(self, timeout_s: float | None = None) -> T:
        """The operation's result. Raises DeadlineExceeded when it takes longer than `timeout_s`."""
        done, _ = await asyncio.wait([self._task], timeout=timeout_s)
        if not done:
            raise DeadlineExceeded(f"not done within {timeout_s} s; the operation goes on")
        return self._if_cancelled() if self._task.cancelled() else self._task.result()

    async def cancel(self) -> bool:
        """End the operation; when this returns its buffers are not touched any more."""
        if self._task.done():
            return False
        self._task.cancel()
        await all_over([self._task])
        return True


class AsyncStore:
    """The asyncio face of a store: the methods, meanings and errors of `Store`, as coroutines.

    Belongs to the loop it was made on. A cancelled method ends only when the caller's buffers
    cannot be touched any more; what it did until then stays done.
    """

    def __init__(self, target: Target, *, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._pool = Pool(target, nonblocking=True)
        self._driver = AsyncDriver(self._pool)
        self._process = os.getpid()
        self._staged: list[lending.Staged] = []
        self._closed = False
        self._tasks: set[asyncio.Task[Any]] = set()

    # ------------------------------------------------------------ shards

    async def put(
        self,
        keys: Keys,
        buffers: Buffers,
        ttl_s: Any = None,
        *,
        priority: Any = 0,
        durability: DurabilityName | None = None,
        depth0: Any = 0,
        cost_s: Any = None,
        timeout_s: float | None = None,
    ) -> list[PutResult]:
        """Store one shard per key; the first copy of a key wins, a later one is EXISTS.

        `keys`: n 16-byte keys, or (n, 16) uint8; `buffers`: n C-contiguous buffers of 1 .. 64 MiB.
        `ttl_s` (None: for ever), `priority` (int16), `depth0` (chunks before the first key's; the
        others follow one by one) and `cost_s` (seconds of recompute) are one value or one per key.
        `durability`: "memory", "group", or None for the namespace's. TIMEOUT means that the outcome
        is unknown, OVERLOADED that it was surely not stored. Buffers of `alloc` are not copied.
        """
        options = PutOptions(ttl_s, priority, durability, depth0, cost_s)
        plan_for = put_call(keys, buffers, options, staged=self._staged)
        return await self._run(plan_for, timeout_s)

    async def get_into(
        self,
        keys: Keys,
        buffers: Buffers,
        timeout_s: float | None = None,
        *,
        exact: bool = False,
    ) -> list[Lookup]:
        """Fill one writable buffer per key; a larger buffer gets exactly the shard's bytes.

        With `exact` a shard of another length than its buffer is a MISS. A buffer whose verdict is
        not HIT has undefined content.
        """
        return await self._run(get_call(keys, buffers, exact=exact), timeout_s)

    @asynccontextmanager
    async def view(
        self, keys: Keys, *, timeout_s: float | None = None
    ) -> AsyncGenerator[lending.Views, None]:
        """Read-only memoryviews of shards, leased until the block ends; None where missing.

        Raises StaleView at the end of the block when a lease was lost meanwhile: then what was read
        may not have been what was stored.
        """
        rows = arguments.key_rows(keys)
        views = await self._run(lambda context: lending.open_view(context, rows), timeout_s)
        try:
            yield views
        except BaseException:
            views.release()
            raise
        views.close()

    @asynccontextmanager
    async def alloc(
        self, lengths: Iterable[int], *, timeout_s: float | None = None
    ) -> AsyncGenerator[lending.Staged, None]:
        """Writable memoryviews of these lengths, to be filled and put within the block.

        Raises Overloaded when the node grants no such staging.
        """
        sizes = arguments.shard_lengths(lengths)
        staged = await self._run(lambda context: lending.open_staged(context, sizes), timeout_s)
        self._staged.append(staged)
        try:
            yield staged
        finally:
            self._staged = [other for other in self._staged if other is not staged]
            staged.close()

    # ------------------------------------------------------------ questions

    async def exists(self, keys: Keys, *, timeout_s: float | None = None) -> npt.NDArray[np.bool_]:
        """(n,) bool: whether a shard is there; False also for what was not answered in time."""
        rows = arguments.key_rows(keys)
        return await self._run(lambda context: control.exists(context, rows), timeout_s)

    async def match(self, keys: Keys, *, timeout_s: float | None = None) -> int:
        """How many leading keys are there; past the deadline, how many are known to be."""
        rows = arguments.key_rows(keys)
        return await self._run(lambda context: control.match(context, rows), timeout_s)

    async def stat(self, keys: Keys, *, timeout_s: float | None = None) -> list[ShardStat | None]:
        """Length, tier, remaining time to live of each shard; None where it is not there."""
        rows = arguments.key_rows(keys)
        return await self._run(lambda context: control.stat(context, rows), timeout_s)

    async def explain(self, keys: Keys, *, timeout_s: float | None = None) -> list[Any]:
        """What the node knows of each key, for people: one JSON object per key, in order.

        Raises DeadlineExceeded or TransportError.
        """
        rows = arguments.key_rows(keys)
        return await self._run(lambda context: control.explain(context, rows), timeout_s)

    async def stats(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """{"client": counters of this store, "node": those of the node, None if unreachable}."""
        node = await self._run(control.node_stats, timeout_s)
        return {"client": self._pool.snapshot(), "node": node}

    async def ping(self, *, timeout_s: float | None = None) -> float:
        """Seconds of one round trip. Raises like `flush`, and why a hello is refused."""
        return await self._run(control.ping, timeout_s)

    # ------------------------------------------------------------ changes

    async def hold(
        self, keys: Keys, ttl_s: float = 60, *, timeout_s: float | None = None
    ) -> npt.NDArray[np.bool_]:
        """Keep shards for `ttl_s` from now; 0 ends the hold. (n,) bool: where it applied.

        Raises Overloaded above the node's share of holds, DeadlineExceeded, TransportError, and
        StorageError where the node cannot write it down: the change may be lost with its restart.
        """
        return await self._masked(keys, control.hold_op(arguments.hold_ms(ttl_s)), timeout_s)

    async def touch(
        self, keys: Keys, ttl_s: float | None = None, *, timeout_s: float | None = None
    ) -> npt.NDArray[np.bool_]:
        """Mark shards as used and raise their time to live to `ttl_s` from now. Like `hold`."""
        return await self._masked(keys, control.touch_op(arguments.ttl_ms(ttl_s)), timeout_s)

    async def remove(self, keys: Keys, *, timeout_s: float | None = None) -> npt.NDArray[np.bool_]:
        """Remove shards for good; (n,) bool: whether each was there. Durable on return.

        Raises DeadlineExceeded, TransportError or StorageError: some may be removed then.
        """
        return await self._masked(keys, control.remove_op(), timeout_s)

    async def flush(self, *, timeout_s: float | None = None) -> int:
        """Wait until all that is committed is on disk; returns how many shards were written.

        Raises DeadlineExceeded or TransportError.
        """
        return await self._run(control.flush, timeout_s)

    async def verify(
        self,
        progress: Callable[[VerifyReply], None],
        *,
        bytes_per_s: int = 0,
        timeout_s: float | None = None,
    ) -> VerifyReply:
        """Have the node read and check every shard on its disk, at most so fast (0: no limit).

        `progress` gets every report, the last one is returned. Raises like `flush`.
        """
        if bytes_per_s < 0:
            raise ValueError(f"bytes_per_s is {bytes_per_s}; it must be 0 or more")
        return await self._run(lambda c: control.verify(c, bytes_per_s, progress), timeout_s)

    # ------------------------------------------------------------ in the background

    async def prefetch(
        self, keys: Keys, by_s: float | None = None, *, timeout_s: float | None = None
    ) -> AsyncTicket[int]:
        """Ask the node to have shards in memory in `by_s` seconds; its result: how many will be."""
        return self._submit(prefetch_call(keys, by_s), timeout_s, lambda: 0)

    async def submit_get(
        self,
        keys: Keys,
        buffers: Buffers,
        timeout_s: float | None = None,
        *,
        exact: bool = False,
    ) -> AsyncTicket[list[Lookup]]:
        """`get_into` in the background. Arguments are checked at once; the deadline runs from now.

        Raises Overloaded when too many operations wait.
        """
        plan_for = get_call(keys, buffers, exact=exact)
        return self._submit(plan_for, timeout_s, lambda: [Lookup.TIMEOUT] * len(keys))

    async def submit_put(
        self,
        keys: Keys,
        buffers: Buffers,
        ttl_s: Any = None,
        *,
        priority: Any = 0,
        durability: DurabilityName | None = None,
        depth0: Any = 0,
        cost_s: Any = None,
        timeout_s: float | None = None,
    ) -> AsyncTicket[list[PutResult]]:
        """`put` in the background, with the rules of `submit_get`."""
        options = PutOptions(ttl_s, priority, durability, depth0, cost_s)
        plan_for = put_call(keys, buffers, options, staged=self._staged)
        return self._submit(plan_for, timeout_s, lambda: [PutResult.TIMEOUT] * len(keys))

    # ------------------------------------------------------------ life

    async def close(self) -> None:
        """Cancel tickets, close every connection and end every thread."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await all_over(tasks)
        self._pool.close()
        await self._driver.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # ------------------------------------------------------------ inside

    def _timeout_of(self, timeout_s: float | None) -> float:
        return arguments.timeout_of(timeout_s, self._timeout_s)

    async def _run(self, plan_for: PlanFor[T], timeout_s: float | None) -> T:
        self._check_process()
        context = self._driver.context(self._timeout_of(timeout_s))
        return await self._driver.run(plan_for(context), context)

    async def _masked(
        self, keys: Keys, operation: control.MaskedOp, timeout_s: float | None
    ) -> npt.NDArray[np.bool_]:
        rows = arguments.key_rows(keys)
        return await self._run(lambda context: control.masked(context, rows, operation), timeout_s)

    def _submit(
        self, plan_for: PlanFor[T], timeout_s: float | None, if_cancelled: Callable[[], T]
    ) -> AsyncTicket[T]:
        self._check_process()
        if self._closed:
            raise ClosedError("the store is closed")
        if len(self._tasks) >= TICKETS_MAX:
            raise Overloaded(f"{TICKETS_MAX} operations wait already")
        context = self._driver.context(self._timeout_of(timeout_s))
        task = asyncio.create_task(self._driver.run(plan_for(context), context))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return AsyncTicket(task, if_cancelled)

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise ForkedError("an AsyncStore belongs to the loop of the process that made it")
