"""The manifest: a small shard whose commit makes one chunk of one KV-cache group visible.

Owns its bytes. It says which cells the chunk has and how long each is, so that a reader can
allocate before it asks. Pure: what is read may come from anybody and is checked on every field.

    0  u16  version, 1            2  u16  zero                4  u32  tokens in the chunk
    8  u64  position: tokens before the chunk                16  16 bytes  layout fingerprint
    32 u32  number of runs       36  runs: (u32 cells, u32 length of each in bytes) ...
little endian; cells count up from the KV-cache group's first one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore import limits
from ctxstore.errors import ManifestError

if TYPE_CHECKING:
    import numpy.typing as npt

VERSION: Final = 1
FINGERPRINT_BYTES: Final = 16
TOKENS_MAX: Final = 2**32 - 1
_HEAD: Final = struct.Struct("<HHIQ16sI")
_RUN: Final = np.dtype([("cells", "<u4"), ("length", "<u4")])


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a chunk consists of. `lengths` runs over the group's cells in order, run-length coded.

    `runs` are (number of cells, bytes of each). Raises `ValueError` for what cannot be encoded.
    """

    fingerprint: bytes
    tokens: int
    position: int
    runs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if len(self.fingerprint) != FINGERPRINT_BYTES:
            raise ValueError(f"a fingerprint has 16 bytes, this one has {len(self.fingerprint)}")
        if not 1 <= self.tokens <= TOKENS_MAX:
            raise ValueError(f"a chunk has 1 .. 2^32-1 tokens, not {self.tokens}")
        if not 0 <= self.position < 2**63:
            raise ValueError(f"a chunk's position is 0 .. 2^63-1, not {self.position}")
        if not self.runs or min(cells for cells, _ in self.runs) < 1:
            raise ValueError("a manifest lists at least one cell, and no empty run")
        if self.cells > limits.MANIFEST_CELL_BASE:
            raise ValueError(f"{self.cells} cells, at most {limits.MANIFEST_CELL_BASE}")
        for _, length in self.runs:
            if not 1 <= length <= limits.SHARD_BYTES_MAX:
                raise ValueError(f"a cell has 1 .. {limits.SHARD_BYTES_MAX} bytes, not {length}")

    @classmethod
    def of_lengths(
        cls, lengths: npt.ArrayLike, *, fingerprint: bytes, tokens: int, position: int
    ) -> Manifest:
        """Manifest of a chunk whose cells have these lengths, in cell order."""
        row = np.asarray(lengths, np.int64)
        if row.ndim != 1 or not len(row):
            raise ValueError("a manifest needs one row of cell lengths, at least one")
        starts = np.flatnonzero(np.concatenate(([True], row[1:] != row[:-1])))
        counts = np.diff(np.concatenate((starts, [len(row)])))
        runs = tuple(zip(counts.tolist(), row[starts].tolist(), strict=True))
        return cls(fingerprint=fingerprint, tokens=tokens, position=position, runs=runs)

    @property
    def cells(self) -> int:
        """Number of cells."""
        return sum(cells for cells, _ in self.runs)

    def lengths(self) -> npt.NDArray[np.uint32]:
        """(cells,) uint32: bytes of each cell, in cell order."""
        table = np.array(self.runs, np.uint32)
        return np.repeat(table[:, 1], table[:, 0])


def encode_manifest(manifest: Manifest) -> bytes:
    """The shard's bytes: 36 and 8 a run, so up to 123 runs stay inline (1 KiB)."""
    head = _HEAD.pack(
        VERSION,
        0,
        manifest.tokens,
        manifest.position,
        manifest.fingerprint,
        len(manifest.runs),
    )
    return head + np.array(list(manifest.runs), _RUN).tobytes()


def decode_manifest(payload: bytes | bytearray | memoryview) -> Manifest:
    """Read a manifest. Raises `ManifestError` for a damaged, newer or oversized one.

    The claimed number of runs is checked against the payload before anything is allocated.
    """
    content = memoryview(payload).cast("B")
    if len(content) < _HEAD.size:
        raise ManifestError(f"a manifest has at least {_HEAD.size} bytes, this has {len(content)}")
    version, zero, tokens, position, fingerprint, count = _HEAD.unpack_from(content)
    if version != VERSION:
        raise ManifestError(f"manifest of version {version}, this release reads {VERSION}")
    if zero or len(content) != _HEAD.size + count * _RUN.itemsize:
        raise ManifestError(f"a manifest of {count} runs does not have {len(content)} bytes")
    rows = np.frombuffer(content, _RUN, offset=_HEAD.size)
    runs = tuple(zip(rows["cells"].tolist(), rows["length"].tolist(), strict=True))
    try:
        return Manifest(fingerprint=fingerprint, tokens=tokens, position=position, runs=runs)
    except ValueError as error:
        raise ManifestError(str(error)) from error
