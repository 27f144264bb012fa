"""The calls into a transformers model: what may be asked of it, its prefill, its first token.

Owns the checks of a caller's arguments and the clock of the first token. Must not touch the store.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from transformers import DynamicCache, PreTrainedModel, StoppingCriteriaList


def prompt_tensor(model: PreTrainedModel, input_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """The prompt as a [1, tokens] tensor on the model's device. Raises ValueError for others."""
    import torch

    ids = torch.as_tensor(input_ids, device=model.device)
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or ids.is_floating_point():
        raise ValueError(
            "input_ids is one prompt of token ids, [tokens] or [1, tokens]; "
            f"got {tuple(ids.shape)} of {ids.dtype}"
        )
    return ids.long()


def check_arguments(model: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    """Refuse, by ValueError, what a context made of token ids alone cannot stand for."""
    import torch

    for name in ("past_key_values", "inputs_embeds", "input_ids", "inputs", "cache_implementation"):
        if arguments.get(name) is not None:
            raise ValueError(f"{name} cannot be given: the session makes the cache and the prompt")
    if arguments.get("use_cache") is False:
        raise ValueError("use_cache=False leaves nothing to store or to load")
    config = arguments.get("generation_config") or model.generation_config
    for name in ("num_beams", "num_return_sequences"):
        if (arguments.get(name, getattr(config, name, None)) or 1) != 1:
            raise ValueError(f"{name} must be 1: a session generates one sequence at a time")
    mask = arguments.get("attention_mask")
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise ValueError("attention_mask hides tokens: padded prompts are not supported")
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and name != "attention_mask":
            raise ValueError(
                f"{name} is a tensor: inputs other than token ids would change the context without "
                "changing its keys"
            )


def prefill(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache) -> None:
    """Compute the state of `ids` into `cache`, without logits where the model lets us."""
    import torch

    arguments: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = 1
    with torch.no_grad():
        model(**arguments)


def generate_from(
    model: PreTrainedModel,
    ids: torch.Tensor,
    cache: DynamicCache,
    *,
    arguments: Mapping[str, Any],
    on_first_token: Callable[[], None],
) -> Any:
    """`model.generate` for the tokens that `cache` does not hold yet."""
    import torch

    wanted = dict(arguments)
    wanted["attention_mask"] = torch.ones_like(ids)
    wanted["stopping_criteria"] = _with_first_token(wanted.get("stopping_criteria"), on_first_token)
    return model.generate(ids, past_key_values=cache, **wanted)


def _with_first_token(
    given: StoppingCriteriaList | None, on_first_token: Callable[[], None]
) -> StoppingCriteriaList:
    """The caller's stopping criteria and one that never stops but sees the first token."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class FirstToken(StoppingCriteria):
        seen = False

        def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            if not self.seen:
                self.seen = True
                input_ids[0, -1].item()  # waits until the device has really chosen it
                on_first_token()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    return StoppingCriteriaList([*(given or ()), FirstToken()])
