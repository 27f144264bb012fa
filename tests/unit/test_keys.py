"""Keys and the prefix chain: golden vectors, separation, bulk arrays, misuse."""

import struct
from hashlib import blake2b
from typing import Any

import numpy as np
import pytest

from ctxstore.keys import (
    MultimodalItem,
    PrefixChain,
    as_key_array,
    key_list,
    make_key,
    manifest_cell,
    raw_keys,
    split_key,
)

FINGERPRINT = bytes(range(16))

GOLDEN_KEYS = [
    "03d694eefae65a8434741c00f6320000",
    "03d694eefae65a8434741c00f6320100",
    "03d694eefae631993af3ffc138170000",
    "03d694eefae631993af3ffc138170100",
]
GOLDEN_MANIFEST = "03d694eefae65a8434741c00f63200ff"
GOLDEN_RAW = "846cd121ef079ec8220db7351ed443ed"


def chain(**changes):
    settings: dict[str, Any] = {"chunk_tokens": 4, "secret": b"s", "group_chunks": 2, **changes}
    return PrefixChain(**{"fingerprint": FINGERPRINT, **settings})


def reference_digest(parent, tokens, *, secret=b"s", lora=b"", items=b"", salt=b""):
    """The documented digest, written down straight."""
    message = b""
    packed = struct.pack(f"<{len(tokens)}I", *tokens)
    for part in (parent, FINGERPRINT, packed, lora, items, salt):
        message += struct.pack("<I", len(part)) + part
    return blake2b(message, digest_size=16, key=secret, person=b"ctxstore-chunk-1").digest()


def test_golden_keys():
    """Written down once; a change orphans every stored context."""
    own = chain()
    own.append(range(9))
    assert [row.tobytes().hex() for row in own.cell_keys(2)] == GOLDEN_KEYS
    assert own.manifest_keys()[0].tobytes().hex() == GOLDEN_MANIFEST
    assert raw_keys(["weights"])[0].tobytes().hex() == GOLDEN_RAW


def test_digests_are_the_documented_ones():
    own = chain(lora_digest=b"lora", salt=b"salt")
    own.append(range(8))
    first = reference_digest(bytes(16), range(4), lora=b"lora", salt=b"salt")
    second = reference_digest(first, range(4, 8), lora=b"lora", salt=b"salt")
    assert own.digests.tobytes() == first + second


