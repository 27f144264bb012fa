"""What is said in the demo: the document, the questions, and how both become a prompt.

Owns the chat format. Pure text and tokens: knows neither models nor the store.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

QUESTIONS: Final = (
    "What is the name of the cat?",
    "How strong may the wind be before the large dome is closed?",
    "What colour is the log book?",
    "In which year was the observatory built?",
    "Where does the rain gauge stand?",
    "Who gave the hill to the town?",
)

_INSTRUCTION: Final = (
    "You are a helpful assistant. Answer questions about the handbook in one short sentence."
)
_START: Final = "<|im_start|>"
_END: Final = "<|im_end|>"


def document(*, characters_max: int | None = None) -> str:
    """The handbook, or its beginning."""
    text = resources.files("ctxstore_client.demo").joinpath("handbook.txt").read_text("utf-8")
    return text if characters_max is None else text[:characters_max]


def prompt(
    encode: Callable[[str], list[int]],
    *,
    history: Sequence[int],
    question: str,
    handbook: str,
) -> list[int]:
    """Tokens of the conversation so far, up to where the model is to answer.

    A history is continued token by token and never encoded anew: text that was generated may
    encode to other tokens, and another token is another context.
    """
    before = f"{_START}system\n{_INSTRUCTION}\n\n{handbook}{_END}\n" if not history else "\n"
    asked = f"{_START}user\n{question}{_END}\n{_START}assistant\n"
    return [*history, *encode(before + asked)]


def closed(tokens: Sequence[int], *, end_of_turn: int | None) -> list[int]:
    """A conversation whose last message is ended, also where the answer was cut by its length."""
    if end_of_turn is None or (tokens and tokens[-1] == end_of_turn):
        return list(tokens)
    return [*tokens, end_of_turn]
