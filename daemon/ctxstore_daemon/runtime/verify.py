"""`ctxstore verify DIR`: an off-line check, with its lock, its progress and its report.

Owns what is printed and the exit code. It must not know the format: `segments.verifier` does.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ctxstore.errors import CtxStoreError
from ctxstore.units import describe_size
from ctxstore_daemon.runtime import host
from ctxstore_daemon.runtime.datadir import DataDirLock
from ctxstore_daemon.runtime.disk import RealDisk
from ctxstore_daemon.runtime.mover import ThreadMover
from ctxstore_daemon.segments.verifier import VerifyProgress, VerifyReport, verify_directory

if TYPE_CHECKING:
    from pathlib import Path


def verify(directory: Path, *, as_json: bool, quiet: bool) -> int:
    """Check a directory and print what was found. 0: all is well, 1: damage, or not readable."""
    try:
        lock = DataDirLock(directory, create=False)
        try:
            report = asyncio.run(_check(directory, quiet=quiet))
        finally:
            lock.release()
    except CtxStoreError as error:
        sys.stderr.write(f"ctxstore: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("ctxstore: interrupted\n")
        return 1
    if as_json:
        sys.stdout.write(json.dumps(_as_json(report), indent=2) + "\n")
    else:
        sys.stdout.write(_as_text(directory, report))
    return 0 if report.ok else 1


async def _check(directory: Path, *, quiet: bool) -> VerifyReport:
    disk = RealDisk(directory)
    mover = ThreadMover(max(1, min(4, host.processors() - 1)))
    try:
        return await verify_directory(disk, mover=mover, progress=None if quiet else _Progress())
    finally:
        mover.close()
        disk.close()


class _Progress:
    """A line on stderr for every percent."""

    def __init__(self) -> None:
        self._last = -1
        self._on_terminal = sys.stderr.isatty()

    def __call__(self, progress: VerifyProgress) -> None:
        percent = 100 * progress.done_bytes // max(1, progress.total_bytes)
        # Files get a line for every tenth only.
        if percent == self._last or (not self._on_terminal and percent % 10):
            return
        self._last = percent
        of = f"{describe_size(progress.done_bytes)} of {describe_size(progress.total_bytes)}"
        end = "\r" if self._on_terminal and percent < 100 else "\n"
        sys.stderr.write(f"verified {percent:3d} %, {of}{end}")
        sys.stderr.flush()


def _as_json(report: VerifyReport) -> dict[str, Any]:
    found = asdict(report)
    for damage in found["damages"]:
        damage["kind"] = damage["kind"].value
    return {"ok": report.ok, "damaged": len(report.damages), **found}


def _as_text(directory: Path, report: VerifyReport) -> str:
    lines = [
        f"damaged: {d.kind.value}, {_where(d.file, d.offset)}: {d.detail} {d.key}".rstrip()
        for d in report.damages
    ]
    lines += [f"note: {note}" for note in report.notes]
    if report.quarantined:
        lines.append(f"note: {report.quarantined} damaged shards were known and are not served")
    lines.append(
        f"{directory}: {report.shards} shards ({describe_size(report.shard_bytes)}) in "
        f"{report.segments} segments, {report.meta_records} log records, "
        + ("no damage" if report.ok else f"{len(report.damages)} damaged")
    )
    return "\n".join(lines) + "\n"


def _where(file: str, offset: int) -> str:
    return f"{file} at byte {offset}" if offset else file
