"""The pages of the daemon's HTTP port.

Owns which paths there are. It must not compute what they say: `telemetry` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctxstore_daemon.runtime.http import Page, Pages
from ctxstore_daemon.telemetry import health, prometheus

if TYPE_CHECKING:
    from ctxstore_daemon.node import Node


def pages(node: Node) -> Pages:
    """`/healthz`, `/readyz` and `/metrics` of a node, from before it is started on."""

    def healthz() -> Page:
        facts = node.health()
        because = health.unhealthy_because(facts)
        return Page(503 if because else 200, health.describe(facts, because))

    def readyz() -> Page:
        facts = node.health()
        because = health.unready_because(facts)
        return Page(503 if because else 200, health.describe(facts, because))

    def metrics() -> Page:
        return Page(200, prometheus.exposition(node.stats()), prometheus.CONTENT_TYPE)

    def index() -> Page:
        return Page(200, b"ctxstore: /healthz /readyz /metrics\n")

    return {"/": index, "/healthz": healthz, "/readyz": readyz, "/metrics": metrics}
