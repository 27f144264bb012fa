"""Prefetch: promotion before it is asked for.

Owns the answer to Prefetch and what bounds it. It must not keep anything in memory: what was
promoted may be evicted like everything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore.limits import PAGE_BYTES
from ctxstore.wire import messages as wire
from ctxstore_daemon.engine.core import NS_PER_S, Core
from ctxstore_daemon.engine.index import INLINE
from ctxstore_daemon.engine.loads import LoadsState, LoadWaiter

if TYPE_CHECKING:
    from ctxstore_daemon.engine.leases import LeasesState

_PATIENCE_NS: Final = 10 * NS_PER_S
"""How long a prefetch without a time of its own may wait for room."""


class PrefetchOperation(LoadWaiter):
    """Wants rows in memory and nothing more."""

    __slots__ = ("core", "waiting")

    def __init__(self, core: Core, *, conn: int, deadline_ns: int, waiting: int) -> None:
        super().__init__(conn, 0, deadline_ns)
        self.core = core
        self.waiting = waiting

    def loaded(self, item: int, row: int) -> None:
        self.waiting -= 1
        if not self.waiting:
            self.core.finish(self)

    def expire(self) -> None:
        self.core.finish(self)

    def abandon(self) -> None:
        self.core.finish(self)


def prefetch(
    core: Core, *, leases: LeasesState, loads: LoadsState, conn: int, message: wire.Prefetch
) -> None:
    """Promote what is on nvme, up to the share one connection may lease; answers how many will be
    there.
    """
    index = core.index
    rows = np.unique(index.find_batch(core.conns[conn].ns, message.keys))
    rows = rows[index.visible(rows, core.now_ns)]
    here = (index.slot[rows] > 0) | ((index.flags[rows] & INLINE) != 0)
    missing = rows[~here]
    pages = (index.length[missing].astype(np.int64) + PAGE_BYTES - 1) // PAGE_BYTES
    missing = missing[np.cumsum(pages) * PAGE_BYTES <= leases.share_bytes]
    core.policy.touch(rows)
    core.reply(conn, wire.CountReply(message.rid, int(here.sum()) + len(missing)))
    if not len(missing):
        return
    patience = message.by_us * 1000 or _PATIENCE_NS
    operation = PrefetchOperation(
        core, conn=conn, deadline_ns=core.now_ns + patience, waiting=len(missing)
    )
    core.start(operation)
    loads.want(operation, [(0, row) for row in missing.tolist()], background=True)
