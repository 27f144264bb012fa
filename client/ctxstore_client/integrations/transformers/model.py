"""What the store must know about a transformers model: its cache geometry and its weights.

Owns the decision which models are supported and every reason to refuse one, learnt from the cache
that the model itself fills, never from its name. Must not touch the store, and imports torch and
transformers only inside functions.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore.layouts import canonical_json, weights_digest

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from transformers import PreTrainedModel

_LENGTH_DEPENDENT_ROPE: Final = frozenset({"dynamic", "longrope"})
"""Rope kinds whose frequencies follow the prompt's length: a prefix's state is not its own."""

_CONFIG_NO_EFFECT: Final = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}
)
"""Entries of a model's config that never change the bytes of its state (the dtype stands apart)."""


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """Shape of one token's state: layers x KV heads x (K then V, `head_dim` elements each)."""

    architecture: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    """As torch prints it, without the module: `float32`, `bfloat16`, `float16`."""
    element_bytes: int
    rope: str
    """Canonical JSON of what decides how positions are encoded."""
    quantization: str
    """Canonical JSON of the weight quantisation, empty for plain weights."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's state over all layers."""
        return self.layers * self.kv_heads * 2 * self.head_dim * self.element_bytes


def read_geometry(model: PreTrainedModel) -> ModelGeometry:
    """Learn a model's geometry from the cache that a one-token forward pass fills.

    Raises ValueError, naming what is unsupported, for every model whose state is not plain full
    attention with the same heads in all layers, and for every model whose state of a prefix
    depends on more than the prefix's tokens.
    """
    _refuse_by_configuration(model)
    name = _name(model)
    states = list(_probe(model))
    keys, values = states[0]
    if keys.shape[-1] != values.shape[-1]:
        raise ValueError(
            f"{name}: keys and values of different sizes ({keys.shape[-1]} and {values.shape[-1]}, "
            "as in multi-head latent attention) are not supported"
        )
    for index, (other_keys, other_values) in enumerate(states):
        if other_keys.shape != keys.shape or other_values.shape != values.shape:
            raise ValueError(
                f"{name}: layer {index} has other KV heads or head sizes than layer 0, "
                "which is not supported"
            )
        if other_keys.dtype != keys.dtype or other_values.dtype != keys.dtype:
            raise ValueError(f"{name}: layer {index} mixes dtypes, which is not supported")
    return ModelGeometry(
        architecture=name,
        layers=len(states),
        kv_heads=int(keys.shape[1]),
        head_dim=int(keys.shape[-1]),
        dtype=str(keys.dtype).removeprefix("torch."),
        element_bytes=keys.element_size(),
        rope=_canonical(_rope_settings(model)),
        quantization=_canonical(_quantization(model)),
    )


def digest_weights(model: PreTrainedModel) -> bytes:
    """16 bytes that tell two models apart: the config, and the size and both ends of every tensor.

    The same on every device; quick for weights in host memory, of which only the ends are read.
    """
    import torch

    def tensors() -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        settings = {k: v for k, v in model.config.to_dict().items() if k not in _CONFIG_NO_EFFECT}
        yield "/config", np.frombuffer(_canonical(settings).encode(), np.uint8)
        for name, tensor in model.state_dict().items():
            yield name, tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()

    with torch.no_grad():
        return weights_digest(tensors())


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__


def _refuse_by_configuration(model: PreTrainedModel) -> None:
    name = _name(model)
    if model.training:
        raise ValueError(
            f"{name} is in training mode, where dropout changes its state: call model.eval()"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name}: encoder-decoder models are not supported")
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        raise ValueError(
            f"{name}: adapters that can be switched are not supported: merge them first"
        )
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{name}: its forward() takes no past_key_values: its state is no attention cache "
            "(recurrent-state models such as Mamba are not supported)"
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1:
        raise ValueError(f"{name}: a model spread over {sorted(devices)} is not supported")
    for settings in _rope_dicts(_rope_settings(model)):
        kind = settings.get("rope_type", settings.get("type"))
        if kind in _LENGTH_DEPENDENT_ROPE:
            raise ValueError(
                f"{name}: rope type {kind!r} lets a prefix's state depend on the prompt's length, "
                "which is not supported"
            )


def _probe(model: PreTrainedModel) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values that one token leaves in each layer; refuses all but full attention."""
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config)
    kinds = {
        index: type(layer).__name__
        for index, layer in enumerate(cache.layers)
        if type(layer) is not DynamicLayer
    }
    if kinds:
        first, kind = next(iter(kinds.items()))
        raise ValueError(
            f"{_name(model)}: only full attention is supported, but {len(kinds)} of "
            f"{len(cache.layers)} layers are of another kind (layer {first}: {kind})"
        )
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with torch.no_grad():
        model(input_ids=token, past_key_values=cache, use_cache=True)
    for index, layer in enumerate(cache.layers):
        keys, values = layer.keys, layer.values
        if keys is None or values is None or keys.dim() != 4 or keys.shape[2] != 1:
            raise ValueError(f"{_name(model)}: layer {index} keeps no keys and values per token")
        yield keys, values


def _rope_settings(model: PreTrainedModel) -> dict[str, object]:
    config = model.config.get_text_config(decoder=True).to_dict()
    return {key: value for key, value in config.items() if "rope" in key or "rotary" in key}


def _rope_dicts(settings: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """Every dictionary in the settings: some models nest one per kind of layer."""
    yield settings
    for value in settings.values():
        if isinstance(value, Mapping):
            yield from _rope_dicts(value)


def _quantization(model: PreTrainedModel) -> object:
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return None
    return settings if isinstance(settings, Mapping) else settings.to_dict()


def _canonical(value: object) -> str:
    """Canonical text of settings; what JSON does not know (a dtype, say) stands as its text."""
    return "" if value is None else canonical_json(json.loads(json.dumps(value, default=str)))
