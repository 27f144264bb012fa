"""The demo in its short form: a tiny model, real processes, a daemon that is really killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from ctxstore_client.demo.node import COMMAND

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.engines


def demo(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-c", COMMAND, "demo"),
            *("--model", "tiny", "--cache-dir", str(tmp_path)),
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.mark.timeout(300)  # five interpreters start, each with torch, on two shared cores
def test_the_demo_finds_its_context_after_a_kill(tmp_path: Path) -> None:
    done = demo(tmp_path, "--turns", "2", "--max-new-tokens", "70", "--json")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["ok"] is True
    first, second = document["turns"]
    assert first["rehydrated_tokens"] == 0
    assert first["stored_chunks"] > 0
    # The answer is found again too, not only the first turn's prompt.
    assert second["rehydrated_tokens"] >= first["context_tokens"]
    assert second["identical"] is True
    assert len(document["daemon_restarts_s"]) == 1
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_wrong_usage_is_told_apart_from_failure(tmp_path: Path) -> None:
    done = demo(tmp_path, "--turns", "1")
    assert done.returncode == 2
    assert "--turns" in done.stderr
