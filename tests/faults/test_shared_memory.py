"""What a client can do to the memory that the daemon shares with it, and what it cannot.

The arena is for reading only, whatever system call is tried; staging can be written, never resized.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest

from ctxstore import limits
from ctxstore.wire import messages as wire
from ctxstore_client import connect
from tests.daemon_process import DaemonProcess, daemon_process
from tests.faults.nodes import hits, make_keys, put_all
from tests.faults.raw import RawClient
from tests.shards import payload_of, shard_length

if TYPE_CHECKING:
    from collections.abc import Iterator

PROT_WRITE: Final = 2
PUNCH_HOLE: Final = 3
MADV_REMOVE: Final = 9
F_ADD_SEALS: Final = 1033
KEYS: Final = make_keys(1, 5, 500_000)

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with daemon_process(tmp_path_factory.mktemp("shm") / "data") as daemon:
        with connect(daemon.url) as store:
            put_all(store, KEYS, durability="group")
        yield daemon


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[RawClient]:
    """A client with descriptors of arena and staging."""
    with daemon.connect(unix=True) as sock:
        client = RawClient(sock)
        client.greet(shm=True, staging_bytes=2 * limits.MIB)
        assert len(client.fds) == 2
        yield client
        for fd in client.fds:
            os.close(fd)


def still_serves(daemon: DaemonProcess) -> None:
    assert daemon.process is not None
    assert daemon.process.poll() is None, daemon.log
    with connect(daemon.url) as store:
        assert all(hits(store, KEYS))
        (fresh,) = make_keys(2, 1, 500_000)
        assert put_all(store, [fresh])[0] in (wire.PutResult.COMMITTED, wire.PutResult.EXISTS)
        assert all(hits(store, [fresh]))


def test_the_arena_cannot_be_mapped_writable(daemon: DaemonProcess, client: RawClient) -> None:
    arena = client.fds[0]
    size = os.fstat(arena).st_size
    with pytest.raises(PermissionError):
        mmap.mmap(arena, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        mmap.mmap(arena, size, mmap.MAP_SHARED, mmap.PROT_WRITE)
    try:
        again = os.open(f"/proc/self/fd/{arena}", os.O_RDWR)
    except PermissionError:
        return
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(again, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.pwrite(again, b"x", 0)
    finally:
        os.close(again)


def test_a_map_of_the_arena_cannot_be_made_writable(
    daemon: DaemonProcess, client: RawClient
) -> None:
    size = os.fstat(client.fds[0]).st_size
    with mmap.mmap(client.fds[0], size, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        data = np.frombuffer(mapped, np.uint8)
        address = ctypes.c_void_p(data.ctypes.data)
        assert _libc.mprotect(address, ctypes.c_size_t(size), mmap.PROT_READ | PROT_WRITE) == -1
        assert ctypes.get_errno() == 13
        assert _libc.madvise(address, ctypes.c_size_t(size), MADV_REMOVE) == -1
        del data
    still_serves(daemon)


def test_neither_file_can_be_written_to_or_resized(
    daemon: DaemonProcess, client: RawClient
) -> None:
    arena, staging = client.fds
    for fd in (arena, staging):
        size = os.fstat(fd).st_size
        for wanted in (0, size - 4096, size + 4096):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, wanted)
        with pytest.raises(PermissionError):
            os.posix_fallocate(fd, 0, size + 4096)
        assert os.fstat(fd).st_size == size
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, F_ADD_SEALS, 0x08)
    with pytest.raises(PermissionError):
        os.pwrite(arena, b"x", 0)
    hole = (ctypes.c_int(arena), PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(1 << 20))
    assert _libc.fallocate(*hole) == -1
    still_serves(daemon)


def put_staged(client: RawClient, key: bytes, length: int) -> Any:
    request = wire.Put(
        rid=client.wire.next_rid(),
        timeout_us=5_000_000,
        durability=wire.Durability.GROUP,
        keys=key,
        lengths=np.array([length], "<u4").tobytes(),
        offsets=np.array([0], "<u8").tobytes(),
        ttl_ms=np.array([0], "<u8").tobytes(),
        priority=np.array([0], "<i2").tobytes(),
        depth=np.array([0], "<u4").tobytes(),
        cost=np.array([np.nan], "<f4").tobytes(),
    )
    client.send(request)
    return request


def test_holes_punched_into_staging_are_zeros(daemon: DaemonProcess, client: RawClient) -> None:
    """A client can give its staging's memory back; the daemon finds zeros, not SIGBUS."""
    staging = client.fds[1]
    length = 1_000_000
    (key,) = make_keys(3, 1, length)
    assert os.pwrite(staging, payload_of(key).tobytes(), 0) == length
    hole = (ctypes.c_int(staging), PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(2 << 20))
    assert _libc.fallocate(*hole) == 0
    put_staged(client, key, length)
    reply = client.reply()
    assert isinstance(reply, wire.PutReply)
    assert bytes(reply.results) == bytes([wire.PutResult.COMMITTED])
    with connect(daemon.url) as store:
        buffer = np.ones(length, np.uint8)
        assert store.get_into([key], [buffer]) == [wire.Lookup.HIT]
        assert not buffer.any()
    still_serves(daemon)


