"""How much a connection may have in flight, and what happens to one that does not read.

Owns the outbox bound and the decision to pause or end a connection. It must not write itself.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from ctxstore import limits

STALL_S_MAX: Final = 30.0
"""A client with replies waiting that reads nothing for so long is cut off."""


class Flow(Enum):
    """What to do with a connection after a write."""

    RUN = "run"
    PAUSE = "pause"
    """Read no more requests until the client has read replies."""
    END = "end"
    """The client has let too much pile up."""


def flow_of(queued_bytes: int, *, paused: bool) -> Flow:
    """Decision for `queued_bytes` of replies that the kernel has not taken yet.

    `paused` says that the transport is above its own high-water mark. While paused no further
    requests come in, so what can still pile up are the replies to outstanding ones.
    """
    if queued_bytes > limits.OUTBOX_BYTES_MAX:
        return Flow.END
    return Flow.PAUSE if paused else Flow.RUN
