"""A child process that streams a fixed batch over TCP until its standard input closes.

Owns the load of the `ping_under_load` row. It prints one line when the first batch has arrived.
"""

from __future__ import annotations

import select
import sys

import numpy as np

import ctxstore_client
from ctxstore_client import Lookup


def main(address: str, keys_hex: str, length: str) -> int:
    """Get all keys again and again; a get that is no hit ends the process with 1."""
    keys = np.frombuffer(bytes.fromhex(keys_hex), np.uint8).reshape(-1, 16)
    buffers = [np.zeros(int(length), np.uint8) for _ in keys]
    with ctxstore_client.connect(address, shm="off") as store:
        announced = False
        while not select.select([sys.stdin], [], [], 0)[0]:
            lookups = store.get_into(keys, buffers, timeout_s=60)
            if any(found is not Lookup.HIT for found in lookups):
                return 1
            if not announced:
                sys.stdout.write("streaming\n")
                sys.stdout.flush()
                announced = True
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
