"""Leases: a client's right to mapped slots, from the reply to its get until the release.

Owns which lease keeps which slots, and the share of the arena that one connection may keep. It must
not end a lease by itself while its connection lives: a mapped reader may still look at the slots,
so a lease that is too old closes the connection, and its end frees them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ctxstore_daemon.engine.core import NS_PER_S, ConnState, Core
from ctxstore_daemon.engine.events import CloseConn

if TYPE_CHECKING:
    from ctxstore_daemon.engine.slabs import Pages


@dataclass(slots=True)
class LeaseState:
    """Slots pinned for one reply. `kept_bytes` counts whole pages of payload."""

    conn: int
    pages: Pages
    kept_bytes: int
    expires_ns: int


class LeasesState:
    """All leases in the order they were given, which is the order in which they grow too old."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.leases: dict[int, LeaseState] = {}
        self.share_bytes = int(core.slabs.usable_bytes * core.settings.lease_fraction)
        self._lease_ns = int(core.settings.lease_s_max * NS_PER_S)

    def left(self, conn: ConnState) -> int:
        """Bytes that the connection may still lease."""
        return self.share_bytes - conn.leased_bytes

    def grant(self, conn_id: int, pages: Pages, kept_bytes: int) -> int:
        """Lease slots that are already pinned and counted in `leased_bytes` of the connection."""
        core = self._core
        lease = core.new_id()
        self.leases[lease] = LeaseState(conn_id, pages, kept_bytes, core.now_ns + self._lease_ns)
        core.conns[conn_id].leases[lease] = None
        return lease

    def release(self, conn_id: int, lease_ids: list[int]) -> None:
        """End leases of this connection; numbers that are not its own are ignored."""
        for lease in lease_ids:
            state = self.leases.get(lease)
            if state is not None and state.conn == conn_id:
                self._end(lease, state)

    def close(self, conn_id: int) -> None:
        """The connection is gone, and so are its leases."""
        for lease in list(self._core.conns[conn_id].leases):
            self._end(lease, self.leases[lease])

    def _end(self, lease: int, state: LeaseState) -> None:
        core = self._core
        del self.leases[lease]
        conn = core.conns[state.conn]
        del conn.leases[lease]
        conn.leased_bytes -= state.kept_bytes
        core.slabs.unpin_batch(state.pages)
        core.room_changed = True

    def expire(self) -> None:
        """Close connections that keep a lease for longer than lease_s_max."""
        core = self._core
        for state in self.leases.values():
            if state.expires_ns > core.now_ns:
                break
            conn = core.conns[state.conn]
            if not conn.closing:
                conn.closing = True
                core.counters.leases_expired += 1
                core.emit(CloseConn(state.conn, "a lease was kept longer than lease_s_max"))

    def next_expiry(self) -> int | None:
        """When `expire` has something to do."""
        core = self._core
        for state in self.leases.values():
            if not core.conns[state.conn].closing:
                return state.expires_ns
        return None

    def audit(self) -> list[str]:
        """What is wrong with the books; empty when all is well."""
        wrong: list[str] = []
        for conn_id, conn in self._core.conns.items():
            kept = sum(self.leases[lease].kept_bytes for lease in conn.leases)
            if kept > conn.leased_bytes or conn.leased_bytes > max(self.share_bytes, 0):
                wrong.append(f"conn {conn_id}: {conn.leased_bytes} bytes leased, {kept} found")
        if sum(len(conn.leases) for conn in self._core.conns.values()) != len(self.leases):
            wrong.append("leases are lost")
        return wrong

    def pins(self) -> list[Pages]:
        """Slots pinned by leases, one array each."""
        return [np.asarray(state.pages, np.int64) for state in self.leases.values()]
