"""The disk has no room: puts that want it are refused, memory keeps serving, room heals.

The disk is a small tmpfs, which answers ENOSPC like any other file system.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from ctxstore.errors import Overloaded
from ctxstore.wire.messages import PutResult
from ctxstore_client import connect
from tests.daemon_process import daemon_process
from tests.faults.nodes import hits, make_keys, put_all, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_root = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root"),
]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """24 MiB of disk."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill_up(path: Path) -> None:
    """Take what is left of the file system."""
    with path.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return


class TestFileSystemFull:
    pytestmark = needs_root

    def test_group_puts_are_refused_and_come_back(self, small_disk: Path) -> None:
        """The cap promises 256 MiB, the file system has 24: it is full long before the cap."""
        filler = small_disk / "filler"
        with (
            daemon_process(small_disk / "data", memory="64MiB", disk="64MiB") as daemon,
            connect(daemon.url, timeout_s=4.0) as store,
        ):
            first = make_keys(1, 4, 300_000)
            assert put_all(store, first, durability="group") == [PutResult.COMMITTED] * 4
            assert store.hold(first, ttl_s=600).all()
            fill_up(filler)
            refused = make_keys(2, 40, 300_000)
            began = time.monotonic()
            results = put_all(store, refused, durability="group")
            assert time.monotonic() - began < 4.5, "refused, not hanging"
            assert set(results) <= {PutResult.COMMITTED, PutResult.REFUSED}, results
            assert PutResult.REFUSED in results
            stored = [key for key, r in zip(refused, results, strict=True) if not r]
            assert all(hits(store, stored))
            assert all(hits(store, first)), "what is there is served"
            in_memory = make_keys(3, 6, 300_000)
            assert put_all(store, in_memory, durability="memory") == [PutResult.COMMITTED] * 6
            assert all(hits(store, in_memory)), "memory keeps serving"
            assert daemon.http("/healthz")[0] == 200
            assert " 0 free" in daemon.http("/readyz")[1]
            failed = re.search(r"groups_failed\S* (\d+)", daemon.http("/metrics")[1])
            assert failed is not None
            assert int(failed[1]) > 0
            filler.unlink()
            again = make_keys(4, 6, 300_000)

            def stored_again() -> bool:
                return put_all(store, again, durability="group") == [PutResult.EXISTS] * 6 or all(
                    result in (PutResult.COMMITTED, PutResult.EXISTS)
                    for result in put_all(store, again, durability="group")
                )

            until(stored_again, what="group puts work once there is room", timeout_s=20)
            daemon.restart(kill=True)
            # What is not held may have been evicted to make room.
            assert all(hits(store, [*first, *again]))
            hits(store, stored)

    def test_a_full_disk_at_the_first_start(self, small_disk: Path) -> None:
        fill_up(small_disk / "filler")
        with daemon_process(
            small_disk / "data", memory="64MiB", disk="64MiB", start=False
        ) as daemon:
            daemon.launch()
            code = daemon.wait(timeout_s=20)
            assert code == 1
            assert "Traceback" not in daemon.log
            assert "space" in daemon.log.splitlines()[-1], daemon.log


def test_all_of_a_small_store_can_be_removed_at_once(tmp_path: Path) -> None:
    """More removals than the log has room for are refused whole, and those in it are for good."""
    keys = make_keys(1, 20_000, 64)
    with (
        daemon_process(tmp_path / "data", memory="64MiB", disk="256MiB") as daemon,
        connect(daemon.url, timeout_s=20.0) as store,
    ):
        assert set(put_all(store, keys, durability="group")) == {PutResult.COMMITTED}
        kept = keys[:10]
        gone = keys[10:]
        assert store.remove(gone).all()
        assert not store.exists(gone).any()
        assert not store.remove(make_keys(2, 16_000, 64)).any()
        with pytest.raises(Overloaded, match="--disk"):
            store.remove([*kept, *make_keys(3, 4000, 64)])
        assert store.exists(kept).all(), "all or none"
        daemon.restart(kill=True)
        assert store.exists(kept).all()
        assert not store.exists(gone).any()
        used = sum(path.stat().st_blocks * 512 for path in daemon.directory.iterdir())
        assert used <= 256 << 20


def test_held_shards_that_fill_the_disk_refuse_new_ones_in_time(tmp_path: Path) -> None:
    """Holds end at half of the tier: what is held stays, the rest makes room."""
    with (
        daemon_process(tmp_path / "data", memory="64MiB", disk="32MiB") as daemon,
        connect(daemon.url, timeout_s=4.0) as store,
    ):
        held: list[bytes] = []
        for number in range(60):
            (key,) = make_keys(1, 1, 300_000, first=number)
            assert put_all(store, [key], durability="group") == [PutResult.COMMITTED]
            try:
                assert store.hold([key], ttl_s=600).all()
            except Overloaded:
                break
            held.append(key)
        else:
            pytest.fail("holds have no bound")
        assert len(held) > 10
        more = make_keys(2, 300, 300_000)
        began = time.monotonic()
        results = [put_all(store, [key], durability="group")[0] for key in more]
        assert set(results) == {PutResult.COMMITTED}, results
        assert time.monotonic() - began < 60
        failed = re.search(r"groups_failed\S* (\d+)", daemon.http("/metrics")[1])
        assert failed is not None
        assert int(failed[1]) == 0, "others took the room of the survivors"
        assert all(hits(store, held)), "a held shard is never evicted"
        daemon.restart(kill=True)
        assert all(hits(store, held))
        assert sum(path.stat().st_blocks * 512 for path in daemon.directory.iterdir()) <= 32 << 20
