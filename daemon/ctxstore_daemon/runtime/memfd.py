"""Anonymous shared memory files: pages, mapping, population, seals.

Owns the system calls behind arena and staging. It must not know slots or clients. Population and
unmapping drop the GIL (Python's own `mmap.madvise` does not), so both may run in any thread.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from enum import Enum
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from ctxstore import limits
from ctxstore.config import PagePreference
from ctxstore.errors import OutOfSpace, StorageError

F_SEAL_SEAL: Final = 0x01
F_SEAL_SHRINK: Final = 0x02
F_SEAL_GROW: Final = 0x04
F_SEAL_FUTURE_WRITE: Final = 0x10
_F_ADD_SEALS: Final = 1033
_MFD_HUGE_2MB: Final = 21 << 26
_MADV_REMOVE: Final = 9
_MADV_DONTFORK: Final = 10
_MADV_HUGEPAGE: Final = 14
_MADV_POPULATE_WRITE: Final = 23
_SHMEM_SWITCH: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

POPULATE_BYTES: Final = 16 * limits.MIB
"""Populated by one system call. Meanwhile the kernel makes every mmap of this process wait, and
so each thread that needs fresh memory: a dozen milliseconds on 4 KiB pages."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int


class PageKind(Enum):
    """What backs a mapping, best first."""

    HUGETLB = "hugetlb"
    """2 MiB pages reserved by the operator: the mapping cannot run short of them."""
    TRANSPARENT = "transparent"
    """2 MiB pages where the kernel finds them; asked for with madvise."""
    SMALL = "4k"
    """4 KiB pages: O_DIRECT costs a multiple of CPU, copies about half as much again."""


class MemoryFile:
    """A sealed memfd and this process's writable map of it.

    Call order: construct, `populate` ranges, `close`.
    The size never changes. `fd` may be passed to other processes; what they can do with it is set
    by `seals`, which apply to everybody and to every later mapping, not to the one made here.
    """

    __slots__ = ("_address", "_map", "data", "fd", "kind", "size")

    def __init__(self, name: str, size: int, *, kind: PageKind, seals: int) -> None:
        assert size > 0, "an empty memory file has no use"
        page = limits.HUGE_PAGE_BYTES if kind is PageKind.HUGETLB else limits.PAGE_BYTES
        assert size % page == 0, "memory files have whole pages"
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if kind is PageKind.HUGETLB:
            flags |= os.MFD_HUGETLB | _MFD_HUGE_2MB
        self.kind = kind
        self.size = size
        self.fd = -1
        try:
            self.fd = os.memfd_create(name, flags)
            os.ftruncate(self.fd, size)
            # For hugetlb pages this is where a shortage shows: mapping reserves all of them.
            self._map: mmap.mmap | None = mmap.mmap(
                self.fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE
            )
        except OSError as error:
            if self.fd >= 0:
                os.close(self.fd)
            raise _storage_error(f"cannot map {size} bytes on {kind.value} pages", error) from error
        self.data: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self._address = self.data.ctypes.data
        self._advise(_MADV_DONTFORK, 0, size)
        if kind is PageKind.TRANSPARENT:
            self._advise(_MADV_HUGEPAGE, 0, size)
        # The writable mapping stands; from here on nobody can make another one where it is sealed.
        fcntl.fcntl(self.fd, _F_ADD_SEALS, seals | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

    def populate(self, start: int, stop: int) -> None:
        """Give every page of [start, stop) its memory. Raises OutOfSpace when none is left."""
        for at in range(start, stop, POPULATE_BYTES):
            self._advise(_MADV_POPULATE_WRITE, at, min(POPULATE_BYTES, stop - at))

    def discard(self) -> None:
        """Give all pages back now, even where another process keeps the file mapped.

        Its next touch finds zeros. Fails on a file sealed against writing.
        """
        self._advise(_MADV_REMOVE, 0, self.size)

    def huge_bytes(self) -> int:
        """Bytes of the mapping that stand on huge pages now."""
        if self.kind is PageKind.HUGETLB:
            return self.size
        if self.kind is PageKind.SMALL:
            return 0
        return _huge_bytes_at(self._address)

    def close_descriptor(self) -> None:
        """Close `fd` once it was passed on; the map stays. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def close(self) -> None:
        """Close the descriptor and let go of the map, which ends with the last view of `data`."""
        self.data = np.zeros(0, np.uint8)
        self._map = None
        self.close_descriptor()

    def _advise(self, advice: int, start: int, length: int) -> None:
        while _libc.madvise(self._address + start, length, advice) != 0:
            code = ctypes.get_errno()
            # EAGAIN and EINTR: a page moved meanwhile, or a signal came; populated pages stay.
            if code not in (errno.EAGAIN, errno.EINTR):
                raise _storage_error(
                    f"madvise {advice} of {length} bytes", OSError(code, os.strerror(code))
                )


def _storage_error(what: str, error: OSError) -> StorageError:
    text = f"{what}: {error.strerror or error}"
    # EFAULT is how population says that there was no page to be had.
    if error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EFAULT, errno.EMFILE, errno.ENFILE):
        return OutOfSpace(text)
    return StorageError(text)


def transparent_pages_allowed() -> bool:
    """Whether this kernel gives shared memory huge pages when asked."""
    try:
        text = _SHMEM_SWITCH.read_text(encoding="ascii")
    except OSError:
        return False
    return any(f"[{mode}]" in text for mode in ("always", "within_size", "advise", "force"))


def page_ladder(preference: PagePreference) -> tuple[PageKind, ...]:
    """Kinds to try, best first: the preferred one and what it falls back to."""
    shared = PageKind.TRANSPARENT if transparent_pages_allowed() else PageKind.SMALL
    if preference is PagePreference.SMALL:
        return (PageKind.SMALL,)
    if preference is PagePreference.TRANSPARENT:
        return (shared,)
    return (PageKind.HUGETLB, shared)


def _huge_bytes_at(address: int) -> int:
    prefix = f"{address:x}-"
    inside = False
    with open("/proc/self/smaps", encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith(prefix):
                inside = True
            elif inside and line.startswith(("ShmemPmdMapped:", "FilePmdMapped:")):
                if kib := int(line.split()[1]):
                    return kib * limits.KIB
            elif inside and line.startswith("VmFlags:"):
                return 0
    return 0
