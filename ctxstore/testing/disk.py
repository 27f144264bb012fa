"""A disk in memory that behaves as badly as disks may.

Owns files with two contents: what readers see, and what would survive a loss of power. Between them
stand writes that are not synced, lost or kept sector by sector at `crash`. Faults are drawn from a
`FaultPlan`; the same seeds and the same calls give the same disk.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from ctxstore.errors import DeviceError, OutOfSpace
from ctxstore.limits import PAGE_BYTES
from ctxstore.testing.faults import FaultPlan, Op, PowerLoss

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from ctxstore.seams import ByteBuffer


class CrashKind(Enum):
    """What `crash` models."""

    POWER = "unsynced sectors survive or not, each by chance"
    KILL = "the process dies: every completed write stays in the page cache"


@dataclass(frozen=True, slots=True)
class DiskProfile:
    """How a healthy disk behaves. `sector_bytes` is what it writes as one, 512 or 4096."""

    delay_s_min: float = 0.0
    delay_s_max: float = 0.0
    sector_bytes: int = 512
    direct: bool = True
    capacity_bytes: int | None = None


@dataclass(slots=True)
class _Pending:
    """A write that no sync has made durable yet."""

    offset: int
    data: npt.NDArray[np.uint8]


@dataclass(slots=True)
class _Inode:
    """One file, whatever its name. Reads return `seen`, a loss of power leaves `durable`."""

    seen: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    durable: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    pending: list[_Pending] = field(default_factory=list)
    running: dict[int, _Pending] = field(default_factory=dict)
    links: int = 1


@dataclass(slots=True)
class _DiskState:
    """Names, now and as of the last directory sync. Changed only in this file."""

    names: dict[str, _Inode] = field(default_factory=dict)
    durable_names: dict[str, _Inode] = field(default_factory=dict)
    steps: list[dict[str, _Inode]] = field(default_factory=list)  # after each unsynced change
    writes: int = 0
    dead: bool = False


class SimDisk:
    """`Disk` in memory. Single-threaded; may be used on a SimLoop or any other loop."""

    def __init__(
        self,
        seed: int = 0,
        *,
        profile: DiskProfile | None = None,
        faults: FaultPlan | None = None,
    ) -> None:
        self.profile = profile or DiskProfile()
        self.faults = faults or FaultPlan()
        self.rng = random.Random(seed)
        self._state = _DiskState()

    # -------------------------------------------------------------------------- Disk

    async def open(self, name: str, *, create: bool = False, direct: bool = True) -> SimFile:
        """See `Disk.open`."""
        await self.begin_call(Op.OPEN, name)
        inode = self._state.names.get(name)
        if inode is None:
            if not create:
                raise DeviceError(f"{name}: No such file or directory")
            inode = self._state.names[name] = _Inode()
            self._name_step()
        return SimFile(self, name, inode, direct=direct and self.profile.direct)

    async def allocate(self, name: str, size: int) -> None:
        """See `Disk.allocate`."""
        await self.begin_call(Op.ALLOCATE, name)
        inode = self._state.names.get(name)
        grown = size - (0 if inode is None else len(inode.seen))
        self.check_room(name, grown)
        if inode is None:
            inode = self._state.names[name] = _Inode()
            self._name_step()
        if grown > 0:
            inode.seen = _resized(inode.seen, size)

    async def listdir(self) -> list[str]:
        """Names in the directory, sorted."""
        await self.begin_call(Op.LIST, ".")
        return sorted(self._state.names)

    async def remove(self, name: str) -> None:
        """Delete a file; missing is fine."""
        await self.begin_call(Op.REMOVE, name)
        self.delete(name)

    async def rename(self, old: str, new: str) -> None:
        """See `Disk.rename`."""
        await self.begin_call(Op.RENAME, old)
        names = self._state.names
        if old not in names:
            raise DeviceError(f"{old}: No such file or directory")
        if new in names:
            names[new].links -= 1
        names[new] = names.pop(old)
        self._name_step()

    async def sync_dir(self) -> None:
        """Make creations, removals and renames durable."""
        await self.begin_call(Op.SYNC_DIR, ".")
        self._state.durable_names = dict(self._state.names)
        self._state.steps.clear()

    async def used_bytes(self) -> int:
        """Allocated bytes of all files in the directory."""
        await self.begin_call(Op.LIST, ".")
        return self.total_bytes()

    # -------------------------------------------------------------------------- for tests

    def crash(self, kind: CrashKind = CrashKind.POWER) -> SimDisk:
        """The disk as the next start finds it. This one is dead: its calls raise PowerLoss."""
        self._state.dead = True
        after = SimDisk(self.rng.getrandbits(63), profile=self.profile)
        if kind is CrashKind.KILL:
            survivors = self._state.names
        else:
            # A journal keeps the order of changes to names: some first part of them survives.
            steps = [self._state.durable_names, *self._state.steps]
            survivors = steps[self.rng.randrange(len(steps))]
        chance = self.rng.choice((0.0, 0.5, 1.0, self.rng.random()))
        images: dict[int, _Inode] = {}
        for names in (survivors, self._state.durable_names):
            for name in sorted(names):
                inode = names[name]
                if id(inode) not in images:
                    images[id(inode)] = self._image(inode, kind, chance)
        after._state.names = {name: images[id(inode)] for name, inode in survivors.items()}
        if kind is CrashKind.POWER:
            after._state.durable_names = dict(after._state.names)
        else:
            after._state.durable_names = {
                name: images[id(inode)] for name, inode in self._state.durable_names.items()
            }
            after._state.steps = [dict(after._state.names)]
        return after

    def power_off(self) -> None:
        """Every call from now on raises PowerLoss, the running ones when they would end."""
        self._state.dead = True

    def flip_bit(self, name: str, offset: int, *, bit: int = 0) -> None:
        """Damage a byte where it lies, for good."""
        inode = self._state.names[name]
        inode.seen[offset] ^= 1 << bit
        if offset < len(inode.durable):
            inode.durable[offset] = inode.seen[offset]

    def cut(self, name: str, size: int) -> None:
        """Truncate a file behind everybody's back."""
        inode = self._state.names[name]
        inode.seen = inode.seen[:size].copy()
        inode.durable = inode.durable[:size].copy()

    def delete(self, name: str) -> None:
        """Delete a file behind everybody's back; it lives on for those who have it open."""
        inode = self._state.names.pop(name, None)
        if inode is not None:
            inode.links -= 1
            self._name_step()

    def read_bytes(self, name: str) -> bytes:
        """What readers of the file see."""
        return self._state.names[name].seen.tobytes()

    def put_bytes(self, name: str, data: bytes) -> None:
        """Replace (or make) a file, durable at once: an old image put back, say."""
        content = np.frombuffer(data, np.uint8)
        inode = _Inode(content.copy(), content.copy())
        self._state.names[name] = inode
        self._state.durable_names[name] = inode

    def file_names(self) -> list[str]:
        """Names in the directory, sorted."""
        return sorted(self._state.names)

    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(len(inode.seen) for inode in self._state.names.values())

    # -------------------------------------------------------------------------- inside

    @property
    def dead(self) -> bool:
        """Whether the power is gone."""
        return self._state.dead

    def next_write(self) -> int:
        """A number for a write that begins."""
        self._state.writes += 1
        return self._state.writes

    async def begin_call(self, op: Op, name: str) -> None:
        """Delay, then fail as planned."""
        self._check_alive()
        slow = self.faults.extra_delay_s(op, name)
        spread = self.rng.uniform(self.profile.delay_s_min, self.profile.delay_s_max)
        await asyncio.sleep(spread + slow)
        self._check_alive()
        error = self.faults.draw(op, name)
        if isinstance(error, PowerLoss):
            self._state.dead = True
        if error is not None:
            raise error

    def _check_alive(self) -> None:
        if self._state.dead:
            raise PowerLoss("this disk has lost its power")

    def _name_step(self) -> None:
        self._state.steps.append(dict(self._state.names))

    def check_room(self, name: str, grown: int) -> None:
        capacity = self.profile.capacity_bytes
        if capacity is not None and grown > 0 and self.total_bytes() + grown > capacity:
            raise OutOfSpace(f"{name}: No space left on device")

    def _image(self, inode: _Inode, kind: CrashKind, chance: float) -> _Inode:
        running = list(inode.running.values())
        if kind is CrashKind.KILL:
            image = _Inode(inode.seen.copy(), inode.durable.copy(), list(inode.pending))
            for write in running:
                if self.rng.random() < 0.5:
                    _apply(image, write)
            return image
        size = self.rng.choice((len(inode.durable), len(inode.seen)))
        content = _resized(inode.durable.copy(), size)
        for write in [*inode.pending, *running]:
            self._survive(content, write, chance)
        return _Inode(content.copy(), content)

    def _survive(self, content: npt.NDArray[np.uint8], write: _Pending, chance: float) -> None:
        """Copy those sectors of an unsynced write that reached the medium."""
        sector = self.profile.sector_bytes
        position = write.offset
        end = min(write.offset + len(write.data), len(content))
        while position < end:
            after = min(end, (position // sector + 1) * sector)
            if self.rng.random() < chance:
                begin = position - write.offset
                content[position:after] = write.data[begin : begin + after - position]
            position = after


class SimFile:
    """`DiskFile` of a SimDisk."""

    def __init__(self, disk: SimDisk, name: str, inode: _Inode, *, direct: bool) -> None:
        self._disk = disk
        self._name = name
        self._inode = inode
        self._direct = direct
        self._closed = False

    @property
    def name(self) -> str:
        """File name inside the data directory."""
        return self._name

    @property
    def direct(self) -> bool:
        """Whether O_DIRECT was obtained."""
        return self._direct

    async def preadv(self, buffers: Sequence[ByteBuffer], offset: int) -> int:
        """See `DiskFile.preadv`."""
        self._check(buffers, offset)
        await self._disk.begin_call(Op.READ, self._name)
        total = 0
        for buffer in buffers:
            part = self._inode.seen[offset + total : offset + total + len(buffer)]
            np.frombuffer(buffer, np.uint8)[: len(part)] = part
            total += len(part)
            if len(part) < len(buffer):
                break
        return total

    async def pwritev(self, buffers: Sequence[ByteBuffer], offset: int) -> int:
        """See `DiskFile.pwritev`."""
        self._check(buffers, offset)
        data = np.concatenate([np.frombuffer(buffer, np.uint8) for buffer in buffers])
        offset = self._disk.faults.landing(self._name, offset, len(data))
        write, number = _Pending(offset, data), self._disk.next_write()
        self._inode.running[number] = write
        try:
            await self._disk.begin_call(Op.WRITE, self._name)
            grown = offset + len(data) - len(self._inode.seen)
            self._disk.check_room(self._name, grown)
        except asyncio.CancelledError:
            # The device was not asked to stop: the write happens all the same.
            if not self._disk.dead:
                _apply(self._inode, self._inode.running.pop(number))
            raise
        except PowerLoss:
            raise  # a part of it may have arrived: it stays among the running ones
        except (DeviceError, OutOfSpace):
            del self._inode.running[number]
            self._tear(write)
            raise
        _apply(self._inode, self._inode.running.pop(number))
        return len(data)

    async def fdatasync(self) -> None:
        """See `DiskFile.fdatasync`. After a failure the unsynced writes never become durable."""
        self._check([], 0)
        covered = list(self._inode.pending)
        try:
            await self._disk.begin_call(Op.SYNC, self._name)
        except DeviceError:
            # Like Linux: the pages count as clean now, a second sync would succeed and lie.
            self._inode.pending.clear()
            raise
        if self._inode.links <= 0:
            raise DeviceError(f"{self._name}: the file was deleted")
        inode = self._inode
        inode.durable = _resized(inode.durable, len(inode.seen))
        for write in covered:
            end = min(write.offset + len(write.data), len(inode.durable))
            inode.durable[write.offset : end] = write.data[: max(0, end - write.offset)]
        inode.pending = inode.pending[len(covered) :]

    async def size(self) -> int:
        """Bytes in the file."""
        await self._disk.begin_call(Op.SIZE, self._name)
        return len(self._inode.seen)

    async def truncate(self, size: int) -> None:
        """Cut the file to `size` bytes."""
        await self._disk.begin_call(Op.WRITE, self._name)
        self._inode.seen = _resized(self._inode.seen, size)

    async def close(self) -> None:
        """Idempotent; works on a dead disk too."""
        self._closed = True

    def _check(self, buffers: Sequence[ByteBuffer], offset: int) -> None:
        if self._closed:
            raise DeviceError(f"{self._name} is closed")
        if self._direct:
            lengths = [len(buffer) for buffer in buffers]
            assert all(length % PAGE_BYTES == 0 for length in (offset, *lengths)), "not aligned"

    def _tear(self, write: _Pending) -> None:
        """A failed write may have arrived in part."""
        sector = self._disk.profile.sector_bytes
        part = self._disk.rng.randrange(len(write.data) // sector + 1) * sector
        end = min(write.offset + part, len(self._inode.seen))
        if end > write.offset:
            _apply(self._inode, _Pending(write.offset, write.data[: end - write.offset]))


def _apply(inode: _Inode, write: _Pending) -> None:
    end = write.offset + len(write.data)
    if end > len(inode.seen):
        inode.seen = _resized(inode.seen, end)
    inode.seen[write.offset : end] = write.data
    inode.pending.append(write)


def _resized(data: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    if len(data) == size:
        return data
    result = np.zeros(size, np.uint8)
    common = min(size, len(data))
    result[:common] = data[:common]
    return result
