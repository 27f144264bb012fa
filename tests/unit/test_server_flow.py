"""What becomes of a connection whose peer reads slowly, or not at all."""

from __future__ import annotations

from ctxstore import limits
from ctxstore.limits import KIB
from ctxstore_daemon.server import session as session_module
from ctxstore_daemon.server.flow import Flow, flow_of


def test_a_full_outbox_pauses_and_then_ends_a_connection() -> None:
    assert flow_of(0, paused=False) is Flow.RUN
    assert flow_of(64 * KIB, paused=True) is Flow.PAUSE
    assert flow_of(limits.OUTBOX_BYTES_MAX + 1, paused=True) is Flow.END


def test_data_threads_are_few() -> None:
    assert session_module.STREAMS_MAX <= 64
