"""Byte geometry of cells, as numpy shapes over plain buffers.

Owns `[layer][head][token][K then V]` and `[layer][token][bytes]`, C order, no padding. A view never
copies; what copies says so in its name. Must not know where a buffer lives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ctxstore.layouts.layout import CellKind, KVGroup, KVLayout

Array = npt.NDArray[Any]
CellBuffer = bytes | bytearray | memoryview | Array

# Elements move as integers of their width: numpy has no bfloat16 and no float8. `.view()` of the
# result gives float32 or float16 back without a copy.
_ELEMENT_BY_ITEMSIZE: Final[dict[int, type[np.unsignedinteger[Any]]]] = {
    1: np.uint8,
    2: np.uint16,
    4: np.uint32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CellGeometry:
    """Extent of one cell: how many layers, heads, tokens and bytes it holds."""

    kind: CellKind
    layers: int
    heads: int
    tokens: int
    k_dim: int
    v_dim: int
    itemsize: int
    token_bytes: int

    @property
    def nbytes(self) -> int:
        """Length of the shard."""
        if self.kind is CellKind.OPAQUE:
            return self.layers * self.tokens * self.token_bytes
        width = (self.k_dim + self.v_dim) * self.itemsize
        return self.layers * self.heads * self.tokens * width


def cell_geometry(layout: KVLayout, cell: int) -> CellGeometry:
    """Geometry of cell index `cell`. Raises `ValueError` for a cell that is not in the grid."""
    group = layout.group_of_cell(cell)
    return _geometry(layout, group, layer_group=(cell - group.base) // group.head_groups)


def cell_lengths(layout: KVLayout, group: KVGroup) -> npt.NDArray[np.uint32]:
    """(cells of the group,) uint32: shard length of each cell, in cell order."""
    rows = [
        _geometry(layout, group, layer_group=number).nbytes for number in range(group.layer_groups)
    ]
    return np.repeat(np.array(rows, np.uint32), group.head_groups)


def cell_offsets(layout: KVLayout, group: KVGroup) -> npt.NDArray[np.int64]:
    """(cells + 1,) int64: where each cell starts when a chunk's cells stand back to back."""
    lengths = cell_lengths(layout, group).astype(np.int64)
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))


def cell_view(buffer: CellBuffer, geometry: CellGeometry) -> Array:
    """`[layers, heads, tokens, 2, dim]` over a grid cell's bytes; unsigned elements by item size.

    Writable if the buffer is. Raises `ValueError` for a buffer of another length, an opaque cell,
    or K and V of different widths (use `kv_views`).
    """
    if geometry.k_dim != geometry.v_dim:
        raise ValueError("K and V are of different widths; use kv_views")
    rows = _grid_rows(buffer, geometry)
    return rows.reshape(*rows.shape[:3], 2, geometry.k_dim)


def kv_views(buffer: CellBuffer, geometry: CellGeometry) -> tuple[Array, Array]:
    """(K, V) views `[layers, heads, tokens, k_dim]` and `[..., v_dim]` over a grid cell's bytes."""
    rows = _grid_rows(buffer, geometry)
    return rows[..., : geometry.k_dim], rows[..., geometry.k_dim :]


def opaque_view(buffer: CellBuffer, geometry: CellGeometry) -> Array:
    """`[layers, tokens, token_bytes]` uint8 over an opaque cell's bytes."""
    if geometry.kind is not CellKind.OPAQUE:
        raise ValueError("a grid cell has heads; use cell_view")
    flat = _flat_bytes(buffer, geometry)
    return flat.reshape(geometry.layers, geometry.tokens, geometry.token_bytes)


def pack_cells_copy(
    layout: KVLayout, group: KVGroup, *, keys: Array, values: Array, out: CellBuffer
) -> None:
    """Copy one chunk of an engine's K and V into the group's cells, back to back in `out`.

    `keys` is `[layers of the group, kv_heads, tokens, k_dim]`, `values` alike with v_dim, with any
    strides and any dtype of the layout's item size. `out` is writable and holds the whole chunk.
    """
    for part, k_part, v_part in _chunk_parts(layout, group, keys=keys, values=values, buffer=out):
        k_view, v_view = part
        np.copyto(k_view, k_part)
        np.copyto(v_view, v_part)


