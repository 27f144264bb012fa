"""The index of a node: key to row, and one column per property of a row.

Owns one dict per namespace and the numpy columns that all rows share; batches are looked up into
row arrays and worked on by column. It must not decide anything: what a change means for tiers,
waiters and policies is said by its callers. Row 0 is never used and never visible: it stands for
"no such key".
"""

from __future__ import annotations

from enum import IntFlag
from itertools import repeat
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ctxstore.limits import KEY_BYTES

Rows = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

NEVER_NS: Final = 2**63 - 1
"""`expires_ns` of a row without TTL."""

NO_SEGMENT: Final = -1

_ROWS_FIRST: Final = 4096


class RowFlag(IntFlag):
    """Bits of a row's `flags`."""

    VISIBLE = 1
    """Committed: gets, match and exists see it."""
    DIRTY = 2
    """Waits to be written to nvme."""
    WRITING = 4
    """Is in the group that is being written."""
    INLINE = 8
    """Its payload is in `inline`, it never has a slot."""
    HELD = 16
    HIT = 32
    """Was read since it was last written: survives a reclaim."""
    LOADING = 64
    """Is being read from nvme into a slot."""
    DETACHED = 128
    """Removed while its first group was under way: no key leads here any more."""


VISIBLE: Final = int(RowFlag.VISIBLE)
DIRTY: Final = int(RowFlag.DIRTY)
WRITING: Final = int(RowFlag.WRITING)
INLINE: Final = int(RowFlag.INLINE)
HELD: Final = int(RowFlag.HELD)
HIT: Final = int(RowFlag.HIT)
LOADING: Final = int(RowFlag.LOADING)
DETACHED: Final = int(RowFlag.DETACHED)

_COLUMNS: Final[tuple[tuple[str, Any], ...]] = (
    ("flags", np.uint16),
    ("ns", np.uint16),
    ("slot", np.uint32),
    ("length", np.uint32),
    ("segment", np.int32),
    ("page", np.uint32),
    ("birth", np.uint64),
    ("checksum", np.uint64),
    ("expires_ns", np.int64),
    ("depth", np.uint32),
    ("cost_s", np.float32),
    ("priority", np.int16),
    ("attempts", np.uint8),
)


