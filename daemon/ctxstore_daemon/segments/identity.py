"""Whose data directory this is: the IDENTITY file.

Owns its text form and the refusal of directories that cannot be used: a newer format, another
cluster, an identity that is damaged or missing beside segments. It must not read segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash

from ctxstore.errors import DataDirError
from ctxstore.limits import PAGE_BYTES
from ctxstore_daemon.segments.format import FORMAT_VERSION, Fault, Invalid
from ctxstore_daemon.segments.geometry import Geometry

if TYPE_CHECKING:
    from ctxstore.seams import Disk, Rng

IDENTITY_NAME: Final = "IDENTITY"
_TEMPORARY_NAME: Final = "IDENTITY.tmp"
_TITLE: Final = "ctxstore-data-format"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a data directory says of itself. `salt` never leaves the node."""

    node_id: bytes
    cluster_id: str
    segment_bytes: int
    salt: int

    @property
    def secret(self) -> int:
        """Part of every structure's checksum seed: a payload cannot pose as a structure."""
        return xxhash.xxh3_64_intdigest(self.node_id, self.salt)


def format_identity(identity: Identity) -> bytes:
    """Text of the IDENTITY file."""
    body = (
        f"{_TITLE}: {FORMAT_VERSION}\n"
        f"node: {identity.node_id.hex()}\n"
        f"cluster: {identity.cluster_id}\n"
        f"segment-bytes: {identity.segment_bytes}\n"
        f"salt: {identity.salt:016x}\n"
    ).encode()
    return body + f"checksum: {xxhash.xxh3_64_intdigest(body):016x}\n".encode()


def parse_identity(data: bytes) -> Identity | Invalid:
    """The identity in `data`, or why there is none. A newer version is told before all else."""
    head, _, _ = data.partition(b"\n")
    title, _, version = head.partition(b": ")
    if title != _TITLE.encode() or not version.isdigit():
        return Invalid(Fault.MAGIC)
    if int(version) > FORMAT_VERSION:
        return Invalid(Fault.VERSION, f"format {int(version)}")
    body, _, tail = data.rpartition(b"checksum: ")
    if f"{xxhash.xxh3_64_intdigest(body):016x}\n".encode() != tail:
        return Invalid(Fault.CHECKSUM)
    try:
        lines = [line.partition(": ")[2] for line in body.decode().splitlines()[1:]]
        node, cluster, segment_bytes, salt = lines
        return Identity(bytes.fromhex(node), cluster, int(segment_bytes), int(salt, 16))
    except ValueError as error:
        return Invalid(Fault.SCHEMA, str(error))


async def load_identity(disk: Disk) -> Identity | None:
    """The directory's identity; None where there is none yet.

    Raises DataDirError, with what to do, when there is one that cannot be used.
    """
    names = await disk.listdir()
    if IDENTITY_NAME not in names:
        orphans = [name for name in names if name.startswith(("segment-", "meta-"))]
        if orphans:
            raise DataDirError(
                f"the data directory holds {orphans[0]} but no {IDENTITY_NAME}: "
                "restore that file, or empty the directory"
            )
        return None
    file = await disk.open(IDENTITY_NAME, direct=False)
    try:
        buffer = np.zeros(PAGE_BYTES, np.uint8)
        count = await file.preadv([buffer], 0)
    finally:
        await file.close()
    found = parse_identity(buffer[:count].tobytes())
    if isinstance(found, Identity):
        return found
    if found.fault is Fault.VERSION:
        raise DataDirError(
            f"the data directory was written by a newer version ({found.detail}); this version "
            f"reads formats up to {FORMAT_VERSION}: upgrade, or use another directory"
        )
    raise DataDirError(
        f"{IDENTITY_NAME} of the data directory is damaged: {found}; restore it from a backup, "
        "or empty the directory to start anew"
    )


async def open_identity(
    disk: Disk, *, cluster_id: str, disk_bytes: int, rng: Rng
) -> tuple[Identity, Geometry]:
    """The directory's identity and geometry, made and synced on the first start.

    Raises DataDirError (other cluster, newer format, damage) or ConfigError (cap too small).
    """
    if not cluster_id.isprintable():
        raise DataDirError(f"cluster id {cluster_id!r} has characters that cannot be printed")
    identity = await load_identity(disk)
    if identity is None:
        geometry = Geometry.for_disk(disk_bytes)
        identity = Identity(
            rng.getrandbits(128).to_bytes(16, "little"),
            cluster_id,
            geometry.segment_bytes,
            rng.getrandbits(64),
        )
        await _store(disk, identity)
        return identity, geometry
    if identity.cluster_id != cluster_id:
        raise DataDirError(
            f"the data directory belongs to cluster {identity.cluster_id!r}, "
            f"this node is configured for {cluster_id!r}"
        )
    return identity, Geometry.for_disk(disk_bytes, segment_bytes=identity.segment_bytes)


async def _store(disk: Disk, identity: Identity) -> None:
    text = format_identity(identity)
    await disk.remove(_TEMPORARY_NAME)
    file = await disk.open(_TEMPORARY_NAME, create=True, direct=False)
    try:
        await file.pwritev([memoryview(text)], 0)
        await file.fdatasync()
    finally:
        await file.close()
    await disk.rename(_TEMPORARY_NAME, IDENTITY_NAME)
    await disk.sync_dir()
