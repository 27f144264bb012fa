"""How one chunk of a transformers model is cut into cells: layout, spans, buffers, manifests.

Owns the choice of layout for a model's geometry. Pure numbers: imports neither torch nor
transformers and never touches the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from ctxstore.layouts import (
    DType,
    KVLayout,
    LayerSpec,
    Rank,
    cell_lengths,
    cells_to_read,
    choose_layer_group,
)
from ctxstore.manifest import Manifest, encode_manifest
from ctxstore_client.integrations.transformers.cache import CellSpan

if TYPE_CHECKING:
    from ctxstore_client.integrations.transformers.cache import ByteArray
    from ctxstore_client.integrations.transformers.model import ModelGeometry

ENGINE_ABI: Final = "transformers-1"
"""Changes whenever this integration would write other bytes for the same tokens."""


def build_layout(
    geometry: ModelGeometry,
    *,
    chunk_tokens: int,
    weights_digest: bytes = b"",
    model_id: str = "",
) -> KVLayout:
    """The layout of a model that runs unsharded. Raises ValueError for an unknown dtype."""
    try:
        dtype = DType(geometry.dtype)
    except ValueError as error:
        raise ValueError(
            f"{geometry.architecture}: a cache of {geometry.dtype} is not supported"
        ) from error
    layer_bytes = chunk_tokens * 2 * geometry.head_dim * geometry.element_bytes
    layer = LayerSpec.full(kv_heads=geometry.kv_heads, head_dim=geometry.head_dim)
    return KVLayout(
        architecture=geometry.architecture,
        engine_abi=ENGINE_ABI,
        layers=(layer,) * geometry.layers,
        kv_dtype=dtype,
        model_dtype=dtype,
        chunk_tokens=chunk_tokens,
        layers_per_cell=choose_layer_group(layer_bytes=layer_bytes, boundaries=(geometry.layers,)),
        rope=geometry.rope,
        weight_quantization=geometry.quantization,
        weights_digest=weights_digest,
        model_id=model_id,
    )


@dataclass(frozen=True, slots=True)
class ChunkGrid:
    """The cells of every chunk of one layout, in cell order."""

    layout: KVLayout
    spans: tuple[CellSpan, ...]
    lengths: tuple[int, ...]
    """Bytes of each cell."""

    @classmethod
    def from_layout(cls, layout: KVLayout) -> Self:
        """The grid of a worker that holds all layers and heads."""
        whole = Rank(tp_rank=0, tp_size=1, pp_rank=0, boundaries=(0, len(layout.layers)))
        spans = tuple(
            CellSpan(
                layer_first=part.local_layers.start,
                layer_stop=part.local_layers.stop,
                head_first=part.local_heads.start,
                head_stop=part.local_heads.stop,
            )
            for part in cells_to_read(layout, whole)
        )
        return cls(layout, spans, tuple(cell_lengths(layout, layout.groups[0]).tolist()))

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        return self.layout.chunk_tokens

    @property
    def cells(self) -> int:
        """Cells of a chunk."""
        return len(self.spans)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's cells."""
        return sum(self.lengths)

    def new_buffers(self) -> list[ByteArray]:
        """Uninitialised host memory for one chunk: a buffer per cell."""
        return [np.empty(length, np.uint8) for length in self.lengths]

    def manifest(self, chunk: int) -> bytes:
        """Encoded manifest of chunk number `chunk` of a context."""
        return encode_manifest(
            Manifest.of_lengths(
                self.lengths,
                fingerprint=self.layout.fingerprint,
                tokens=self.chunk_tokens,
                position=chunk * self.chunk_tokens,
            )
        )
