"""Keys: the prefix chain that names chunks by their tokens, and 16-byte keys in bulk.

Owns the key format and the digest that fills it. Knows tokens and an opaque layout fingerprint,
nothing of models, cells' geometry or nodes; the secret is an argument, never read from anywhere.

Key, 16 bytes:   0..5 placement group | 6..13 chunk id | 14..15 cell index u16 LE
Chunk digest D = blake2b-16(key=secret, person=b"ctxstore-chunk-1") of these fields, each preceded
by its length as u32 LE:
    parent D (the root's parent is 16 zero bytes) | fingerprint | token ids, u32 LE each |
    LoRA digest | multimodal items | salt
where the multimodal field is, for each item that touches the chunk, in order of start:
    u32 LE length of its digest | digest | first token relative to the chunk's, i64 LE |
    number of tokens, u64 LE
Placement group = D(first chunk of the group)[0:6], chunk id = D[8:16].
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, NewType

import numpy as np
import numpy.typing as npt

from ctxstore import limits

Key = NewType("Key", bytes)
PlacementGroup = NewType("PlacementGroup", bytes)
ChunkId = NewType("ChunkId", bytes)
CellIndex = NewType("CellIndex", int)

KeyArray = npt.NDArray[np.uint8]
"""(n, 16) uint8, C-contiguous: one key a row."""

Keys = Sequence[bytes | bytearray | memoryview] | KeyArray
"""What public methods accept as keys."""

Tokens = Sequence[int] | npt.NDArray[Any]
"""One-dimensional token ids, each in 0 .. 2^32-1."""

GROUP_BYTES: Final = 6
CHUNK_ID_BYTES: Final = 8
DIGEST_BYTES: Final = 16
GROUP_CHUNKS_DEFAULT: Final = 16
ROOT_PARENT: Final = bytes(DIGEST_BYTES)

_PERSON_CHUNK: Final = b"ctxstore-chunk-1"
_PERSON_RAW: Final = b"ctxstore-rawkey1"
_SECRET_BYTES_MAX: Final = 64  # what blake2b accepts as a key
_U32: Final = struct.Struct("<I")
_ITEM_SPAN: Final = struct.Struct("<qQ")
_ID_AT: Final = slice(GROUP_BYTES, GROUP_BYTES + CHUNK_ID_BYTES)


@dataclass(frozen=True, slots=True)
class KeyParts:
    """A key taken apart."""

    group: PlacementGroup
    chunk_id: ChunkId
    cell: CellIndex


@dataclass(frozen=True, slots=True)
class MultimodalItem:
    """An image, clip, ... whose placeholder tokens begin at `start`, counted from the root."""

    digest: bytes
    start: int
    length: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.length < 1:
            raise ValueError(f"a multimodal item spans {self.length} tokens from {self.start}")


def make_key(*, group: bytes, chunk_id: bytes, cell: int) -> Key:
    """Compose one key. Raises `ValueError` on parts of the wrong size."""
    if len(group) != GROUP_BYTES or len(chunk_id) != CHUNK_ID_BYTES or not 0 <= cell <= 0xFFFF:
        raise ValueError(
            f"a key has a group of 6 bytes, a chunk id of 8 and a cell below 65536; "
            f"got {len(group)}, {len(chunk_id)} and {cell}"
        )
    return Key(group + chunk_id + cell.to_bytes(2, "little"))


def split_key(key: bytes) -> KeyParts:
    """Take a key apart; the parts mean something only for keys that a chain made."""
    if len(key) != limits.KEY_BYTES:
        raise ValueError(f"a key has 16 bytes, this one has {len(key)}")
    return KeyParts(
        group=PlacementGroup(key[:GROUP_BYTES]),
        chunk_id=ChunkId(key[_ID_AT]),
        cell=CellIndex(int.from_bytes(key[14:], "little")),
    )


def raw_keys(names: Iterable[str | bytes]) -> KeyArray:
    """Keys for named shards that belong to no prefix: (n, 16), equal names give equal keys.

    Raw shards have no manifest. The first six bytes spread them over nodes like any other key.
    """
    digests = [
        blake2b(
            name.encode() if isinstance(name, str) else name,
            digest_size=DIGEST_BYTES,
            person=_PERSON_RAW,
        ).digest()
        for name in names
    ]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, limits.KEY_BYTES)


def as_key_array(keys: Keys) -> KeyArray:
    """`keys` as a C-contiguous (n, 16) uint8 array, sharing memory where it already is one.

    Raises `ValueError` that names the first offending index and its length.
    """
    if isinstance(keys, np.ndarray):
        if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != limits.KEY_BYTES:
            raise ValueError(
                f"a key array has shape (n, 16) and dtype uint8; "
                f"got shape {keys.shape} and dtype {keys.dtype}"
            )
        return np.ascontiguousarray(keys)
    if isinstance(keys, (bytes, bytearray, memoryview, str)):
        raise ValueError(
            f"keys is one {type(keys).__name__}; pass a sequence of 16-byte keys, for example [key]"
        )
    keys = list(keys)
    try:
        joined = b"".join(keys)
        lengths = set(map(len, keys))
    except TypeError as error:
        raise ValueError(_first_bad_key(keys)) from error
    if lengths - {limits.KEY_BYTES} or len(joined) != limits.KEY_BYTES * len(keys):
        raise ValueError(_first_bad_key(keys))
    return np.frombuffer(joined, np.uint8).reshape(-1, limits.KEY_BYTES)


def key_list(keys: KeyArray) -> list[bytes]:
    """Rows of an (n, 16) array as `bytes`, for use as dictionary keys."""
    rows: list[bytes] = np.ascontiguousarray(keys).view("V16").reshape(-1).tolist()
    return rows


def manifest_cell(kv_group: int) -> CellIndex:
    """Cell index under which KV-cache group `kv_group` keeps its manifests."""
    if not 0 <= kv_group < limits.KV_GROUPS_MAX:
        raise ValueError(f"KV-cache group {kv_group} is not in 0 .. {limits.KV_GROUPS_MAX - 1}")
    return CellIndex(limits.MANIFEST_CELL_BASE + kv_group)


class PrefixChain:
    """Names the chunks of one token sequence. Append tokens as they come; complete chunks get keys.

    The same tokens, fingerprint, secret and extras give the same keys in every process; one token
    more or less anywhere before a chunk gives that chunk another key. Tokens after the last
    complete chunk wait in the chain and have no key. Not thread-safe.

    `secret` (at most 64 bytes) keeps others from computing the keys of a text they guess; empty
    for none. `fingerprint` is `KVLayout.fingerprint`, `chunk_tokens` and `group_chunks` are the
    layout's. `lora_digest` and `salt` separate what equal tokens would otherwise share.
    """

    __slots__ = (
        "_digests",
        "_fingerprint",
        "_items",
        "_lora",
        "_salt",
        "_secret",
        "_tail",
        "chunk_tokens",
        "group_chunks",
    )

    def __init__(
        self,
        *,
        fingerprint: bytes,
        chunk_tokens: int,
        secret: bytes | str | None = None,
        group_chunks: int = GROUP_CHUNKS_DEFAULT,
        lora_digest: bytes = b"",
        salt: bytes = b"",
    ) -> None:
        raw_secret = secret.encode() if isinstance(secret, str) else (secret or b"")
        if len(raw_secret) > _SECRET_BYTES_MAX:
            raise ValueError(
                f"the secret has {len(raw_secret)} bytes, at most {_SECRET_BYTES_MAX} are used; "
                "pass a digest of it"
            )
        if chunk_tokens < 1 or group_chunks < 1:
            raise ValueError(
                f"chunk_tokens and group_chunks are at least 1; got {chunk_tokens}, {group_chunks}"
            )
        if not fingerprint:
            raise ValueError("a chain needs the layout's fingerprint; it is empty")
        self.chunk_tokens = chunk_tokens
        self.group_chunks = group_chunks
        self._secret = raw_secret
        self._fingerprint = _prefixed(fingerprint)
        self._lora = _prefixed(lora_digest)
        self._salt = _prefixed(salt)
        self._digests = bytearray()
        self._tail = np.empty(0, np.dtype("<u4"))
        self._items: list[MultimodalItem] = []

    def __len__(self) -> int:
        """Number of complete chunks."""
        return len(self._digests) // DIGEST_BYTES

    @property
    def tokens(self) -> int:
        """Number of tokens appended so far, those of the incomplete last chunk included."""
        return len(self) * self.chunk_tokens + len(self._tail)

    @property
    def digests(self) -> KeyArray:
        """(chunks, 16) uint8, read-only copy: the full digest of each complete chunk."""
        return np.frombuffer(bytes(self._digests), np.uint8).reshape(-1, DIGEST_BYTES)

    def append(self, tokens: Tokens, multimodal: Iterable[MultimodalItem] = ()) -> int:
        """Add tokens at the end; returns how many chunks became complete by it.

        An item must start at or after the first token of the incomplete chunk: earlier chunks have
        their keys already. Raises `ValueError` before anything changes.
        """
        fresh = _token_array(tokens)
        added = list(multimodal)
        first_open = len(self) * self.chunk_tokens
        for item in added:
            if item.start < first_open:
                raise ValueError(
                    f"multimodal item at token {item.start} starts in a chunk that has its key"
                )
        items = sorted((*self._items, *added), key=lambda item: (item.start, item.length))
        waiting = np.concatenate((self._tail, fresh)) if len(self._tail) else fresh
        complete = len(waiting) // self.chunk_tokens
        self._hash_chunks(waiting.data.cast("B"), complete, items)
        self._tail = waiting[complete * self.chunk_tokens :].copy()
        end = len(self) * self.chunk_tokens
        self._items = [item for item in items if item.start + item.length > end]
        return complete

    def fork_copy(self) -> PrefixChain:
        """An independent chain with the same past: two continuations of one conversation."""
        twin = object.__new__(PrefixChain)
        for name in self.__slots__:
            object.__setattr__(twin, name, getattr(self, name))
        twin._digests = bytearray(self._digests)
        twin._items = list(self._items)
        return twin

    def chunk_keys(self, *, cell: int, first: int = 0, stop: int | None = None) -> KeyArray:
        """(chunks, 16): the key of one cell for chunks `first` .. `stop` (all by default)."""
        return self.cell_keys((cell,), first=first, stop=stop)

    def manifest_keys(
        self, kv_group: int = 0, *, first: int = 0, stop: int | None = None
    ) -> KeyArray:
        """(chunks, 16): the manifest keys of one KV-cache group, in chunk order: what to match."""
        return self.cell_keys((manifest_cell(kv_group),), first=first, stop=stop)

    def cell_keys(
        self,
        cells: int | Sequence[int] | npt.NDArray[Any],
        *,
        first: int = 0,
        stop: int | None = None,
    ) -> KeyArray:
        """(chunks * cells, 16), chunk by chunk: keys of `cells` (a count, or cell indices).

        Raises `ValueError` when `first` .. `stop` are not complete chunks, or for a bad cell.
        """
        last = len(self) if stop is None else stop
        if not 0 <= first <= last <= len(self):
            raise ValueError(f"chunks {first} .. {last} are not among the {len(self)} complete")
        wanted = np.arange(cells) if isinstance(cells, int) else np.asarray(cells, np.int64)
        if wanted.ndim != 1 or (wanted.size and not 0 <= wanted.min() <= wanted.max() <= 0xFFFF):
            raise ValueError("cell indices are one row of numbers in 0 .. 65535")
        digests = np.frombuffer(self._digests, np.uint8).reshape(-1, DIGEST_BYTES)
        heads = np.arange(first, last) // self.group_chunks * self.group_chunks
        keys = np.empty((last - first, len(wanted), limits.KEY_BYTES), np.uint8)
        keys[:, :, :GROUP_BYTES] = digests[heads, None, :GROUP_BYTES]
        keys[:, :, _ID_AT] = digests[first:last, None, 8:]
        keys[:, :, 14:] = wanted.astype("<u2").view(np.uint8).reshape(1, -1, 2)
        return keys.reshape(-1, limits.KEY_BYTES)

    def _hash_chunks(self, waiting: memoryview, count: int, items: list[MultimodalItem]) -> None:
        """Extend the digests by `count` chunks whose token bytes begin `waiting`."""
        size = self.chunk_tokens * 4
        before_tokens = self._fingerprint + _U32.pack(size)
        parent = bytes(self._digests[-DIGEST_BYTES:]) or ROOT_PARENT
        parent_length = _U32.pack(DIGEST_BYTES)
        after_tokens = self._lora + _prefixed(b"") + self._salt
        for at in range(0, count * size, size):
            if items:
                seen = _prefixed(
                    _items_field(items, len(self) * self.chunk_tokens, self.chunk_tokens)
                )
                after_tokens = self._lora + seen + self._salt
            hasher = blake2b(
                parent_length + parent + before_tokens,
                digest_size=DIGEST_BYTES,
                key=self._secret,
                person=_PERSON_CHUNK,
            )
            hasher.update(waiting[at : at + size])
            hasher.update(after_tokens)
            parent = hasher.digest()
            self._digests += parent


def _prefixed(field: bytes) -> bytes:
    return _U32.pack(len(field)) + field


def _items_field(items: list[MultimodalItem], first: int, count: int) -> bytes:
    """The multimodal field of the chunk of tokens `first` .. `first + count`; b"" without items."""
    return b"".join(
        _prefixed(item.digest) + _ITEM_SPAN.pack(item.start - first, item.length)
        for item in items
        if item.start < first + count and item.start + item.length > first
    )


def _token_array(tokens: Tokens) -> npt.NDArray[np.uint32]:
    try:
        array = np.asarray(tokens)
    except (OverflowError, ValueError) as error:
        raise ValueError(f"tokens are not one row of integers: {error}") from error
    if array.size == 0:
        return np.empty(0, np.dtype("<u4"))
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"tokens are one row of integers; got shape {array.shape} and dtype {array.dtype}"
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 0xFFFF_FFFF:
        raise ValueError(f"token ids are 0 .. 4294967295; got {low if low < 0 else high}")
    return np.ascontiguousarray(array, np.dtype("<u4"))


def _first_bad_key(keys: Sequence[Any]) -> str:
    for index, key in enumerate(keys):
        if not isinstance(key, (bytes, bytearray, memoryview)):
            return f"key {index} is a {type(key).__name__}, not bytes of length 16"
        if memoryview(key).nbytes != limits.KEY_BYTES or len(key) != limits.KEY_BYTES:
            return f"key {index} has {memoryview(key).nbytes} bytes, a key has 16"
    return "keys changed while they were read"
