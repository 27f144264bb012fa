"""KVLayout: the facts about a model that decide the bytes of its cells.

Owns their validation, the KV-cache groups and the numbering of cells. Tensor and pipeline
parallelism, block size and page layout must never become fields: they do not change a cell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final

from ctxstore import limits
from ctxstore.layouts.fingerprint import fingerprint_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CHUNK_TOKENS_TARGET: Final = 256
CHUNK_TOKENS_MAX: Final = 1 << 20


class DType(Enum):
    """Element types; the value is torch's name without the module."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT8_E4M3 = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEMSIZES[self]


_ITEMSIZES: Final = {
    DType.FLOAT32: 4,
    DType.FLOAT16: 2,
    DType.BFLOAT16: 2,
    DType.FLOAT8_E4M3: 1,
    DType.FLOAT8_E5M2: 1,
}


class LayerKind(Enum):
    """How a layer looks back, and so which chunks a hit of some length needs of it."""

    FULL = "full"
    SLIDING = "sliding"
    MLA = "mla"
    STATE = "state"


class CellKind(Enum):
    """How the bytes of a cell are arranged."""

    GRID = "grid"
    """[layer][head][token][K then V]"""
    OPAQUE = "opaque"
    """[layer][token][bytes]: one head group, elements not told apart"""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer's state per token, over all ranks: `kv_heads` x (K, V), or `token_bytes` opaque."""

    kind: LayerKind
    kv_heads: int
    k_dim: int = 0
    v_dim: int = 0
    window: int = 0
    token_bytes: int = 0
    draft: bool = False

    def __post_init__(self) -> None:
        if self.kind is LayerKind.STATE:
            raise ValueError(
                "recurrent state layers have no cells in this version; "
                "only attention layers can be stored"
            )
        if min(self.k_dim, self.v_dim, self.window, self.token_bytes) < 0 or self.kv_heads < 1:
            raise ValueError(f"negative sizes in {self}")
        if (self.window > 0) != (self.kind is LayerKind.SLIDING):
            raise ValueError(f"a sliding layer has a window, others have none: {self}")
        opaque = self.token_bytes > 0
        if opaque and (self.k_dim or self.v_dim or self.kv_heads != 1):
            raise ValueError(f"an opaque layer has one head group and no K and V: {self}")
        if not opaque and (self.k_dim < 1 or self.v_dim < 1):
            raise ValueError(f"a layer needs k_dim and v_dim, or token_bytes: {self}")
        if self.kind is LayerKind.MLA and not opaque:
            raise ValueError(f"MLA latents are opaque, give token_bytes: {self}")

    @classmethod
    def full(
        cls, *, kv_heads: int, head_dim: int, v_dim: int | None = None, draft: bool = False
    ) -> LayerSpec:
        """Full attention; `v_dim` where V is not as wide as K."""
        width = head_dim if v_dim is None else v_dim
        return cls(LayerKind.FULL, kv_heads, k_dim=head_dim, v_dim=width, draft=draft)

    @classmethod
    def sliding(
        cls, *, kv_heads: int, head_dim: int, window: int, v_dim: int | None = None
    ) -> LayerSpec:
        """Attention over the last `window` tokens, the current one included."""
        width = head_dim if v_dim is None else v_dim
        return cls(LayerKind.SLIDING, kv_heads, k_dim=head_dim, v_dim=width, window=window)

    @classmethod
    def mla(cls, *, token_bytes: int) -> LayerSpec:
        """Multi-head latent attention: `token_bytes` of latent and rope part per token."""
        return cls(LayerKind.MLA, 1, token_bytes=token_bytes)


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers with the same state: one KV-cache group. Its cells are numbered from `base`.

    Cell = base + layer_group * head_groups + head_group. Layer group j holds `layers[j * n:][:n]`
    with n = layers_per_cell; the last one may be shorter.
    """

    index: int
    spec: LayerSpec
    layers: tuple[int, ...]
    layer_groups: int
    head_groups: int
    base: int

    @property
    def cells(self) -> int:
        """Number of cells of one chunk."""
        return self.layer_groups * self.head_groups

    @property
    def cell_kind(self) -> CellKind:
        """Arrangement of bytes."""
        return CellKind.OPAQUE if self.spec.token_bytes else CellKind.GRID

    def cell(self, *, layer_group: int, head_group: int) -> int:
        """Cell index of one square of the grid."""
        if not (0 <= layer_group < self.layer_groups and 0 <= head_group < self.head_groups):
            raise ValueError(
                f"no cell ({layer_group}, {head_group}) in a grid of "
                f"{self.layer_groups} x {self.head_groups}"
            )
        return self.base + layer_group * self.head_groups + head_group


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """Everything that changes the bytes of a model's cells. Raises `ValueError` where it cannot be.

    `engine_abi` names the engine's way of computing state (for example "transformers-1"): engines
    share keys only when they give the same. `rope` and `weight_quantization` are canonical texts
    (`canonical_json`). `rope_max_length` is 0 unless it changes the frequencies. The weights are
    told apart by `weights_digest` or by a `model_id` the operator vouches for; one is required.
    `groups` and `fingerprint` (16 bytes) are derived.
    """

    architecture: str
    engine_abi: str
    layers: tuple[LayerSpec, ...]
    kv_dtype: DType
    model_dtype: DType
    chunk_tokens: int = CHUNK_TOKENS_TARGET
    layers_per_cell: int = 1
    heads_per_cell: int = 1
    group_chunks: int = 16
    rope: str = ""
    rope_max_length: int = 0
    weight_quantization: str = ""
    kv_scales_digest: bytes = b""
    weights_digest: bytes = b""
    model_id: str = ""
    groups: tuple[KVGroup, ...] = field(init=False, compare=False, repr=False)
    fingerprint: bytes = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a layout needs at least one layer")
        if not (self.weights_digest or self.model_id):
            raise ValueError(
                "a layout needs weights_digest or model_id: "
                "models of the same shape would share their contexts"
            )
        if not 1 <= self.chunk_tokens <= CHUNK_TOKENS_MAX:
            raise ValueError(f"chunk_tokens is 1 .. {CHUNK_TOKENS_MAX}, not {self.chunk_tokens}")
        if min(self.layers_per_cell, self.heads_per_cell, self.group_chunks) < 1:
            raise ValueError("layers_per_cell, heads_per_cell and group_chunks are at least 1")
        if self.rope_max_length < 0:
            raise ValueError(f"rope_max_length is {self.rope_max_length}")
        # The one place that fills derived fields of the frozen object.
        object.__setattr__(self, "groups", _kv_groups(self))
        object.__setattr__(self, "fingerprint", fingerprint_of(self))

    @property
    def cells(self) -> int:
        """Number of cells of one chunk, manifests not counted."""
        return sum(group.cells for group in self.groups)

    def group_of_cell(self, cell: int) -> KVGroup:
        """The KV-cache group a cell belongs to. Raises `ValueError` for no cell of this grid."""
        for group in self.groups:
            if group.base <= cell < group.base + group.cells:
                return group
        raise ValueError(f"cell {cell} is not in the grid's 0 .. {self.cells - 1}")


def chunk_tokens_for(block_sizes: Iterable[int]) -> int:
    """Tokens per chunk for an engine's block sizes: the multiple of their lcm nearest to 256."""
    sizes = list(block_sizes)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"block sizes are positive and at least one: {sizes}")
    block = math.lcm(*sizes)
    return block * max(1, round(CHUNK_TOKENS_TARGET / block))


