"""`ctxstore status`: what a node is doing, for people and for tools.

Owns the choice and layout of figures. It must not interpret them: the node's numbers are shown as
they come.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Final

from ctxstore.errors import ConfigError, CtxStoreError
from ctxstore.units import describe_size
from ctxstore_client.cli.places import place_of
from ctxstore_client.discovery import DEFAULT_ADDRESS, Endpoint, SharedMemory, resolve_target
from ctxstore_client.store import connect

if TYPE_CHECKING:
    import argparse

_TEXT: Final = """\
Show what one node, or each of several, is doing: memory, disk, shards, hits, connections.

  ctxstore status                                      the node at CTXSTORE_ADDRESS
  ctxstore status ctxstore://10.0.0.1:7600,10.0.0.2:7600
  ctxstore status /var/lib/ctxstore                    the daemon on that data directory
  ctxstore status --json | jq .nodes[0].node.engine.entries

Exit code 0: all of them answer, 1: one does not, 2: usage.
"""
_WIDTH: Final = 18


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ctxstore status`."""
    parser.description = _TEXT
    parser.add_argument(
        "where",
        nargs="?",
        metavar="ADDRESS|DIR",
        help=f"address or data directory (default: CTXSTORE_ADDRESS, then {DEFAULT_ADDRESS})",
    )
    parser.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="per node")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Ask and print."""
    place = place_of(args.where)
    if not place.served:
        raise CtxStoreError(f"no daemon runs on {place.directory}")
    if not args.timeout > 0:
        raise ConfigError("--timeout must be above zero")
    target = resolve_target(place.address)
    nodes = [_ask(endpoint, args.timeout) for endpoint in target.endpoints]
    if args.json:
        sys.stdout.write(json.dumps({"nodes": nodes}, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_table(node) for node in nodes))
    return 0 if all(node["reachable"] for node in nodes) else 1


def _ask(endpoint: Endpoint, timeout_s: float) -> dict[str, Any]:
    address = str(endpoint)
    found: dict[str, Any] = {"address": address, "reachable": False, "node": None}
    try:
        # Figures need no arena: mapping one only to look would be a waste.
        with connect(address, shm=SharedMemory.OFF, timeout_s=timeout_s) as store:
            found["ping_us"] = round(store.ping() * 1e6)
            found["node"] = store.stats()["node"]
            found["reachable"] = found["node"] is not None
    except CtxStoreError as error:
        found["error"] = str(error)
    return found


def _table(found: dict[str, Any]) -> str:
    lines = [("address", found["address"])]
    if not found["reachable"]:
        lines.append(("state", f"not reachable: {found.get('error', 'no answer')}"))
        return _layout(lines)
    node = found["node"]
    about = _part(node, "node")
    engine = _part(node, "engine")
    server = _part(node, "server")
    counters = _part(engine, "counters")
    lines += [
        ("state", f"{node.get('phase', 'serving')}, ping {found['ping_us']} us"),
        ("node", f"{about.get('id', '?')}, version {about.get('version', '?')}"),
        ("up for", _duration(about.get("uptime_s"))),
        ("shards", _shards(engine)),
        ("memory", _used(engine, "arena_used_bytes", "arena_bytes", _part(node, "arena"))),
        ("disk", _disk(engine, _part(node, "disk"))),
        ("held", f"{engine.get('holds', 0)} shards, {_size(engine.get('held_bytes'))}"),
        ("leased", f"{engine.get('leases', 0)} leases, {_size(engine.get('leased_bytes'))}"),
        ("connections", _connections(server)),
        ("gets", _gets(counters)),
        ("puts", _puts(counters)),
    ]
    return _layout(lines)


def _part(tree: dict[str, Any], name: str) -> dict[str, Any]:
    part = tree.get(name)
    return part if isinstance(part, dict) else {}


def _layout(lines: list[tuple[str, str]]) -> str:
    return "".join(f"{name:<{_WIDTH}}{text}\n" for name, text in lines)


def _size(count: Any) -> str:
    return describe_size(int(count or 0))


def _duration(seconds: Any) -> str:
    whole = int(seconds or 0)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def _shards(engine: dict[str, Any]) -> str:
    waiting = f", {_size(engine.get('dirty_bytes'))} not on disk yet"
    return f"{engine.get('entries', 0)} of at most {engine.get('entries_max', '?')}{waiting}"


def _used(engine: dict[str, Any], used: str, total: str, arena: dict[str, Any]) -> str:
    pages = arena.get("pages", "?")
    return f"{_size(engine.get(used))} of {_size(engine.get(total))} used, {pages} pages"


def _disk(engine: dict[str, Any], about: dict[str, Any]) -> str:
    how = f", by {about.get('io_engine', '?')}"
    how += "" if about.get("direct_io", True) else " through the page cache (no O_DIRECT)"
    state = "" if engine.get("disk_ok", True) else ", FAILED: nothing is written any more"
    free, usable = engine.get("segments_free", 0), engine.get("segments_usable", 0)
    return f"{usable - free} of {usable} segments used{how}{state}"


def _connections(server: dict[str, Any]) -> str:
    control, data = server.get("control_connections", 0), server.get("data_connections", 0)
    staging = f"{_size(server.get('staging_bytes'))} of {_size(server.get('staging_bytes_max'))}"
    return f"{control} control, {data} data; staging {staging}"


def _gets(counters: dict[str, Any]) -> str:
    memory, nvme = counters.get("get_hits_memory", 0), counters.get("get_hits_nvme", 0)
    misses = counters.get("get_misses", 0)
    total = memory + nvme + misses
    share = f" ({100 * (memory + nvme) / total:.1f} % hits)" if total else ""
    return f"{memory} from memory, {nvme} from disk, {misses} misses{share}"


def _puts(counters: dict[str, Any]) -> str:
    names = {"committed": "stored", "exists": "known", "refused": "refused"}
    return ", ".join(f"{counters.get(f'put_{name}', 0)} {text}" for name, text in names.items())
