"""`ctxstore bench`: arguments, order of the rows, table and JSON.

Owns what the user sees. It must not measure anything itself.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ctxstore_client
from ctxstore.errors import CtxStoreError
from ctxstore_client.benchmark import disk_paths, paths
from ctxstore_client.benchmark.ceilings import DiskCeiling
from ctxstore_client.benchmark.node import BenchNode, machine

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from ctxstore_client.benchmark.harness import Row

MIB = 1024 * 1024
ROWS = (
    "same_host_get",
    "same_host_get_512k",
    "same_host_put",
    "same_host_put_staged",
    "rpc_32",
    "rpc_256",
    "match_400",
    "view_32",
    "tcp_get",
    "nvme_read_2m",
    "nvme_read_256k",
    "nvme_write",
    "remote_nvme",
    "ping_under_load",
    "restart_1m",
)
METADATA_ROWS = ("rpc_32", "rpc_256", "match_400", "view_32")
COLD_BYTES = 512 * MIB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ctxstore bench`."""
    parser.add_argument("what", nargs="?", choices=["node"], default="node", help="what to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per throughput row")
    parser.add_argument("--quick", action="store_true", help="2 rounds: shows that it works")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument(
        "--dir", type=Path, help="where the temporary directory goes; measure the disk you will use"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and report. Exit code 0 when every row was measured, whether or not targets are
    met."""
    effort = paths.Effort(
        rounds=2 if args.quick else max(2, args.rounds),
        calls=200 if args.quick else 1000,
        latency_rounds=2 if args.quick else 5,
    )
    wanted: set[str] = set(args.only or ROWS)
    # Ended from outside, the daemon and the temporary directory must go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="ctxstore-bench-", dir=args.dir) as name:
        report = _Report(as_json=args.json)
        try:
            _measure(Path(name), wanted, effort, report)
        except (CtxStoreError, RuntimeError, OSError) as error:
            sys.stderr.write(f"ctxstore bench: {error}\n")
            return 1
    report.finish()
    return 0


class _Report:
    """Prints rows as they come, or collects them for one JSON object."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._rows: dict[str, dict[str, Any]] = {}
        self.node: dict[str, Any] = {}
        """Page size and I/O engine obtained, known before the first row."""

    def progress(self, text: str) -> None:
        sys.stderr.write(f"\r\033[K{text}" if sys.stderr.isatty() else f"{text}\n")
        sys.stderr.flush()

    def add(self, row: Row) -> None:
        # A figure from 4 KiB pages must say so wherever the row is quoted.
        row.extra.setdefault("pages", self.node["pages"])
        row.extra.setdefault("io_engine", self.node["io_engine"])
        self._rows[row.key] = row.as_json()
        if self._as_json:
            return
        self.progress("")
        if len(self._rows) == 1:
            sys.stdout.write(
                f"{'row':<22}{'value':>10} {'unit':<5}{'ceiling':>9}{'ratio':>8}"
                f"{'target':>8}{'CPU s/GB':>10}  met\n"
            )
        shown = row.as_json()
        cells = [_cell(shown[name]) for name in ("ceiling", "ratio", "target", "cpu_s_per_gb")]
        sys.stdout.write(
            f"{row.key:<22}{row.value:>10.3f} {row.unit:<5}{cells[0]:>9}{cells[1]:>8}"
            f"{cells[2]:>8}{cells[3]:>10}  {'yes' if row.met else 'NO'}\n"
        )
        sys.stdout.flush()

    def finish(self) -> None:
        facts = {"machine": machine(), "node": self.node}
        if self._as_json:
            sys.stdout.write(json.dumps({**self._rows, **facts}, indent=1) + "\n")
        else:
            for name, values in facts.items():
                sys.stdout.write(f"{name}: " + ", ".join(f"{k}={v}" for k, v in values.items()))
                sys.stdout.write("\n")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _measure(directory: Path, wanted: set[str], effort: paths.Effort, report: _Report) -> None:
    with ExitStack() as stack:
        node = stack.enter_context(BenchNode(directory, memory="2GiB", disk="6GiB"))
        node.wait_populated()
        report.node = _node_facts(node)
        huge = report.node["huge_page_bytes"] > 0
        disk = DiskCeiling(directory, COLD_BYTES * 2, huge=huge)
        if wanted & {"nvme_read_2m", "nvme_read_256k", "nvme_write"}:
            disk.prepare()
        for key, call in _plan(node, disk, effort, wanted):
            if key in wanted:
                report.progress(f"measuring {key} ...")
                for row in call():
                    report.add(row)
    if "restart_1m" in wanted:
        report.progress("measuring restart_1m ...")
        report.add(disk_paths.restart_1m(directory, effort))


def _plan(
    node: BenchNode, disk: DiskCeiling, effort: paths.Effort, wanted: set[str]
) -> list[tuple[str, Callable[[], list[Row]]]]:
    first_metadata = next((key for key in METADATA_ROWS if key in wanted), METADATA_ROWS[0])

    def get(key: str, shape: tuple[int, int], target: float) -> list[Row]:
        return [paths.same_host_get(node, key, shape=shape, target=target, effort=effort)]

    def put(key: str, target: float, *, staged: bool) -> list[Row]:
        return [paths.same_host_put(node, key, staged=staged, target=target, effort=effort)]

    def read(block: int) -> list[Row]:
        return [disk_paths.nvme_read(node, disk, block, total=COLD_BYTES, effort=effort)]

    return [
        ("same_host_get", lambda: get("same_host_get", (32, 2 * MIB), 0.90)),
        ("same_host_get_512k", lambda: get("same_host_get_512k", (128, MIB // 2), 0.80)),
        ("same_host_put", lambda: put("same_host_put", 0.45, staged=False)),
        ("same_host_put_staged", lambda: put("same_host_put_staged", 0.70, staged=True)),
        (first_metadata, lambda: paths.metadata(node, wanted.__contains__, effort)),
        ("tcp_get", lambda: [paths.tcp_get(node, effort)]),
        ("nvme_read_2m", lambda: read(2 * MIB)),
        ("nvme_read_256k", lambda: read(256 * 1024)),
        ("nvme_write", lambda: [disk_paths.nvme_write(node, disk, effort)]),
        ("remote_nvme", lambda: [disk_paths.remote_nvme(node, effort)]),
        ("ping_under_load", lambda: [paths.ping_under_load(node, effort)]),
    ]


def _node_facts(node: BenchNode) -> dict[str, Any]:
    """Page size and I/O engine obtained: figures mean nothing without them."""
    with ctxstore_client.connect(node.address) as store:
        told = store.stats()["node"]
    return {"version": told["node"]["version"], **told["disk"], **told["arena"]}