def unpack_cells_copy(
    layout: KVLayout, group: KVGroup, *, cells: CellBuffer, keys: Array, values: Array
) -> None:
    """The way back: copy a chunk's cells into an engine's K and V, shaped as in pack."""
    for part, k_part, v_part in _chunk_parts(layout, group, keys=keys, values=values, buffer=cells):
        k_view, v_view = part
        np.copyto(k_part, k_view)
        np.copyto(v_part, v_view)


def _chunk_parts(
    layout: KVLayout, group: KVGroup, *, keys: Array, values: Array, buffer: CellBuffer
) -> list[tuple[tuple[Array, Array], Array, Array]]:
    """Per cell: its (K, V) views and the engine's K and V of the same squares."""
    spec = group.spec
    shape = (len(group.layers), spec.kv_heads, layout.chunk_tokens)
    k_all = _as_elements(keys, (*shape, spec.k_dim), layout, what="keys")
    v_all = _as_elements(values, (*shape, spec.v_dim), layout, what="values")
    flat = _as_bytes(buffer)
    offsets = cell_offsets(layout, group).tolist()
    if flat.size != offsets[-1]:
        raise ValueError(f"the chunk's cells have {offsets[-1]} bytes, the buffer {flat.size}")
    layers, heads = layout.layers_per_cell, spec.kv_heads // group.head_groups
    parts: list[tuple[tuple[Array, Array], Array, Array]] = []
    for number in range(group.cells):
        row, column = divmod(number, group.head_groups)
        geometry = _geometry(layout, group, layer_group=row)
        at = np.s_[row * layers : (row + 1) * layers, column * heads : (column + 1) * heads]
        views = kv_views(flat[offsets[number] : offsets[number + 1]], geometry)
        parts.append((views, k_all[at], v_all[at]))
    return parts


def _geometry(layout: KVLayout, group: KVGroup, *, layer_group: int) -> CellGeometry:
    rest = len(group.layers) - layer_group * layout.layers_per_cell
    spec = group.spec
    return CellGeometry(
        kind=group.cell_kind,
        layers=min(layout.layers_per_cell, rest),
        heads=spec.kv_heads // group.head_groups,
        tokens=layout.chunk_tokens,
        k_dim=spec.k_dim,
        v_dim=spec.v_dim,
        itemsize=layout.kv_dtype.itemsize,
        token_bytes=spec.token_bytes,
    )


def _grid_rows(buffer: CellBuffer, geometry: CellGeometry) -> Array:
    if geometry.kind is not CellKind.GRID:
        raise ValueError("an opaque cell has no K and V; use opaque_view")
    elements = _flat_bytes(buffer, geometry).view(_ELEMENT_BY_ITEMSIZE[geometry.itemsize])
    width = geometry.k_dim + geometry.v_dim
    return elements.reshape(geometry.layers, geometry.heads, geometry.tokens, width)


def _flat_bytes(buffer: CellBuffer, geometry: CellGeometry) -> npt.NDArray[np.uint8]:
    flat = _as_bytes(buffer)
    if flat.size != geometry.nbytes:
        raise ValueError(f"the cell has {geometry.nbytes} bytes, the buffer {flat.size}")
    return flat


def _as_bytes(buffer: CellBuffer) -> npt.NDArray[np.uint8]:
    if isinstance(buffer, np.ndarray):
        if not buffer.flags.c_contiguous:
            raise ValueError("a cell's buffer is C-contiguous")
        return buffer.reshape(-1).view(np.uint8)
    return np.frombuffer(buffer, np.uint8)


def _as_elements(array: Array, shape: tuple[int, ...], layout: KVLayout, *, what: str) -> Array:
    itemsize = layout.kv_dtype.itemsize
    if array.shape != shape or array.dtype.itemsize != itemsize:
        raise ValueError(
            f"{what} are {shape} with elements of {itemsize} bytes; "
            f"got {array.shape} of {array.dtype.itemsize} bytes"
        )
    return array.view(_ELEMENT_BY_ITEMSIZE[itemsize])
