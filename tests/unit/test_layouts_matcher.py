"""The prefix matcher against a plain reading of its rules."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxstore.layouts import LayerKind, chunks_to_load, match_chunks

CHUNK = 4


def row(text):
    return np.array([mark == "x" for mark in text])


@pytest.mark.parametrize(
    ("kind", "present", "window", "hit"),
    [
        (LayerKind.FULL, "xxxx", 0, 4),
        (LayerKind.FULL, "xx.x", 0, 2),
        (LayerKind.FULL, ".xxx", 0, 0),
        (LayerKind.FULL, "", 0, 0),
        (LayerKind.MLA, "xx.x", 0, 2),
        (LayerKind.SLIDING, "..xx", 5, 4),
        (LayerKind.SLIDING, "...x", 6, 0),
        (LayerKind.SLIDING, "...x", 5, 4),
        (LayerKind.SLIDING, "....", 1, 4),
        (LayerKind.SLIDING, "x...", 9, 1),
        (LayerKind.STATE, ".x..", 0, 2),
        (LayerKind.STATE, "....", 0, 0),
    ],
)
def test_one_group(kind, present, window, hit):
    assert match_chunks([kind], [row(present)], chunk_tokens=CHUNK, windows=[window]) == hit


def test_all_groups_must_serve():
    kinds = [LayerKind.FULL, LayerKind.SLIDING, LayerKind.STATE]
    present = [row("xxxxx."), row("..xxxx"), row(".x.x.x")]
    assert match_chunks(kinds, present, chunk_tokens=CHUNK, windows=[0, 6, 0]) == 4


@pytest.mark.parametrize("present", [[], [row("x"), row("xx")]])
def test_uneven_presence_is_refused(present):
    with pytest.raises(ValueError, match="one presence row"):
        match_chunks([LayerKind.FULL] * len(present), present, chunk_tokens=CHUNK)


def test_sliding_needs_its_window():
    with pytest.raises(ValueError, match="window"):
        match_chunks([LayerKind.SLIDING], [row("x")], chunk_tokens=CHUNK)


def test_chunks_to_load():
    about = {"hit_chunks": 5, "chunk_tokens": CHUNK}
    assert chunks_to_load(LayerKind.FULL, **about) == range(5)
    assert chunks_to_load(LayerKind.SLIDING, **about, window=6) == range(3, 5)
    assert chunks_to_load(LayerKind.SLIDING, **about, window=1000) == range(5)
    assert chunks_to_load(LayerKind.STATE, **about) == range(4, 5)
    assert chunks_to_load(LayerKind.STATE, hit_chunks=0, chunk_tokens=CHUNK) == range(0)


def tokens_needed(kind, hit_tokens, window):
    """The rule as it is written: which tokens' state a hit of some length needs."""
    if kind is LayerKind.STATE:
        return range(hit_tokens - 1, hit_tokens) if hit_tokens else range(0)
    if kind is LayerKind.SLIDING:
        return range(max(0, hit_tokens - (window - 1)), hit_tokens)
    return range(hit_tokens)


@given(
    st.integers(0, 12).flatmap(
        lambda chunks: st.lists(
            st.tuples(
                st.sampled_from(list(LayerKind)),
                st.integers(1, 30),
                st.lists(st.booleans(), min_size=chunks, max_size=chunks),
            ),
            min_size=1,
            max_size=3,
        )
    )
)
def test_longest_hit_by_plain_reading(groups):
    chunks = len(groups[0][2])

    def served(hit):
        return all(
            present[token // CHUNK]
            for kind, window, present in groups
            for token in tokens_needed(kind, hit * CHUNK, window)
        )

    expected = max(hit for hit in range(chunks + 1) if served(hit))
    kinds = [kind for kind, _, _ in groups]
    got = match_chunks(
        kinds,
        [np.array(present, np.bool_) for _, _, present in groups],
        chunk_tokens=CHUNK,
        windows=[window for _, window, _ in groups],
    )
    assert got == expected
    for kind, window, present in groups:
        load = chunks_to_load(kind, hit_chunks=got, chunk_tokens=CHUNK, window=window)
        needed = {token // CHUNK for token in tokens_needed(kind, got * CHUNK, window)}
        assert needed == set(load)
        assert all(present[number] for number in load)
