"""What the fault tests share: filled directories, off-line verify, the daemon seen from outside.

Owns no fault of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ctxstore.wire.messages import Lookup
from tests.daemon_process import ROOT, DaemonProcess
from tests.shards import first_difference, is_payload_of, payload_of, shard_key, shard_length

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

SETTLE_S: Final = 8.0
_CTXSTORE: Final = "import sys; from ctxstore_client.cli import main; sys.exit(main())"


def make_keys(space: int, count: int, length: int, *, first: int = 0) -> list[bytes]:
    """Keys of `count` shards."""
    return [shard_key(space, first + number, length) for number in range(count)]


def put_all(store: Any, keys: Sequence[bytes], **options: Any) -> list[Any]:
    """Put the payloads that belong to the keys."""
    results: list[Any] = store.put(keys, [payload_of(key) for key in keys], **options)
    return results


def lookups(store: Any, keys: Sequence[bytes], **options: Any) -> list[Lookup]:
    """Get all; a HIT with wrong bytes fails the test."""
    buffers = [np.zeros(shard_length(key), np.uint8) for key in keys]
    statuses: list[Lookup] = store.get_into(keys, buffers, **options)
    for key, status, buffer in zip(keys, statuses, buffers, strict=True):
        if status is Lookup.HIT:
            assert is_payload_of(key, buffer), f"wrong bytes: {first_difference(key, buffer)}"
    return statuses


def hits(store: Any, keys: Sequence[bytes]) -> list[bool]:
    """Whether each is a HIT; anything but HIT and MISS fails the test."""
    statuses = lookups(store, keys)
    assert set(statuses) <= {Lookup.HIT, Lookup.MISS}, statuses
    return [status is Lookup.HIT for status in statuses]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Its output as one JSON document."""
        return json.loads(self.out)


def command(*arguments: str, timeout_s: float = 30.0) -> Ended:
    """Run `ctxstore` with these arguments."""
    done = subprocess.run(
        [sys.executable, "-c", _CTXSTORE, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Ended(done.returncode, done.stdout, done.stderr)


def verify(directory: Path) -> Ended:
    """Off-line verify."""
    return command("verify", str(directory), "--json")


class Outside:
    """Descriptors and threads of a daemon as the kernel counts them, leases as it says itself."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon

    def descriptors(self) -> Counter[str]:
        """Open descriptors by kind; segment files, which are kept for reuse, are left out."""
        directory = f"/proc/{self._daemon.pid}/fd"
        found: Counter[str] = Counter()
        for name in os.listdir(directory):
            try:
                target = os.readlink(f"{directory}/{name}")
            except FileNotFoundError:
                continue
            if "/segment-" not in target:
                found[target.split(":")[0] if ":[" in target else target] += 1
        return found

    def threads(self) -> Counter[str]:
        """Threads by name."""
        directory = f"/proc/{self._daemon.pid}/task"
        found: Counter[str] = Counter()
        for name in os.listdir(directory):
            try:
                with open(f"{directory}/{name}/comm", encoding="utf-8") as comm:
                    found[comm.read().strip()] += 1
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._daemon.process is not None and self._daemon.process.poll() is None


def figure(store: Any, name: str) -> Any:
    """One figure of `store.stats()`, wherever it stands in the document."""
    stats = store.stats()["node"]
    assert stats is not None, "the daemon does not answer"
    found = list(_find(stats, name))
    assert found, f"no {name} in {stats}"
    return found[0]


def _find(document: Any, name: str) -> Any:
    if isinstance(document, dict):
        if name in document:
            yield document[name]
        for value in document.values():
            yield from _find(value, name)


def until(
    condition: Callable[[], Any],
    *,
    what: str | Callable[[], str],
    timeout_s: float = SETTLE_S,
) -> None:
    """Wait for something that must come true."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            said = what if isinstance(what, str) else what()
            raise AssertionError(f"after {timeout_s:.0f} s still not: {said}")
        time.sleep(0.02)
