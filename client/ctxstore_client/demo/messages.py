"""What the demo and its child process tell each other, as JSON, and what a whole demo came to.

Owns no behaviour but the way in and out of JSON. Imports no engine.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """One turn, for a process that knows nothing yet."""

    model: str
    cache_dir: str
    address: str
    """Of the daemon, for `ctxstore_client.connect`."""
    history: list[int]
    """Tokens of all earlier turns, answers included."""
    question: str
    max_new_tokens: int

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The way back. Raises ValueError or TypeError for anything else."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnReply:
    """What the child process measured. Times are seconds."""

    context_tokens: int
    matched_tokens: int
    rehydrated_tokens: int
    load_s: float
    load_bytes: int
    ttft_with_s: float
    ttft_without_s: float
    """Of the reference run: no store, prefill cut after `rehydrated_tokens`."""
    answer: str
    new_tokens: list[int]
    reference_tokens: list[int]
    history: list[int]
    """The request's history with this turn's question and answer."""
    stored_chunks: int
    failed_chunks: int

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The way back. Raises ValueError or TypeError for anything else."""
        return cls(**json.loads(text))

    @property
    def identical(self) -> bool:
        """Whether the store changed nothing."""
        return self.new_tokens == self.reference_tokens


@dataclass(frozen=True, slots=True)
class TurnOutcome:
    """A turn as the user sees it."""

    number: int
    question: str
    reply: TurnReply

    @property
    def ok(self) -> bool:
        """Identical tokens, and from the second turn on something came from the store."""
        return self.reply.identical and (self.number == 1 or self.reply.rehydrated_tokens > 0)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """A whole demo."""

    model: str
    turns: tuple[TurnOutcome, ...]
    restarts_s: tuple[float, ...]
    """How long the daemon took to be ready again after each SIGKILL."""
    elapsed_s: float

    @property
    def ok(self) -> bool:
        """Whether every turn was as it has to be."""
        return all(turn.ok for turn in self.turns)

    def to_document(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "model": self.model,
            "ok": self.ok,
            "elapsed_s": round(self.elapsed_s, 3),
            "daemon_restarts_s": [round(restart, 3) for restart in self.restarts_s],
            "turns": [
                {
                    "turn": turn.number,
                    "question": turn.question,
                    "answer": turn.reply.answer,
                    "context_tokens": turn.reply.context_tokens,
                    "rehydrated_tokens": turn.reply.rehydrated_tokens,
                    "ttft_without_s": round(turn.reply.ttft_without_s, 4),
                    "ttft_with_s": round(turn.reply.ttft_with_s, 4),
                    "load_s": round(turn.reply.load_s, 4),
                    "load_bytes": turn.reply.load_bytes,
                    "new_tokens": len(turn.reply.new_tokens),
                    "stored_chunks": turn.reply.stored_chunks,
                    "identical": turn.reply.identical,
                    "ok": turn.ok,
                }
                for turn in self.turns
            ],
        }
