"""`python -m ctxstore_daemon`: `serve` runs a node, `verify` checks a data directory off-line.

Owns the command line of the daemon. It must not do the work: `runtime` does.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ctxstore import __version__
from ctxstore.config import FLAGS, DaemonConfig, load_config
from ctxstore.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

_SERVE_TEXT: Final = """\
Run one node. Ready when it prints its line on stdout and DIR/endpoints.json is there; ends with
SIGTERM or SIGINT, after syncing what is in memory. Exit code 0: ended cleanly, 1: failed, 2: usage.

  ctxstore serve --data-dir /var/lib/ctxstore --memory 4GiB --disk 20GiB --listen 127.0.0.1:7600

PORT is control, PORT+1 data, PORT+2 HTTP (/healthz, /readyz, /metrics); port 0 takes free ones.
Settings come from --config, then environment variables CTXSTORED_SECTION_NAME, then flags.
"""
_VERIFY_TEXT: Final = """\
Check every byte of a data directory that no daemon uses: headers, footers, meta log, payload
checksums. Changes nothing. Exit code 0: all is well, 1: damage found or not readable, 2: usage.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command == "verify":
        from ctxstore_daemon.runtime.verify import verify

        return verify(Path(given.directory), as_json=given.json, quiet=given.quiet)
    try:
        config = _config(given)
    except (ConfigError, OSError) as error:
        sys.stderr.write(f"ctxstore: {error}\n")
        return 2
    from ctxstore_daemon.runtime.serve import serve

    return serve(config)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ctxstore", description="The node daemon of ctxstore, a context store for LLMs."
    )
    parser.add_argument("--version", action="version", version=f"ctxstore {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter
    serve = commands.add_parser(
        "serve", help="run one node", description=_SERVE_TEXT, formatter_class=raw
    )
    serve.add_argument("--config", metavar="FILE", help="TOML file with settings")
    for flag in FLAGS:
        serve.add_argument(flag.name, dest=flag.key, metavar=flag.metavar, help=flag.key)
    serve.add_argument(
        "--set",
        dest="settings",
        metavar="SECTION.NAME=VALUE",
        action="append",
        default=[],
        help="any other setting; may be given several times",
    )
    verify = commands.add_parser(
        "verify",
        help="check a data directory off-line",
        description=_VERIFY_TEXT,
        formatter_class=raw,
    )
    verify.add_argument("directory", metavar="DIR", help="data directory of a stopped daemon")
    verify.add_argument("--json", action="store_true", help="print the findings as JSON")
    verify.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


def _config(given: argparse.Namespace) -> DaemonConfig:
    text = "" if given.config is None else Path(given.config).read_text(encoding="utf-8")
    flags: dict[str, object] = {flag.key: getattr(given, flag.key) for flag in FLAGS}
    for setting in given.settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: write --set section.name=value")
        flags[key] = value
    return load_config(text, environment=os.environ, flags=flags)


if __name__ == "__main__":
    sys.exit(main())
