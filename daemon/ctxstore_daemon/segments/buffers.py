"""Memory that O_DIRECT accepts.

Owns the one way to get page-aligned bytes without mapping files. It must not keep or pool anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ctxstore.limits import PAGE_BYTES

if TYPE_CHECKING:
    import numpy.typing as npt


def round_up(count: int, unit: int = PAGE_BYTES) -> int:
    """The smallest multiple of `unit` that is not below `count`."""
    return -(-count // unit) * unit


def aligned_zeros(size: int) -> npt.NDArray[np.uint8]:
    """(size,) zero bytes whose address is a multiple of 4 KiB."""
    whole = np.zeros(size + PAGE_BYTES, np.uint8)
    return _aligned_part(whole, size)


def aligned_empty(size: int) -> npt.NDArray[np.uint8]:
    """(size,) bytes of undefined content whose address is a multiple of 4 KiB."""
    whole = np.empty(size + PAGE_BYTES, np.uint8)
    return _aligned_part(whole, size)


def _aligned_part(whole: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    address: int = whole.__array_interface__["data"][0]
    skip = -address % PAGE_BYTES
    return whole[skip : skip + size]
