"""The leak check of ``tests/conftest.py``, run on tests that leak on purpose."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

LEAKY = """
import asyncio, os, subprocess, threading
import pytest

kept = []

def test_descriptor():
    kept.append(os.memfd_create("forgotten"))

def test_thread():
    stop = threading.Event()
    threading.Thread(target=stop.wait, name="forgotten-thread", daemon=True).start()
    kept.append(stop)

def test_child():
    kept.append(subprocess.Popen(["sleep", "60"]))

def test_task():
    async def quits():
        task = asyncio.ensure_future(fails())
        await asyncio.sleep(0)
        del task
    async def fails():
        raise OSError("nobody asks")
    asyncio.run(quits())

@pytest.mark.leaks_ok("to show the way out")
def test_excused():
    kept.append(os.memfd_create("excused"))

def test_slow_ending_is_waited_for():
    threading.Timer(0.05, int).start()

def test_clean():
    with open("/proc/self/stat") as f:
        assert f.read()
    subprocess.run(["true"], check=True)

def teardown_module():
    child = next(k for k in kept if isinstance(k, subprocess.Popen))
    child.kill()
    child.wait()
"""


def test_leaks_fail_their_test(tmp_path: Path) -> None:
    (tmp_path / "test_leaky.py").write_text(LEAKY)
    (tmp_path / "conftest.py").write_text("import tests.conftest as c\nc.LEAK_SETTLE_S = 0.3\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = leaks_ok(reason): x\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:randomly"]
    command += ["-p", "no:cacheprovider", "-q", "--rootdir", str(tmp_path), str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    out = run.stdout
    assert run.returncode == 1, out
    assert "7 passed, 4 errors" in out, out
    assert "descriptor /memfd:forgotten" in out
    assert "thread forgotten-thread x1" in out
    assert "child process" in out
    assert "asyncio: Task exception was never retrieved" in out
