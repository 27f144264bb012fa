"""The session a user holds: one transformers model whose contexts live in one store.

Owns the order of things in a call: name the prompt's chunks, rehydrate what the store has, generate
from there, hand new chunks to the background. A store that is slow, wrong or away costs a bounded
time and never a generation. Must not know cell geometry (grid) or how chunks are put (offload).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ctxstore.keys import PrefixChain
from ctxstore_client.discovery import environment_secret
from ctxstore_client.integrations.transformers.cache import (
    cache_from_layers,
    cached_tokens,
    take_layers,
)
from ctxstore_client.integrations.transformers.generation import (
    check_arguments,
    generate_from,
    prefill,
    prompt_tensor,
)
from ctxstore_client.integrations.transformers.grid import ChunkGrid, build_layout
from ctxstore_client.integrations.transformers.load import Loader, LoadResult
from ctxstore_client.integrations.transformers.model import digest_weights, read_geometry
from ctxstore_client.integrations.transformers.offload import (
    Offloader,
    OffloadJob,
    OffloadStats,
    PutOptions,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    import torch
    from transformers import DynamicCache, PreTrainedModel

    from ctxstore.layouts import KVLayout
    from ctxstore_client.ops.arguments import DurabilityName
    from ctxstore_client.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CallStats:
    """What one call did. Times are seconds on a monotonic clock."""

    context_tokens: int
    """Tokens of the prompt."""
    matched_tokens: int
    """Tokens the store said it has; above `rehydrated_tokens` where cells behind them were lost."""
    rehydrated_tokens: int
    """Tokens whose state came from the store: they were not computed."""
    new_tokens: int
    ttft_s: float
    """From the call to the first new token, loading included."""
    load_s: float
    """Asking the store and loading; part of `ttft_s`."""
    load_bytes: int
    total_s: float


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished call."""

    sequences: torch.Tensor
    """[1, prompt + new tokens], as `model.generate` gives it."""
    stats: CallStats
    output: Any
    """What `model.generate` returned: the sequences, or the output class that was asked for."""

    @property
    def new_tokens(self) -> list[int]:
        """The generated token ids."""
        ids: list[int] = self.sequences[0, self.stats.context_tokens :].tolist()
        return ids


