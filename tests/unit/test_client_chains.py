"""Chains of the client: the environment's secret reaches the keys, and what may override it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ctxstore.keys import PrefixChain
from ctxstore.layouts import DType, KVLayout, LayerKind, LayerSpec
from ctxstore_client import prefix_chain

PRINT = bytes(range(16))
TOKENS = list(range(64))


def layout(**options: Any) -> KVLayout:
    layer = LayerSpec(kind=LayerKind.FULL, kv_heads=2, k_dim=8, v_dim=8)
    return KVLayout(
        architecture="test",
        engine_abi="test-1",
        layers=(layer, layer),
        kv_dtype=DType.FLOAT16,
        model_dtype=DType.FLOAT16,
        model_id="test",
        **options,
    )


def keys_of(chain: PrefixChain) -> list[bytes]:
    chain.append(TOKENS)
    return [row.tobytes() for row in chain.chunk_keys(cell=0)]


def plain(secret: bytes) -> list[bytes]:
    return keys_of(PrefixChain(fingerprint=PRINT, chunk_tokens=16, secret=secret))


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CTXSTORE_SECRET", "of this cluster")
    return "of this cluster"


def test_the_environment_binds_the_keys(secret: str) -> None:
    keys = keys_of(prefix_chain(PRINT, 16))
    assert len(keys) == 4
    assert keys == plain(secret.encode())
    assert keys != plain(b"")


def test_without_a_secret_keys_are_those_of_the_plain_chain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CTXSTORE_SECRET", raising=False)
    assert keys_of(prefix_chain(PRINT, 16)) == plain(b"")


@pytest.mark.parametrize("given", ["mine", b"mine", b"", ""])
def test_a_secret_that_is_given_wins(secret: str, given: str | bytes) -> None:
    expected = plain(given.encode() if isinstance(given, str) else given)
    assert keys_of(prefix_chain(PRINT, 16, secret=given)) == expected


def test_a_layout_brings_its_own_sizes(secret: str) -> None:
    shape = layout(chunk_tokens=16, group_chunks=2)
    chain = prefix_chain(shape, lora_digest=b"l", salt=b"s")
    assert (chain.chunk_tokens, chain.group_chunks) == (16, 2)
    same = PrefixChain(
        fingerprint=shape.fingerprint,
        chunk_tokens=16,
        group_chunks=2,
        secret=secret,
        lora_digest=b"l",
        salt=b"s",
    )
    assert keys_of(chain) == keys_of(same)


def test_misuse_is_a_value_error(secret: str) -> None:
    shape = layout(chunk_tokens=16)
    wrong: list[Any] = [
        lambda: prefix_chain(PRINT),
        lambda: prefix_chain(b"", 16),
        lambda: prefix_chain(16, 16),  # type: ignore[arg-type]
        lambda: prefix_chain(shape, 32),
        lambda: prefix_chain(shape, group_chunks=3),
        lambda: prefix_chain(shape, secret=bytes(65)),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=r"\w"):
            call()
    assert np.array_equal(prefix_chain(shape, 16).digests, prefix_chain(shape).digests)
