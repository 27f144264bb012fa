"""What a model's state looks like in the store: layout, fingerprint, canonical grid, matcher.

Owns the byte geometry of cells and the rules that say which chunks serve a prefix. Pure: it knows
neither keys nor where bytes are kept, and never imports an engine.
"""

from ctxstore.layouts.cells import (
    CellGeometry,
    cell_geometry,
    cell_lengths,
    cell_offsets,
    cell_view,
    kv_views,
    opaque_view,
    pack_cells_copy,
    unpack_cells_copy,
)
from ctxstore.layouts.fingerprint import canonical_json, weights_digest
from ctxstore.layouts.grid import (
    CellPart,
    Rank,
    cells_to_read,
    cells_to_write,
    choose_layer_group,
    even_boundaries,
)
from ctxstore.layouts.layout import (
    CellKind,
    DType,
    KVGroup,
    KVLayout,
    LayerKind,
    LayerSpec,
    chunk_tokens_for,
)
from ctxstore.layouts.matcher import chunks_to_load, match_chunks, usable_tokens

__all__ = [
    "CellGeometry",
    "CellKind",
    "CellPart",
    "DType",
    "KVGroup",
    "KVLayout",
    "LayerKind",
    "LayerSpec",
    "Rank",
    "canonical_json",
    "cell_geometry",
    "cell_lengths",
    "cell_offsets",
    "cell_view",
    "cells_to_read",
    "cells_to_write",
    "choose_layer_group",
    "chunk_tokens_for",
    "chunks_to_load",
    "even_boundaries",
    "kv_views",
    "match_chunks",
    "opaque_view",
    "pack_cells_copy",
    "unpack_cells_copy",
    "usable_tokens",
    "weights_digest",
]
