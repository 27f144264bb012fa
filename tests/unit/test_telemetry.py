"""Metrics and probes: every figure of the engine has its place and its words."""

from __future__ import annotations

from dataclasses import fields

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ctxstore_daemon.engine.stats import CountersState, EngineStats
from ctxstore_daemon.telemetry import health, prometheus
from ctxstore_daemon.telemetry.health import HealthFacts

NOT_SHOWN = {"counters", "sequence", "connections"}


def test_every_counter_of_the_engine_is_explained() -> None:
    assert set(CountersState().as_dict()) == set(prometheus.COUNTERS)


def test_every_gauge_of_the_engine_is_shown() -> None:
    there = {field.name for field in fields(EngineStats)} - NOT_SHOWN
    shown = {
        name for part, _, name in (g.partition(".") for g in prometheus.GAUGES) if part == "engine"
    }
    assert there == shown


def test_the_page_can_be_read_by_prometheus() -> None:
    stats = {
        "node": {"id": "ab" * 16, "version": "0.1", "uptime_s": 2.5},
        "arena": {"pages": "4k", "huge_page_bytes": 0, "populated_bytes": 7},
        "engine": {"entries": 3, "disk_ok": True, "counters": {"get_misses": 5}},
        "server": {
            "control_connections": 2,
            "requests": {"get": 9, "put": 1},
            "counters": {"opened": 4},
        },
    }
    text = prometheus.exposition(stats).decode()
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["ctxstore_entries", ()] == 3
    assert found["ctxstore_disk_ok", ()] == 1
    assert found["ctxstore_get_misses_total", ()] == 5
    assert found["ctxstore_connections_opened_total", ()] == 4
    assert found["ctxstore_requests_total", (("op", "get"),)] == 9
    assert found["ctxstore_uptime_s", ()] == 2.5
    labels = (("node", "ab" * 16), ("pages", "4k"), ("version", "0.1"))
    assert found["ctxstore_node", labels] == 1
    assert ("process_open_fds", ()) in found


def test_the_page_of_a_node_that_starts() -> None:
    text = prometheus.exposition({"phase": "recovering", "arena": {"populated_bytes": 1}})
    assert b"ctxstore_entries" not in text
    assert b"process_cpu_seconds_total" in text


def _facts(**changes: object) -> HealthFacts:
    base = {
        "phase": "serving",
        "serving": True,
        "failed": False,
        "segments_usable": 8,
        "segments_free": 3,
        "arena_populated_bytes": 50,
        "arena_bytes": 100,
    }
    return HealthFacts(**(base | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "healthy", "ready"),
    [
        (_facts(), True, True),
        (_facts(phase="recovering", serving=False), True, False),
        (_facts(phase="stopping", serving=False), True, False),
        (_facts(segments_usable=0), True, False),
        (_facts(failed=True), False, False),
    ],
)
def test_probes(facts: HealthFacts, healthy: bool, ready: bool) -> None:
    assert (health.unhealthy_because(facts) is None) == healthy
    assert (health.unready_because(facts) is None) == ready
    text = health.describe(facts, health.unready_because(facts)).decode()
    assert text.startswith("ok\n" if ready else "not ok: ")
    assert "arena 50% populated" in text
