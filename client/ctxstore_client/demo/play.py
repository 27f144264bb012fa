"""Plays the demo: turns in child processes, and between them a daemon that is killed.

Owns the child processes, the temporary directory and the order of events. What the user sees is the
reporter's; what is measured is the turn's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ctxstore_client.demo.conversation import QUESTIONS
from ctxstore_client.demo.messages import DemoResult, TurnOutcome, TurnReply, TurnRequest
from ctxstore_client.demo.node import DemoNode, NodeFailed

if TYPE_CHECKING:
    from ctxstore_client.demo.report import Reporter
    from ctxstore_client.integrations.transformers.demo_models import DemoModel

TURN_TIMEOUT_S: Final = 900.0
"""A turn takes some seconds; the first one converts the model, which a slow disk draws out."""

_CHILD_ENVIRONMENT: Final = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    # Threads that spin while they wait make a shared machine several times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
}


class DemoFailed(Exception):
    """The demo could not be played to its end."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the user chose."""

    model: DemoModel
    turns: int
    max_new_tokens: int
    cache_dir: Path


def play_demo(options: DemoOptions, reporter: Reporter) -> DemoResult:
    """Play all turns. Raises DemoFailed, and OSError where the cache directory cannot be used."""
    started = time.monotonic()
    options.cache_dir.mkdir(parents=True, exist_ok=True)
    # Beside the model and not in /tmp, which often is memory: the point is that this is a disk.
    directory = Path(tempfile.mkdtemp(prefix="run-", dir=options.cache_dir))
    node = DemoNode(directory)
    turns: list[TurnOutcome] = []
    restarts_s: list[float] = []
    try:
        reporter.begin(options, directory)
        address = node.start()
        history: list[int] = []
        for number, question in enumerate(QUESTIONS[: options.turns], start=1):
            if number > 1:
                killed = time.monotonic()
                pid = node.pid
                node.kill()
                address = node.start()
                restarts_s.append(time.monotonic() - killed)
                reporter.restarted(pid, restarts_s[-1])
            reporter.asking(number, question)
            reply = _run_turn(options, address=address, history=history, question=question)
            turns.append(TurnOutcome(number, question, reply))
            reporter.answered(turns[-1])
            history = reply.history
    except NodeFailed as error:
        raise DemoFailed(str(error)) from error
    finally:
        node.stop()
        shutil.rmtree(directory, ignore_errors=True)
    return DemoResult(
        options.model.value, tuple(turns), tuple(restarts_s), time.monotonic() - started
    )


def _run_turn(
    options: DemoOptions, *, address: str, history: list[int], question: str
) -> TurnReply:
    request = TurnRequest(
        model=options.model.value,
        cache_dir=str(options.cache_dir),
        address=address,
        history=history,
        question=question,
        max_new_tokens=options.max_new_tokens,
    )
    try:
        child = subprocess.run(
            [sys.executable, "-m", "ctxstore_client.demo.turn"],
            input=request.to_json(),
            stdout=subprocess.PIPE,
            text=True,
            timeout=TURN_TIMEOUT_S,
            env={**_CHILD_ENVIRONMENT, **os.environ},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DemoFailed(f"the model's process did not end in {TURN_TIMEOUT_S:.0f} s") from error
    lines = child.stdout.splitlines()
    if child.returncode != 0 or not lines:
        raise DemoFailed(f"the model's process ended with {child.returncode}; its error is above")
    return TurnReply.from_json(lines[-1])
