"""Integrity of shards: 64-bit xxh3, seeded with everything that says whose bytes they are.

Owns the seed and the sum, byte for byte as written below; must not decide what happens on a
mismatch and never copies a payload.

    seed = xxh3_64( key (16) | namespace id u64 | incarnation u64 | length u64 )   little endian
    sum  = xxh3_64( payload, seed )
    namespace id = blake2b-8 of the namespace's name in UTF-8, read as u64 little endian
"""

from __future__ import annotations

import struct
from hashlib import blake2b
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from ctxstore import limits

Payload = bytes | bytearray | memoryview | npt.NDArray[Any]
"""Any C-contiguous buffer; it is only read."""

_SEED: Final = struct.Struct("<16sQQQ")
_SEED_ROW: Final = np.dtype(
    [("key", "V16"), ("ns_id", "<u8"), ("incarnation", "<u8"), ("length", "<u8")]
)


def namespace_id(name: str) -> int:
    """The u64 that stands for a namespace in seeds, records and placement."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def seed(key: bytes, *, ns_id: int, incarnation: int, length: int) -> int:
    """Seed for one shard of `length` bytes. Raises `ValueError` if the key has not 16."""
    if len(key) != limits.KEY_BYTES:
        raise ValueError(f"a key has 16 bytes, this one has {len(key)}")
    return xxhash.xxh3_64_intdigest(_SEED.pack(key, ns_id, incarnation, length))


def seeds(
    keys: npt.NDArray[np.uint8],
    *,
    ns_id: int,
    incarnation: int,
    lengths: npt.ArrayLike,
) -> npt.NDArray[np.uint64]:
    """Seeds of a batch: `keys` (n, 16) uint8, `lengths` n integers; returns (n,) uint64."""
    rows = np.empty(len(keys), _SEED_ROW)
    rows["key"] = np.ascontiguousarray(keys).view("V16").reshape(-1)
    rows["ns_id"] = ns_id
    rows["incarnation"] = incarnation
    rows["length"] = lengths
    packed: list[bytes] = rows.view(f"V{_SEED_ROW.itemsize}").tolist()
    return np.fromiter(map(xxhash.xxh3_64_intdigest, packed), np.uint64, len(packed))


def checksum(payload: Payload, seed: int) -> int:
    """xxh3-64 of `payload` under a ready seed. Drops the GIL for long payloads; makes no copy."""
    return xxhash.xxh3_64_intdigest(_bytes_of(payload), seed)


def shard_checksum(payload: Payload, *, key: bytes, ns_id: int, incarnation: int) -> int:
    """Checksum of one whole shard; its length is `payload`'s size in bytes."""
    content = memoryview(_bytes_of(payload))
    own = seed(key, ns_id=ns_id, incarnation=incarnation, length=content.nbytes)
    return xxhash.xxh3_64_intdigest(content, own)


def _bytes_of(payload: Payload) -> bytes | bytearray | memoryview:
    return payload.data if isinstance(payload, np.ndarray) else payload
