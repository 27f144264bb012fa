"""The real disk behind its seam: alignment, O_DIRECT and its absence, errors, cancellation."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ctxstore.errors import DataDirError, DeviceError, OutOfSpace
from ctxstore_daemon.runtime.disk import RealDisk
from ctxstore_daemon.segments.buffers import aligned_zeros

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path


def _pattern(pages: int) -> np.ndarray:
    data = aligned_zeros(pages * 4096)
    data[:] = np.arange(len(data), dtype=np.uint32).astype(np.uint8)
    return data


def test_bytes_come_back_through_many_buffers(tmp_path: Path) -> None:
    async def scene(disk: RealDisk) -> None:
        data = _pattern(1100)
        file = await disk.open("a", create=True)
        parts = [data[start : start + 4096] for start in range(0, len(data), 4096)]
        assert await file.pwritev(parts, 8192) == len(data)  # more parts than one call takes
        await file.fdatasync()
        assert await file.size() == 8192 + len(data)
        found = aligned_zeros(len(data) + 8192)
        views = [found[start : start + 4096] for start in range(0, len(found), 4096)]
        assert await file.preadv(views, 8192) == len(data)  # short at the end of the file
        assert (found[: len(data)] == data).all()
        await file.truncate(4096)
        assert await file.preadv([found], 4096) == 0
        await file.close()
        await file.close()
        with pytest.raises(DeviceError, match="closed"):
            await file.size()

    _run(scene, tmp_path)


def test_direct_files_insist_on_alignment(tmp_path: Path) -> None:
    async def scene(disk: RealDisk) -> None:
        file = await disk.open("a", create=True)
        if file.direct:
            data = _pattern(2)
            for buffer, offset in ((data, 512), (data[1:4097], 0), (data[:100], 0)):
                with pytest.raises(AssertionError, match="not aligned"):
                    await file.pwritev([buffer], offset)
        await file.close()
        buffered = await disk.open("b", create=True, direct=False)
        assert not buffered.direct
        assert await buffered.pwritev([memoryview(b"abc")], 7) == 3
        await buffered.close()

    _run(scene, tmp_path)


def test_without_direct_io_files_are_opened_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_open = os.open

    def refuse(path: Path, flags: int, *args: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real_open(path, flags, *args)

    async def scene(disk: RealDisk) -> None:
        monkeypatch.setattr(os, "open", refuse)
        for name in ("a", "b"):
            file = await disk.open(name, create=True)
            assert not file.direct
            assert disk.about()["direct_io"] is False
            data = _pattern(3)
            await file.pwritev([data], 0)
            found = aligned_zeros(len(data))
            assert await file.preadv([found], 0) == len(data)
            assert (found == data).all()
            await file.close()
        assert caplog.text.count("no_direct_io") == 1

    _run(scene, tmp_path)


def test_direct_io_refused_at_the_first_transfer_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev

    def refuse(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real(fd, buffers, offset)

    async def scene(disk: RealDisk) -> None:
        file = await disk.open("a", create=True)
        monkeypatch.setattr(os, "pwritev", refuse)
        assert await file.pwritev([_pattern(2)], 0) == 8192
        assert not file.direct
        assert disk.about()["direct_io"] is False
        await file.close()

    _run(scene, tmp_path)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EIO, DeviceError),
        (errno.ENOSPC, OutOfSpace),
        (errno.EDQUOT, OutOfSpace),
        (errno.EROFS, DataDirError),
        (errno.ENODEV, DeviceError),
    ],
)
def test_errors_are_mapped_and_name_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    def fail(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    async def scene(disk: RealDisk) -> None:
        file = await disk.open("some.ctx", create=True)
        for name in ("pwritev", "preadv", "fdatasync"):
            monkeypatch.setattr(os, name, fail)
        data = _pattern(1)
        for call in (file.pwritev([data], 0), file.preadv([data], 0), file.fdatasync()):
            with pytest.raises(kind, match=r"some\.ctx: "):
                await call
        await file.close()

    _run(scene, tmp_path)


def test_missing_files_and_directories(tmp_path: Path) -> None:
    async def scene(disk: RealDisk) -> None:
        with pytest.raises(DeviceError, match="nowhere"):
            await disk.open("nowhere")
        await disk.remove("nowhere")
        with pytest.raises(DeviceError):
            await disk.rename("nowhere", "there")

    _run(scene, tmp_path)


def test_a_deleted_file_cannot_be_made_durable(tmp_path: Path) -> None:
    async def scene(disk: RealDisk) -> None:
        file = await disk.open("a", create=True)
        await file.pwritev([_pattern(1)], 0)
        await file.fdatasync()
        (tmp_path / "a").unlink()
        await file.pwritev([_pattern(1)], 0)
        with pytest.raises(DeviceError, match="a: "):
            await file.fdatasync()
        await file.close()

    _run(scene, tmp_path)


def test_names_space_and_renames(tmp_path: Path) -> None:
    async def scene(disk: RealDisk) -> None:
        await disk.allocate("b", 1 << 20)
        await disk.allocate("b", 1 << 19)  # smaller: nothing changes
        assert (tmp_path / "b").stat().st_size == 1 << 20
        assert await disk.used_bytes() >= 1 << 20
        file = await disk.open("a", create=True, direct=False)
        await file.pwritev([memoryview(b"new")], 0)
        await file.fdatasync()
        await file.close()
        await disk.rename("a", "b")
        await disk.sync_dir()
        assert await disk.listdir() == ["b"]
        assert (tmp_path / "b").read_bytes() == b"new"
        assert await disk.used_bytes() < 1 << 20

    _run(scene, tmp_path)


def test_a_cancelled_write_is_waited_for_by_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(disk: RealDisk) -> None:
        loop = asyncio.get_running_loop()
        started = asyncio.Event()
        release = threading.Event()
        real = os.pwritev
        done: list[int] = []

        def slow(fd: int, buffers: list[memoryview], offset: int) -> int:
            loop.call_soon_threadsafe(started.set)
            assert release.wait(10)
            done.append(real(fd, buffers, offset))
            return done[-1]

        file = await disk.open("a", create=True)
        monkeypatch.setattr(os, "pwritev", slow)
        task = asyncio.create_task(file.pwritev([_pattern(1)], 0))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        closing = asyncio.create_task(file.close())
        await asyncio.sleep(0.01)
        assert not closing.done()
        release.set()
        await closing
        assert done == [4096]

    _run(scene, tmp_path)


def _run(scene: Callable[[RealDisk], Awaitable[None]], directory: Path) -> None:
    async def main() -> None:
        disk = RealDisk(directory)
        try:
            await scene(disk)
        finally:
            disk.close()

    asyncio.run(main())
