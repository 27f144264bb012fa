"""Prefix chains and key arrays for any tokens, cut anywhere."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ctxstore.keys import MultimodalItem, PrefixChain, as_key_array, key_list, split_key

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=60)
FINGERPRINT = bytes(16)


def chain(chunk_tokens=4, group_chunks=3):
    return PrefixChain(
        fingerprint=FINGERPRINT, chunk_tokens=chunk_tokens, group_chunks=group_chunks
    )


@given(TOKENS, st.data())
def test_any_cut_gives_the_same_chain(tokens, data):
    image = MultimodalItem(digest=b"i", start=data.draw(st.integers(0, 60)), length=9)
    whole = chain()
    whole.append(tokens, [image])
    steps, rest = chain(), list(tokens)
    steps.append([], [image])
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        steps.append(rest[:cut])
        rest = rest[cut:]
    assert steps.digests.tobytes() == whole.digests.tobytes()
    assert steps.tokens == len(tokens)


@given(TOKENS, TOKENS)
def test_keys_are_shared_as_far_as_the_tokens_are(one, other):
    left, right = chain(), chain()
    left.append(one)
    right.append(other)
    common = 0
    while one[common : common + 4] == other[common : common + 4] and common + 4 <= min(
        len(one), len(other)
    ):
        common += 4
    shared = common // 4
    ids_left = [split_key(key).chunk_id for key in key_list(left.manifest_keys())]
    ids_right = [split_key(key).chunk_id for key in key_list(right.manifest_keys())]
    assert ids_left[:shared] == ids_right[:shared]
    assert set(ids_left[shared:]).isdisjoint(ids_right[shared:])


@given(TOKENS, st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_a_group_lives_together(tokens, chunk_tokens, group_chunks, cells):
    own = chain(chunk_tokens, group_chunks)
    own.append(tokens)
    parts = [split_key(key) for key in key_list(own.cell_keys(cells))]
    assert len(parts) == len(own) * cells == len(set(parts))
    for number, part in enumerate(parts):
        chunk, cell = divmod(number, cells)
        assert part.cell == cell
        assert part.group == parts[chunk // group_chunks * group_chunks * cells].group


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=40))
def test_key_arrays_round_trip(keys):
    assert key_list(as_key_array(keys)) == keys
    wide = np.zeros((len(keys), 20), np.uint8)
    wide[:, 2:18] = as_key_array(keys)
    assert key_list(as_key_array(wide[:, 2:18])) == keys
