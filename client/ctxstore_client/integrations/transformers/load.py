"""Brings the longest stored prefix of a prompt from the store into a model's tensors.

Owns the host buffers of a load and its one deadline. Whatever the store answers becomes a number of
tokens, possibly 0, never an exception. Removes nothing: cells that a manifest promised and the
store lost are put again by the next offload, which starts where the load ended.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ctxstore.wire.messages import Lookup
from ctxstore_client.integrations.transformers.cache import TensorShape, copy_cells_in, new_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ctxstore.keys import PrefixChain
    from ctxstore_client.integrations.transformers.cache import ByteArray, LayerTensors
    from ctxstore_client.integrations.transformers.grid import ChunkGrid
    from ctxstore_client.integrations.transformers.model import ModelGeometry
    from ctxstore_client.store import Store

log = logging.getLogger(__name__)

LOAD_BATCH_BYTES_MAX: Final = 64 * 1024 * 1024
"""Host memory for chunks on their way into tensors; longer contexts load in several batches."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What came from the store."""

    tokens: int
    """Leading tokens whose state is there, a multiple of the chunk's."""
    matched_tokens: int
    """Tokens whose manifests are there; above `tokens` where cells behind them were not."""
    load_s: float
    load_bytes: int
    layers: Sequence[LayerTensors]
    """Tensors that hold at least `tokens` tokens; empty without any."""

    @staticmethod
    def nothing() -> LoadResult:
        """The result of a load that found nothing, or was not made."""
        return LoadResult(tokens=0, matched_tokens=0, load_s=0.0, load_bytes=0, layers=())


@dataclass(slots=True)
class _ProgressState:
    """Chunks matched and loaded so far: what stays valid when a later batch fails."""

    matched: int = 0
    loaded: int = 0
    layers: Sequence[LayerTensors] = ()


class Loader:
    """Loads prefixes one at a time; a second thread waits for the first one's buffers."""

    def __init__(
        self,
        store: Store,
        grid: ChunkGrid,
        *,
        geometry: ModelGeometry,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self._store = store
        self._grid = grid
        self._timeout_s = timeout_s
        self._shape = TensorShape(
            layers=geometry.layers,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            dtype=geometry.dtype,
            device=device,
        )
        self._lock = threading.Lock()
        self._buffers: list[list[ByteArray]] = []

    def load(self, chain: PrefixChain, *, tokens_max: int) -> LoadResult:
        """Load the longest stored prefix of `chain` of at most `tokens_max` tokens."""
        started = time.perf_counter()
        progress = _ProgressState()
        with self._lock:
            try:
                self._load(chain, tokens_max // self._grid.chunk_tokens, started, progress)
            except Exception:  # a broken store must not break generation
                log.warning("event=rehydrate_failed chunks=%d", len(chain), exc_info=True)
        if progress.loaded < progress.matched:
            log.warning(
                "event=rehydrate_incomplete matched_chunks=%d loaded_chunks=%d",
                progress.matched,
                progress.loaded,
            )
        return LoadResult(
            tokens=progress.loaded * self._grid.chunk_tokens,
            matched_tokens=progress.matched * self._grid.chunk_tokens,
            load_s=time.perf_counter() - started,
            load_bytes=progress.loaded * self._grid.chunk_bytes,
            layers=progress.layers if progress.loaded else (),
        )

    def _load(
        self, chain: PrefixChain, chunks_max: int, started: float, progress: _ProgressState
    ) -> None:
        wanted = min(len(chain), chunks_max)
        if wanted == 0:
            return
        keys = chain.manifest_keys(stop=wanted)
        progress.matched = self._store.match(keys, timeout_s=self._left_s(started))
        if progress.matched == 0:
            return
        progress.layers = new_layers(self._shape, progress.matched * self._grid.chunk_tokens)
        batch = max(1, LOAD_BATCH_BYTES_MAX // self._grid.chunk_bytes)
        while progress.loaded < progress.matched and (left_s := self._left_s(started)) > 0:
            asked = min(batch, progress.matched - progress.loaded)
            arrived = self._load_batch(
                chain,
                progress.layers,
                first=progress.loaded,
                chunks=asked,
                timeout_s=left_s,
            )
            progress.loaded += arrived
            if arrived < asked:
                return

    def _load_batch(
        self,
        chain: PrefixChain,
        layers: Sequence[LayerTensors],
        *,
        first: int,
        chunks: int,
        timeout_s: float,
    ) -> int:
        """Load `chunks` chunks from `first` on; returns how many leading ones arrived whole."""
        while len(self._buffers) < chunks:
            self._buffers.append(self._grid.new_buffers())
        buffers = [buffer for cells in self._buffers[:chunks] for buffer in cells]
        keys = chain.cell_keys(self._grid.cells, first=first, stop=first + chunks)
        results = self._store.get_into(keys, buffers, timeout_s=timeout_s, exact=True)
        cells = self._grid.cells
        for index in range(chunks):
            if any(r is not Lookup.HIT for r in results[index * cells : (index + 1) * cells]):
                return index
            copy_cells_in(
                layers,
                self._grid.spans,
                self._buffers[index],
                first_token=(first + index) * self._grid.chunk_tokens,
                tokens=self._grid.chunk_tokens,
            )
        return chunks

    def _left_s(self, started: float) -> float:
        return self._timeout_s - (time.perf_counter() - started)
