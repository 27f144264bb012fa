"""`ctxstore verify`: have every stored byte read and checked, on-line or off-line.

Owns the choice between asking the running daemon and checking its directory, and the progress on
stderr. It must not read a data directory: that is the daemon's package.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from ctxstore.errors import ConfigError
from ctxstore.units import describe_size, parse_size
from ctxstore_client.cli import run_daemon
from ctxstore_client.cli.places import place_of
from ctxstore_client.store import connect

if TYPE_CHECKING:
    import argparse

    from ctxstore.wire.messages import VerifyReply

_TEXT: Final = """\
Read every shard on a node's disk and compare it with its checksum. A running daemon does it beside
its work and drops what is damaged; the directory of a stopped one is only read. Shards of up to
1 KiB stand in the daemon's index, which always serves them from memory: a running daemon checks
them there, the check of a directory reads them from disk.

  ctxstore verify                          the node at CTXSTORE_ADDRESS
  ctxstore verify --rate 200MiB            at most so many bytes a second
  ctxstore verify /var/lib/ctxstore        that directory, by its daemon if one runs

Exit code 0: all is well, 1: damage found or not to be read, 2: usage.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ctxstore verify`."""
    parser.description = _TEXT
    parser.add_argument("where", nargs="?", metavar="ADDRESS|DIR", help="default: CTXSTORE_ADDRESS")
    parser.add_argument(
        "--rate", default="0", metavar="SIZE", help="bytes a second for a running daemon; 0: all"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="longest silence between two reports of a running daemon (default: 30)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Check and report."""
    place = place_of(args.where)
    if not place.served:
        flags = [flag for flag in ("--json", "--quiet") if getattr(args, flag[2:])]
        run_daemon(["verify", str(place.directory), *flags])
    try:
        rate = parse_size(args.rate)
    except ValueError as error:
        raise ConfigError(f"--rate: {error}") from error
    progress = _Progress(shown=not args.quiet and sys.stderr.isatty())
    with connect(place.address, timeout_s=args.timeout) as store:
        try:
            found = store.verify(progress.report, bytes_per_s=rate)
        finally:
            progress.end()
    if args.json:
        fields = asdict(found)
        del fields["rid"]
        sys.stdout.write(json.dumps(fields, indent=2) + "\n")
    else:
        sys.stdout.write(
            f"{found.shards} shards, {describe_size(found.checked_bytes)} checked: "
            f"{found.damaged} damaged, {found.unreadable} unreadable\n"
        )
    return 1 if found.damaged or found.unreadable else 0


class _Progress:
    """One line on a terminal, written over and over."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._width = 0

    def report(self, reply: VerifyReply) -> None:
        """Show how far it is."""
        if not self._shown:
            return
        share = f"{100 * reply.shards / reply.total:5.1f} %" if reply.total else "100.0 %"
        line = f"{share}  {reply.shards} of {reply.total} shards, {reply.damaged} damaged"
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = len(line)

    def end(self) -> None:
        """Leave the line."""
        if self._width:
            sys.stderr.write("\n")
