"""Staging: memory shared with one client, through which its puts arrive.

Owns creation and return of the memory; who may have how much is decided in `server.shm`. Staging
never stands on hugetlb pages: a client can punch holes into memory it may write, and refilling a
hole from an empty huge page pool would kill the daemon with SIGBUS. Truncation is sealed off.
"""

from __future__ import annotations

import contextlib

from ctxstore.errors import StorageError
from ctxstore_daemon.runtime.memfd import MemoryFile, PageKind, transparent_pages_allowed


def create_staging(size: int) -> MemoryFile:
    """A populated file of `size` bytes (whole 2 MiB) that both sides may write, neither resize.

    Takes milliseconds for large sizes: call it in a thread. Raises StorageError.
    """
    kind = PageKind.TRANSPARENT if transparent_pages_allowed() else PageKind.SMALL
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
