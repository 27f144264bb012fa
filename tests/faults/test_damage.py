"""Files of the data directory damaged behind the daemon's back: exactly the stated losses.

Wrong bytes fail inside `lookups`. What each damage may cost stands in docs/failure-model.md.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest

from ctxstore.wire.messages import PutResult
from ctxstore_client import connect
from tests.daemon_process import DaemonProcess, daemon_process
from tests.faults.damage import (
    Place,
    find_group,
    find_payload,
    find_trailer,
    flip,
    meta_logs,
    segments,
    used_bytes,
)
from tests.faults.nodes import hits, make_keys, put_all, verify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MEMORY: Final = "64MiB"
DISK: Final = "64MiB"
KEYS: Final = make_keys(1, 28, 300_000)
"""One group each, over two sealed segments of 4 MiB and an open one."""

SMALL: Final = make_keys(2, 6, 700)
REMOVED: Final = make_keys(3, 4, 5000)
"""Put and removed again, between the others."""

EVERYTHING: Final = [*KEYS, *SMALL]


def fill(daemon: DaemonProcess) -> None:
    with connect(daemon.url) as store:
        assert put_all(store, REMOVED, durability="group") == [PutResult.COMMITTED] * len(REMOVED)
        for number, key in enumerate(KEYS):
            assert put_all(store, [key], durability="group") == [PutResult.COMMITTED]
            if number % 7 == 3:
                assert store.remove([REMOVED[number // 7]]).all()
        assert put_all(store, SMALL, durability="group") == [PutResult.COMMITTED] * len(SMALL)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory after SIGKILL: the newest segment has no footer."""
    directory = tmp_path_factory.mktemp("killed") / "data"
    with daemon_process(directory, memory=MEMORY, disk=DISK) as daemon:
        fill(daemon)
        daemon.kill()
    return directory


