"""What the demo shows: a story while it runs, a table or JSON at its end.

Owns every text of the demo. Writes to the streams it is given and nowhere else.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from pathlib import Path

    from ctxstore_client.demo.messages import DemoResult, TurnOutcome
    from ctxstore_client.demo.play import DemoOptions

_HEADINGS = (
    ("turn", 4),
    ("context", 8),
    ("rehydrated", 11),
    ("1st token without", 18),
    ("with store", 11),
    ("faster", 7),
    ("identical", 10),
)


class Reporter:
    """Writes the story to `out`, or to `progress` when `out` is for JSON alone."""

    def __init__(self, *, json_wanted: bool, out: TextIO, progress: TextIO) -> None:
        self._json_wanted = json_wanted
        self._out = out
        self._progress = progress

    def begin(self, options: DemoOptions, directory: Path) -> None:
        """Say what is about to happen."""
        self._tell(
            "A model answers questions about a handbook. After each answer its process exits and\n"
            "the store's daemon is killed, so the next turn finds its context only on disk.\n\n"
            f"  model    {options.model.value}, float32, greedy\n"
            f"  store    ctxstore serve, data in {directory / 'data'}, durability group\n"
        )

    def asking(self, number: int, question: str) -> None:
        """A turn begins; loading a model takes a while, so say so."""
        self._tell(
            f"\nturn {number}   user   {question}\n         (a new process loads the model)\n"
        )

    def answered(self, turn: TurnOutcome) -> None:
        """A turn ended."""
        reply = turn.reply
        lines = [
            f"         model  {' '.join(reply.answer.split())}",
            f"         {reply.context_tokens} tokens of context, {reply.rehydrated_tokens} "
            f"rehydrated{_load(turn)}",
            f"         first token after {reply.ttft_with_s:.2f} s, "
            f"without the store {reply.ttft_without_s:.2f} s",
            f"         {_verdict(turn)}",
        ]
        if reply.failed_chunks:
            lines.append(f"         {reply.failed_chunks} chunks could not be stored")
        self._tell("\n".join(lines) + "\n")

    def restarted(self, pid: int, ready_s: float) -> None:
        """The daemon is back."""
        self._tell(
            f"\n         daemon {pid} killed with SIGKILL, a new one ready {ready_s:.2f} s later\n"
        )

    def finish(self, result: DemoResult) -> None:
        """The table, or the JSON document."""
        if self._json_wanted:
            self._out.write(json.dumps(result.to_document(), indent=2) + "\n")
        else:
            self._out.write("\n" + _table(result) + "\n\n" + _conclusion(result) + "\n")
        self._out.flush()

    def fail(self, text: str) -> None:
        """The demo ends without a result."""
        self._progress.write(f"ctxstore demo: {text}\n")
        self._progress.flush()

    def _tell(self, text: str) -> None:
        stream = self._progress if self._json_wanted else self._out
        stream.write(text)
        stream.flush()


def _load(turn: TurnOutcome) -> str:
    reply = turn.reply
    if not reply.rehydrated_tokens:
        return ""
    return f" ({reply.load_bytes / 2**20:.0f} MiB in {reply.load_s * 1000:.0f} ms)"


def _verdict(turn: TurnOutcome) -> str:
    if not turn.reply.identical:
        return "FAILED: the tokens differ from those of the run without the store"
    if not turn.ok:
        return "FAILED: the context was not found in the store"
    return f"all {len(turn.reply.new_tokens)} tokens identical to the run without the store"


def _table(result: DemoResult) -> str:
    rows = [tuple(title for title, _ in _HEADINGS)]
    for turn in result.turns:
        reply = turn.reply
        rows.append(
            (
                str(turn.number),
                f"{reply.context_tokens}",
                f"{reply.rehydrated_tokens}",
                f"{reply.ttft_without_s:.3f} s",
                f"{reply.ttft_with_s:.3f} s",
                _factor(turn),
                "yes" if reply.identical else "NO",
            )
        )
    widths = [width for _, width in _HEADINGS]
    return "\n".join(
        "".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


def _factor(turn: TurnOutcome) -> str:
    """How much sooner the first token came; nothing where nothing was loaded."""
    reply = turn.reply
    if not reply.rehydrated_tokens:
        return "-"
    return f"{reply.ttft_without_s / max(reply.ttft_with_s, 1e-9):.1f}x"


def _conclusion(result: DemoResult) -> str:
    kills = len(result.restarts_s)
    if not result.ok:
        return "FAILED: see the turns above."
    return (
        f"The context survived {kills} exits of the model and {kills} kill -9 of the daemon, and "
        f"every token is the same.\n({result.elapsed_s:.0f} s in all. Turn 1 has nothing to load; "
        "later turns compute only what is new.)"
    )