class IndexState:
    """Rows and the way to them.

    Each column is a numpy array for batches, and under the name with `_at` a memoryview of the same
    memory for single rows (plain Python numbers, three times as fast). Arrays are replaced when the
    index grows: never keep one over a call of `allocate`.
    """

    flags: npt.NDArray[np.uint16]
    ns: npt.NDArray[np.uint16]
    slot: npt.NDArray[np.uint32]
    """First page of the slot, 0 = not in memory."""
    length: npt.NDArray[np.uint32]
    segment: npt.NDArray[np.int32]
    page: npt.NDArray[np.uint32]
    """Extent's first page in `segment`."""
    birth: npt.NDArray[np.uint64]
    """0 until the payload has arrived."""
    checksum: npt.NDArray[np.uint64]
    expires_ns: npt.NDArray[np.int64]
    """Monotonic clock."""
    depth: npt.NDArray[np.uint32]
    cost_s: npt.NDArray[np.float32]
    priority: npt.NDArray[np.int16]
    attempts: npt.NDArray[np.uint8]
    """Groups that failed with this row in them."""

    flags_at: memoryview[int]
    ns_at: memoryview[int]
    slot_at: memoryview[int]
    length_at: memoryview[int]
    segment_at: memoryview[int]
    page_at: memoryview[int]
    birth_at: memoryview[int]
    checksum_at: memoryview[int]
    expires_ns_at: memoryview[int]
    depth_at: memoryview[int]
    cost_s_at: memoryview[float]
    priority_at: memoryview[int]
    attempts_at: memoryview[int]

    def __init__(self, *, namespaces: int, entries_max: int) -> None:
        self.entries_max = entries_max
        self.maps: list[dict[bytes, int]] = [{} for _ in range(namespaces)]
        self.inline: dict[int, bytes] = {}
        self.inline_bytes = 0
        self.keys = np.zeros((0, KEY_BYTES), np.uint8)
        self.count = 0
        """Rows in use, the detached among them."""
        self.high = 1
        """Rows from here on were never used."""
        self.capacity = 0
        self._free: list[int] = []
        self._resize(min(_ROWS_FIRST, entries_max + 1))
        self.segment_at[0] = NO_SEGMENT

    def _resize(self, capacity: int) -> None:
        keys = np.zeros((capacity, KEY_BYTES), np.uint8)
        keys[: self.high] = self.keys[: self.high] if self.capacity else 0
        self.keys = keys
        for name, dtype in _COLUMNS:
            column = np.zeros(capacity, dtype)
            if self.capacity:
                column[: self.high] = getattr(self, name)[: self.high]
            setattr(self, name, column)
            setattr(self, f"{name}_at", column.data)
        self.capacity = capacity

    @property
    def full(self) -> bool:
        """Whether another row would pass entries_max."""
        return self.count >= self.entries_max

    def reserve(self, rows: int) -> None:
        """Make room for that many rows at once, before a bulk load."""
        if rows + 1 > self.capacity:
            self._resize(min(rows + 1, self.entries_max + 1))

    # ------------------------------------------------------------ lookup

    def find(self, ns: int, key: bytes) -> int:
        """Row of the key, visible or not; 0 when there is none."""
        return self.maps[ns].get(key, 0)

    def find_batch(self, ns: int, keys: bytes | memoryview) -> Rows:
        """Rows of packed keys (16 bytes each), 0 where there is none."""
        names = split_keys(keys)
        return np.fromiter(map(self.maps[ns].get, names, repeat(0)), np.int64, len(names))

    def visible(self, rows: Rows, now_ns: int) -> BoolArray:
        """Which rows are committed and not expired."""
        seen: BoolArray = (self.flags[rows] & VISIBLE).astype(np.bool_)
        seen &= self.expires_ns[rows] > now_ns
        return seen

    def key(self, row: int) -> bytes:
        """The 16 bytes of the row's key (copy)."""
        key: bytes = self.keys[row].tobytes()
        return key

    # ------------------------------------------------------------ change

    def allocate(self, ns: int, key: bytes) -> int:
        """A new row that the key leads to: no flags, no birth, no copy anywhere, no TTL."""
        assert self.count < self.entries_max, "the index is full"
        if self._free:
            row = self._free.pop()
        else:
            row = self.high
            if row >= self.capacity:
                self._resize(min(self.capacity * 2, self.entries_max + 1))
            self.high = row + 1
        self.keys[row] = np.frombuffer(key, np.uint8)
        self.ns_at[row] = ns
        self.segment_at[row] = NO_SEGMENT
        self.expires_ns_at[row] = NEVER_NS
        self.maps[ns][key] = row
        self.count += 1
        return row

    def detach(self, row: int) -> None:
        """No key leads to the row any more; the row itself stays until `release`."""
        found = self.maps[self.ns_at[row]].pop(self.key(row), 0)
        assert found == row, "row was not attached"
        self.flags_at[row] |= DETACHED

    def release(self, row: int) -> None:
        """Forget the row (and its key, unless it was detached before). It must have no slot any
        more.
        """
        assert self.slot_at[row] == 0, "row still has a slot"
        if not self.flags_at[row] & DETACHED:
            found = self.maps[self.ns_at[row]].pop(self.key(row), 0)
            assert found == row, "row was not attached"
        payload = self.inline.pop(row, None)
        if payload is not None:
            self.inline_bytes -= len(payload)
        # Flags and birth tell a forgotten row from a living one, also to those who kept its number.
        self.flags_at[row] = 0
        self.birth_at[row] = 0
        self.length_at[row] = 0
        self.attempts_at[row] = 0
        self.segment_at[row] = NO_SEGMENT
        self._free.append(row)
        self.count -= 1

    def set_inline(self, row: int, payload: bytes) -> None:
        """Keep the payload of an inline row."""
        self.inline[row] = payload
        self.inline_bytes += len(payload)
        self.flags_at[row] |= INLINE

    def load(self, *, ns: npt.NDArray[np.uint16], keys: npt.NDArray[np.uint8]) -> Rows:
        """Bulk form of `allocate` for an empty index: rows 1..n in order, keys distinct per
        namespace.
        """
        assert self.count == 0, "load into an index in use"
        n = len(keys)
        assert n <= self.entries_max, "more rows than entries_max"
        self.reserve(n)
        rows = np.arange(1, n + 1, dtype=np.int64)
        self.keys[1 : n + 1] = keys
        self.ns[1 : n + 1] = ns
        self.segment[1 : n + 1] = NO_SEGMENT
        self.expires_ns[1 : n + 1] = NEVER_NS
        for number in range(len(self.maps)):
            own = rows[ns == number]
            if n and len(own) == n:
                names = split_keys(np.ascontiguousarray(keys).data.cast("B"))
                self.maps[number] = dict(zip(names, range(1, n + 1), strict=True))
            elif len(own):
                names = split_keys(np.ascontiguousarray(keys[own - 1]).data.cast("B"))
                self.maps[number] = dict(zip(names, own.tolist(), strict=True))
        self.high = n + 1
        self.count = n
        return rows

    def table_bytes(self) -> int:
        """Memory of the columns and a fair estimate for dict, key and row number of each entry."""
        row_bytes: int = KEY_BYTES + sum(np.dtype(dtype).itemsize for _, dtype in _COLUMNS)
        return self.high * row_bytes + self.count * 140 + self.inline_bytes

    def audit(self) -> list[str]:
        """What is wrong with the books; empty when all is well."""
        wrong: list[str] = []
        attached = 0
        for number, names in enumerate(self.maps):
            attached += len(names)
            wrong.extend(
                f"row {row}: key or namespace differ"
                for key, row in names.items()
                if self.key(row) != key or self.ns_at[row] != number
            )
        detached = int(np.count_nonzero(self.flags[: self.high] & DETACHED))
        if attached + detached != self.count:
            wrong.append(f"{self.count} rows, {attached} attached, {detached} detached")
        if self.count + len(self._free) != self.high - 1:
            wrong.append("rows are lost")
        if sum(map(len, self.inline.values())) != self.inline_bytes:
            wrong.append("inline bytes are miscounted")
        return wrong


def split_keys(keys: bytes | memoryview) -> list[bytes]:
    """Packed keys as one bytes object each."""
    names: list[bytes] = np.frombuffer(keys, dtype="V16").tolist()
    return names