def _kv_groups(layout: KVLayout) -> tuple[KVGroup, ...]:
    """Groups in the order of their first layer; dictionaries keep the order of insertion."""
    members: dict[LayerSpec, list[int]] = {}
    for number, spec in enumerate(layout.layers):
        members.setdefault(spec, []).append(number)
    groups: list[KVGroup] = []
    base = 0
    for spec, layers in members.items():
        heads = 1 if spec.token_bytes else layout.heads_per_cell
        if spec.kv_heads % heads:
            raise ValueError(
                f"heads_per_cell={heads} does not divide {spec.kv_heads} KV heads; "
                f"set heads_per_cell={math.gcd(heads, spec.kv_heads)}"
            )
        group = KVGroup(
            index=len(groups),
            spec=spec,
            layers=tuple(layers),
            layer_groups=-(-len(layers) // layout.layers_per_cell),
            head_groups=spec.kv_heads // heads,
            base=base,
        )
        groups.append(group)
        base += group.cells
    _check_bounds(groups, cells=base)
    return tuple(groups)


def _check_bounds(groups: Sequence[KVGroup], *, cells: int) -> None:
    if len(groups) > limits.KV_GROUPS_MAX:
        raise ValueError(f"{len(groups)} KV-cache groups, at most {limits.KV_GROUPS_MAX}")
    if cells > limits.MANIFEST_CELL_BASE:
        raise ValueError(
            f"{cells} cells in a chunk, at most {limits.MANIFEST_CELL_BASE}; "
            "raise layers_per_cell or heads_per_cell"
        )
