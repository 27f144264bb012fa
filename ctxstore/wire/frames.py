"""Framing of control connections: a u32 length, then that many bytes of payload.

Owns the length prefix and the limits on it. It must not look inside a payload.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from ctxstore.errors import LocalProtocolError, RemoteProtocolError
from ctxstore.limits import FRAME_BYTES_MAX

if TYPE_CHECKING:
    from ctxstore.wire.columns import Column

_LENGTH: Final = struct.Struct("<I")

FRAME_HEADER_BYTES: Final = _LENGTH.size
"""Bytes before the payload."""


def pack_frame(payload: bytes, *, limit: int = FRAME_BYTES_MAX) -> bytes:
    """Prefix a payload with its length. Raises LocalProtocolError unless that is 1 to `limit`."""
    if not 0 < len(payload) <= limit:
        raise LocalProtocolError(f"frame of {len(payload)} bytes, allowed are 1 to {limit}")
    return _LENGTH.pack(len(payload)) + payload


def payload_bytes(
    header: Column | bytearray, *, offset: int = 0, limit: int = FRAME_BYTES_MAX
) -> int:
    """The payload length announced by the 4 bytes at `offset`.

    Raises RemoteProtocolError when it is 0 or above `limit`, before anything is allocated for it.
    """
    (length,) = _LENGTH.unpack_from(header, offset)
    if not 0 < length <= limit:
        raise RemoteProtocolError(f"frame announces {length} bytes, allowed are 1 to {limit}")
    return int(length)
