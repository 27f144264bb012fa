"""The sync face: the public methods over plans, executed on the caller's thread.

Owns the signatures and the checks of arguments. It must not know messages, sockets or connections:
every method builds a plan and hands it to the driver.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from ctxstore.errors import ClosedError, DeadlineExceeded, Overloaded, TransportError
from ctxstore.wire.messages import Lookup, PutResult
from ctxstore_client.blocking import BlockingDriver, CancelState
from ctxstore_client.discovery import SharedMemory, Target, resolve_target
from ctxstore_client.ops import arguments, control, lending
from ctxstore_client.ops.calls import PutOptions, get_call, prefetch_call, put_call
from ctxstore_client.pool import Pool
from ctxstore_client.tickets import Ticket, Workers

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from types import TracebackType

    import numpy as np
    import numpy.typing as npt

    from ctxstore.keys import Keys
    from ctxstore.wire.messages import VerifyReply
    from ctxstore_client.ops.arguments import Buffers, DurabilityName
    from ctxstore_client.ops.calls import PlanFor
    from ctxstore_client.ops.control import ShardStat

T = TypeVar("T")

__all__ = ["Store", "Ticket", "connect"]

TIMEOUT_S: Final = 5.0


def connect(
    address: str | None = None,
    *,
    namespace: str | None = None,
    token: str | None = None,
    shm: str | SharedMemory = SharedMemory.AUTO,
    timeout_s: float = TIMEOUT_S,
    cluster_id: str = "",
) -> Store:
    """A store at `ctxstore://host:port[,host:port]` or `unix:///path`; a context manager.

    What is None comes from CTXSTORE_ADDRESS, CTXSTORE_NAMESPACE and CTXSTORE_TOKEN, then from the
    defaults. `timeout_s` is the deadline of every operation that names none. Returns a store also
    when no daemon answers: it connects by itself later. Raises ValueError (ConfigError) for a
    malformed argument, AuthenticationError, UnknownNamespace, WrongCluster or ProtocolError for
    what the daemon refuses.
    """
    target = resolve_target(
        address, namespace=namespace, token=token, cluster_id=cluster_id, shm=shm
    )
    store = Store(target, timeout_s=arguments.default_timeout_of(timeout_s))
    try:
        store.ping()
    except (TransportError, DeadlineExceeded, Overloaded):
        pass
    except BaseException:
        store.close()
        raise
    return store


class Store:
    """A context store. Thread-safe; close it, or use it as a context manager.

    Misses and time-outs are values. `ValueError` is raised for misuse, before anything is sent. A
    method returns or raises only when the caller's buffers cannot be touched any more. In a forked
    child the store makes its own connections; views, staged buffers and tickets raise ForkedError.
    """

    def __init__(self, target: Target, *, timeout_s: float = TIMEOUT_S) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._pool = Pool(target)
        self._driver = BlockingDriver(self._pool)
        self._workers = Workers()
        self._staged_lock = threading.Lock()
        self._staged: list[lending.Staged] = []

    # ------------------------------------------------------------ shards

    def put(
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
        return self._run(plan_for, timeout_s)

    def get_into(
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
        return self._run(get_call(keys, buffers, exact=exact), timeout_s)

    @contextmanager
    def view(
        self, keys: Keys, *, timeout_s: float | None = None
    ) -> Generator[lending.Views, None, None]:
        """Read-only memoryviews of shards, leased until the block ends; None where missing.

        Raises StaleView at the end of the block when a lease was lost meanwhile: then what was read
        may not have been what was stored.
        """
        rows = arguments.key_rows(keys)
        views = self._run(lambda context: lending.open_view(context, rows), timeout_s)
        try:
            yield views
        except BaseException:
            views.release()
            raise
        views.close()

    @contextmanager
    def alloc(
        self, lengths: Iterable[int], *, timeout_s: float | None = None
    ) -> Generator[lending.Staged, None, None]:
        """Writable memoryviews of these lengths, to be filled and put within the block.

        Raises Overloaded when the node grants no such staging.
        """
        sizes = arguments.shard_lengths(lengths)
        staged = self._run(lambda context: lending.open_staged(context, sizes), timeout_s)
        with self._staged_lock:
            self._staged.append(staged)
        try:
            yield staged
        finally:
            with self._staged_lock:
                self._staged = [other for other in self._staged if other is not staged]
            staged.close()

    # ------------------------------------------------------------ questions

    def exists(self, keys: Keys, *, timeout_s: float | None = None) -> npt.NDArray[np.bool_]:
        """(n,) bool: whether a shard is there; False also for what was not answered in time."""
        rows = arguments.key_rows(keys)
        return self._run(lambda context: control.exists(context, rows), timeout_s)

    def match(self, keys: Keys, *, timeout_s: float | None = None) -> int:
        """How many leading keys are there; past the deadline, how many are known to be."""
        rows = arguments.key_rows(keys)
        return self._run(lambda context: control.match(context, rows), timeout_s)

    def stat(self, keys: Keys, *, timeout_s: float | None = None) -> list[ShardStat | None]:
        """Length, tier, remaining time to live of each shard; None where it is not there."""
        rows = arguments.key_rows(keys)
        return self._run(lambda context: control.stat(context, rows), timeout_s)

    def explain(self, keys: Keys, *, timeout_s: float | None = None) -> list[Any]:
        """What the node knows of each key, for people: one JSON object per key, in order.

        Raises DeadlineExceeded or TransportError.
        """
        rows = arguments.key_rows(keys)
        return self._run(lambda context: control.explain(context, rows), timeout_s)

    def stats(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """{"client": counters of this store, "node": those of the node, None if unreachable}."""
        node = self._run(control.node_stats, timeout_s)
        return {"client": self._pool.snapshot(), "node": node}

    def ping(self, *, timeout_s: float | None = None) -> float:
        """Seconds of one round trip. Raises like `flush`, and why a hello is refused."""
        return self._run(control.ping, timeout_s)

    # ------------------------------------------------------------ changes

    def hold(
        self, keys: Keys, ttl_s: float = 60, *, timeout_s: float | None = None
    ) -> npt.NDArray[np.bool_]:
        """Keep shards for `ttl_s` from now; 0 ends the hold. (n,) bool: where it applied.

        Raises Overloaded above the node's share of holds, DeadlineExceeded, TransportError, and
        StorageError where the node cannot write it down: the change may be lost with its restart.
        """
        return self._masked(keys, control.hold_op(arguments.hold_ms(ttl_s)), timeout_s)

    def touch(
        self, keys: Keys, ttl_s: float | None = None, *, timeout_s: float | None = None
    ) -> npt.NDArray[np.bool_]:
        """Mark shards as used and raise their time to live to `ttl_s` from now. Like `hold`."""
        return self._masked(keys, control.touch_op(arguments.ttl_ms(ttl_s)), timeout_s)

    def remove(self, keys: Keys, *, timeout_s: float | None = None) -> npt.NDArray[np.bool_]:
        """Remove shards for good; (n,) bool: whether each was there. Durable on return.

        Raises DeadlineExceeded, TransportError or StorageError: some may be removed then.
        """
        return self._masked(keys, control.remove_op(), timeout_s)

    def flush(self, *, timeout_s: float | None = None) -> int:
        """Wait until all that is committed is on disk; returns how many shards were written.

        Raises DeadlineExceeded or TransportError.
        """
        return self._run(control.flush, timeout_s)

    def verify(
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
        return self._run(lambda c: control.verify(c, bytes_per_s, progress), timeout_s)

    # ------------------------------------------------------------ in the background

    def prefetch(
        self, keys: Keys, by_s: float | None = None, *, timeout_s: float | None = None
    ) -> Ticket[int]:
        """Ask the node to have shards in memory in `by_s` seconds; its result: how many will be."""
        return self._submit(prefetch_call(keys, by_s), timeout_s, lambda: 0)

    def submit_get(
        self,
        keys: Keys,
        buffers: Buffers,
        timeout_s: float | None = None,
        *,
        exact: bool = False,
    ) -> Ticket[list[Lookup]]:
        """`get_into` in the background. Arguments are checked at once; the deadline runs from now.

        Raises Overloaded when too many operations wait.
        """
        plan_for = get_call(keys, buffers, exact=exact)
        return self._submit(plan_for, timeout_s, lambda: [Lookup.TIMEOUT] * len(keys))

    def submit_put(
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
    ) -> Ticket[list[PutResult]]:
        """`put` in the background, with the rules of `submit_get`."""
        options = PutOptions(ttl_s, priority, durability, depth0, cost_s)
        plan_for = put_call(keys, buffers, options, staged=self._staged)
        return self._submit(plan_for, timeout_s, lambda: [PutResult.TIMEOUT] * len(keys))

    # ------------------------------------------------------------ life

    def close(self) -> None:
        """Close every connection and end every thread; operations of others end as misses."""
        self._workers.stop()
        self._pool.close()
        self._workers.join()
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------ inside

    def _timeout_of(self, timeout_s: float | None) -> float:
        return arguments.timeout_of(timeout_s, self._timeout_s)

    def _run(self, plan_for: PlanFor[T], timeout_s: float | None) -> T:
        context = self._driver.context(self._timeout_of(timeout_s))
        return self._driver.run(plan_for(context), context)

    def _masked(
        self, keys: Keys, operation: control.MaskedOp, timeout_s: float | None
    ) -> npt.NDArray[np.bool_]:
        rows = arguments.key_rows(keys)
        return self._run(lambda context: control.masked(context, rows, operation), timeout_s)

    def _submit(
        self, plan_for: PlanFor[T], timeout_s: float | None, if_cancelled: Callable[[], T]
    ) -> Ticket[T]:
        # The deadline runs from now on, also while the ticket waits for a thread.
        context = self._driver.context(self._timeout_of(timeout_s))

        def work(cancel: CancelState) -> T:
            try:
                return self._driver.run(plan_for(context), context, cancel)
            except ClosedError:  # closed before it began, as if it had still been waiting
                return if_cancelled()

        ticket = Ticket(work, if_cancelled)
        self._workers.submit(ticket)
        return ticket
