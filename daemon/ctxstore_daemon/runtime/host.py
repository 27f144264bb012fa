"""What this machine has: memory, processors, descriptors.

Owns the questions to /proc and cgroups. It must not decide; it says what is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path

from ctxstore import units
from ctxstore.errors import ConfigError


def memory_bytes() -> int:
    """Memory this process may use: the machine's, or its cgroup's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(path).read_text(encoding="ascii")))
    return total


def check_memory(wanted_bytes: int) -> None:
    """Refuse a cap above what there is: it would end in the kernel killing processes.

    Raises ConfigError.
    """
    there = memory_bytes()
    if wanted_bytes > there:
        raise ConfigError(
            f"--memory {units.describe_size(wanted_bytes)} is above the "
            f"{units.describe_size(there)} of memory this machine (or its cgroup) has"
        )


def raise_descriptor_limit() -> int:
    """Lift the soft limit on descriptors to the hard one; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft


def processors() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0))


def release_free_memory() -> None:
    """Give freed heap pages back to the kernel.

    Recovery reads whole footers; glibc keeps what it freed of them, about 100 bytes a shard.
    """
    libc = ctypes.CDLL(None)
    # musl has no such call, and keeps less.
    with contextlib.suppress(AttributeError):
        libc.malloc_trim(0)
