"""The digest of everything that changes what a cell's bytes mean.

Owns one canonical serialisation of plain values and dataclasses. It must stay as it is for ever:
a changed byte here orphans every stored context. Knows no field of a layout by name.

Each value is   tag (1) | payload length u32 LE | payload :
    N none | B bool | I integer, decimal | F float64 LE | S text, UTF-8 | Y bytes |
    T sequence, its items | E enum, its value | D dataclass: class name, then (field name, value)
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from hashlib import blake2b
from typing import Any, Final

import numpy as np
import numpy.typing as npt

FORMAT_VERSION: Final = 1
FINGERPRINT_BYTES: Final = 16
_PERSON_LAYOUT: Final = b"ctxstore-layout1"
_PERSON_WEIGHTS: Final = b"ctxstore-weight1"
_EDGE_BYTES: Final = 4096
_HEAD: Final = struct.Struct("<cI")


def fingerprint_of(value: object, *, format_version: int = FORMAT_VERSION) -> bytes:
    """16-byte digest of a dataclass of settings; equal values give equal digests everywhere."""
    return blake2b(
        canonical((format_version, value)), digest_size=FINGERPRINT_BYTES, person=_PERSON_LAYOUT
    ).digest()


def canonical(value: object) -> bytes:
    """The one serialisation of `value`. Fields with `init=False` are derived and left out."""
    tag, payload = _encoded(value)
    return _HEAD.pack(tag, len(payload)) + payload


def canonical_json(settings: Mapping[str, Any]) -> str:
    """One text for equal nested settings, whatever their order; whole floats read as integers.

    For what engines keep as dictionaries: rope scaling, quantisation. Raises `ValueError` on NaN
    and `TypeError` on values that JSON does not know.
    """
    return json.dumps(
        _plain_numbers(settings), sort_keys=True, separators=(",", ":"), allow_nan=False
    )


def weights_digest(tensors: Iterable[tuple[str, npt.NDArray[Any]]]) -> bytes:
    """16-byte digest of a model's weights: name, size, first and last 4 KiB of each tensor.

    `tensors` may come in any order; arrays are C-contiguous, of any dtype (view what numpy does
    not know, such as bfloat16, as integers). Names must differ. Nothing is copied but the edges.
    """
    digests: dict[str, bytes] = {}
    for name, tensor in tensors:
        if name in digests:
            raise ValueError(f"two tensors are named {name!r}")
        if not tensor.flags.c_contiguous:
            raise ValueError(f"tensor {name!r} is not C-contiguous")
        content = tensor.reshape(-1).view(np.uint8)
        edges = (content[:_EDGE_BYTES].tobytes(), content[-_EDGE_BYTES:].tobytes())
        digests[name] = canonical((name, content.size, edges))
    whole = blake2b(digest_size=FINGERPRINT_BYTES, person=_PERSON_WEIGHTS)
    for name in sorted(digests):
        whole.update(digests[name])
    return whole.digest()


def _encoded(value: object) -> tuple[bytes, bytes]:
    if value is None:
        return b"N", b""
    if isinstance(value, Enum):
        return b"E", canonical(value.value)
    if is_dataclass(value) and not isinstance(value, type):
        named = ((field.name, getattr(value, field.name)) for field in fields(value) if field.init)
        return b"D", canonical(type(value).__name__) + b"".join(map(canonical, named))
    if isinstance(value, bool):
        return b"B", b"\1" if value else b"\0"
    return _encoded_plain(value)


def _encoded_plain(value: object) -> tuple[bytes, bytes]:
    if isinstance(value, int):
        return b"I", str(value).encode()
    if isinstance(value, float):
        return b"F", struct.pack("<d", value)
    if isinstance(value, str):
        return b"S", value.encode()
    if isinstance(value, bytes):
        return b"Y", value
    if isinstance(value, (tuple, list)):
        return b"T", b"".join(map(canonical, value))
    raise TypeError(f"a fingerprint holds no {type(value).__name__}")


def _plain_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain_numbers(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_numbers(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
