"""The tables of docs/wire-protocol.md say what the code does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest

from ctxstore.wire import connection
from ctxstore.wire.messages import (
    DATA_ENTRY_DTYPE,
    ENTRY_DTYPE,
    STAT_DTYPE,
    Capability,
    DataOp,
    Message,
    Op,
)

if TYPE_CHECKING:
    import numpy as np

TEXT = (Path(__file__).parents[2] / "docs" / "wire-protocol.md").read_text()
BY_OP = {message.op: message for message in get_args(Message)}


def message_rows() -> dict[int, tuple[str, list[str], str]]:
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \| ([^|]+) \| ([^|]+) \|$", TEXT, re.MULTILINE)
    return {
        int(op): (name, [] if names == "-" else names.split(", "), reply)
        for op, name, names, reply in rows
    }


def test_every_op_with_its_name() -> None:
    assert {op: row[0] for op, row in message_rows().items()} == {int(op): op.name for op in Op}


@pytest.mark.parametrize("op", Op, ids=lambda op: op.name)
def test_fields_in_wire_order_and_reply(op: Op) -> None:
    _, names, reply = message_rows()[op]
    message = BY_OP[op]
    assert ["rid", *names] == [field.name for field in fields(message)]
    answer = connection._REPLIES.get(message)
    if op is Op.HELLO:
        assert reply == "HELLO_OK"
    else:
        assert reply == (answer.op.name if answer else "-")


@pytest.mark.parametrize(
    ("heading", "dtype"),
    [
        ("A row of `entries` has 32 bytes", ENTRY_DTYPE),
        ("A row of StatReply has 16 bytes", STAT_DTYPE),
        ("back to back.", DATA_ENTRY_DTYPE),
    ],
)
def test_row_tables(heading: str, dtype: np.dtype[np.void]) -> None:
    table = TEXT.split(heading, 1)[1].split("\n\n")[1]
    documented = [
        (int(at), int(size))
        for at, size in re.findall(r"^\| (\d+) \| (\d+) \|", table, re.MULTILINE)
    ]
    assert dtype.fields is not None
    coded = [(place[1], place[0].itemsize) for place in dtype.fields.values()]
    assert documented == coded


def test_numbers_of_capabilities_and_data_ops() -> None:
    for capability in Capability:
        assert f"| {capability.value} | {capability.name}: " in TEXT
    for op in DataOp:
        assert f"{op.value} {op.name}" in TEXT
