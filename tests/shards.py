"""Shards that prove themselves: the key says length and bytes of its payload.

Owns the map from key to payload, so that any process can tell right bytes from wrong ones without
knowing who put them. It must not talk to a store.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

Bytes = npt.NDArray[np.uint8]

LENGTH_MAX: Final = 8 * 1024 * 1024
_SHIFTS: Final = 4096
_KEY: Final = struct.Struct("<IIII")


def _noise() -> npt.NDArray[np.uint64]:
    words = (LENGTH_MAX + 8 * _SHIFTS) // 8
    return np.random.default_rng(20).integers(0, 2**64, words, dtype=np.uint64)


_NOISE: Final = _noise()


def shard_key(space: int, number: int, length: int) -> bytes:
    """16 bytes; `space` keeps the keys of different writers apart."""
    assert 0 <= length <= LENGTH_MAX, "a payload of this length cannot be made"
    return _KEY.pack(space, number, length, (space * 2654435761 + number) & 0xFFFFFFFF)


def shard_length(key: bytes) -> int:
    """Bytes of the payload that belongs to `key`."""
    return int(_KEY.unpack(key)[2])


def payload_of(key: bytes) -> Bytes:
    """The payload that belongs to `key`: noise, shifted and masked by the key's hash."""
    length = shard_length(key)
    mask = xxhash.xxh3_64_intdigest(key)
    shift = mask % _SHIFTS
    words = _NOISE[shift : shift + -(-length // 8)] ^ np.uint64(mask)
    return words.view(np.uint8)[:length]


def is_payload_of(key: bytes, found: Bytes | memoryview) -> bool:
    """Whether `found` is the whole payload of `key`, byte by byte."""
    bytes_found = np.frombuffer(found, np.uint8)
    return len(bytes_found) == shard_length(key) and bool(
        np.array_equal(bytes_found, payload_of(key))
    )


def first_difference(key: bytes, found: Bytes) -> str:
    """Where wrong bytes begin and how many there are, for messages."""
    wanted = payload_of(key)
    if len(found) != len(wanted):
        return f"{len(found)} bytes, not {len(wanted)}"
    wrong = np.flatnonzero(found != wanted)
    return "equal" if not len(wrong) else f"{len(wrong)} bytes differ, first at {int(wrong[0])}"
