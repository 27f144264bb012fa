"""A client in a process of its own that a test kills in the middle of what it does.

Prints one line when it is there. Owns nothing: what it leaves behind is the daemon's to clean up.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ctxstore_client import connect
from tests.faults.nodes import make_keys
from tests.shards import payload_of, shard_length

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTH: Final = 1_500_000
SHARED: Final = make_keys(1, 6, LENGTH)
"""Put by the test; children read them."""

SPACE: Final = 50
"""Of what children put."""


def _ready() -> None:
    sys.stdout.write("there\n")
    sys.stdout.flush()


def hold_views(store: Any) -> None:
    """Several leases, open for ever."""
    with ExitStack() as stack:
        for key in SHARED:
            stack.enter_context(store.view([key]))
        _ready()
        time.sleep(60)


def hold_staging(store: Any) -> None:
    """Staged buffers, filled and never put."""
    with store.alloc([LENGTH] * 2) as staged:
        staged[0][:] = payload_of(SHARED[0]).data
        _ready()
        time.sleep(60)


def put_for_ever(store: Any) -> None:
    """Puts of fresh shards, one batch after the other."""
    number = 0
    _ready()
    while True:
        keys = make_keys(SPACE, 4, LENGTH, first=number % 400)
        store.put(keys, [payload_of(key) for key in keys], durability="group")
        number += 4


def get_for_ever(store: Any) -> None:
    """Gets into the same buffers."""
    buffers = [np.zeros(shard_length(key), np.uint8) for key in SHARED]
    _ready()
    while True:
        store.get_into(SHARED, buffers)


CHILDREN: Final[dict[str, Callable[[Any], None]]] = {
    "views": hold_views,
    "staging": hold_staging,
    "puts": put_for_ever,
    "gets": get_for_ever,
}


if __name__ == "__main__":
    what, url, shm = sys.argv[1:4]
    with connect(url, shm=shm, timeout_s=5) as connected:
        CHILDREN[what](connected)