class ContextSession:
    """Attaches a full-attention transformers model to a store.

    `model` is a causal language model on one device, in eval mode; `store` is what
    `ctxstore_client.connect` returned and stays the caller's to close, after the session.
    `model_id` names the weights instead of a digest of them: give it only where it surely changes
    with every change of the weights. `secret` (default: the environment's `CTXSTORE_SECRET`) keeps
    others from computing keys of texts they guess. `durability`, `ttl_s` and `priority` are those
    of `store.put`. `load_timeout_s` bounds what asking and loading may add to a call,
    `offload_timeout_s` each put in the background. Weights, dtype and device of the model must
    stay as they are while the session lives.

    Raises ValueError for a model it cannot serve. Call `close` (or use `with`) before the process
    ends, otherwise chunks still on their way are lost. One call of `generate` at a time; the other
    methods may be called from any thread.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: Store,
        *,
        model_id: str | None = None,
        secret: str | bytes | None = None,
        chunk_tokens: int = 256,
        durability: DurabilityName | None = None,
        ttl_s: float | None = None,
        priority: int = 0,
        load_timeout_s: float = 10.0,
        offload_timeout_s: float = 30.0,
    ) -> None:
        if durability not in (None, "memory", "group"):
            raise ValueError(f'durability is "memory", "group" or None, not {durability!r}')
        if not (load_timeout_s > 0 and offload_timeout_s > 0):
            raise ValueError("load_timeout_s and offload_timeout_s are above zero")
        geometry = read_geometry(model)
        self._model = model
        self._layout = build_layout(
            geometry,
            chunk_tokens=chunk_tokens,
            weights_digest=b"" if model_id else digest_weights(model),
            model_id=model_id or "",
        )
        self._grid = ChunkGrid.from_layout(self._layout)
        self._secret = secret if secret is not None else environment_secret()
        self._loader = Loader(
            store, self._grid, geometry=geometry, device=model.device, timeout_s=load_timeout_s
        )
        self._offloader = Offloader(
            store,
            self._grid,
            PutOptions(
                durability=durability,
                ttl_s=ttl_s,
                priority=priority,
                timeout_s=offload_timeout_s,
            ),
        )

    @property
    def layout(self) -> KVLayout:
        """The layout whose fingerprint binds every key of this session."""
        return self._layout

    @property
    def offload_stats(self) -> OffloadStats:
        """What became of the chunks handed to the background so far."""
        return self._offloader.stats

    def generate(
        self,
        input_ids: Sequence[int] | torch.Tensor,
        **arguments: Any,
    ) -> Generation:
        """Generate like `model.generate(input_ids, **arguments)`, computing only what is missing.

        Takes one unpadded prompt of token ids. Raises ValueError for arguments that a stored
        context cannot serve (several beams, padding, images) and whatever the model raises; never
        because of the store. On return new chunks of prompt and answer are queued for the store.
        """
        started = time.perf_counter()
        check_arguments(self._model, arguments)
        ids = prompt_tensor(self._model, input_ids)
        chain = self._chain(ids[0].tolist())
        loaded = self._loader.load(chain, tokens_max=ids.shape[1] - 1)
        cache = cache_from_layers(self._model.config, loaded.layers, tokens=loaded.tokens)
        generation = self._generate(ids, cache, loaded, arguments=arguments, started=started)
        stats = generation.stats
        prefill_s = max(0.0, stats.ttft_s - stats.load_s)
        computed = stats.context_tokens - stats.rehydrated_tokens
        self.offload(
            generation.sequences[0].tolist(),
            cache,
            first_token=loaded.tokens,
            chunk_cost_s=prefill_s / computed * self._grid.chunk_tokens,
        )
        return generation

    def generate_reference(
        self,
        input_ids: Sequence[int] | torch.Tensor,
        *,
        cut_tokens: int,
        **arguments: Any,
    ) -> Generation:
        """Generate without the store, the prefill cut in two after `cut_tokens`.

        What a call that rehydrated `cut_tokens` must equal: floating-point sums depend on where a
        prefill is cut, so a run is compared with one that was cut at the same token.
        """
        started = time.perf_counter()
        check_arguments(self._model, arguments)
        ids = prompt_tensor(self._model, input_ids)
        if not 0 <= cut_tokens < ids.shape[1]:
            raise ValueError(f"cut_tokens is below the prompt's {ids.shape[1]}; got {cut_tokens}")
        cache = cache_from_layers(self._model.config, [], tokens=0)
        if cut_tokens:
            prefill(self._model, ids[:, :cut_tokens], cache)
        nothing = LoadResult.nothing()
        return self._generate(ids, cache, nothing, arguments=arguments, started=started)

    def rehydrate(self, input_ids: Sequence[int] | torch.Tensor) -> tuple[DynamicCache, LoadResult]:
        """The longest stored prefix of a prompt, as a cache for `past_key_values`.

        For applications that call the model themselves; at least one token of the prompt is left
        to compute. Never raises because of the store: the cache is empty then.
        """
        ids = prompt_tensor(self._model, input_ids)
        loaded = self._loader.load(self._chain(ids[0].tolist()), tokens_max=ids.shape[1] - 1)
        cache = cache_from_layers(self._model.config, loaded.layers, tokens=loaded.tokens)
        return cache, loaded

    def offload(
        self,
        tokens: Sequence[int],
        cache: DynamicCache,
        *,
        first_token: int = 0,
        chunk_cost_s: float | None = None,
    ) -> bool:
        """Queue every complete chunk from `first_token` on that `cache` holds; returns at once.

        `tokens` are the ids behind the cache's state; those it does not hold yet (the last one
        generated) are left out. `chunk_cost_s`, what computing a chunk took, helps the store to
        choose what to keep. False when the queue was full and the chunks were dropped.
        """
        layers = take_layers(cache)
        known = min(cached_tokens(layers), len(tokens))
        chain = self._chain(tokens[:known])
        first = first_token // self._grid.chunk_tokens
        if first >= len(chain):
            return True
        return self._offloader.submit(
            OffloadJob(
                first_chunk=first,
                cell_keys=chain.cell_keys(self._grid.cells, first=first),
                manifest_keys=chain.manifest_keys(first=first),
                manifests=[self._grid.manifest(chunk) for chunk in range(first, len(chain))],
                layers=layers,
                chunk_cost_s=chunk_cost_s,
            )
        )

    def wait(self, timeout_s: float = 60.0) -> bool:
        """Wait until all queued chunks are stored or given up; False after `timeout_s`."""
        return self._offloader.wait(timeout_s)

    def close(self, timeout_s: float = 60.0) -> bool:
        """Wait for queued chunks, then end the background thread; False when some were given up.

        Idempotent. The store is left open. `generate` still works afterwards and stores nothing.
        """
        return self._offloader.close(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _chain(self, tokens: Sequence[int]) -> PrefixChain:
        chain = PrefixChain(
            fingerprint=self._layout.fingerprint,
            chunk_tokens=self._grid.chunk_tokens,
            secret=self._secret,
            group_chunks=self._layout.group_chunks,
        )
        chain.append(tokens)
        return chain

    def _generate(
        self,
        ids: torch.Tensor,
        cache: DynamicCache,
        loaded: LoadResult,
        *,
        arguments: dict[str, Any],
        started: float,
    ) -> Generation:
        first_token: list[float] = []
        output = generate_from(
            self._model,
            ids,
            cache,
            arguments=arguments,
            on_first_token=lambda: first_token.append(time.perf_counter()),
        )
        ended = time.perf_counter()
        sequences = getattr(output, "sequences", output)
        stats = CallStats(
            context_tokens=ids.shape[1],
            matched_tokens=loaded.matched_tokens,
            rehydrated_tokens=loaded.tokens,
            new_tokens=sequences.shape[1] - ids.shape[1],
            ttft_s=(first_token[0] if first_token else ended) - started,
            load_s=loaded.load_s,
            load_bytes=loaded.load_bytes,
            total_s=ended - started,
        )
        return Generation(sequences, stats, output)