def test_keys_are_cut_from_digests():
    own = chain(group_chunks=2)
    own.append(range(20))
    digests = [row.tobytes() for row in own.digests]
    keys = key_list(own.cell_keys([5, 0x1234]))
    assert len(keys) == 10
    for number in range(5):
        head = digests[number // 2 * 2]
        for at, cell in enumerate((5, 0x1234)):
            expected = head[:6] + digests[number][8:] + struct.pack("<H", cell)
            assert keys[number * 2 + at] == expected


def test_growing_in_steps_gives_the_same_keys():
    tokens = np.random.default_rng(3).integers(0, 2**32, 103)
    whole = chain()
    assert whole.append(tokens) == 25
    steps = chain()
    complete = [steps.append(tokens[at : at + 7].tolist()) for at in range(0, 103, 7)]
    assert sum(complete) == 25
    assert steps.digests.tobytes() == whole.digests.tobytes()
    assert steps.tokens == whole.tokens == 103
    assert len(steps) == 25


@pytest.mark.parametrize(
    "changes",
    [
        {"secret": b"t"},
        {"secret": None},
        {"fingerprint": bytes(16)},
        {"lora_digest": b"l"},
        {"salt": b"l"},
    ],
)
def test_what_differs_shares_nothing(changes):
    own, other = chain(), chain(**changes)
    own.append(range(64))
    other.append(range(64))
    ids = {key[:14] for key in key_list(own.cell_keys(1))}
    assert ids.isdisjoint(key[:14] for key in key_list(other.cell_keys(1)))


def test_lora_and_salt_are_different_fields():
    with_lora, with_salt = chain(lora_digest=b"x"), chain(salt=b"x")
    with_lora.append(range(4))
    with_salt.append(range(4))
    assert with_lora.digests.tobytes() != with_salt.digests.tobytes()


def test_one_token_changes_all_that_follows_and_nothing_before():
    tokens = list(range(40))
    own, other = chain(), chain()
    own.append(tokens)
    tokens[17] += 1
    other.append(tokens)
    same = (own.digests == other.digests).all(axis=1)
    assert same.tolist() == [True] * 4 + [False] * 6


def test_secret_as_text_is_its_utf8():
    text, raw = chain(secret="schlüssel"), chain(secret="schlüssel".encode())
    text.append(range(4))
    raw.append(range(4))
    assert text.digests.tobytes() == raw.digests.tobytes()


def test_fork_goes_its_own_way():
    trunk = chain()
    trunk.append(range(6))
    branch = trunk.fork_copy()
    branch.append([100, 101])
    trunk.append([6, 7])
    assert trunk.digests[0].tobytes() == branch.digests[0].tobytes()
    assert trunk.digests[1].tobytes() != branch.digests[1].tobytes()
    straight = chain()
    straight.append(range(8))
    assert trunk.digests.tobytes() == straight.digests.tobytes()


def test_multimodal_items_count_where_they_touch():
    image = MultimodalItem(digest=b"img", start=5, length=4)  # tokens 5..8: chunks 1 and 2
    plain, seen = chain(), chain()
    plain.append(range(16))
    seen.append(range(16), [image])
    assert plain.digests[0].tobytes() == seen.digests[0].tobytes()
    field = struct.pack("<I", 3) + b"img" + struct.pack("<qQ", 1, 4)
    second = reference_digest(plain.digests[0].tobytes(), range(4, 8), items=field)
    field = struct.pack("<I", 3) + b"img" + struct.pack("<qQ", -3, 4)
    third = reference_digest(second, range(8, 12), items=field)
    assert seen.digests[1].tobytes() == second
    assert seen.digests[2].tobytes() == third
    assert seen.digests[3].tobytes() == reference_digest(third, range(12, 16))


def test_multimodal_item_over_two_appends():
    image = MultimodalItem(digest=b"img", start=5, length=9)
    whole, steps = chain(), chain()
    whole.append(range(16), [image])
    steps.append(range(6), [image])
    steps.append(range(6, 11))
    steps.append(range(11, 16))
    assert steps.digests.tobytes() == whole.digests.tobytes()


def test_multimodal_item_that_comes_too_late_changes_nothing():
    own = chain()
    own.append(range(10))
    with pytest.raises(ValueError, match="token 7 starts in a chunk that has its key"):
        own.append(range(10, 12), [MultimodalItem(digest=b"i", start=7, length=2)])
    assert own.tokens == 10
    own.append(range(10, 12), [MultimodalItem(digest=b"i", start=8, length=2)])
    assert len(own) == 3


def test_multimodal_item_without_tokens_is_refused():
    with pytest.raises(ValueError, match="spans 0 tokens"):
        MultimodalItem(digest=b"i", start=0, length=0)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([1, -2], "got -2"),
        ([2**32], "got 4294967296"),
        ([1.5], "dtype float64"),
        (["a"], "one row of integers"),
        ([[1, 2]], "shape"),
        ([[1, 2], [3]], "one row of integers"),
        ([2**70], "one row of integers"),
    ],
)
def test_bad_tokens_change_nothing(tokens, reason):
    own = chain()
    own.append([1, 2])
    with pytest.raises(ValueError, match=reason):
        own.append(tokens)
    assert own.tokens == 2


def test_no_tokens():
    own = chain()
    assert own.append([]) == 0
    assert own.cell_keys(3).shape == (0, 16)
    assert own.digests.shape == (0, 16)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"secret": b"x" * 65}, "65 bytes"),
        ({"chunk_tokens": 0}, "at least 1"),
        ({"group_chunks": 0}, "at least 1"),
        ({"fingerprint": b""}, "fingerprint"),
    ],
)
def test_bad_chain_settings(changes, reason):
    with pytest.raises(ValueError, match=reason):
        chain(**changes)


