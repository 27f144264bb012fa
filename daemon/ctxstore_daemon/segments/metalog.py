"""The meta log: what must survive beside the shards, in one append-only file and its mirror.

Owns the two files, their order of writes, syncs and renames, and the bounded size. It must not know
what records mean beyond the rules of compaction in `metaformat`.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from ctxstore.errors import DeviceError, OutOfSpace, StorageError
from ctxstore_daemon.engine.records import META_DTYPE, RecordArray
from ctxstore_daemon.segments.metaformat import (
    FRAME_BYTES,
    Horizon,
    MetaHeader,
    compact,
    pack_frames,
    pack_meta_header,
)
from ctxstore_daemon.segments.metareader import (
    MetaFound,
    file_names,
    older_files,
    read_meta_log,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ctxstore.seams import Disk, DiskFile
    from ctxstore_daemon.segments.identity import Identity

_LOG: Final = logging.getLogger(__name__)

_PACK_RECORDS: Final = 2048
"""Frames packed before the loop gets a turn: about half a millisecond."""

_REWRITE_CELLS_MIN: Final = 8192
"""Below this many records a log is not worth rewriting."""

_VITAL_SHARE: Final = 16
"""One part in this many is kept for generations and retirements, which free space again."""

_REWRITE_AGAIN_NS: Final = 60_000_000_000
"""A full log in which nothing was superseded is looked at again after this time."""


@dataclass(slots=True)
class _LogState:
    """Changed only by MetaLog, under its lock (`accepted`, `pending`: between awaits)."""

    number: int = 0
    files: list[DiskFile] = field(default_factory=list)
    cells: int = 0  # in the current file
    cells_synced: int = 0
    checkpoint_cells: int = 0
    accepted: list[RecordArray] = field(default_factory=list)  # every record that still counts
    accepted_count: int = 0
    reserved: int = 0  # records that have room kept for them
    pending: list[RecordArray] = field(default_factory=list)  # accepted and in no file yet
    taken: int = 0  # running totals of records: accepted, written, synced
    written: int = 0
    synced: int = 0
    rewrite_due: bool = False
    rewritten_wall_ns: int = 0
    closed: bool = False


class MetaLog:
    """Order: `open`, `start` once, then `append` from any number of tasks, `close`.

    A cancelled `append` may or may not have stored its records.
    """

    def __init__(self, disk: Disk, identity: Identity, file_bytes_max: int) -> None:
        self._disk = disk
        self._identity = identity
        self._cells_max = file_bytes_max // FRAME_BYTES - 1
        self._horizon: Callable[[], Horizon] = lambda: Horizon(0, 0)
        self._lock = asyncio.Lock()
        self._state = _LogState()

    @classmethod
    async def open(
        cls, disk: Disk, *, identity: Identity, file_bytes_max: int
    ) -> tuple[MetaLog, MetaFound]:
        """Read the newest log. Files are left as they are; `start` makes it writable."""
        log = cls(disk, identity, file_bytes_max)
        found = await read_meta_log(disk, identity)
        state = log._state
        state.number = found.number
        state.accepted = [found.records]
        state.accepted_count = state.cells = state.checkpoint_cells = len(found.records)
        state.cells_synced = found.synced
        state.rewrite_due = not found.clean
        return log, found

    @property
    def file_bytes(self) -> int:
        """Bytes in the current log file; its mirror has as many."""
        return (1 + self._state.cells) * FRAME_BYTES

    async def start(self, horizon: Callable[[], Horizon], *, extra: RecordArray) -> None:
        """Make the log writable: a clean one is continued, any other is rewritten and replaced.

        `extra` records become durable together with the first write: there is no moment between.
        """
        self._horizon = horizon
        state = self._state
        if len(extra):
            state.accepted.append(extra)
            state.accepted_count += len(extra)
            state.rewrite_due = True
        async with self._lock:
            if state.rewrite_due:
                await self._repair()
                return
            names = file_names(state.number)
            state.files = [await self._disk.open(name, direct=False) for name in names]
            # What was read may not be durable yet, and from here on it is acted upon.
            await self._sync()

    async def reserve(self, count: int) -> None:
        """Keep room for `count` records until an `append` gives it back.

        Raises OutOfSpace or DeviceError; then nothing is kept.
        """
        await self._make_room(count, vital=False)
        self._state.reserved += count

    async def append(
        self, records: RecordArray, *, sync: bool, vital: bool = False, reserved: int = 0
    ) -> None:
        """Store META_DTYPE records; with `sync` return when they are durable.

        Concurrent calls share syncs. Raises OutOfSpace when the log's budget is used up (nothing
        was stored) or DeviceError (they may be stored later). `vital` ones may use the last of it.
        `reserved` is the room kept for these records; it is given back unless OutOfSpace is raised.
        """
        state = self._state
        try:
            await self._make_room(len(records) - reserved, vital=vital)
        except DeviceError:
            state.reserved -= reserved
            raise
        state.reserved -= reserved
        if not len(records):
            return
        kept = np.array(records, META_DTYPE)
        state.accepted.append(kept)
        state.accepted_count += len(kept)
        state.pending.append(kept)
        state.taken += len(kept)
        mine = state.taken
        async with self._lock:
            if state.written < mine:
                await self._write_pending()
            if sync and state.synced < mine:
                await self._sync()

    async def close(self) -> None:
        """Sync and close. Idempotent."""
        state = self._state
        async with self._lock:
            if state.closed:
                return
            state.closed = True
            try:
                if state.pending:
                    await self._write_pending()
                if state.files and state.synced < state.written:
                    await self._sync()
            finally:
                await self._close_files()

    # -------------------------------------------------------------------------- writing

    async def _make_room(self, count: int, *, vital: bool) -> None:
        """Have room for `count` records beside what is accepted and what is reserved."""
        state = self._state
        if state.closed:
            raise DeviceError("the meta log is closed")
        if count <= 0:
            return
        limit = self._cells_max if vital else self._cells_max - self._cells_max // _VITAL_SHARE
        if state.accepted_count + state.reserved + count > limit and self._rewrite_may_help():
            async with self._lock:
                await self._repair()
        if state.accepted_count + state.reserved + count > limit:
            raise OutOfSpace(
                f"the meta log holds {state.accepted_count} of {limit} records; "
                "a larger disk cap makes it larger"
            )

    async def _write_pending(self) -> None:
        state = self._state
        count = sum(len(records) for records in state.pending)
        grown = max(_REWRITE_CELLS_MIN, 2 * state.checkpoint_cells)
        if state.rewrite_due or state.cells + count > min(grown, self._cells_max):
            await self._repair()
            return
        records = _joined(state.pending)
        state.pending = []
        # Until the write is known to be whole (it may be cancelled), only new files are safe.
        state.rewrite_due = True
        data = await self._pack(records, first_index=state.cells, synced=state.cells_synced)
        offset = (1 + state.cells) * FRAME_BYTES
        if not await self._on_each(lambda file: _write_all(file, data, offset)):
            await self._repair()
            return
        state.rewrite_due = False
        state.cells += count
        state.written += count

    async def _sync(self) -> None:
        state = self._state
        cells, written = state.cells, state.written
        if not await self._on_each(lambda file: file.fdatasync()):
            state.rewrite_due = True
            await self._repair()
            return
        state.cells_synced = max(state.cells_synced, cells)
        state.synced = max(state.synced, written)

    async def _on_each(self, work: Callable[[DiskFile], Awaitable[None]]) -> bool:
        """Run on log and mirror at once; False if one failed, which then is never used again."""
        state = self._state
        files = list(state.files)
        errors = await asyncio.gather(*(_attempt(work, file) for file in files))
        for file, error in zip(files, errors, strict=True):
            if error is not None:
                _LOG.error("meta_log_fault file=%s reason=%s", file.name, error)
                state.files.remove(file)
                await _close_quietly(file)
        return not any(errors)

    def _rewrite_may_help(self) -> bool:
        state = self._state
        elapsed = abs(self._horizon().wall_ns - state.rewritten_wall_ns)
        return state.accepted_count > state.checkpoint_cells or elapsed > _REWRITE_AGAIN_NS

    async def _repair(self) -> None:
        """Everything goes into new files: after a fault, or when the old ones have grown."""
        try:
            await self._rewrite()
        except StorageError as error:
            raise DeviceError(f"the meta log cannot be written: {error}") from error

    async def _rewrite(self) -> None:
        """Write what still counts into the next pair of files, durable before the old one goes."""
        state = self._state
        taken = state.taken
        everything = _joined(state.accepted)
        in_accepted = len(state.accepted)
        horizon = self._horizon()
        kept = compact(everything, horizon)
        number = state.number + 1
        header = MetaHeader(number, self._identity.node_id, len(kept))
        data = pack_meta_header(header, self._identity.secret) + await self._pack(
            kept, first_index=0, synced=len(kept), number=number
        )
        state.rewrite_due = True
        names = file_names(number)
        for name in names:
            await self._disk.remove(name + ".tmp")
            file = await self._disk.open(name + ".tmp", create=True, direct=False)
            try:
                await _write_all(file, data, 0)
                await file.fdatasync()
            finally:
                await file.close()
        for name in names:
            await self._disk.rename(name + ".tmp", name)
        await self._disk.sync_dir()
        await self._close_files()
        state.number = number
        state.files = [await self._disk.open(name, direct=False) for name in names]
        # Records accepted while this ran stay pending.
        state.accepted = [kept, *state.accepted[in_accepted:]]
        state.accepted_count = sum(len(part) for part in state.accepted)
        state.pending = state.accepted[1:]
        state.cells = state.cells_synced = state.checkpoint_cells = len(kept)
        state.written = state.synced = taken
        state.rewrite_due = False
        state.rewritten_wall_ns = horizon.wall_ns
        await self._remove_older(number)

    async def _remove_older(self, number: int) -> None:
        for name in older_files(await self._disk.listdir(), number):
            await self._disk.remove(name)

    async def _pack(
        self, records: RecordArray, *, first_index: int, synced: int, number: int | None = None
    ) -> bytes:
        parts: list[bytes] = []
        for start in range(0, len(records), _PACK_RECORDS):
            parts.append(
                pack_frames(
                    records[start : start + _PACK_RECORDS],
                    first_index=first_index + start,
                    synced=synced,
                    number=self._state.number if number is None else number,
                    secret=self._identity.secret,
                )
            )
            await asyncio.sleep(0)
        return b"".join(parts)

    async def _close_files(self) -> None:
        files, self._state.files = self._state.files, []
        for file in files:
            await _close_quietly(file)


def _joined(parts: list[RecordArray]) -> RecordArray:
    return np.concatenate(parts) if parts else np.zeros(0, META_DTYPE)


async def _write_all(file: DiskFile, data: bytes, offset: int) -> None:
    await file.pwritev([memoryview(data)], offset)


async def _attempt(
    work: Callable[[DiskFile], Awaitable[None]], file: DiskFile
) -> StorageError | None:
    try:
        await work(file)
    except StorageError as error:
        return error
    return None


async def _close_quietly(file: DiskFile) -> None:
    try:
        await file.close()
    except StorageError as error:
        _LOG.warning("meta_log_close file=%s reason=%s", file.name, error)
