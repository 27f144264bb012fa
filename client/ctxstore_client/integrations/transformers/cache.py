"""Moves chunks between a transformers cache and host buffers, cell by cell, bit for bit.

Owns the byte order of a cell, [layer][head][token][K then V], on the tensor side. Knows nothing of
keys, the store or a model's name, and imports torch and transformers only inside functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import DynamicCache, PretrainedConfig

    LayerTensors = tuple[torch.Tensor, torch.Tensor]
    """Keys and values of one layer, each [1, heads, tokens, head_dim]."""

ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class CellSpan:
    """The layers and KV heads that one cell of a chunk's grid covers, each half open."""

    layer_first: int
    layer_stop: int
    head_first: int
    head_stop: int

    def elements(self, tokens: int, head_dim: int) -> int:
        """Elements of this cell in a chunk of `tokens` tokens."""
        layers = self.layer_stop - self.layer_first
        heads = self.head_stop - self.head_first
        return layers * heads * tokens * 2 * head_dim


def take_layers(cache: DynamicCache) -> list[LayerTensors]:
    """The tensors that a cache holds now.

    They stay as they are while generation goes on: a growing cache puts new tensors in the place
    of old ones and never writes into those.
    """
    layers: list[LayerTensors] = []
    for layer in cache.layers:
        if layer.keys is None or layer.values is None:
            return []
        layers.append((layer.keys, layer.values))
    return layers


def cached_tokens(layers: Sequence[LayerTensors]) -> int:
    """Tokens that every layer holds."""
    return min((int(keys.shape[2]) for keys, _ in layers), default=0)


def copy_cells_out(
    layers: Sequence[LayerTensors],
    spans: Sequence[CellSpan],
    buffers: Sequence[ByteArray],
    *,
    first_token: int,
    tokens: int,
) -> None:
    """Fill one buffer per cell with the bytes of tokens `first_token` .. `first_token + tokens`."""
    import torch

    with torch.no_grad():
        for span, buffer in zip(spans, buffers, strict=True):
            keys, _ = layers[span.layer_first]
            cell = _cell_tensor(buffer, span, tokens, keys)
            heads = slice(span.head_first, span.head_stop)
            wanted = slice(first_token, first_token + tokens)
            for row, index in enumerate(range(span.layer_first, span.layer_stop)):
                keys, values = layers[index]
                cell[row, ..., : keys.shape[-1]].copy_(keys[0, heads, wanted])
                cell[row, ..., keys.shape[-1] :].copy_(values[0, heads, wanted])


def copy_cells_in(
    layers: Sequence[LayerTensors],
    spans: Sequence[CellSpan],
    buffers: Sequence[ByteArray],
    *,
    first_token: int,
    tokens: int,
) -> None:
    """The way back: write the cells' bytes into the layers' tensors at `first_token`."""
    import torch

    with torch.no_grad():
        for span, buffer in zip(spans, buffers, strict=True):
            keys, _ = layers[span.layer_first]
            cell = _cell_tensor(buffer, span, tokens, keys).to(keys.device)
            heads = slice(span.head_first, span.head_stop)
            wanted = slice(first_token, first_token + tokens)
            for row, index in enumerate(range(span.layer_first, span.layer_stop)):
                keys, values = layers[index]
                keys[0, heads, wanted].copy_(cell[row, ..., : keys.shape[-1]])
                values[0, heads, wanted].copy_(cell[row, ..., keys.shape[-1] :])


@dataclass(frozen=True, slots=True)
class TensorShape:
    """What is needed to make a layer's tensors: sizes, dtype as torch names it, device."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: torch.device


def new_layers(shape: TensorShape, tokens: int) -> list[LayerTensors]:
    """Uninitialised tensors for `tokens` tokens of every layer."""
    import torch

    dtype: torch.dtype = getattr(torch, shape.dtype)
    size = (1, shape.kv_heads, tokens, shape.head_dim)

    def empty() -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=shape.device)

    return [(empty(), empty()) for _ in range(shape.layers)]


def cache_from_layers(
    config: PretrainedConfig, layers: Sequence[LayerTensors], *, tokens: int
) -> DynamicCache:
    """A cache that holds the first `tokens` tokens of `layers`; empty for 0."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    if tokens == 0:
        return cache
    for layer, (keys, values) in zip(cache.layers, layers, strict=True):
        layer.lazy_initialization(keys, values)
        layer.keys = keys[:, :, :tokens]
        layer.values = values[:, :, :tokens]
    return cache


def _cell_tensor(
    buffer: ByteArray, span: CellSpan, tokens: int, like: torch.Tensor
) -> torch.Tensor:
    """The buffer as a host tensor [layers, heads, tokens, K and V], sharing its memory."""
    import torch

    return (
        torch.from_numpy(buffer)
        .view(like.dtype)
        .view(
            span.layer_stop - span.layer_first,
            span.head_stop - span.head_first,
            tokens,
            2 * like.shape[-1],
        )
    )