def test_ranges_of_chunks():
    own = chain()
    own.append(range(40))
    every = own.chunk_keys(cell=3)
    assert own.chunk_keys(cell=3, first=2, stop=5).tobytes() == every[2:5].tobytes()
    assert own.manifest_keys(1, first=9)[0, 14:].tobytes() == b"\x01\xff"
    for first, stop in ((-1, 2), (3, 2), (0, 11)):
        with pytest.raises(ValueError, match="not among the 10 complete"):
            own.cell_keys(1, first=first, stop=stop)
    for cells in ([-1], [0x10000], [[1]]):
        with pytest.raises(ValueError, match="cell indices"):
            own.cell_keys(cells)


def test_manifest_cells_end_at_255():
    assert manifest_cell(0) == 0xFF00
    assert manifest_cell(255) == 0xFFFF
    with pytest.raises(ValueError, match="256"):
        manifest_cell(256)


def test_make_and_split():
    key = make_key(group=b"GROUP!", chunk_id=b"CHUNK_ID", cell=0x0102)
    assert key == b"GROUP!CHUNK_ID\x02\x01"
    parts = split_key(key)
    assert (parts.group, parts.chunk_id, parts.cell) == (b"GROUP!", b"CHUNK_ID", 0x0102)
    with pytest.raises(ValueError, match="this one has 15"):
        split_key(key[:15])
    changes: list[dict[str, Any]] = [
        {"group": b"short"},
        {"chunk_id": b""},
        {"cell": -1},
        {"cell": 65536},
    ]
    for change in changes:
        parts_of: dict[str, Any] = {"group": bytes(6), "chunk_id": bytes(8), "cell": 0, **change}
        with pytest.raises(ValueError, match="a key has"):
            make_key(**parts_of)


def test_key_arrays():
    keys = [bytes([n]) * 16 for n in range(5)]
    array = as_key_array(keys)
    assert array.shape == (5, 16)
    assert array.flags.c_contiguous
    assert key_list(array) == keys
    assert as_key_array(array) is array or np.shares_memory(as_key_array(array), array)
    assert key_list(as_key_array(array[::2])) == keys[::2]
    mixed: list[bytearray | memoryview] = [bytearray(keys[0]), memoryview(keys[1])]
    assert key_list(as_key_array(mixed)) == keys[:2]
    assert as_key_array([]).shape == (0, 16)


def test_keys_with_zero_bytes_at_the_end_survive():
    keys = [bytes(16), b"\1" + bytes(15)]
    assert key_list(as_key_array(keys)) == keys


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ([bytes(16), bytes(15)], "key 1 has 15 bytes"),
        ([bytes(15), bytes(17)], "key 0 has 15 bytes"),
        ([bytes(16), b""], "key 1 has 0 bytes"),
        ([bytes(16), "x" * 16], "key 1 is a str"),
        ([bytes(16), 7], "key 1 is a int"),
        ([memoryview(bytes(64)).cast("I")], "key 0 has 64 bytes"),
        (bytes(16), "one bytes; pass a sequence"),
        ("x" * 16, "one str"),
        (np.zeros(16, np.uint8), "shape \\(16,\\)"),
        (np.zeros((2, 15), np.uint8), "shape \\(2, 15\\)"),
        (np.zeros((2, 16), np.int8), "dtype int8"),
    ],
)
def test_bad_keys_are_named(keys, reason):
    with pytest.raises(ValueError, match=reason):
        as_key_array(keys)


def test_raw_keys():
    keys = raw_keys(["a", b"a", "b"])
    assert keys.shape == (3, 16)
    assert keys[0].tobytes() == keys[1].tobytes() != keys[2].tobytes()
    assert raw_keys([]).shape == (0, 16)