def test_staging_that_changes_during_the_put(daemon: DaemonProcess, client: RawClient) -> None:
    """The daemon hashes what it copied: whatever was stored, memory, disk and TCP agree on it."""
    staging = client.fds[1]
    length = 2 * limits.MIB
    keys = make_keys(4, 40, length)
    with mmap.mmap(staging, 2 * limits.MIB) as mapped:
        data = np.frombuffer(mapped, np.uint8)
        for number, key in enumerate(keys):
            data[:] = number
            put_staged(client, key, length)
            data[:] = number + 100
            reply = client.reply()
            assert isinstance(reply, wire.PutReply)
            assert bytes(reply.results) == bytes([wire.PutResult.COMMITTED])
        del data
    with connect(daemon.url) as store, connect(daemon.url, shm="off") as remote:
        for number, key in enumerate(keys):
            seen = [np.zeros(length, np.uint8) for _ in range(2)]
            for each, buffer in zip((store, remote), seen, strict=True):
                assert each.get_into([key], [buffer]) == [wire.Lookup.HIT]
                assert set(np.unique(buffer)) <= {number, number + 100}
            assert (seen[0] == seen[1]).all()
    still_serves(daemon)


def test_descriptors_go_to_nobody_who_did_not_ask(daemon: DaemonProcess) -> None:
    with daemon.connect(unix=True) as sock:
        client = RawClient(sock)
        answer = client.greet(shm=False, staging_bytes=2 * limits.MIB)
        assert answer.arena_bytes == answer.staging_bytes == 0
        assert not client.fds
    with daemon.connect() as sock:
        client = RawClient(sock)
        answer = client.greet(shm=True, staging_bytes=2 * limits.MIB)
        assert answer.arena_bytes == answer.staging_bytes == 0
        assert not client.fds


def test_staging_of_all_clients_stays_inside_its_share(daemon: DaemonProcess) -> None:
    """One that asks for everything leaves something for others, who can put all the same."""
    granted = 0
    sockets = []
    try:
        for _ in range(20):
            sock = daemon.connect(unix=True)
            sockets.append(sock)
            client = RawClient(sock)
            granted += client.greet(shm=True, staging_bytes=2**40).staging_bytes
            for fd in client.fds:
                os.close(fd)
        assert granted <= 8 * limits.MIB
        keys = make_keys(5, 3, 400_000)
        with connect(daemon.url, timeout_s=3) as store:
            results = put_all(store, keys)
            assert set(results) <= {wire.PutResult.COMMITTED, wire.PutResult.OVERLOADED}
            assert sum(shard_length(key) for key in keys) > 0
            assert all(hits(store, KEYS)), "reading needs no staging"
    finally:
        for sock in sockets:
            sock.close()
    still_serves(daemon)
