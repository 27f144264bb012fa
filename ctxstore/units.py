"""Sizes and durations as people write them, and back.

Owns the grammar of "4GiB" and "250ms". Pure text and numbers: reads no clock, knows no setting,
and raises plain `ValueError` (the configuration adds the name of the setting).
"""

import re
from typing import Final

_KIB: Final = 1024
_MIB: Final = 1024 * _KIB
_GIB: Final = 1024 * _MIB
_TIB: Final = 1024 * _GIB

_SIZE_UNITS: Final = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": _KIB,
    "mib": _MIB,
    "gib": _GIB,
    "tib": _TIB,
}
_DURATION_UNITS: Final = {
    "": 1.0,
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
_SIZES_DOWN: Final = (
    ("TiB", _TIB),
    ("GiB", _GIB),
    ("MiB", _MIB),
    ("KiB", _KIB),
)
_NUMBER: Final = re.compile(r"\s*([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?)\s*([A-Za-zµ]*)\s*", re.ASCII)
_INT64_MAX: Final = 2**63 - 1


def parse_size(text: str | int) -> int:
    """Bytes of "4GiB", "512MiB", "1.5GB", or of a plain count of bytes.

    KiB, MiB, GiB, TiB are powers of 1024; kB, MB, GB, TB powers of 1000; case does not matter.
    Raises `ValueError` for an unknown unit, a negative number or a fraction of a byte.
    """
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise ValueError(f"not a size: {text!r}; write for example 4GiB, 512MiB or 4096")
    if isinstance(text, int):
        count: float = text
        whole = text
    else:
        count, scale = _number_and_unit(text, _SIZE_UNITS, what="size", example="4GiB or 512MiB")
        whole = round(count * scale) if count % 1 else int(count) * int(scale)
        if count % 1 and abs(count * scale - whole) > 1e-6 * scale:
            raise ValueError(f"size {text!r} is not a whole number of bytes")
    if whole < 0:
        raise ValueError(f"size {text!r} is negative")
    if whole > _INT64_MAX:
        raise ValueError(f"size {text!r} is beyond 2^63-1 bytes")
    return whole


def format_size(count_bytes: int) -> str:
    """Shortest exact text that `parse_size` reads back: 4294967296 -> "4GiB", 1500 -> "1500B"."""
    if count_bytes < 0:
        raise ValueError(f"size {count_bytes} is negative")
    for unit, scale in _SIZES_DOWN:
        if count_bytes and count_bytes % scale == 0:
            return f"{count_bytes // scale}{unit}"
    return f"{count_bytes}B" if count_bytes else "0"


def describe_size(count_bytes: int) -> str:
    """Rounded text for people, not for `parse_size` to read back exactly: 1500000 -> "1.43 MiB"."""
    for unit, scale in _SIZES_DOWN:
        if abs(count_bytes) >= scale:
            return f"{count_bytes / scale:.2f}".rstrip("0").rstrip(".") + f" {unit}"
    return f"{count_bytes} B"


def parse_duration(text: str | float) -> float:
    """Seconds of "10s", "5m", "250ms", "2h", "1d", or of a plain number of seconds.

    Raises `ValueError` for an unknown unit, a negative or a non-finite number.
    """
    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise ValueError(f"not a duration: {text!r}; write for example 10s, 5m or 250ms")
    if isinstance(text, str):
        count, scale = _number_and_unit(
            text, _DURATION_UNITS, what="duration", example="10s, 250ms"
        )
        # Division keeps 250ms at exactly 0.25, where 250 * 1e-3 would not always be.
        return count * scale if scale >= 1 else count / round(1 / scale)
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"duration {text!r} must be a finite number of seconds, 0 or more")
    return seconds


def format_duration(seconds: float) -> str:
    """Exact text that `parse_duration` reads back: 300.0 -> "5m", 0.25 -> "250ms"."""
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"duration {seconds!r} must be a finite number of seconds, 0 or more")
    for unit, scale in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if seconds and seconds % scale == 0:
            return f"{int(seconds) // scale}{unit}"
    for unit, parts in (("ms", 1000), ("us", 1_000_000)):
        count = round(seconds * parts)
        if count and count / parts == seconds:
            return f"{count}{unit}"
    return f"{seconds!r}s" if "e" not in repr(seconds) else f"{seconds:.18f}s"


def _number_and_unit(
    text: str, units: dict[str, int] | dict[str, float], *, what: str, example: str
) -> tuple[float, float]:
    found = _NUMBER.fullmatch(text)
    if found is None:
        raise ValueError(f"not a {what}: {text!r}; write for example {example}")
    number, unit = found.groups()
    scale = units.get(unit.lower())
    if scale is None:
        known = ", ".join(name for name in units if name)
        raise ValueError(f"unknown unit {unit!r} in {what} {text!r}; known: {known}")
    digits = number.replace("_", "")
    return (float(digits) if "." in digits else int(digits)), scale
