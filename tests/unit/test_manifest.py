"""Manifests: golden bytes, round trips, and every way a foreign one can be wrong."""

import contextlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxstore.errors import ManifestError
from ctxstore.limits import INLINE_BYTES_MAX, SHARD_BYTES_MAX
from ctxstore.manifest import Manifest, decode_manifest, encode_manifest

FINGERPRINT = bytes(range(16))


def manifest(**changes):
    settings: dict[str, Any] = {"tokens": 256, "position": 512, "runs": ((3, 1000), (1, 7))}
    return Manifest(**{"fingerprint": FINGERPRINT, **settings, **changes})


def raw(*, version=1, zero=0, tokens=256, position=0, runs=((1, 1),), count=None):
    body = b"".join(struct.pack("<II", *run) for run in runs)
    claimed = len(runs) if count is None else count
    head = struct.pack("<HHIQ16sI", version, zero, tokens, position, FINGERPRINT, claimed)
    return head + body


def test_golden_bytes():
    assert encode_manifest(manifest()).hex() == (
        "01000000" "00010000" "0002000000000000" "000102030405060708090a0b0c0d0e0f"
        "02000000" "03000000e8030000" "0100000007000000"
    )  # fmt: skip


def test_round_trip():
    own = manifest()
    assert decode_manifest(encode_manifest(own)) == own
    assert decode_manifest(memoryview(bytearray(encode_manifest(own)))) == own
    assert own.cells == 4
    assert own.lengths().tolist() == [1000, 1000, 1000, 7]
    assert own.lengths().dtype == np.uint32


@given(st.lists(st.integers(1, 5) | st.integers(1, SHARD_BYTES_MAX), min_size=1, max_size=60))
def test_lengths_survive(lengths):
    own = Manifest.of_lengths(lengths, fingerprint=FINGERPRINT, tokens=1, position=0)
    again = decode_manifest(encode_manifest(own))
    assert again.lengths().tolist() == lengths
    assert all(one[1] != other[1] for one, other in zip(own.runs, own.runs[1:], strict=False))


def test_a_large_grid_stays_inline():
    lengths = np.full(0xFF00, 1 << 20)
    own = Manifest.of_lengths(lengths, fingerprint=FINGERPRINT, tokens=256, position=0)
    assert len(encode_manifest(own)) == 44
    alternating = [1 + n % 2 for n in range(123)]
    own = Manifest.of_lengths(alternating, fingerprint=FINGERPRINT, tokens=256, position=0)
    assert len(encode_manifest(own)) <= INLINE_BYTES_MAX


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fingerprint": b"short"}, "has 5"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": 2**32}, "tokens"),
        ({"position": -1}, "position"),
        ({"runs": ()}, "at least one cell"),
        ({"runs": ((0, 1),)}, "no empty run"),
        ({"runs": ((1, 0),)}, "not 0"),
        ({"runs": ((1, SHARD_BYTES_MAX + 1),)}, "bytes, not"),
        ({"runs": ((0xFF00, 1), (1, 2))}, "65281 cells"),
    ],
)
def test_what_cannot_be_encoded(changes, reason):
    with pytest.raises(ValueError, match=reason):
        manifest(**changes)


@pytest.mark.parametrize("lengths", [[], [[1, 2]], 5])
def test_lengths_of_the_wrong_shape(lengths):
    with pytest.raises(ValueError, match="one row of cell lengths"):
        Manifest.of_lengths(lengths, fingerprint=FINGERPRINT, tokens=1, position=0)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "at least 36 bytes, this has 0"),
        (raw()[:35], "at least 36 bytes"),
        (raw(version=2), "version 2, this release reads 1"),
        (raw(zero=1), "1 runs"),
        (raw() + b"\0", "does not have 45 bytes"),
        (raw()[:-1], "does not have 43 bytes"),
        (raw(count=2**32 - 1), "4294967295 runs"),
        (raw(runs=()), "at least one cell"),
        (raw(runs=((0, 5),)), "no empty run"),
        (raw(runs=((2**32 - 1, 5),)), "4294967295 cells"),
        (raw(runs=((1, 2**32 - 1),)), "bytes, not 4294967295"),
        (raw(tokens=0), "tokens"),
        (raw(position=2**64 - 1), "position"),
    ],
)
def test_foreign_bytes_are_refused(payload, reason):
    with pytest.raises(ManifestError, match=reason):
        decode_manifest(payload)


@given(st.binary(max_size=80))
def test_garbage_never_does_anything_else(payload):
    try:
        own = decode_manifest(payload)
    except ManifestError:
        return
    assert encode_manifest(own) == payload


@given(st.integers(0, 51), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_reads_differently(at, flip):
    """The shard's checksum finds it; the decoder must only never misbehave."""
    damaged = bytearray(encode_manifest(manifest()))
    damaged[at] ^= flip
    with contextlib.suppress(ManifestError):
        assert decode_manifest(damaged) != manifest()
