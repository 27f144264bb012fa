"""Hypothesis strategies for what the store is fed with.

Owns how keys, sizes, batches and cuts of a byte stream are drawn. It must not know the code that
eats them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

from ctxstore.limits import INLINE_BYTES_MAX, KEY_BYTES, KIB, PAGE_BYTES

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def keys() -> SearchStrategy[bytes]:
    """Raw 16-byte keys; few distinct ones, so that batches meet the same key again."""
    return st.one_of(
        st.integers(0, 9).map(lambda n: n.to_bytes(KEY_BYTES, "little")),
        st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES),
    )


def shard_sizes(most: int = 256 * KIB) -> SearchStrategy[int]:
    """Payload lengths in bytes, from 1; often at the edges of inline shards and pages."""
    edges = [1, INLINE_BYTES_MAX - 1, INLINE_BYTES_MAX, INLINE_BYTES_MAX + 1]
    edges += [pages * PAGE_BYTES + by for pages in (1, 2, 16) for by in (-1, 0, 1)]
    return st.one_of(st.sampled_from([e for e in edges if e <= most]), st.integers(1, most))


def payloads(most: int = 64 * KIB) -> SearchStrategy[bytes]:
    """Shard payloads: one drawn byte pattern, repeated, so that large ones are cheap to draw."""
    return st.builds(
        lambda pattern, size: (pattern * (size // len(pattern) + 1))[:size],
        st.binary(min_size=1, max_size=64),
        shard_sizes(most),
    )


def ttls_ms() -> SearchStrategy[int]:
    """Times to live: none (0), short, long."""
    return st.one_of(st.just(0), st.integers(1, 1000), st.integers(1000, 10**12))


def cuts(length: int) -> SearchStrategy[list[int]]:
    """Places to cut a byte string of `length` into pieces, rising; pieces may be empty."""
    return st.lists(st.integers(0, length), max_size=20).map(sorted)


def pieces(data: bytes) -> SearchStrategy[list[bytes]]:
    """`data` in random pieces that join to it."""
    return cuts(len(data)).map(
        lambda places: [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]
    )
