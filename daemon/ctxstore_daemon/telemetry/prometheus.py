"""The metrics page: names, kinds and meaning of every figure in one table.

Owns how figures of `Node.stats` are shown to Prometheus. It must not count anything itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

PREFIX: Final = "ctxstore_"

GAUGES: Final[Mapping[str, str]] = {
    "engine.entries": "Shards in the index.",
    "engine.entries_max": "Most shards the index may hold.",
    "engine.index_bytes": "Memory of the index, outside the memory cap.",
    "engine.arena_bytes": "Size of the arena with its generation table.",
    "engine.arena_populated_bytes": "Bytes of the arena that have memory; slots beyond wait.",
    "engine.arena_used_bytes": "Bytes of slots that hold shards.",
    "engine.inline_bytes": "Payload bytes of inline shards.",
    "engine.leases": "Leases of clients.",
    "engine.leased_bytes": "Bytes of slots under lease.",
    "engine.holds": "Shards under a hold.",
    "engine.held_bytes": "Bytes of shards under a hold.",
    "engine.dirty_shards": "Shards that are not on disk yet.",
    "engine.dirty_bytes": "Bytes that are not on disk yet.",
    "engine.waiting_puts": "Puts that wait for room.",
    "engine.waiting_gets": "Gets that wait for a read.",
    "engine.loading": "Shards being read from disk.",
    "engine.segments": "Segments with data.",
    "engine.segments_free": "Segments that can take data.",
    "engine.segments_usable": "Segments that are not retired.",
    "engine.disk_ok": "1 while groups can be made durable.",
    "server.control_connections": "Open control connections.",
    "server.data_connections": "Open data connections.",
    "server.connections_max": "Most connections of both kinds.",
    "server.staging_bytes": "Staging handed out to clients.",
    "server.staging_bytes_max": "Most staging of all clients together.",
    "arena.huge_page_bytes": "Bytes of the arena that stand on 2 MiB pages.",
    "disk.direct_io": "1 where reads and writes go round the page cache.",
    "node.uptime_s": "Seconds since the node was started.",
}
"""Figures that go up and down, by their place in the statistics."""

COUNTERS: Final[Mapping[str, str]] = {
    "get_hits_memory": "Keys of gets answered from memory.",
    "get_hits_nvme": "Keys of gets answered from disk.",
    "get_hit_bytes": "Payload bytes of hits.",
    "get_misses": "Keys of gets that were not there.",
    "get_too_small": "Keys of gets whose buffer was too small.",
    "get_timeouts": "Keys of gets that were not ready by their deadline.",
    "get_overloaded": "Keys of gets turned away by a bound.",
    "put_committed": "Shards committed.",
    "put_committed_bytes": "Payload bytes committed.",
    "put_exists": "Shards put again.",
    "put_refused": "Shards refused by policy, size, quota or a full or failed disk.",
    "put_overloaded": "Shards turned away by a bound.",
    "put_timeouts": "Shards whose put was not through by its deadline.",
    "put_length_differs": "Shards put again with another length.",
    "put_payload_failed": "Payloads that never arrived whole.",
    "evicted": "Shards that left memory.",
    "demoted": "Of those, shards that stay on disk.",
    "slabs_cleared": "Chunks of the arena taken from one size class for another.",
    "promoted": "Shards read from disk into memory.",
    "expired": "Shards ended by their time to live.",
    "removed": "Shards removed by clients.",
    "quarantined": "Copies on disk found damaged.",
    "read_failed": "Reads from disk that failed.",
    "groups_written": "Group commits.",
    "groups_failed": "Group commits that failed.",
    "shards_written": "Shards written to disk.",
    "bytes_written": "Bytes of slots written to disk.",
    "write_given_up": "Shards kept in memory only after their writes failed.",
    "reclaimed_segments": "Segments emptied for new data.",
    "reclaim_survivors": "Shards copied out of emptied segments.",
    "reclaim_dropped": "Shards dropped with emptied segments.",
    "segments_lost": "Segments that became unreadable.",
    "leases_expired": "Leases ended because they were kept too long.",
    "reports": "Transfers that clients found damaged.",
    "reports_confirmed": "Of those, copies found damaged here.",
    "meta_failed": "Appends to the meta log that failed.",
}
"""Counters of the engine."""

SERVER_COUNTERS: Final[Mapping[str, str]] = {
    "opened": "Connections that said hello.",
    "closed": "Connections that ended.",
    "hellos_refused": "Connections turned away at their hello.",
    "protocol_errors": "Connections ended for breaking the protocol.",
    "internal_errors": "Replies that could not be sent for a defect of ours.",
}


def exposition(stats: Mapping[str, Any]) -> bytes:
    """The page for these statistics (`Node.stats`), in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(stats))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Figures:
    """A collector over one set of statistics."""

    def __init__(self, stats: Mapping[str, Any]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        """Every figure that is there: while a node recovers most are not."""
        yield from self._gauges()
        engine = self._stats.get("engine", {}).get("counters", {})
        for name, value in engine.items():
            yield CounterMetricFamily(
                PREFIX + name, COUNTERS.get(name, "Counter of the engine."), value=value
            )
        server = self._stats.get("server", {}).get("counters", {})
        for name, value in server.items():
            yield CounterMetricFamily(
                f"{PREFIX}connections_{name}", SERVER_COUNTERS[name], value=value
            )
        requests = CounterMetricFamily(
            f"{PREFIX}requests", "Requests on control connections.", labels=["op"]
        )
        for name, value in self._stats.get("server", {}).get("requests", {}).items():
            requests.add_metric([name], value)
        yield requests
        info = self._stats.get("node")
        if info is not None:
            about = GaugeMetricFamily(
                f"{PREFIX}node",
                "1, with what the node is in its labels.",
                labels=["node", "version", "pages"],
            )
            pages = str(self._stats.get("arena", {}).get("pages", ""))
            about.add_metric([str(info["id"]), str(info["version"]), pages], 1)
            yield about

    def _gauges(self) -> Iterable[Metric]:
        for place, text in GAUGES.items():
            part, _, name = place.partition(".")
            value = self._stats.get(part, {}).get(name)
            if value is not None:
                yield GaugeMetricFamily(PREFIX + name, text, value=float(value))
