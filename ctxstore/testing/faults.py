"""Which calls of a disk fail, and how.

Owns the plan: the n-th call of a kind, calls by chance, calls on certain files. It must not touch
data; `SimDisk` asks it before each call.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from ctxstore.errors import DeviceError, OutOfSpace

if TYPE_CHECKING:
    from collections.abc import Callable


class PowerLoss(BaseException):
    """The machine is gone: no code under test may handle this, only the test that planned it."""


class Op(Enum):
    """Kinds of calls."""

    OPEN = "open"
    ALLOCATE = "allocate"
    LIST = "listdir"
    REMOVE = "remove"
    RENAME = "rename"
    SYNC_DIR = "sync_dir"
    READ = "preadv"
    WRITE = "pwritev"
    SYNC = "fdatasync"
    SIZE = "size"


MUTATING = frozenset({Op.ALLOCATE, Op.REMOVE, Op.RENAME, Op.SYNC_DIR, Op.WRITE, Op.SYNC})
"""Calls that change what a crash would leave."""


class FaultKind(Enum):
    """What happens to a call that was chosen."""

    EIO = "input/output error"
    ENOSPC = "no space left on device"
    POWER = "the power goes; part of the call may be done"


@dataclass(frozen=True, slots=True)
class _Rule:
    kind: FaultKind
    ops: frozenset[Op]
    names: Callable[[str], bool]
    nth: int = 0
    chance: float = 0.0


def _any_name(name: str) -> bool:
    return True


@dataclass(slots=True)
class FaultPlan:
    """Mutable plan; rules are tried in the order in which they were added.

    `counts` is the number of calls of each kind so far: run once without faults to learn how many
    there are, then fail each in turn.
    """

    seed: int = 0
    counts: Counter[Op] = field(default_factory=Counter)
    _rules: list[_Rule] = field(default_factory=list)
    _hits: Counter[int] = field(default_factory=Counter)
    _slow: list[tuple[Callable[[str], bool], float]] = field(default_factory=list)
    _shifts: list[tuple[Callable[[str], bool], int, int]] = field(default_factory=list)
    _rng: random.Random | None = None

    def fail_nth(
        self,
        kind: FaultKind,
        nth: int,
        *ops: Op,
        names: Callable[[str], bool] = _any_name,
    ) -> None:
        """The nth call (from 1) of these kinds on these files fails; no other."""
        self._rules.append(_Rule(kind, frozenset(ops), names, nth=nth))

    def fail_by_chance(
        self,
        kind: FaultKind,
        chance: float,
        *ops: Op,
        names: Callable[[str], bool] = _any_name,
    ) -> None:
        """Each call of these kinds on these files fails with this chance."""
        self._rules.append(_Rule(kind, frozenset(ops), names, chance=chance))

    def slow_down(self, delay_s: float, *, names: Callable[[str], bool] = _any_name) -> None:
        """Every call on these files takes this much longer."""
        self._slow.append((names, delay_s))

    def misdirect_nth(
        self, nth: int, shift_bytes: int, *, names: Callable[[str], bool] = _any_name
    ) -> None:
        """The nth write (from 1) to these files lands `shift_bytes` further on."""
        self._shifts.append((names, nth, shift_bytes))

    def heal(self) -> None:
        """No more faults."""
        self._rules.clear()
        self._hits.clear()
        self._slow.clear()
        self._shifts.clear()

    # -------------------------------------------------------------------------- asked by SimDisk

    def draw(self, op: Op, name: str) -> BaseException | None:
        """The error of this call, or None."""
        self.counts[op] += 1
        for rule in self._rules:
            if op not in rule.ops or not rule.names(name):
                continue
            self._hits[id(rule)] += 1
            if rule.nth == self._hits[id(rule)] or (
                rule.chance and self._random().random() < rule.chance
            ):
                return _error(rule.kind, op, name)
        return None

    def extra_delay_s(self, op: Op, name: str) -> float:
        """Seconds that this call takes beyond its own."""
        return sum(delay for names, delay in self._slow if names(name))

    def landing(self, name: str, offset: int, size: int) -> int:
        """Where a write to `offset` really lands."""
        for index, (names, nth, shift) in enumerate(self._shifts):
            if names(name):
                self._hits[-1 - index] += 1
                if self._hits[-1 - index] == nth:
                    return max(0, offset + shift)
        return offset

    def _random(self) -> random.Random:
        if self._rng is None:
            self._rng = random.Random(self.seed)
        return self._rng


def _error(kind: FaultKind, op: Op, name: str) -> BaseException:
    if kind is FaultKind.POWER:
        return PowerLoss(f"power lost in {op.value} of {name}")
    if kind is FaultKind.ENOSPC:
        return OutOfSpace(f"{name}: No space left on device ({op.value})")
    return DeviceError(f"{name}: Input/output error ({op.value})")
