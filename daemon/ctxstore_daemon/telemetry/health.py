"""Whether a node lives and whether it can do its work, as answers for probes.

Owns what counts as ready. It must not measure anything itself.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HealthFacts:
    """What a probe's answer is made from."""

    phase: str
    serving: bool
    failed: bool
    segments_usable: int
    segments_free: int
    arena_populated_bytes: int
    arena_bytes: int


def unhealthy_because(facts: HealthFacts) -> str | None:
    """Why the process should be restarted; None while it lives."""
    return "the engine stopped after an internal error" if facts.failed else None


def unready_because(facts: HealthFacts) -> str | None:
    """Why no new clients should be sent here; None when they should."""
    if facts.failed:
        return unhealthy_because(facts)
    if not facts.serving:
        return f"the node is {facts.phase}"
    if facts.segments_usable == 0:
        return "no segment of the disk can be written"
    return None


def describe(facts: HealthFacts, because: str | None) -> bytes:
    """A short text for people who look at a probe."""
    populated = 100 * facts.arena_populated_bytes // max(1, facts.arena_bytes)
    lines = [
        "ok" if because is None else f"not ok: {because}",
        f"phase {facts.phase}",
        f"segments {facts.segments_usable} usable, {facts.segments_free} free",
        f"arena {populated}% populated",
    ]
    return ("\n".join(lines) + "\n").encode()
