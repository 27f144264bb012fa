"""The `ctxstore` command: which subcommand runs, and what its exit code means.

Owns the top of the command line. Subcommands are imported only when they run, so that a broken or
missing extra disturbs no other. Exit code 0: done, 1: failed or damage found, 2: usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from ctxstore import __version__
from ctxstore.errors import ConfigError, CtxStoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2

_OVERVIEW: Final = """\
ctxstore keeps the context (KV cache) of language models outside GPU memory and gives it back
faster than it can be computed again.
"""
_EXAMPLES: Final = """\
first steps:
  ctxstore serve --data-dir /tmp/ctx --memory 1GiB --disk 4GiB --listen 127.0.0.1:7600
  ctxstore status                          what the node at CTXSTORE_ADDRESS is doing
  ctxstore demo                            a chat whose context survives a killed daemon
  ctxstore bench node --quick              how fast this machine is, path by path

Clients find the node by CTXSTORE_ADDRESS (default ctxstore://127.0.0.1:7600), CTXSTORE_NAMESPACE
and CTXSTORE_TOKEN. `ctxstore COMMAND --help` explains one command.
"""


class _Command(NamedTuple):
    """A subcommand: where it lives and one line about it."""

    module: str
    help: str


_COMMANDS: Final = {
    "status": _Command("ctxstore_client.cli.status", "show what a node is doing"),
    "verify": _Command("ctxstore_client.cli.verify", "check every stored byte of a node"),
    "bench": _Command("ctxstore_client.benchmark.cli", "measure each path beside its ceiling"),
    "demo": _Command("ctxstore_client.demo", "a chat that continues after kill -9"),
}
"""Each module has `add_arguments(parser)` and `run(args) -> int`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["serve"]:
        run_daemon(given)
    chosen = next((word for word in given if not word.startswith("-")), "")
    try:
        parsed = _parser(chosen).parse_args(given)
    except ImportError as error:
        return _complain(f"{chosen} needs a package that is not installed: {error}", EXIT_FAILED)
    run: Callable[[argparse.Namespace], int] = parsed.run
    try:
        return run(parsed)
    except ConfigError as error:
        return _complain(str(error), EXIT_USAGE)
    except (CtxStoreError, ImportError) as error:
        return _complain(str(error), EXIT_FAILED)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_FAILED


def run_daemon(arguments: Sequence[str]) -> NoReturn:
    """Become the daemon's process: signals and exit code are its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "ctxstore_daemon", *arguments])


def _complain(text: str, code: int) -> int:
    sys.stderr.write(f"ctxstore: {text}\n")
    return code


def _parser(chosen: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="ctxstore", description=_OVERVIEW, epilog=_EXAMPLES, formatter_class=raw
    )
    parser.add_argument("--version", action="version", version=f"ctxstore {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", help="run one node (see ctxstore serve --help)")
    for name, command in _COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, formatter_class=raw)
        if name == chosen:
            module = import_module(command.module)
            sub.description = sub.description or command.help
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser
