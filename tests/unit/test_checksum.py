"""Checksum of shards: golden vectors, and what each part of the seed changes."""

import struct
from typing import Any

import numpy as np
import pytest
import xxhash

from ctxstore.checksum import checksum, namespace_id, seed, seeds, shard_checksum

KEY = bytes(range(16))

GOLDEN_NAMESPACE = 0xA2B3A61B7BB098FE
GOLDEN_SEED = 0x4606230D39F78C50
GOLDEN_SUM = 0x0F0D682D49A2623A


def test_golden_vectors():
    """Written down once; a change orphans every stored shard."""
    assert namespace_id("default") == GOLDEN_NAMESPACE
    own = seed(KEY, ns_id=GOLDEN_NAMESPACE, incarnation=3, length=11)
    assert own == GOLDEN_SEED
    assert checksum(b"hello shard", own) == GOLDEN_SUM
    total = shard_checksum(b"hello shard", key=KEY, ns_id=GOLDEN_NAMESPACE, incarnation=3)
    assert total == GOLDEN_SUM


def test_seed_is_the_documented_bytes():
    packed = KEY + struct.pack("<QQQ", 7, 8, 9)
    assert seed(KEY, ns_id=7, incarnation=8, length=9) == xxhash.xxh3_64_intdigest(packed)


def test_every_part_changes_the_sum():
    base: dict[str, Any] = {"key": KEY, "ns_id": 1, "incarnation": 1}
    sums = {
        shard_checksum(b"payload", **base),
        shard_checksum(b"payloae", **base),
        shard_checksum(b"payload\0", **base),
        shard_checksum(b"payload", **{**base, "key": bytes(16)}),
        shard_checksum(b"payload", **{**base, "ns_id": 2}),
        shard_checksum(b"payload", **{**base, "incarnation": 2}),
    }
    assert len(sums) == 6


def test_seeds_of_a_batch_equal_single_seeds():
    rng = np.random.default_rng(5)
    keys = rng.integers(0, 256, (100, 16), dtype=np.uint8)
    lengths = rng.integers(0, 1 << 26, 100)
    batch = seeds(keys, ns_id=2**64 - 1, incarnation=2**63, lengths=lengths)
    assert batch.dtype == np.uint64
    assert batch.tolist() == [
        seed(row.tobytes(), ns_id=2**64 - 1, incarnation=2**63, length=int(length))
        for row, length in zip(keys, lengths, strict=True)
    ]
    every_second = seeds(keys[::2], ns_id=2**64 - 1, incarnation=2**63, lengths=lengths[::2])
    assert every_second.tolist() == batch.tolist()[::2]


def test_seeds_of_nothing():
    assert seeds(np.empty((0, 16), np.uint8), ns_id=1, incarnation=0, lengths=[]).shape == (0,)


def test_payload_may_be_any_contiguous_buffer():
    array = np.arange(64, dtype=np.float32).reshape(4, 16)
    raw = array.tobytes()
    about: dict[str, Any] = {"key": KEY, "ns_id": 1, "incarnation": 0}
    expected = shard_checksum(raw, **about)
    for payload in (array, memoryview(raw), bytearray(raw), array.data):
        assert shard_checksum(payload, **about) == expected
    assert shard_checksum(b"", **about) == shard_checksum(np.empty(0, np.uint8), **about)


def test_payload_that_is_not_contiguous_is_refused():
    array = np.zeros((4, 16), np.uint8)[:, ::2]
    with pytest.raises((BufferError, ValueError)):
        shard_checksum(array, key=KEY, ns_id=1, incarnation=0)


def test_wrong_key_length():
    with pytest.raises(ValueError, match="this one has 15"):
        seed(KEY[:15], ns_id=0, incarnation=0, length=0)
