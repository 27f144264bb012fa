"""The canonical grid at every (tp, pp): written once, read whole, bytes in their place."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ctxstore.layouts import (
    DType,
    KVLayout,
    LayerSpec,
    Rank,
    cell_geometry,
    cell_offsets,
    cells_to_read,
    cells_to_write,
    kv_views,
    pack_cells_copy,
)

SPECS = [
    LayerSpec.full(kv_heads=4, head_dim=2),
    LayerSpec.sliding(kv_heads=8, head_dim=2, window=5),
    LayerSpec.full(kv_heads=2, head_dim=3, v_dim=1),
    LayerSpec.mla(token_bytes=6),
]


@st.composite
def layouts(draw):
    layers = tuple(draw(st.lists(st.sampled_from(SPECS), min_size=1, max_size=9)))
    return KVLayout(
        architecture="any",
        engine_abi="any",
        layers=layers,
        kv_dtype=DType.FLOAT16,
        model_dtype=DType.FLOAT16,
        model_id="any",
        chunk_tokens=2,
        layers_per_cell=draw(st.integers(1, 4)),
        heads_per_cell=draw(st.sampled_from([1, 2])),
    )


@st.composite
def shapes(draw, layers):
    tp_size = draw(st.sampled_from([1, 2, 4, 8, 16]))
    inner = draw(st.sets(st.integers(1, layers - 1), max_size=3)) if layers > 1 else set()
    return tp_size, (0, *sorted(inner), layers)


def ranks(tp_size, boundaries):
    for pp_rank in range(len(boundaries) - 1):
        for tp_rank in range(tp_size):
            yield Rank(tp_rank=tp_rank, tp_size=tp_size, pp_rank=pp_rank, boundaries=boundaries)


def squares(layout, part):
    """(layer, head) pairs of the model that a part covers, from the cell's own numbers."""
    group = layout.groups[part.kv_group]
    row, column = divmod(part.cell - group.base, group.head_groups)
    heads = group.spec.kv_heads // group.head_groups
    members = group.layers[row * layout.layers_per_cell :][: layout.layers_per_cell]
    return {
        (layer, column * heads + head)
        for layer in members[part.cell_layers]
        for head in range(heads)[part.cell_heads]
    }


def held(layout, rank):
    """(layer, head) pairs a worker holds, counted without the grid."""
    first, stop = rank.boundaries[rank.pp_rank], rank.boundaries[rank.pp_rank + 1]
    found = set()
    for layer in range(first, stop):
        heads = layout.layers[layer].kv_heads
        for head in range(heads):
            owner = head * rank.tp_size // heads  # first rank that holds the head
            copies = max(1, rank.tp_size // heads)
            if owner <= rank.tp_rank < owner + copies:
                found.add((layer, head))
    return found


@given(layouts(), st.data())
def test_readers_get_exactly_what_they_hold(layout, data):
    tp_size, boundaries = data.draw(shapes(len(layout.layers)))
    for rank in ranks(tp_size, boundaries):
        covered = [
            square for part in cells_to_read(layout, rank) for square in squares(layout, part)
        ]
        assert len(covered) == len(set(covered))
        assert set(covered) == held(layout, rank)


@given(layouts(), st.data())
def test_every_cell_has_one_writer_or_the_shape_is_refused(layout, data):
    tp_size, boundaries = data.draw(shapes(len(layout.layers)))
    written = []
    refusals = []
    for rank in ranks(tp_size, boundaries):
        try:
            parts = cells_to_write(layout, rank)
        except ValueError as error:
            refusals.append(str(error))
            continue
        for part in parts:
            geometry = cell_geometry(layout, part.cell)
            assert (part.cell_layers, part.cell_heads) == (
                slice(0, geometry.layers),
                slice(0, geometry.heads),
            )
        written += [part.cell for part in parts]
    assert len(written) == len(set(written))
    assert all("set layers_per_cell=" in told or "set heads_per_cell=" in told for told in refusals)
    assert refusals or sorted(written) == list(range(layout.cells))


@given(layouts(), st.data())
def test_the_finest_grid_is_never_refused(layout, data):
    tp_size, boundaries = data.draw(shapes(len(layout.layers)))
    settings: dict[str, Any] = {"layers_per_cell": 1, "heads_per_cell": 1}
    finest = KVLayout(
        architecture="any",
        engine_abi="any",
        layers=layout.layers,
        kv_dtype=DType.FLOAT16,
        model_dtype=DType.FLOAT16,
        model_id="any",
        **settings,
    )
    written = [
        part.cell for rank in ranks(tp_size, boundaries) for part in cells_to_write(finest, rank)
    ]
    assert sorted(written) == list(range(finest.cells))


@given(layouts(), st.data())
def test_a_reader_of_any_shape_finds_the_writers_bytes(layout, data):
    """Write the chunk as one worker, read it as another shape: every element in its place."""
    tp_size, boundaries = data.draw(shapes(len(layout.layers)))
    grids = [group for group in layout.groups if not group.spec.token_bytes]
    assume(grids)
    rng = np.random.default_rng(1)
    for group in grids:
        spec = group.spec
        sizes = (len(group.layers), spec.kv_heads, layout.chunk_tokens)
        k = rng.integers(0, 2**16, (*sizes, spec.k_dim), dtype=np.uint16)
        v = rng.integers(0, 2**16, (*sizes, spec.v_dim), dtype=np.uint16)
        offsets = cell_offsets(layout, group)
        chunk = np.zeros(int(offsets[-1]), np.uint8)
        pack_cells_copy(layout, group, keys=k, values=v, out=chunk)
        for rank in ranks(tp_size, boundaries):
            mine = sorted({pair for pair in held(layout, rank) if pair[0] in group.layers})
            if not mine:
                continue
            first_layer = group.layers.index(mine[0][0])
            first_head = mine[0][1]
            for part in cells_to_read(layout, rank):
                if part.kv_group != group.index:
                    continue
                at = part.cell - group.base
                cell = chunk[offsets[at] : offsets[at + 1]]
                cell_k, cell_v = kv_views(cell, cell_geometry(layout, part.cell))
                own = np.s_[first_layer:, first_head:]
                local = (part.local_layers, part.local_heads)
                inside = (part.cell_layers, part.cell_heads)
                assert np.array_equal(cell_k[inside], k[own][local])
                assert np.array_equal(cell_v[inside], v[own][local])


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8, 16])
def test_cells_are_numbered_without_gaps(tp_size):
    layout = KVLayout(
        architecture="any",
        engine_abi="any",
        layers=(SPECS[0], SPECS[1], SPECS[0], SPECS[3]),
        kv_dtype=DType.FLOAT16,
        model_dtype=DType.FLOAT16,
        model_id="any",
    )
    for group, following in pairwise(layout.groups):
        assert group.base + group.cells == following.base
    owners = [layout.group_of_cell(cell).index for cell in range(layout.cells)]
    assert owners == sorted(owners)
    written = [
        part.cell for rank in ranks(tp_size, (0, 4)) for part in cells_to_write(layout, rank)
    ]
    assert sorted(written) == list(range(layout.cells))
