"""Receive buffer that turns bytes cut anywhere into whole frames.

Owns bytes that have arrived and were not consumed yet, never more than one frame and one read.
It must not interpret payloads. However small the cuts, a byte is moved a bounded number of times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctxstore.limits import FRAME_BYTES_MAX
from ctxstore.wire.frames import FRAME_HEADER_BYTES, payload_bytes

if TYPE_CHECKING:
    from ctxstore.wire.columns import Column


class ReceiveBuffer:
    """Feed what arrives, take frames until there is none. Not thread-safe.

    Memory grows with the bytes that came, never with the length a peer merely announces.
    """

    __slots__ = ("_data", "_start")

    def __init__(self) -> None:
        self._data = bytearray()
        self._start = 0

    def __len__(self) -> int:
        return len(self._data) - self._start

    def feed(self, data: Column) -> None:
        """Append bytes; they are copied, so `data` may be reused at once."""
        if self._start:
            # bytearray drops its head by moving a pointer, so this copies nothing.
            del self._data[: self._start]
            self._start = 0
        self._data += data

    def next_frame(self, *, limit: int = FRAME_BYTES_MAX) -> memoryview | None:
        """The next payload, or None when it is not complete.

        The view must be released before `feed` is called again. Raises RemoteProtocolError when the
        announced length is 0 or above `limit`, as soon as the 4 length bytes are there.
        """
        have = len(self._data) - self._start
        if have < FRAME_HEADER_BYTES:
            return None
        length = payload_bytes(self._data, offset=self._start, limit=limit)
        if have < FRAME_HEADER_BYTES + length:
            return None
        begin = self._start + FRAME_HEADER_BYTES
        self._start = begin + length
        return memoryview(self._data)[begin : self._start]

    def missing_bytes(self, *, limit: int = FRAME_BYTES_MAX) -> int:
        """How many more bytes complete the next length prefix or frame; 0 when one is complete.

        Lets a blocking reader ask its socket for exactly what it needs. Raises like `next_frame`.
        """
        have = len(self)
        if have < FRAME_HEADER_BYTES:
            return FRAME_HEADER_BYTES - have
        length = payload_bytes(self._data, offset=self._start, limit=limit)
        return max(0, FRAME_HEADER_BYTES + length - have)

    def take_rest_copy(self) -> bytes:
        """All bytes not consumed; the buffer is empty afterwards."""
        rest = bytes(memoryview(self._data)[self._start :])
        self._data.clear()
        self._start = 0
        return rest
