"""Layouts: the fingerprint, KV-cache groups, ownership of cells, byte views, the matcher."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from ctxstore.layouts import (
    CellKind,
    DType,
    KVLayout,
    LayerKind,
    LayerSpec,
    Rank,
    canonical_json,
    cell_geometry,
    cell_lengths,
    cell_offsets,
    cell_view,
    cells_to_read,
    cells_to_write,
    choose_layer_group,
    chunk_tokens_for,
    even_boundaries,
    kv_views,
    opaque_view,
    pack_cells_copy,
    unpack_cells_copy,
    usable_tokens,
    weights_digest,
)
from ctxstore.layouts.fingerprint import canonical, fingerprint_of

FULL = LayerSpec.full(kv_heads=4, head_dim=8)
SLIDING = LayerSpec.sliding(kv_heads=2, head_dim=8, window=10)
MLA = LayerSpec.mla(token_bytes=40)

GOLDEN_FINGERPRINT = "2805cc281cba69d63e8b4e3d26373134"


def layout(**changes):
    settings: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "engine_abi": "transformers-1",
        "layers": (FULL,) * 6,
        "kv_dtype": DType.FLOAT16,
        "model_dtype": DType.BFLOAT16,
        "chunk_tokens": 4,
        "rope": canonical_json({"rope_theta": 10000.0}),
        "model_id": "test",
    }
    return KVLayout(**{**settings, **changes})


def rank(tp_rank=0, tp_size=1, pp_rank=0, boundaries=(0, 6)):
    return Rank(tp_rank=tp_rank, tp_size=tp_size, pp_rank=pp_rank, boundaries=boundaries)


def cells(parts):
    return [part.cell for part in parts]


# -- fingerprint

CHANGES: dict[str, Any] = {
    "architecture": "MistralForCausalLM",
    "engine_abi": "vllm-lhnc-1",
    "layers": (FULL,) * 5,
    "kv_dtype": DType.BFLOAT16,
    "model_dtype": DType.FLOAT16,
    "chunk_tokens": 8,
    "layers_per_cell": 2,
    "heads_per_cell": 2,
    "group_chunks": 8,
    "rope": canonical_json({"rope_theta": 10001.0}),
    "rope_max_length": 8192,
    "weight_quantization": "awq",
    "kv_scales_digest": b"scales",
    "weights_digest": b"weights",
    "model_id": "other",
}
LAYER_CHANGES: dict[str, LayerSpec] = {
    "kind": LayerSpec(LayerKind.SLIDING, 4, k_dim=8, v_dim=8, window=1),
    "kv_heads": replace(FULL, kv_heads=8),
    "k_dim": replace(FULL, k_dim=16),
    "v_dim": replace(FULL, v_dim=16),
    "window": LayerSpec(LayerKind.SLIDING, 4, k_dim=8, v_dim=8, window=2),
    "token_bytes": LayerSpec(LayerKind.FULL, 1, token_bytes=64),
    "draft": replace(FULL, draft=True),
}


def test_fingerprint_golden():
    """Written down once; a change orphans every stored context."""
    assert layout().fingerprint.hex() == GOLDEN_FINGERPRINT
    assert len(layout().fingerprint) == 16


def test_every_field_changes_the_fingerprint():
    assert set(CHANGES) == {field.name for field in fields(KVLayout) if field.init}
    prints = {layout(**{name: value}).fingerprint for name, value in CHANGES.items()}
    prints.add(layout().fingerprint)
    assert len(prints) == len(CHANGES) + 1


def test_every_field_of_a_layer_changes_the_fingerprint():
    assert set(LAYER_CHANGES) == {field.name for field in fields(LayerSpec)}
    prints = {layout(layers=(FULL, spec)).fingerprint for spec in LAYER_CHANGES.values()}
    prints.add(layout(layers=(FULL, FULL)).fingerprint)
    assert len(prints) == len(LAYER_CHANGES) + 1


def test_format_version_changes_the_fingerprint():
    assert fingerprint_of(layout(), format_version=2) != layout().fingerprint


def test_what_a_cell_does_not_depend_on_is_not_a_field():
    names = {field.name for spec in (KVLayout, LayerSpec) for field in fields(spec)}
    assert not names & {"tp", "pp", "tp_size", "pp_size", "block", "block_size", "page_size"}


def test_the_same_layout_made_twice_is_equal():
    assert layout() == layout()
    assert hash(layout()) == hash(layout())
    assert layout().fingerprint == layout().fingerprint


def test_order_of_layers_counts():
    one = layout(layers=(FULL, SLIDING), heads_per_cell=1)
    other = layout(layers=(SLIDING, FULL), heads_per_cell=1)
    assert one.fingerprint != other.fingerprint


def test_canonical_tells_neighbours_apart():
    values = [None, False, 0, 0.0, "", b"", (), "0", b"0", (0,), ((0,),), (0, 0), ("a", "b"), "ab"]
    assert len({canonical(value) for value in values}) == len(values)
    with pytest.raises(TypeError, match="no set"):
        canonical({1})


def test_canonical_json():
    assert canonical_json({"b": 1.0, "a": [2, {"c": None}]}) == '{"a":[2,{"c":null}],"b":1}'
    assert canonical_json({"x": 0.5, "y": True}) == '{"x":0.5,"y":true}'
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": float("nan")})


def test_weights_digest():
    rng = np.random.default_rng(1)
    big = rng.integers(0, 256, 20_000, dtype=np.uint8)
    tensors: list[tuple[str, Any]] = [
        ("a", big),
        ("b", np.arange(6, dtype=np.float32).reshape(2, 3)),
    ]
    digest = weights_digest(tensors)
    assert len(digest) == 16
    assert weights_digest(reversed(tensors)) == digest
    middle, first, last = big.copy(), big.copy(), big.copy()
    middle[10_000] ^= 1
    first[0] ^= 1
    last[-1] ^= 1
    assert weights_digest([("a", middle), tensors[1]]) == digest  # only the edges are read
    others = [
        weights_digest(changed)
        for changed in (
            [("a", first), tensors[1]],
            [("a", last), tensors[1]],
            [("a", big[:-1]), tensors[1]],
            [("c", big), tensors[1]],
            [tensors[0]],
        )
    ]
    assert len({digest, *others}) == 6
    with pytest.raises(ValueError, match="two tensors"):
        weights_digest([tensors[0], tensors[0]])
    with pytest.raises(ValueError, match="C-contiguous"):
        weights_digest([("a", big[::2])])
    assert len(weights_digest([("empty", np.empty(0, np.uint8))])) == 16


# -- groups and numbering


def test_groups_of_a_hybrid_model():
    own = layout(layers=(SLIDING, SLIDING, FULL, SLIDING, MLA, FULL, SLIDING), layers_per_cell=2)
    first, second, third = own.groups
    assert first.layers == (0, 1, 3, 6)
    assert (first.base, first.layer_groups, first.head_groups) == (0, 2, 2)
    assert second.layers == (2, 5)
    assert (second.base, second.layer_groups, second.head_groups) == (4, 1, 4)
    assert third.layers == (4,)
    assert (third.base, third.cells, third.cell_kind) == (8, 1, CellKind.OPAQUE)
    assert own.cells == 9
    assert second.cell(layer_group=0, head_group=3) == 7
    assert own.group_of_cell(7) is second
    with pytest.raises(ValueError, match=r"not in the grid's 0 \.\. 8"):
        own.group_of_cell(9)
    with pytest.raises(ValueError, match="no cell"):
        second.cell(layer_group=1, head_group=0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": ()}, "at least one layer"),
        ({"model_id": ""}, "weights_digest or model_id"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"layers_per_cell": 0}, "at least 1"),
        ({"heads_per_cell": 3}, "set heads_per_cell=1"),
        ({"rope_max_length": -1}, "rope_max_length"),
        ({"layers": (LayerSpec.full(kv_heads=65281, head_dim=1),)}, "raise layers_per_cell"),
        (
            {"layers": tuple(LayerSpec.full(kv_heads=1, head_dim=n + 1) for n in range(257))},
            "257 KV-cache groups",
        ),
    ],
)
def test_impossible_layouts(changes, reason):
    with pytest.raises(ValueError, match=reason):
        layout(**changes)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"kind": LayerKind.STATE, "kv_heads": 1, "token_bytes": 8}, "recurrent state"),
        ({"kind": LayerKind.FULL, "kv_heads": 0, "k_dim": 8, "v_dim": 8}, "negative sizes"),
        ({"kind": LayerKind.FULL, "kv_heads": 1, "k_dim": 8}, "k_dim and v_dim"),
        ({"kind": LayerKind.SLIDING, "kv_heads": 1, "k_dim": 8, "v_dim": 8}, "has a window"),
        (
            {"kind": LayerKind.FULL, "kv_heads": 1, "k_dim": 8, "v_dim": 8, "window": 4},
            "has a window",
        ),
        ({"kind": LayerKind.MLA, "kv_heads": 1, "k_dim": 8, "v_dim": 8}, "latents are opaque"),
        ({"kind": LayerKind.MLA, "kv_heads": 2, "token_bytes": 8}, "one head group"),
    ],
)
def test_impossible_layers(spec, reason):
    with pytest.raises(ValueError, match=reason):
        LayerSpec(**spec)


@pytest.mark.parametrize(
    ("blocks", "tokens"),
    [
        ([16], 256),
        ([128], 256),
        ([1], 256),
        ([256], 256),
        ([400], 400),
        ([512], 512),
        ([96], 288),
        ([16, 24], 240),
        ([1000], 1000),
        ([528], 528),
    ],
)
def test_chunk_tokens(blocks, tokens):
    assert chunk_tokens_for(blocks) == tokens


def test_chunk_tokens_refuses():
    for blocks in ([], [0], [16, -1]):
        with pytest.raises(ValueError, match="block sizes"):
            chunk_tokens_for(blocks)


# -- ownership


def test_choose_layer_group():
    mib = 1 << 20
    llama_70b = [at for size in (1, 2, 4, 8) for at in even_boundaries(80, size)]
    assert choose_layer_group(layer_bytes=128 * 1024, boundaries=llama_70b) == 10
    assert choose_layer_group(layer_bytes=512 * 1024, boundaries=llama_70b) == 2
    assert choose_layer_group(layer_bytes=3 * mib, boundaries=llama_70b) == 1
    assert choose_layer_group(layer_bytes=64, boundaries=[30]) == 30
    assert choose_layer_group(layer_bytes=64, boundaries=[0, 7, 15]) == 1
    for bad in ({"layer_bytes": 0, "boundaries": [4]}, {"layer_bytes": 1, "boundaries": [0]}):
        with pytest.raises(ValueError, match="positive"):
            choose_layer_group(**bad)  # type: ignore[arg-type]


def test_even_boundaries():
    assert even_boundaries(6, 3) == (0, 2, 4, 6)
    with pytest.raises(ValueError, match="engine's own"):
        even_boundaries(6, 4)


def test_one_worker_owns_everything():
    own = layout(layers_per_cell=2)
    assert cells(cells_to_write(own, rank())) == list(range(own.cells)) == list(range(12))
    assert cells_to_write(own, rank()) == cells_to_read(own, rank())


def test_tensor_parallel_splits_heads():
    own = layout(layers_per_cell=3)
    parts = cells_to_write(own, rank(1, 2))
    assert cells(parts) == [2, 3, 6, 7]
    assert [part.local_heads for part in parts[:2]] == [slice(0, 1), slice(1, 2)]
    assert [part.local_layers for part in parts[1:3]] == [slice(0, 3), slice(3, 6)]


def test_pipeline_splits_layers():
    own = layout(layers_per_cell=2)
    assert cells(cells_to_write(own, rank(0, 4, 1, (0, 4, 6)))) == [8]
    assert cells_to_write(own, rank(0, 4, 1, (0, 4, 6)))[0].local_layers == slice(0, 2)


def test_copies_have_one_writer():
    own = layout()
    writers = [cells(cells_to_write(own, rank(r, 8))) for r in range(8)]
    assert [bool(row) for row in writers] == [True, False] * 4
    assert cells(cells_to_read(own, rank(5, 8))) == cells(cells_to_read(own, rank(4, 8)))
    latents = layout(layers=(MLA,) * 6)
    assert [len(cells_to_write(latents, rank(r, 3))) for r in range(3)] == [6, 0, 0]
    assert [len(cells_to_read(latents, rank(r, 3))) for r in range(3)] == [6, 6, 6]


def test_misaligned_reader_uses_a_part():
    own = layout(layers_per_cell=4, heads_per_cell=4)
    (part,) = cells_to_read(own, rank(1, 2, 0, (0, 3, 6)))
    assert (part.cell, part.cell_layers, part.cell_heads) == (0, slice(0, 3), slice(2, 4))
    assert (part.local_layers, part.local_heads) == (slice(0, 3), slice(0, 2))
    second, third = cells_to_read(own, rank(1, 2, 1, (0, 3, 6)))
    assert (second.cell, second.cell_layers, second.local_layers) == (0, slice(3, 4), slice(0, 1))
    assert (third.cell, third.cell_layers, third.local_layers) == (1, slice(0, 2), slice(1, 3))


def test_misaligned_writer_is_told_the_fix():
    with pytest.raises(ValueError, match=r"layers 0 \.\. 3.*set layers_per_cell=2"):
        cells_to_write(layout(layers_per_cell=6), rank(0, 1, 0, (0, 4, 6)))
    with pytest.raises(ValueError, match=r"2 of 4 KV heads.*set heads_per_cell=2"):
        cells_to_write(layout(heads_per_cell=4), rank(0, 2))
    # What the messages propose works.
    assert cells_to_write(layout(layers_per_cell=2), rank(0, 1, 0, (0, 4, 6)))
    assert cells_to_write(layout(heads_per_cell=2), rank(0, 2))


def test_stage_without_layers_of_a_group_owns_none_of_it():
    own = layout(layers=(SLIDING, SLIDING, FULL, FULL))
    parts = cells_to_write(own, rank(0, 1, 0, (0, 2, 4)))
    assert {part.kv_group for part in parts} == {0}


def test_impossible_ranks():
    with pytest.raises(ValueError, match="neither divides"):
        cells_to_read(layout(), rank(0, 3))
    with pytest.raises(ValueError, match="cover 5 layers"):
        cells_to_read(layout(), rank(0, 1, 0, (0, 5)))
    for bad in ((2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="tp rank"):
            rank(*bad)
    with pytest.raises(ValueError, match="pp rank 1 of 1"):
        rank(0, 1, 1)
    for boundaries in ((1, 6), (0, 3, 3, 6)):
        with pytest.raises(ValueError, match="rise from 0"):
            rank(boundaries=boundaries)


# -- bytes


def test_bytes_of_a_cell_are_layer_head_token_k_then_v():
    own = layout(layers_per_cell=2, heads_per_cell=2)
    geometry = cell_geometry(own, 0)
    assert geometry.nbytes == 2 * 2 * 4 * 2 * 8 * 2
    buffer = np.arange(geometry.nbytes // 2, dtype=np.uint16)
    view = cell_view(buffer, geometry)
    assert view.shape == (2, 2, 4, 2, 8)
    assert view[1, 0, 3, 1, 5] == (((1 * 2 + 0) * 4 + 3) * 2 + 1) * 8 + 5
    assert np.shares_memory(view, buffer)
    k, v = kv_views(buffer, geometry)
    assert np.array_equal(k, view[..., 0, :])
    assert np.array_equal(v, view[..., 1, :])


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("v_dim", [8, 3])
def test_pack_and_unpack_give_the_same_elements(dtype, v_dim):
    own = layout(
        layers=(LayerSpec.full(kv_heads=4, head_dim=8, v_dim=v_dim),) * 5,
        layers_per_cell=2,  # the last cell row is shorter
        heads_per_cell=2,
        kv_dtype=dtype,
    )
    (group,) = own.groups
    rng = np.random.default_rng(7)
    element = f"u{dtype.itemsize}"
    k, v = (
        rng.integers(0, 256, (5, 4, 4, dim * dtype.itemsize), dtype=np.uint8).view(element)
        for dim in (8, v_dim)
    )
    out = np.zeros(int(cell_offsets(own, group)[-1]), np.uint8)
    pack_cells_copy(own, group, keys=k, values=v, out=out)
    got_k, got_v = np.zeros_like(k), np.zeros_like(v)
    unpack_cells_copy(own, group, cells=out.tobytes(), keys=got_k, values=got_v)
    assert np.array_equal(got_k, k)
    assert np.array_equal(got_v, v)
    offsets = cell_offsets(own, group)
    assert np.array_equal(np.diff(offsets), cell_lengths(own, group))
    for part in cells_to_read(own, rank(boundaries=(0, 5))):
        raw = out[offsets[part.cell] : offsets[part.cell + 1]]
        cell_k, cell_v = kv_views(raw, cell_geometry(own, part.cell))
        assert np.array_equal(cell_k, k[part.local_layers, part.local_heads])
        assert np.array_equal(cell_v, v[part.local_layers, part.local_heads])


def test_pack_from_strided_floats():
    own = layout(kv_dtype=DType.FLOAT32, layers_per_cell=3)
    (group,) = own.groups
    tokens_first = np.random.default_rng(2).random((4, 6, 4, 8), dtype=np.float32)
    k = tokens_first.transpose(1, 2, 0, 3)
    out = bytearray(int(cell_offsets(own, group)[-1]))
    pack_cells_copy(own, group, keys=k, values=k, out=out)
    first = memoryview(out)[: int(cell_offsets(own, group)[1])]
    floats = cell_view(first, cell_geometry(own, 0)).view(np.float32)
    assert np.array_equal(floats[:, 0, :, 0], k[:3, 0])


def test_opaque_cells():
    own = layout(layers=(MLA,) * 3, layers_per_cell=2)
    geometry = cell_geometry(own, 1)
    assert (geometry.layers, geometry.nbytes) == (1, 4 * 40)
    buffer = bytearray(geometry.nbytes)
    opaque_view(buffer, geometry)[0, 3, 39] = 9
    assert buffer.index(9) == 4 * 40 - 1
    with pytest.raises(ValueError, match="no K and V"):
        cell_view(buffer, geometry)
    with pytest.raises(ValueError, match="has heads"):
        opaque_view(bytes(512), cell_geometry(layout(), 0))


def test_wrong_buffers_are_refused():
    own = layout()
    (group,) = own.groups
    geometry = cell_geometry(own, 0)
    with pytest.raises(ValueError, match=f"the cell has {geometry.nbytes} bytes, the buffer 10"):
        cell_view(bytes(10), geometry)
    with pytest.raises(ValueError, match="C-contiguous"):
        cell_view(np.zeros(2 * geometry.nbytes, np.uint8)[::2], geometry)
    wide = layout(layers=(LayerSpec.full(kv_heads=4, head_dim=8, v_dim=4),))
    with pytest.raises(ValueError, match="use kv_views"):
        cell_view(bytes(cell_geometry(wide, 0).nbytes), cell_geometry(wide, 0))
    k = np.zeros((6, 4, 4, 8), np.uint16)
    with pytest.raises(ValueError, match="the buffer 3"):
        pack_cells_copy(own, group, keys=k, values=k, out=bytearray(3))
    for bad in (k[:5], k.view(np.uint8), k.astype(np.uint32)):
        with pytest.raises(ValueError, match="values are"):
            pack_cells_copy(own, group, keys=k, values=bad, out=bytearray(6144))


# -- use


def test_one_token_is_left_to_compute():
    about = {"hit_chunks": 2, "chunk_tokens": 256}
    assert usable_tokens(**about, prompt_tokens=600) == 512
    assert usable_tokens(**about, prompt_tokens=512) == 511
    assert usable_tokens(**about, prompt_tokens=512, block_tokens=16) == 496
    assert usable_tokens(**about, prompt_tokens=1) == 0
    with pytest.raises(ValueError, match="at least one"):
        usable_tokens(**about, prompt_tokens=0)
