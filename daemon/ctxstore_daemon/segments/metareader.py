"""Reading the meta log back: log and mirror, one record from either.

Owns what may be missing without a loss and what may not. It must not write.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore.errors import DeviceError, StorageError
from ctxstore.limits import MIB
from ctxstore_daemon.engine.records import META_DTYPE, RecordArray
from ctxstore_daemon.segments.metaformat import (
    FRAME_BYTES,
    MetaFrames,
    MetaHeader,
    merge_frames,
    parse_frames,
    parse_meta_header,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from ctxstore.seams import Disk
    from ctxstore_daemon.segments.identity import Identity

_NAME: Final = re.compile(r"meta-(\d{6})(-mirror)?\.log(\.tmp)?")
_READ_BYTES: Final = 8 * MIB

FileNotes = tuple[tuple[str, str], ...]
"""(file name, what is odd about it)."""


@dataclass(frozen=True, slots=True)
class MetaFound:
    """What the files say. `lost` counts synced records that are in neither copy.

    `damaged` is what was synced and is wrong, `torn` what a crash may leave. `number` is the newest
    log's; `clean` says that it can be continued as it is.
    """

    records: RecordArray
    lost: int
    damaged: FileNotes
    torn: FileNotes
    existed: bool
    number: int
    synced: int
    clean: bool


def file_names(number: int) -> tuple[str, str]:
    """Names of a log and its mirror."""
    return f"meta-{number:06d}.log", f"meta-{number:06d}-mirror.log"


def older_files(names: list[str], number: int) -> list[str]:
    """Of the directory's files, those that log `number` has made useless."""
    matches = [(name, _NAME.fullmatch(name)) for name in names]
    return [name for name, m in matches if m and (int(m[1]) < number or m[3])]


@dataclass(slots=True)
class _PairState:
    """Both copies of one log while they are read."""

    names: list[str]
    parts: list[MetaFrames] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    torn: list[tuple[str, str]] = field(default_factory=list)
    failed: str = ""
    checkpoint: int = 0


async def read_meta_log(disk: Disk, identity: Identity) -> MetaFound:
    """The newest log of the directory.

    Raises DeviceError when no copy of it can be read: trying again may help, starting without would
    bring removed shards back.
    """
    names = await disk.listdir()
    numbers = {int(m[1]) for name in names if (m := _NAME.fullmatch(name)) and not m[3]}
    stray = bool(older_files(names, min(numbers, default=0)))
    damaged: list[tuple[str, str]] = []
    for number in sorted(numbers, reverse=True):
        present = [name for name in file_names(number) if name in names]
        pair = await _read_pair(disk, identity, number, present)
        if pair.parts:
            merged = merge_frames(pair.parts)
            merged = replace(merged, synced=max(merged.synced, pair.checkpoint))
            _judge(pair, merged.synced)
            odd = pair.damaged or pair.torn or stray or damaged or len(numbers) > 1
            return MetaFound(
                merged.records,
                merged.missing + len(damaged),
                (*damaged, *pair.damaged),
                tuple(pair.torn),
                existed=True,
                number=max(numbers),
                synced=merged.synced,
                clean=not odd,
            )
        if pair.failed:
            raise DeviceError(f"the meta log cannot be read: {pair.failed}")
        damaged += pair.damaged
    return MetaFound(
        np.zeros(0, META_DTYPE),
        len(damaged),
        tuple(damaged),
        (),
        existed=bool(numbers),
        number=max(numbers, default=0),
        synced=0,
        clean=False,
    )


async def _read_pair(disk: Disk, identity: Identity, number: int, present: list[str]) -> _PairState:
    pair = _PairState([])
    secret = identity.secret
    for name in file_names(number):
        if name not in present:
            pair.torn.append((name, "is missing, its twin stands in"))
            continue
        try:
            data = await _read_file(disk, name)
        except StorageError as error:
            pair.failed = str(error)
            pair.damaged.append((name, str(error)))
            continue
        header = parse_meta_header(data[:FRAME_BYTES].tobytes(), number=number, secret=secret)
        frames = parse_frames(data[FRAME_BYTES:], number=number, secret=secret)
        if isinstance(header, MetaHeader):
            pair.checkpoint = max(pair.checkpoint, header.checkpoint)
        else:
            pair.damaged.append((name, f"header: {header}"))
            if not len(frames.records):
                continue
        if len(data) % FRAME_BYTES:
            pair.torn.append((name, "ends in the middle of a record"))
        pair.names.append(name)
        pair.parts.append(frames)
    return pair


def _judge(pair: _PairState, synced: int) -> None:
    """Tell damage from a torn tail: only what was synced must be there."""
    for name, part in zip(pair.names, pair.parts, strict=True):
        there = int((part.indexes < synced).sum())
        if there < synced:
            pair.damaged.append((name, f"{synced - there} of {synced} synced records are damaged"))
        beyond = part.bad_cells - (synced - there)
        if beyond > 0:
            pair.torn.append((name, f"{beyond} records after the last sync are torn"))
    if len(pair.parts) == 2 and not np.array_equal(pair.parts[0].indexes, pair.parts[1].indexes):
        pair.torn.append((pair.names[1], "has other records than its twin"))


async def _read_file(disk: Disk, name: str) -> npt.NDArray[np.uint8]:
    """All bytes of a file."""
    file = await disk.open(name, direct=False)
    try:
        size = await file.size()
        data = np.zeros(size, np.uint8)
        done = 0
        while done < size:
            part = data[done : done + _READ_BYTES]
            count = await file.preadv([part], done)
            done += count
            if count < len(part):
                break
        return data[:done]
    finally:
        await file.close()
