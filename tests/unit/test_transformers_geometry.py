"""Cells of a transformers model, told from its geometry alone: no torch, no model, no store."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ctxstore.keys import PrefixChain
from ctxstore.manifest import decode_manifest
from ctxstore_client.integrations.transformers.grid import ChunkGrid, build_layout
from ctxstore_client.integrations.transformers.model import ModelGeometry

SMOLLM2 = ModelGeometry(
    architecture="LlamaForCausalLM",
    layers=30,
    kv_heads=3,
    head_dim=64,
    dtype="float32",
    element_bytes=4,
    rope='{"rope_theta":100000}',
    quantization="",
)


def layout_of(geometry: ModelGeometry, *, chunk_tokens: int = 256, model_id: str = "m"):
    return build_layout(geometry, chunk_tokens=chunk_tokens, model_id=model_id)


@pytest.mark.parametrize("layers", [1, 2, 7, 30, 32])
@pytest.mark.parametrize("kv_heads", [1, 3, 8])
def test_every_layer_and_head_is_in_exactly_one_cell(layers: int, kv_heads: int) -> None:
    geometry = replace(SMOLLM2, layers=layers, kv_heads=kv_heads)
    grid = ChunkGrid.from_layout(layout_of(geometry))
    covered = np.zeros((layers, kv_heads), np.int64)
    for span in grid.spans:
        covered[span.layer_first : span.layer_stop, span.head_first : span.head_stop] += 1
    assert (covered == 1).all()
    assert grid.chunk_bytes == geometry.token_bytes * 256


def test_cells_have_the_length_that_their_spans_say() -> None:
    grid = ChunkGrid.from_layout(layout_of(SMOLLM2))
    expected = [span.elements(256, SMOLLM2.head_dim) * 4 for span in grid.spans]
    assert list(grid.lengths) == expected
    assert [len(buffer) for buffer in grid.new_buffers()] == expected
    # 15 layers of one head: as many as stay below 2 MiB and divide 30.
    assert expected == [15 * 256 * 2 * 64 * 4] * 6


def test_the_manifest_describes_the_chunk() -> None:
    layout = layout_of(SMOLLM2)
    grid = ChunkGrid.from_layout(layout)
    manifest = decode_manifest(grid.manifest(7))
    assert manifest.fingerprint == layout.fingerprint
    assert (manifest.tokens, manifest.position) == (256, 7 * 256)
    assert manifest.lengths().tolist() == list(grid.lengths)


@pytest.mark.parametrize(
    "changed",
    [
        {"architecture": "QwenForCausalLM"},
        {"layers": 15},
        {"kv_heads": 1},
        {"head_dim": 32},
        {"dtype": "bfloat16", "element_bytes": 2},
        {"rope": '{"rope_theta":10000}'},
        {"quantization": '{"bits":4}'},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_whatever_changes_the_bytes_changes_every_key(changed: dict[str, Any]) -> None:
    other = layout_of(replace(SMOLLM2, **changed))
    assert keys_of(other) != keys_of(layout_of(SMOLLM2))


def test_other_weights_or_chunks_have_other_keys() -> None:
    same = keys_of(layout_of(SMOLLM2))
    assert keys_of(layout_of(SMOLLM2)) == same
    assert keys_of(layout_of(SMOLLM2, model_id="n")) != same
    assert keys_of(layout_of(SMOLLM2, chunk_tokens=128)) != same
    digest = build_layout(SMOLLM2, chunk_tokens=256, weights_digest=b"m" * 16)
    assert keys_of(digest) != same


def keys_of(layout) -> bytes:
    chain = PrefixChain(fingerprint=layout.fingerprint, chunk_tokens=layout.chunk_tokens)
    chain.append(range(512))
    return chain.manifest_keys().tobytes()


def test_a_dtype_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="float64 is not supported"):
        layout_of(replace(SMOLLM2, dtype="float64", element_bytes=8))


@pytest.mark.parametrize(
    "module",
    [
        "ctxstore_client.integrations.transformers",
        "ctxstore_client.integrations.transformers.demo_models",
        "ctxstore_client.demo",
        "ctxstore_client.demo.turn",
    ],
)
def test_importing_needs_no_engine(module: str) -> None:
    code = (
        "import importlib, sys\n"
        "for name in ('torch', 'transformers'): sys.modules[name] = None\n"
        f"importlib.import_module({module!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
