"""Tiny models with fixed random weights, made on the spot: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import numpy as np

VOCABULARY = 512
CHUNK_TOKENS = 32

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    # With the default, greedy output would be one token for ever.
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}

GREEDY: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}


def tiny_llama(*, seed: int = 0, dtype: str = "float32", **changes: Any) -> Any:
    """A Llama of 4 layers, 2 KV heads of 32: 2 KiB of float32 state per layer and 4 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # So small a model gains nothing from threads, and loses much where cores are shared.
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes}))
    return model.to(getattr(torch, dtype)).eval()


def tokens(count: int, *, seed: int = 1) -> list[int]:
    """Random token ids, the same for the same seed."""
    ids: list[int] = np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()
    return ids