@pytest.fixture(scope="module")
def stopped(killed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after SIGTERM: every segment has a footer."""
    directory = tmp_path_factory.mktemp("stopped") / "data"
    shutil.copytree(killed, directory)
    with daemon_process(directory, memory=MEMORY, disk=DISK) as daemon:
        assert daemon.stop() == 0
    return directory


@contextmanager
def serving(directory: Path) -> Iterator[tuple[DaemonProcess, Any]]:
    with (
        daemon_process(directory, memory=MEMORY, disk=DISK) as daemon,
        connect(daemon.url) as store,
    ):
        yield daemon, store


def copy_of(template: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    shutil.copytree(template, directory)
    return directory


def check_and_heal(directory: Path, lost: list[bytes]) -> None:
    """Exactly `lost` are misses; putting them again heals, over one more kill."""
    with serving(directory) as (daemon, store):
        wanted = [key not in lost for key in EVERYTHING]
        assert hits(store, EVERYTHING) == wanted
        assert not any(hits(store, REMOVED))
        assert hits(store, EVERYTHING) == wanted, "the second look says the same"
        if not lost:
            return
        results = put_all(store, lost, durability="group")
        assert results == [PutResult.COMMITTED] * len(lost)
        daemon.restart(kill=True)
        assert all(hits(store, EVERYTHING))
        assert not any(hits(store, REMOVED))


def behind(directory: Path, key: bytes) -> list[bytes]:
    """The key and all that were put after it in the same segment."""
    first = find_payload(directory, key)
    places = {other: find_payload(directory, other) for other in EVERYTHING}
    return [
        other
        for other, place in places.items()
        if place.path == first.path and place.offset >= first.offset
    ]


def in_segment(directory: Path, path: Path) -> list[bytes]:
    return [key for key in EVERYTHING if find_payload(directory, key).path == path]


def test_the_template_is_what_the_tests_need(killed: Path, stopped: Path) -> None:
    assert [find_trailer(path) is not None for path in segments(killed)] == [True, True, False]
    assert [find_trailer(path) is not None for path in segments(stopped)] == [True, True, True]
    assert len(meta_logs(killed)) == len(meta_logs(stopped)) == 2
    for directory in (killed, stopped):
        found = verify(directory)
        assert found.code == 0, (found.out, found.err)


@pytest.mark.parametrize("template", ["killed", "stopped"])
def test_a_flipped_byte_in_payloads(
    template: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    directory = copy_of(request.getfixturevalue(template), tmp_path)
    # The last one put is in the group whose sync nothing later in the log confirms.
    lost = [KEYS[0], KEYS[15], KEYS[-1]]
    for key, by in zip(lost, (0, 299_999, 150_000), strict=True):
        flip(find_payload(directory, key), by=by)
    found = verify(directory)
    assert found.code == 1, (found.out, found.err)
    assert found.json()["damaged"] == 3, found.out
    check_and_heal(directory, lost)


def test_a_flipped_byte_in_a_footer_costs_nothing(stopped: Path, tmp_path: Path) -> None:
    """In its last page, or in the table before it."""
    directory = copy_of(stopped, tmp_path)
    for path, by in zip(segments(directory), (20, None, 3000), strict=True):
        trailer = find_trailer(path)
        assert trailer is not None, "every segment has one"
        if by is not None:
            flip(trailer, by=by)
        else:
            table = path.read_bytes().find(b"ARROW1")
            assert table > 0, "a footer is an Arrow file"
            flip(Place(path, table), by=700)
    found = verify(directory)
    assert found.code == 1, (found.out, found.err)
    check_and_heal(directory, [])


def test_a_flipped_byte_in_a_group_header_under_a_good_footer_costs_nothing(
    stopped: Path, tmp_path: Path
) -> None:
    directory = copy_of(stopped, tmp_path)
    for key, by in ((KEYS[2], 0), (KEYS[14], 30), (KEYS[-1], 100)):
        flip(find_group(find_payload(directory, key)), by=by)
    check_and_heal(directory, [])


def test_a_flipped_byte_in_a_group_header_of_the_open_segment(killed: Path, tmp_path: Path) -> None:
    directory = copy_of(killed, tmp_path)
    (open_segment,) = (path for path in segments(directory) if find_trailer(path) is None)
    inside = in_segment(directory, open_segment)
    assert len(inside) >= 3, "the template leaves an open segment with something in it"
    lost = behind(directory, inside[1])
    # To verify this looks like the torn tail that a crash leaves, which is no damage.
    flip(find_group(find_payload(directory, inside[1])), by=60)
    check_and_heal(directory, lost)


def test_a_group_header_and_the_footer_both_damaged(stopped: Path, tmp_path: Path) -> None:
    directory = copy_of(stopped, tmp_path)
    key = KEYS[16]
    lost = behind(directory, key)
    place = find_payload(directory, key)
    trailer = find_trailer(place.path)
    assert trailer is not None, "every segment has one"
    flip(trailer, by=9)
    flip(find_group(place), by=9)
    check_and_heal(directory, lost)


def test_a_flipped_byte_in_a_segment_header_costs_that_segment_at_most(
    killed: Path, tmp_path: Path
) -> None:
    directory = copy_of(killed, tmp_path)
    first, _, last = segments(directory)
    inside = [*in_segment(directory, first), *in_segment(directory, last)]
    flip(Place(first, 0), by=3)
    flip(Place(last, 0), by=25)
    assert verify(directory).code == 1
    with serving(directory) as (daemon, store):
        found = dict(zip(EVERYTHING, hits(store, EVERYTHING), strict=True))
        lost = [key for key in EVERYTHING if not found[key]]
        assert set(lost) <= set(inside)
        assert not any(hits(store, REMOVED))
        assert put_all(store, lost, durability="group") == [PutResult.COMMITTED] * len(lost)
        daemon.restart(kill=True)
        assert all(hits(store, EVERYTHING))
        assert not any(hits(store, REMOVED))


@pytest.mark.parametrize("size", ["none", "a little", "half"])
def test_a_segment_deleted_or_truncated(killed: Path, tmp_path: Path, size: str) -> None:
    directory = copy_of(killed, tmp_path)
    path = segments(directory)[1]
    mine = in_segment(directory, path)
    before = path.stat().st_size
    if size == "none":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.truncate({"a little": 100, "half": before // 2 + 123}[size])
    checked = verify(directory)
    # Without a header nothing proves that there was data: said, but not called damage.
    assert checked.code == (1 if size == "half" else 0), (checked.out, checked.err)
    assert path.name in checked.out
    with serving(directory) as (daemon, store):
        found = dict(zip(EVERYTHING, hits(store, EVERYTHING), strict=True))
        assert all(found[key] for key in EVERYTHING if key not in mine)
        if size != "half":
            assert not any(found[key] for key in mine)
        else:
            assert not found[mine[-1]], "its bytes are gone"
        lost = [key for key in mine if not found[key]]
        assert put_all(store, lost, durability="group") == [PutResult.COMMITTED] * len(lost)
        daemon.restart(kill=True)
        assert all(hits(store, EVERYTHING))
        assert not any(hits(store, REMOVED))


def test_one_copy_of_the_meta_log_damaged_anywhere_costs_nothing(
    killed: Path, tmp_path: Path
) -> None:
    directory = copy_of(killed, tmp_path)
    for copy, log in enumerate(meta_logs(directory)):
        used = used_bytes(log)
        # Never the same frame in both: every third part in one, the others in the other.
        for at in range(40 + 1000 * copy, used, 2000):
            flip(Place(log, at))
    assert verify(directory).code == 1
    check_and_heal(directory, [])


@pytest.mark.parametrize(
    ("copy", "how"), [(0, "last frame"), (1, "deleted"), (0, "emptied"), (1, "header")]
)
def test_one_copy_of_the_meta_log_lost(killed: Path, tmp_path: Path, copy: int, how: str) -> None:
    directory = copy_of(killed, tmp_path)
    log = meta_logs(directory)[copy]
    if how == "deleted":
        log.unlink()
    elif how == "emptied":
        log.write_bytes(b"")
    else:
        flip(Place(log, 0), by=5 if how == "header" else used_bytes(log) - 30)
    check_and_heal(directory, [])


@pytest.mark.parametrize("how", ["deleted", "emptied", "same frame"])
def test_both_copies_of_the_meta_log_lost_bring_no_removed_shard_back(
    killed: Path, tmp_path: Path, how: str
) -> None:
    directory = copy_of(killed, tmp_path)
    for log in meta_logs(directory):
        if how == "deleted":
            log.unlink()
        elif how == "emptied":
            log.write_bytes(b"")
        else:
            flip(Place(log, used_bytes(log) // 2))
    found = verify(directory)
    assert found.code == 1, (found.out, found.err)
    with serving(directory) as (daemon, store):
        # What was removed is not known any more, so nothing may be served.
        assert not any(hits(store, [*REMOVED, *EVERYTHING]))
        assert put_all(store, REMOVED, durability="group") == [PutResult.COMMITTED] * 4
        daemon.restart(kill=True)
        assert all(hits(store, REMOVED))
        assert not any(hits(store, EVERYTHING)), "dropped for good"


def test_an_older_image_of_a_segment_put_back(tmp_path: Path) -> None:
    """The segment was recycled since: nothing of its former life may be seen."""
    directory = tmp_path / "data"
    old = make_keys(5, 12, 300_000)
    with serving(directory) as (daemon, store):
        put_all(store, old, durability="group")
        daemon.stop()
        (image,) = segments(directory)
        kept = image.read_bytes()
        daemon.start()
        store.remove(old[:1])
        for first in range(0, 260, 20):
            results = put_all(store, make_keys(6, 20, 300_000, first=first), durability="group")
            assert results == [PutResult.COMMITTED] * 20
        assert not any(hits(store, old)), "78 MB over a disk of 64 MiB: the oldest are evicted"
        daemon.stop()
        assert image.read_bytes()[:4096] != kept[:4096]
        image.write_bytes(kept)
        assert image.name in verify(directory).out
        daemon.start()
        assert not any(hits(store, old))
        recent = make_keys(6, 100, 300_000, first=160)
        found = hits(store, recent)
        assert sum(found) > 80, "what the image replaced is lost, the rest is not"
        assert put_all(store, old, durability="group") == [PutResult.COMMITTED] * len(old)
        daemon.restart(kill=True)
        assert all(hits(store, old))


def test_an_image_of_the_open_segment_from_before_its_last_groups(
    killed: Path, tmp_path: Path
) -> None:
    directory = copy_of(killed, tmp_path)
    image = segments(directory)[-1]
    kept = image.read_bytes()
    later = make_keys(7, 3, 200_000)
    with serving(directory) as (daemon, store):
        put_all(store, later, durability="group")
        daemon.kill()
        image.write_bytes(kept)
        daemon.start()
        assert not any(hits(store, later))
        assert all(hits(store, EVERYTHING))
        assert put_all(store, later, durability="group") == [PutResult.COMMITTED] * 3
        daemon.restart(kill=True)
        assert all(hits(store, [*later, *EVERYTHING]))
        assert not any(hits(store, REMOVED))


def test_a_segment_of_another_node_is_neither_read_nor_written(
    killed: Path, tmp_path: Path
) -> None:
    """Under a free number, and in the place of a full one."""
    foreign_keys = make_keys(8, 5, 300_000)
    with serving(tmp_path / "other") as (other, store):
        put_all(store, foreign_keys, durability="group")
        other.stop()
    (foreign,) = segments(tmp_path / "other")
    directory = copy_of(killed, tmp_path)
    lost = in_segment(directory, segments(directory)[0])
    targets = [directory / "segment-000007.ctx", segments(directory)[0]]
    for target in targets:
        shutil.copy(foreign, target)
    assert all(target.name in verify(directory).out for target in targets)
    with serving(directory) as (daemon, store):
        assert not any(hits(store, foreign_keys))
        assert hits(store, EVERYTHING) == [key not in lost for key in EVERYTHING]
        assert put_all(store, lost, durability="group") == [PutResult.COMMITTED] * len(lost)
        daemon.restart(kill=True)
        assert all(hits(store, EVERYTHING))
        assert not any(hits(store, [*foreign_keys, *REMOVED]))
    for target in targets:
        assert target.read_bytes() == foreign.read_bytes()


def test_segments_deleted_under_the_running_daemon(killed: Path, tmp_path: Path) -> None:
    directory = copy_of(killed, tmp_path)
    with serving(directory) as (daemon, store):
        assert all(hits(store, KEYS[:3]))
        sealed = segments(directory)[0]
        mine = in_segment(directory, sealed)
        sealed.unlink()
        hits(store, EVERYTHING)  # right bytes or a miss
        daemon.restart(kill=True)
        assert hits(store, EVERYTHING) == [key not in mine for key in EVERYTHING]
        for path in segments(directory):
            path.unlink()
        hits(store, EVERYTHING)
        put_all(store, make_keys(9, 20, 300_000), durability="group")
        daemon.restart(kill=True)
        hits(store, [*EVERYTHING, *make_keys(9, 20, 300_000)])
        assert not any(hits(store, REMOVED))
        put_all(store, EVERYTHING, durability="group")
        daemon.restart(kill=True)
        assert all(hits(store, EVERYTHING))


def test_the_meta_log_deleted_under_the_running_daemon(killed: Path, tmp_path: Path) -> None:
    directory = copy_of(killed, tmp_path)
    gone = KEYS[4]
    with serving(directory) as (daemon, store):
        for log in meta_logs(directory):
            log.unlink()
        assert store.remove([gone]).all()
        assert not any(hits(store, [gone]))
        daemon.restart(kill=True)
        assert not any(hits(store, [gone, *REMOVED]))


def test_the_identity_damaged_or_deleted(killed: Path, tmp_path: Path) -> None:
    directory = copy_of(killed, tmp_path)
    identity = directory / "IDENTITY"
    text = identity.read_text()
    with daemon_process(directory, memory=MEMORY, disk=DISK, start=False) as daemon:
        for damaged in (text.replace("cluster", "cluttered"), ""):
            identity.write_text(damaged)
            daemon.launch()
            assert daemon.wait(timeout_s=20) == 1
        identity.unlink()
        daemon.launch()
        assert daemon.wait(timeout_s=20) == 1
        assert "Traceback" not in daemon.log
        assert daemon.log.count("IDENTITY") >= 3
        identity.write_text(text)
        daemon.start()
        with connect(daemon.url) as store:
            assert all(hits(store, EVERYTHING))
