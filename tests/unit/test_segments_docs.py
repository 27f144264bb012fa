"""The tables of docs/disk-format.md say what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ctxstore_daemon.engine.records import META_DTYPE, RECORD_DTYPE, MetaKind
from ctxstore_daemon.segments.footer import SCHEMA
from ctxstore_daemon.segments.format import (
    FOOTER_MAGIC,
    GROUP_FIXED_BYTES,
    GROUP_MAGIC,
    GROUP_RECORDS_MAX,
    SEGMENT_MAGIC,
)
from ctxstore_daemon.segments.metaformat import FRAME_BYTES, FRAME_DTYPE, META_MAGIC

if TYPE_CHECKING:
    import numpy as np

TEXT = (Path(__file__).parents[2] / "docs" / "disk-format.md").read_text()
ROW = re.compile(r"^\| (\d+) \| (\d+) \| ([^|]+) \|", re.MULTILINE)


def table(after: str) -> list[tuple[int, int, str]]:
    """(offset, size, field) of the first byte table behind a piece of text."""
    start = TEXT.index(after) + len(after)
    part = TEXT[TEXT.index("\n| offset ", start) :]
    part = part[: part.index("\n\n", 2)]
    return [(int(a), int(b), c.strip()) for a, b, c in ROW.findall(part)]


@pytest.mark.parametrize(
    ("after", "size", "magic"),
    [
        ("### Segment header", 64, SEGMENT_MAGIC),
        ("### Group header", GROUP_FIXED_BYTES, GROUP_MAGIC),
        ("Trailer, the last page", 72, FOOTER_MAGIC),
        ("Header cell", FRAME_BYTES, META_MAGIC),
    ],
)
def test_structures_have_no_holes(after: str, size: int, magic: bytes) -> None:
    rows = table(after)
    at = 0
    for offset, length, _ in rows:
        assert offset == at
        at += length
    assert at == size
    assert rows[0][2] == f"magic `{magic.decode()}`"


@pytest.mark.parametrize(
    ("after", "dtype"),
    [("#### Record", RECORD_DTYPE), ("Frame:", FRAME_DTYPE), ("\nRecord:", META_DTYPE)],
)
def test_records_are_as_written(after: str, dtype: np.dtype[np.void]) -> None:
    assert dtype.fields is not None
    expected = [(v[1], v[0].itemsize, name) for name, v in dtype.fields.items()]
    assert table(after) == expected


def test_kinds_and_bounds_are_as_written() -> None:
    kinds = re.findall(r"^\| (\d) \| ([A-Z]+) \|", TEXT, re.MULTILINE)
    assert {int(value): name for value, name in kinds} == {int(k): k.name for k in MetaKind}
    assert f"1 to {GROUP_RECORDS_MAX}" in TEXT
    names = [name for name in RECORD_DTYPE.names or () if name != "reserved"]
    assert SCHEMA.names == [*names, "group_seq", "inline"]
