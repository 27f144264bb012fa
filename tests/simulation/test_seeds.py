"""Seeded runs of one node and its clients on the virtual clock.

CTXSTORE_SIM_SEEDS says how many seeds, CTXSTORE_SIM_SEED plays a single one. A failure names its
seed and how to play it again; the same seed and the same code give the same run, event for event.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.simulation.profiles import PROFILES, profile_of
from tests.simulation.scenario import Report, simulate

pytestmark = pytest.mark.sim

SEEDS_IN_TEST = 20
"""Seeds of `make test`; `make sim` plays 200."""

REGRESSIONS = (
    68,  # a TTL raised by a put that was still waiting for its group
    6322,  # a group in the page cache of a killed process was relied upon before it was synced
    2382,  # survivors of a reclaim waited for room on a disk that was full for good
    237,  # a segment reclaimed while one of its shards was being read
    34,  # a goodbye behind a reply made the next request of a get raise
    140,  # a second offer of an overloaded key went unanswered, and was called not stored
)
"""Seeds that found something once; what a seed does changes with the code, but they are cheap."""


def chosen_seeds() -> list[int]:
    """What the environment asks for."""
    one = os.environ.get("CTXSTORE_SIM_SEED", "")
    if one:
        return [int(one)]
    count = int(os.environ.get("CTXSTORE_SIM_SEEDS", str(SEEDS_IN_TEST)))
    return [*range(count), *(seed for seed in REGRESSIONS if seed >= count)]


def play(seed: int) -> Report:
    """Play a seed; a failure says how to see it again."""
    try:
        return simulate(seed)
    except BaseException as error:
        profile = profile_of(seed).name
        again = f"seed {seed} ({profile}) failed; play it again with: make sim SEED={seed}"
        sys.stderr.write(f"{again}\n")
        error.add_note(again)
        raise


@pytest.mark.parametrize("seed", chosen_seeds())
def test_every_promise_is_kept(seed: int) -> None:
    report = play(seed)

    assert report.operations > 50
    assert report.observations > 100
    assert report.duties > 20, "the checker had nothing that it could hold the node to"


def test_a_seed_replays_exactly() -> None:
    assert play(3).digest == play(3).digest


def test_a_seed_replays_exactly_in_another_process() -> None:
    code = "from tests.simulation.scenario import simulate; print(simulate(10).digest)"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={
                **os.environ,
                "PYTHONHASHSEED": hash_seed,
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for hash_seed in ("1", "2")
    }

    assert len(digests) == 1


def test_the_profiles_bring_about_what_they_are_for() -> None:
    """Pressure reclaims, small memories read from disk, restarts happen: else the rest is idle."""
    numbers = {profile.name: number for number, profile in enumerate(PROFILES)}
    pressure, calm = play(numbers["pressure"]), play(numbers["calm"])

    assert pressure.reclaims > 5
    assert calm.reclaims == 0
    assert calm.starts >= 4
    assert calm.results["get:HIT"] > 100
    assert calm.results["put:COMMITTED"] > 50
