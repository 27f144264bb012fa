"""The kinds of runs: how small the node is, what goes wrong, and what may be lost because of it.

Owns these tables only; `scenario` plays them. A seed picks its profile, so a list of seeds covers
all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from ctxstore.limits import KIB, MIB
from tests.simulation.clients import Habits
from tests.simulation.watch import Expected

LARGE: Final = (20_000, 65_536, 100_000, 131_072, 200_000, 262_144)


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of run. Rates are mean seconds between two events; 0 = never."""

    name: str
    clients: int = 5
    remote_share: float = 0.4
    """Clients that use data connections."""
    steps: int = 36
    keys: int = 48
    habits: Habits = field(default_factory=Habits)
    arena_bytes: int = 12 * MIB
    disk_bytes: int = 48 * MIB
    disk_capacity_bytes: int | None = None
    disk_delay_s: float = 400e-6
    mover_delay_s: float = 0.0
    kill_every_s: float = 2.0
    stop_share: float = 0.3
    """Ends of the process that are clean."""
    client_death_every_s: float = 3.0
    network_fault_every_s: float = 0.0
    disk_slow_every_s: float = 0.0
    eio_every_s: float = 0.0
    damage_every_s: float = 0.0
    clock_jump_every_s: float = 0.0
    lease_s_max: float = 3.0
    entries_max: int = 2000
    reclaim: bool = True
    read_faults: bool = False
    write_faults: bool = False
    full: bool = False
    misdirected: bool = False

    def expected(self) -> Expected:
        """What the watch has to put up with."""
        return Expected(
            reclaim=self.reclaim,
            read_faults=self.read_faults,
            write_faults=self.write_faults,
            full=self.full,
            misdirected=self.misdirected,
        )


_CALM: Final = Profile(
    "calm", arena_bytes=32 * MIB, disk_bytes=96 * MIB, reclaim=False, kill_every_s=1.5
)
_PRESSURE: Final = Profile(
    "pressure",
    arena_bytes=8 * MIB,
    disk_bytes=12 * MIB,
    keys=150,
    steps=48,
    habits=Habits(
        sizes=(*LARGE, 1025, 600),
        weights=(
            ("put", 36),
            ("get", 26),
            ("view", 6),
            ("exists", 4),
            ("hold", 12),
            ("remove", 3),
            ("flush", 2),
            ("prefetch", 3),
            ("touch", 2),
        ),
    ),
    full=True,
)
_STORM: Final = Profile(
    "storm",
    arena_bytes=8 * MIB,
    disk_bytes=14 * MIB,
    keys=70,
    clients=7,
    habits=Habits(sizes=(*LARGE, 1, 1024, 9000, 40_000)),
    network_fault_every_s=0.8,
    disk_slow_every_s=1.0,
    eio_every_s=1.5,
    clock_jump_every_s=2.0,
    client_death_every_s=1.0,
    read_faults=True,
    write_faults=True,
    full=True,
)

PROFILES: Final = (
    _CALM,
    _PRESSURE,
    Profile(
        "demotion",
        arena_bytes=8 * MIB,
        disk_bytes=96 * MIB,
        keys=110,
        habits=Habits(sizes=LARGE, ttl_share=0.1),
        reclaim=False,
    ),
    Profile("network", network_fault_every_s=0.3, client_death_every_s=0.8, remote_share=0.6),
    Profile(
        "eio",
        eio_every_s=0.4,
        read_faults=True,
        write_faults=True,
        full=True,  # each failed sync retires a segment
        arena_bytes=8 * MIB,
        habits=Habits(sizes=(*LARGE, 9000, 500)),
        keys=80,
    ),
    Profile("damage", damage_every_s=0.25, misdirected=True, arena_bytes=8 * MIB),
    Profile(
        "full",
        disk_capacity_bytes=9 * MIB,
        disk_bytes=48 * MIB,
        habits=Habits(sizes=LARGE),
        full=True,
    ),
    Profile(
        "clock",
        clock_jump_every_s=0.4,
        habits=Habits(ttl_share=0.7, ttl_ms=(100, 400, 1500, 5000)),
    ),
    Profile(
        "slow",
        disk_slow_every_s=0.4,
        mover_delay_s=0.02,
        habits=Habits(timeouts_s=(2.0, 0.6, 0.03, 0.01, 0.004)),
    ),
    replace(_PRESSURE, name="tiny", arena_bytes=6 * MIB, lease_s_max=0.5, clients=8),
    _STORM,
    replace(
        _CALM,
        name="small",
        habits=Habits(sizes=(1, 2, 300, 1000, 1024, 1025, 4096, 4 * KIB + 1), group_share=0.7),
        keys=200,
        disk_bytes=64 * MIB,
        steps=60,
    ),
)


def profile_of(seed: int) -> Profile:
    """The profile that a seed plays."""
    return PROFILES[seed % len(PROFILES)]
