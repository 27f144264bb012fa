"""Which cells of the canonical grid a worker of any (tp, pp) writes and reads.

Owns the election of one writer per cell and the choice of the layer group. The grid is fixed per
model: nothing here may change it for the sake of one worker's shape.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ctxstore.layouts.layout import KVGroup, KVLayout

CELL_BYTES_TARGET_MAX: Final = 2 * 1024 * 1024
"""Cells aim at 0.25 to 2 MiB: fewer index entries, yet many enough to spread over links."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One worker: its place in tensor and pipeline parallelism.

    `boundaries` are the engine's pipeline stages over all layers: 0, ..., number of layers;
    stage p runs layers boundaries[p] .. boundaries[p + 1].
    """

    tp_rank: int
    tp_size: int
    pp_rank: int
    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.tp_rank < self.tp_size:
            raise ValueError(f"tp rank {self.tp_rank} of {self.tp_size}")
        if not 0 <= self.pp_rank < len(self.boundaries) - 1:
            raise ValueError(f"pp rank {self.pp_rank} of {len(self.boundaries) - 1}")
        rising = all(low < high for low, high in pairwise(self.boundaries))
        if self.boundaries[0] != 0 or not rising:
            raise ValueError(f"stage boundaries rise from 0: {self.boundaries}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CellPart:
    """The part of one cell that a worker holds, in the cell's and in the worker's own numbers.

    `cell_layers`, `cell_heads` index the cell's view; `local_layers` counts the worker's layers of
    this KV-cache group, `local_heads` the heads the worker holds.
    """

    cell: int
    kv_group: int
    cell_layers: slice
    cell_heads: slice
    local_layers: slice
    local_heads: slice


def even_boundaries(layers: int, pp_size: int) -> tuple[int, ...]:
    """Stages of equal size. Raises `ValueError` where there are none: pass the engine's own."""
    if pp_size < 1 or layers % pp_size:
        raise ValueError(
            f"{layers} layers do not split into {pp_size} equal stages; "
            "give the engine's own stage boundaries"
        )
    return tuple(range(0, layers + 1, layers // pp_size))


def choose_layer_group(*, layer_bytes: int, boundaries: Iterable[int]) -> int:
    """Layers per cell: the largest that divides every boundary and keeps a cell within 2 MiB.

    `layer_bytes` is one layer's share of a cell (chunk tokens x heads per cell x bytes). The
    `boundaries` of every pipeline shape that is to write must be among those given; the number of
    layers counts as one. 1 is the answer where nothing larger fits.
    """
    step = math.gcd(*boundaries)
    if step < 1 or layer_bytes < 1:
        raise ValueError("choose_layer_group needs a positive boundary and positive layer_bytes")
    fitting = [
        count
        for count in range(1, step + 1)
        if step % count == 0 and count * layer_bytes <= CELL_BYTES_TARGET_MAX
    ]
    return max(fitting, default=1)


def cells_to_read(layout: KVLayout, rank: Rank) -> tuple[CellPart, ...]:
    """Parts of cells that fill everything this worker holds, in cell order.

    A worker whose borders cut a cell reads the whole cell and uses the part. Raises `ValueError`
    where `tp_size` and the number of KV heads do not fit at all.
    """
    _check_layers(layout, rank)
    return tuple(part for group in layout.groups for part in _parts(layout, group, rank))


def cells_to_write(layout: KVLayout, rank: Rank) -> tuple[CellPart, ...]:
    """Cells this worker writes, whole ones only, in cell order; each cell has one writer.

    Where ranks hold copies (more ranks than KV heads, MLA) the first of them writes. Raises
    `ValueError`, naming the fix, when the worker's borders cut a cell.
    """
    _check_layers(layout, rank)
    chosen: list[CellPart] = []
    for group in layout.groups:
        _check_writer(layout, group, rank)
        copies = max(1, rank.tp_size // group.spec.kv_heads)
        if rank.tp_rank % copies == 0:
            chosen.extend(_parts(layout, group, rank))
    return tuple(chosen)


def _parts(layout: KVLayout, group: KVGroup, rank: Rank) -> Iterator[CellPart]:
    first_layer, stop_layer = _ordinals(group, rank)
    first_head, stop_head = _heads(group, rank)
    layers, heads = layout.layers_per_cell, group.spec.kv_heads // group.head_groups
    for row in range(first_layer // layers, -(-stop_layer // layers)):
        low, high = max(first_layer, row * layers), min(stop_layer, (row + 1) * layers)
        if low >= high:
            continue
        for column in range(first_head // heads, -(-stop_head // heads)):
            left = max(first_head, column * heads)
            right = min(stop_head, (column + 1) * heads)
            yield CellPart(
                cell=group.cell(layer_group=row, head_group=column),
                kv_group=group.index,
                cell_layers=slice(low - row * layers, high - row * layers),
                cell_heads=slice(left - column * heads, right - column * heads),
                local_layers=slice(low - first_layer, high - first_layer),
                local_heads=slice(left - first_head, right - first_head),
            )


def _ordinals(group: KVGroup, rank: Rank) -> tuple[int, int]:
    """The worker's layers of the group, counted within the group."""
    return (
        bisect_left(group.layers, rank.boundaries[rank.pp_rank]),
        bisect_left(group.layers, rank.boundaries[rank.pp_rank + 1]),
    )


def _heads(group: KVGroup, rank: Rank) -> tuple[int, int]:
    heads, size = group.spec.kv_heads, rank.tp_size
    if heads % size == 0:
        share = heads // size
        return rank.tp_rank * share, (rank.tp_rank + 1) * share
    if size % heads == 0:
        head = rank.tp_rank // (size // heads)
        return head, head + 1
    raise ValueError(
        f"{heads} KV heads and tp={size}: neither divides the other; "
        f"use a tp that divides {heads} or is a multiple of it"
    )


def _check_layers(layout: KVLayout, rank: Rank) -> None:
    if rank.boundaries[-1] != len(layout.layers):
        raise ValueError(
            f"the stages cover {rank.boundaries[-1]} layers, the layout has {len(layout.layers)}"
        )


def _check_writer(layout: KVLayout, group: KVGroup, rank: Rank) -> None:
    first, stop = _ordinals(group, rank)
    layers = layout.layers_per_cell
    if first < stop and (first % layers or (stop % layers and stop != len(group.layers))):
        inner = [bisect_left(group.layers, at) for at in rank.boundaries[1:-1]]
        raise ValueError(
            f"pipeline stage {rank.pp_rank} (layers {rank.boundaries[rank.pp_rank]} .. "
            f"{rank.boundaries[rank.pp_rank + 1] - 1}) cuts a cell of {layers} layers: no worker "
            f"could write it; set layers_per_cell={math.gcd(layers, *inner)} for this model, "
            "the same on all its workers"
        )
    low, high = _heads(group, rank)
    heads = group.spec.kv_heads // group.head_groups
    if low % heads or high % heads:
        raise ValueError(
            f"tp={rank.tp_size} gives a worker {high - low} of {group.spec.kv_heads} KV heads, "
            f"which cuts a cell of {heads}; set heads_per_cell={math.gcd(heads, high - low)} "
            "for this model, the same on all its workers"
        )
