"""The footer of a sealed segment: its records as one Arrow IPC table.

Owns the table's schema and its validation. An accelerator only: whatever is wrong with a footer,
recovery walks the group headers instead. Bytes come from `pread`; a footer is never mapped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa

from ctxstore.limits import INLINE_BYTES_MAX, KIB, PAGE_BYTES
from ctxstore_daemon.engine.records import RECORD_DTYPE, U64, RecordArray, RecordBatch
from ctxstore_daemon.segments.buffers import aligned_zeros, round_up
from ctxstore_daemon.segments.format import (
    FIRST_GROUP_OFFSET,
    Fault,
    FooterTrailer,
    Invalid,
    check_records,
    inline_mask,
)

if TYPE_CHECKING:
    import numpy.typing as npt

_NUMBERS: Final = (
    ("ns_id", pa.uint64()),
    ("incarnation", pa.uint64()),
    ("birth", pa.uint64()),
    ("checksum", pa.uint64()),
    ("written_at_ns", pa.int64()),
    ("ttl_ms", pa.uint64()),
    ("length", pa.uint32()),
    ("page", pa.uint32()),
    ("depth", pa.uint32()),
    ("cost_s", pa.float32()),
    ("priority", pa.int16()),
    ("flags", pa.uint16()),
)
SCHEMA: Final = pa.schema(
    [
        pa.field("key", pa.binary(16), nullable=False),
        *(pa.field(name, kind, nullable=False) for name, kind in _NUMBERS),
        pa.field("group_seq", pa.uint64(), nullable=False),
        pa.field("inline", pa.large_binary(), nullable=False),
    ]
)

_OVERHEAD_BYTES: Final = 16 * KIB
"""Arrow's magic, schema, block table, and 64-byte padding of each buffer."""
_RECORD_BYTES: Final = RECORD_DTYPE.itemsize + 8 + 8


def footer_bytes_max(count: int, inline_bytes: int) -> int:
    """Whole pages that a footer of `count` records may need, its trailer not counted."""
    return round_up(_OVERHEAD_BYTES + count * _RECORD_BYTES + inline_bytes)


def encode_footer(batch: RecordBatch, group_seq: U64) -> npt.NDArray[np.uint8]:
    """The table as whole pages, zeros after the end, aligned for O_DIRECT."""
    records = batch.records
    count = len(records)
    lengths = np.where(inline_mask(records), records["length"], 0)
    ends = np.zeros(count + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    columns = [_column(pa.binary(16), count, records["key"])]
    columns += [_column(kind, count, records[name]) for name, kind in _NUMBERS]
    columns.append(_column(pa.uint64(), count, group_seq))
    columns.append(
        pa.Array.from_buffers(
            pa.large_binary(), count, [None, pa.py_buffer(ends), pa.py_buffer(batch.inline)]
        )
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
    table = np.frombuffer(sink.getvalue(), np.uint8)
    pages = aligned_zeros(round_up(len(table) + 8))
    pages[: len(table)] = table
    # Arrow finds its own end from the end of the file, which the padding hides.
    pages[-8:] = np.array([len(table)], "<u8").view(np.uint8)
    return pages


def _column(kind: pa.DataType, count: int, values: npt.NDArray[np.generic]) -> pa.Array:
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(kind, count, [None, buffer])


def decode_footer(
    pages: npt.NDArray[np.uint8], trailer: FooterTrailer
) -> tuple[RecordBatch, U64] | Invalid:
    """Records and group sequences of a footer whose checksum has been found right.

    The checksum says that these bytes were written; the rest is checked so that a fault of an older
    writer cannot become a wrong read.
    """
    used = int(pages[-8:].view("<u8")[0])
    if used > len(pages) - 8:
        return Invalid(Fault.BOUNDS, f"table of {used} bytes")
    try:
        with pa.ipc.open_file(pa.py_buffer(pages[:used])) as reader:
            if not reader.schema.equals(SCHEMA) or reader.num_record_batches != 1:
                return Invalid(Fault.SCHEMA)
            table = reader.get_batch(0)
            table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        return Invalid(Fault.SCHEMA, str(error)[:100])
    if table.num_rows != trailer.count or any(column.null_count for column in table.columns):
        return Invalid(Fault.BOUNDS, f"{table.num_rows} records")
    return _from_table(table, trailer)


def _from_table(table: pa.RecordBatch, trailer: FooterTrailer) -> tuple[RecordBatch, U64] | Invalid:
    count = table.num_rows
    records: RecordArray = np.zeros(count, RECORD_DTYPE)
    keys = table.column("key")
    if count:
        raw = np.frombuffer(keys.buffers()[1], np.uint8, count * 16, keys.offset * 16)
        records["key"] = raw.reshape(count, 16)
    for name, _ in _NUMBERS:
        records[name] = table.column(name).to_numpy(zero_copy_only=True)
    group_seq = np.array(table.column("group_seq").to_numpy(zero_copy_only=True), np.uint64)
    inline, lengths = _inline_of(table.column("inline"), count)
    expected = np.where(inline_mask(records), records["length"], 0)
    if not np.array_equal(expected, lengths):
        return Invalid(Fault.BOUNDS, "inline lengths")
    wrong = check_records(
        records,
        len(inline),
        first_page=FIRST_GROUP_OFFSET // PAGE_BYTES,
        end_page=trailer.footer_offset // PAGE_BYTES,
    )
    if wrong is not None:
        return wrong
    if count and not (
        trailer.first_seq <= group_seq[0]
        and group_seq[-1] <= trailer.last_seq
        and (group_seq[1:] >= group_seq[:-1]).all()
    ):
        return Invalid(Fault.ORDER)
    return RecordBatch(records, inline), group_seq


def _inline_of(column: pa.Array, count: int) -> tuple[bytes, npt.NDArray[np.int64]]:
    _, offsets_buffer, data = column.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64, count + 1, column.offset * 8)
    lengths = np.diff(offsets)
    if count == 0 or offsets[-1] == offsets[0] or lengths.max() > INLINE_BYTES_MAX:
        return b"", lengths
    return bytes(memoryview(data)[int(offsets[0]) : int(offsets[-1])]), lengths
