"""Which transformers models are served, and that their state survives cells bit for bit."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from ctxstore.layouts import pack_cells_copy
from ctxstore_client.integrations.transformers.cache import (
    TensorShape,
    cache_from_layers,
    cached_tokens,
    copy_cells_in,
    copy_cells_out,
    new_layers,
    take_layers,
)
from ctxstore_client.integrations.transformers.grid import ChunkGrid, build_layout
from ctxstore_client.integrations.transformers.model import digest_weights, read_geometry
from tests.engines.tiny import CHUNK_TOKENS, SMALL, tiny_llama, tokens

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

pytestmark = pytest.mark.engines


def filled_cache(model: Any, count: int) -> Any:
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens(count)]), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_state_survives_the_way_through_cells_bit_for_bit(dtype: str) -> None:
    model = tiny_llama(dtype=dtype)
    geometry = read_geometry(model)
    assert geometry.dtype == dtype
    grid = ChunkGrid.from_layout(build_layout(geometry, chunk_tokens=CHUNK_TOKENS, model_id="tiny"))
    chunks = 3
    layers = take_layers(filled_cache(model, chunks * CHUNK_TOKENS + 5))
    assert cached_tokens(layers) == chunks * CHUNK_TOKENS + 5
    shape = TensorShape(
        layers=geometry.layers,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        dtype=dtype,
        device=model.device,
    )
    back = new_layers(shape, chunks * CHUNK_TOKENS)
    for chunk in range(chunks):
        at = {"first_token": chunk * CHUNK_TOKENS, "tokens": CHUNK_TOKENS}
        buffers = grid.new_buffers()
        copy_cells_out(layers, grid.spans, buffers, **at)
        copy_cells_in(back, grid.spans, buffers, **at)
    cache = cache_from_layers(model.config, back, tokens=2 * CHUNK_TOKENS)
    assert cache.get_seq_length() == 2 * CHUNK_TOKENS
    for layer, (keys, values) in zip(cache.layers, layers, strict=True):
        assert torch.equal(layer.keys, keys[:, :, : 2 * CHUNK_TOKENS])
        assert torch.equal(layer.values, values[:, :, : 2 * CHUNK_TOKENS])


def test_cells_are_those_of_the_canonical_grid() -> None:
    model = tiny_llama()
    layout = build_layout(read_geometry(model), chunk_tokens=CHUNK_TOKENS, model_id="tiny")
    grid = ChunkGrid.from_layout(layout)
    layers = take_layers(filled_cache(model, 2 * CHUNK_TOKENS))
    buffers = grid.new_buffers()
    copy_cells_out(layers, grid.spans, buffers, first_token=CHUNK_TOKENS, tokens=CHUNK_TOKENS)
    chunk = np.s_[:, :, CHUNK_TOKENS:]
    expected = np.empty(grid.chunk_bytes, np.uint8)
    pack_cells_copy(
        layout,
        layout.groups[0],
        keys=np.concatenate([keys.numpy() for keys, _ in layers])[chunk],
        values=np.concatenate([values.numpy() for _, values in layers])[chunk],
        out=expected,
    )
    assert np.concatenate(buffers).tobytes() == expected.tobytes()


def test_an_empty_cache_has_nothing_to_take() -> None:
    model = tiny_llama()
    assert take_layers(transformers.DynamicCache(config=model.config)) == []
    assert cached_tokens([]) == 0


def test_the_weights_digest_sees_one_changed_weight() -> None:
    digest = digest_weights(tiny_llama())
    assert digest == digest_weights(tiny_llama())
    other = tiny_llama()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    eps = tiny_llama(rms_norm_eps=1e-5)
    names = [digest, digest_weights(other), digest_weights(tiny_llama(seed=1)), digest_weights(eps)]
    assert all(one != two for one, two in pairwise(sorted(names)))


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, head_dim=32))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=512, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
        )
    )


@pytest.mark.parametrize("make", [qwen3, gpt2])
def test_other_full_attention_models_are_served(make: Any) -> None:
    model = make().eval()
    geometry = read_geometry(model)
    assert geometry.layers == model.config.num_hidden_layers
    assert build_layout(geometry, chunk_tokens=64, model_id="m").cells > 0


def mistral() -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=16))


def gemma3() -> Any:
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **SMALL,
            head_dim=32,
            sliding_window=16,
            layer_types=["full_attention", "sliding_attention"] * 2,
        )
    )


def mamba2() -> Any:
    return transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=512,
            hidden_size=64,
            state_size=16,
            num_hidden_layers=2,
            num_heads=8,
            head_dim=16,
            n_groups=1,
        )
    )


def deepseek() -> Any:
    return transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **{**SMALL, "num_key_value_heads": 4},
            moe_intermediate_size=32,
            kv_lora_rank=32,
            q_lora_rank=32,
            qk_rope_head_dim=16,
            v_head_dim=16,
            qk_nope_head_dim=16,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
        )
    )


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=512, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4
        )
    )


def dynamic_rope() -> Any:
    return tiny_llama(
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    )


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (mistral, "4 of 4 layers .*DynamicSlidingWindowLayer"),
        (gemma3, "2 of 4 layers .*layer 1: DynamicSlidingWindowLayer"),
        (mamba2, "no past_key_values.*Mamba"),
        (deepseek, "different sizes .*latent attention"),
        (t5, "encoder-decoder"),
        (dynamic_rope, "rope type 'dynamic'"),
    ],
)
def test_what_is_unsupported_is_refused_by_name(make: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        read_geometry(make().eval())


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        read_geometry(tiny_llama().train())
