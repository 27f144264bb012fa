"""Staging: memory shared with one client, through which its puts arrive.

Owns creation and return of the memory; who may have how much is decided in `server.shm`. Staging
never stands on hugetlb pages: a client can punch holes into memory it may write, and refilling a
hole from an empty huge page pool would kill the daemon with SIGBUS. Truncation is sealed off.
"""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ctxstore.config import PagePreference
from ctxstore.errors import StorageError
from ctxstore_daemon.runtime.memfd import MemoryFile, page_ladder
from ctxstore_daemon.server.shm import StagingGrant
from ctxstore_daemon.telemetry.log import event_log

if TYPE_CHECKING:
    from collections.abc import Callable

_log = event_log(__name__)


def create_staging(size: int) -> MemoryFile:
    """A populated file of `size` bytes (whole 4 KiB) that both sides may write, neither resize.

    Takes milliseconds for large sizes: call it in a thread. Raises StorageError.
    """
    (kind,) = page_ladder(PagePreference.TRANSPARENT)
    file = MemoryFile("ctxstore-staging", size, kind=kind, seals=0)
    try:
        file.populate(0, size)
    except StorageError:
        file.close()
        raise
    return file


def release_staging(file: MemoryFile) -> None:
    """Give the pages back, also where the client still maps them, and unmap. Thread-safe."""
    with contextlib.suppress(StorageError):  # then they go with the client's last mapping
        file.discard()
    file.close()


class StagingPool:
    """Makes and returns staging in a thread of its own. `close` waits for what runs."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ctxstore-staging")

    async def create(self, size: int) -> tuple[MemoryFile, StagingGrant]:
        """The file, whose descriptor goes to the client, and the grant for its session.

        Raises StorageError. Cancelled: the memory is returned as soon as it is there.
        """
        loop = asyncio.get_running_loop()
        making = loop.run_in_executor(self._pool, create_staging, size)
        try:
            file = await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(self._drop)
            raise

        def release(then: Callable[[], None]) -> None:
            gone = loop.run_in_executor(self._pool, release_staging, file)
            gone.add_done_callback(lambda _: then())

        return file, StagingGrant(file.data, release)

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._pool.shutdown(wait=True)

    def _drop(self, made: asyncio.Future[MemoryFile]) -> None:
        if not made.cancelled() and made.exception() is None:
            release_staging(made.result())
