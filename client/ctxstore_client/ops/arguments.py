"""Checks of what callers pass in, and its form inside plans: key rows, byte arrays, columns.

Owns every `ValueError` of the client; all are raised before anything is sent and name argument and
index. It copies no payload and must not know connections.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from ctxstore import limits
from ctxstore.keys import KeyArray, Keys, as_key_array
from ctxstore.wire.messages import Durability

if TYPE_CHECKING:
    from ctxstore_client.ops.requests import ByteArray

Buffers = Sequence[Any] | npt.NDArray[Any]
"""C-contiguous buffers: bytes, bytearray, memoryview, numpy arrays of any dtype, ..."""

DurabilityName = Literal["memory", "group"]

_U32_MAX: Final = 2**32 - 1
_I16: Final = np.iinfo(np.int16)
_TTL_MS_MAX: Final = 2**53
_DURABILITIES: Final = {
    None: Durability.DEFAULT,
    "memory": Durability.MEMORY,
    "group": Durability.GROUP,
}


def key_rows(keys: Keys) -> KeyArray:
    """(n, 16) uint8. Raises ValueError naming the first wrong key."""
    try:
        return as_key_array(keys)
    except ValueError as error:
        raise ValueError(f"keys: {error}") from None
    except TypeError as error:
        raise ValueError(f"keys is a {type(keys).__name__}, not a sequence of keys") from error


def byte_arrays(buffers: Buffers, *, count: int, writable: bool) -> list[ByteArray]:
    """One flat byte array over each buffer, sharing its memory.

    Raises ValueError for a wrong number of buffers, and for one that is no buffer, not contiguous,
    read-only where it is to be filled, empty, or above the shard limit.
    """
    if isinstance(buffers, (bytes, bytearray, memoryview, str)):
        raise ValueError(
            f"buffers is one {type(buffers).__name__}; pass a sequence, for example [buffer]"
        )
    try:
        found = len(buffers)
    except TypeError as error:
        raise ValueError(
            f"buffers is a {type(buffers).__name__}, not a sequence of buffers"
        ) from error
    if found != count:
        raise ValueError(f"{count} keys but {found} buffers: pass one buffer per key")
    return [_byte_array(buffer, index, writable) for index, buffer in enumerate(buffers)]


def _byte_array(buffer: Any, index: int, writable: bool) -> ByteArray:
    if isinstance(buffer, np.ndarray):
        if not buffer.flags.c_contiguous:
            raise ValueError(f"buffers[{index}] is not C-contiguous")
        if buffer.dtype.hasobject:
            raise ValueError(f"buffers[{index}] holds Python objects, not bytes")
        flat = buffer if buffer.dtype == np.uint8 and buffer.ndim == 1 else _flat(buffer)
    else:
        flat = _over_buffer(buffer, index)
    if writable and not flat.flags.writeable:
        raise ValueError(f"buffers[{index}] is read-only and cannot be filled")
    if flat.size == 0:
        raise ValueError(f"buffers[{index}] has zero bytes")
    if flat.size > limits.SHARD_BYTES_MAX:
        raise ValueError(
            f"buffers[{index}] has {flat.size} bytes, "
            f"a shard has at most {limits.SHARD_BYTES_MAX} (64 MiB)"
        )
    return flat


def _flat(array: npt.NDArray[Any]) -> ByteArray:
    return array.reshape(-1).view(np.uint8)


def _over_buffer(buffer: Any, index: int) -> ByteArray:
    try:
        view = memoryview(buffer)
    except TypeError as error:
        raise ValueError(
            f"buffers[{index}] is a {type(buffer).__name__}, which has no buffer "
            "(of a torch tensor, pass tensor.numpy())"
        ) from error
    except ValueError as error:  # a released memoryview
        raise ValueError(f"buffers[{index}]: {error}") from error
    if not view.c_contiguous:
        raise ValueError(f"buffers[{index}] is not C-contiguous")
    if view.nbytes == 0:
        raise ValueError(f"buffers[{index}] has zero bytes")
    return np.frombuffer(view, np.uint8)


def addresses(arrays: Sequence[ByteArray]) -> npt.NDArray[np.int64]:
    """Where each array begins in memory."""
    return np.fromiter(
        (array.__array_interface__["data"][0] for array in arrays), np.int64, len(arrays)
    )


def shard_lengths(lengths: Iterable[int]) -> npt.NDArray[np.int64]:
    """Lengths of shards to be allocated, bytes. Raises ValueError naming the first wrong one."""
    try:
        values = [_index_of(value) for value in lengths]
    except TypeError as error:
        raise ValueError(f"lengths are whole numbers of bytes: {error}") from error
    for index, value in enumerate(values):
        if not 0 < value <= limits.SHARD_BYTES_MAX:
            raise ValueError(
                f"lengths[{index}] is {value}, a shard has 1 .. {limits.SHARD_BYTES_MAX} bytes"
            )
    return np.array(values, np.int64)


def _index_of(value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{value!r} is a {type(value).__name__}")
    return int(value.__index__())


def timeout_of(timeout_s: float | None, default_s: float) -> float:
    """Seconds an operation may take; 0 and less: its deadline has passed already.

    Raises ValueError unless it is a finite number.
    """
    value = default_s if timeout_s is None else timeout_s
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise ValueError(f"timeout_s is a {type(value).__name__}, not seconds")
    if not value < math.inf:  # NaN is not either
        raise ValueError(f"timeout_s is {value}; it must be a finite number of seconds")
    return max(0.0, float(value))


def default_timeout_of(timeout_s: float) -> float:
    """Seconds for operations that name none. Raises ValueError unless finite and above zero."""
    value = timeout_of(timeout_s, 0.0)
    if value <= 0:
        raise ValueError(f"timeout_s is {timeout_s}; no operation could ever be done within it")
    return value


def hold_ms(ttl_s: float) -> int:
    """How long to hold, in milliseconds; 0 ends a hold. Raises ValueError."""
    if ttl_s is None:
        raise ValueError("ttl_s is None; say for how many seconds to hold (ttl_s=0 ends a hold)")
    return ttl_ms(ttl_s)


def ttl_ms(ttl_s: float | None) -> int:
    """One time to live in milliseconds, 0 for none; above zero it is never rounded down to none.

    Raises ValueError.
    """
    return 0 if ttl_s is None else int(_ttl_column(ttl_s, 1)[0])


def by_us(by_s: float | None) -> int:
    """Microseconds until prefetched shards are wanted; 0 = soon. Raises ValueError."""
    if by_s is None:
        return 0
    if isinstance(by_s, bool) or not 0 <= by_s < math.inf:
        raise ValueError(f"by_s is {by_s!r}; it is seconds from now, 0 or more")
    return int(min(by_s, limits.REQUEST_TIMEOUT_S_MAX) * 1e6)


@dataclass(frozen=True, slots=True)
class PutColumns:
    """Options of a put as wire columns: each has one value, or one per key."""

    durability: Durability
    ttl_ms: npt.NDArray[np.uint64]
    priority: npt.NDArray[np.int16]
    depth: npt.NDArray[np.uint32]
    cost: npt.NDArray[np.float32]

    def rows(self, chosen: npt.NDArray[np.int64]) -> PutColumns:
        """The options of some of the keys."""
        return PutColumns(
            durability=self.durability,
            ttl_ms=_rows(self.ttl_ms, chosen),
            priority=_rows(self.priority, chosen),
            depth=_rows(self.depth, chosen),
            cost=_rows(self.cost, chosen),
        )


def _rows(column: npt.NDArray[Any], chosen: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    return column if len(column) == 1 else column[chosen]


def put_columns(
    count: int,
    *,
    ttl_s: Any,
    priority: Any,
    durability: str | None,
    depth0: Any,
    cost_s: Any,
) -> PutColumns:
    """Check the options of a put of `count` keys. Raises ValueError naming argument and index.

    A single `depth0` is the depth of the first key; the others follow it one by one. `cost_s` is
    seconds of recompute, None where unknown.
    """
    if durability not in _DURABILITIES:
        raise ValueError(f"durability is {durability!r}; one of None, 'memory', 'group'")
    whole = _whole_column("priority", priority, count, low=_I16.min, high=_I16.max)
    depth = _whole_column("depth0", depth0, count, low=0, high=_U32_MAX)
    if len(depth) == 1 and count > 1:
        depth = np.minimum(depth[0] + np.arange(count, dtype=np.int64), _U32_MAX)
    return PutColumns(
        durability=_DURABILITIES[durability],
        ttl_ms=_ttl_column(ttl_s, count),
        priority=whole.astype("<i2"),
        depth=depth.astype("<u4"),
        cost=_cost_column(cost_s, count),
    )


def _column(name: str, value: Any, count: int) -> npt.NDArray[Any]:
    """A single value, or one per key, as a one-dimensional float64 or int64 array."""
    items: list[Any]
    if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value) > 0:
        items = list(value)
        if len(items) != count:
            raise ValueError(
                f"{name} has {len(items)} values for {count} keys; pass one or {count}"
            )
    else:
        items = [value]
    for index, item in enumerate(items):
        if isinstance(item, bool) or not isinstance(item, (int, float, np.number)):
            where = f"{name}[{index}]" if len(items) > 1 else name
            raise ValueError(f"{where} is {item!r}, not a number")
    return np.array(items if items else [0])


def _whole_column(
    name: str, value: Any, count: int, *, low: int, high: int
) -> npt.NDArray[np.int64]:
    column = _column(name, value, count)
    if column.dtype.kind not in "iu":
        raise ValueError(f"{name} must be whole numbers")
    _check_range(name, column, low=low, high=high)
    return column.astype(np.int64)


def _ttl_column(ttl_s: Any, count: int) -> npt.NDArray[np.uint64]:
    if isinstance(ttl_s, (list, tuple)):
        ttl_s = [0 if item is None else item for item in ttl_s]
    column = _column("ttl_s", 0 if ttl_s is None else ttl_s, count).astype(np.float64)
    _check_range("ttl_s", column, low=0, high=_TTL_MS_MAX / 1000)
    return np.ceil(column * 1000).astype("<u8")


def _cost_column(cost_s: Any, count: int) -> npt.NDArray[np.float32]:
    if isinstance(cost_s, (list, tuple)):
        cost_s = [math.nan if item is None else item for item in cost_s]
    column = _column("cost_s", math.nan if cost_s is None else cost_s, count).astype(np.float64)
    known = column[~np.isnan(column)]
    _check_range("cost_s", known, low=0, high=float(np.finfo(np.float32).max))
    return column.astype("<f4")


def _check_range(name: str, column: npt.NDArray[Any], *, low: float, high: float) -> None:
    wrong = np.flatnonzero(~((column >= low) & (column <= high)))
    if wrong.size:
        index = int(wrong[0])
        where = f"{name}[{index}]" if len(column) > 1 else name
        raise ValueError(f"{where} is {column[index]}; it must be {low} .. {high}")
