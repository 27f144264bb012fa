"""Which prefix of a context the stored chunks can serve, and what must be loaded for it.

Owns the rules per kind of layer: full and MLA need every chunk, sliding the last window - 1 tokens,
recurrent state the one checkpoint at the hit length. Pure: presence comes in, lengths go out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ctxstore.layouts.layout import LayerKind

if TYPE_CHECKING:
    from collections.abc import Sequence

Presence = npt.NDArray[np.bool_]


def match_chunks(
    kinds: Sequence[LayerKind],
    present: Sequence[Presence],
    *,
    chunk_tokens: int,
    windows: Sequence[int] | None = None,
) -> int:
    """Longest hit, in chunks, that every KV-cache group can serve; 0 when none can.

    `present[i]` is (chunks,) bool for group i: whether its manifest of each chunk is visible; all
    groups tell of the same chunks. `windows[i]` is the window of a sliding group, else ignored.
    """
    if not kinds or len(kinds) != len(present) or len({len(row) for row in present}) != 1:
        raise ValueError("match_chunks needs one presence row per group, all of one length")
    usable = np.ones(len(present[0]) + 1, np.bool_)
    for number, (kind, row) in enumerate(zip(kinds, present, strict=True)):
        window = windows[number] if windows else 0
        usable &= _serves(row, reach=_reach(kind, chunk_tokens=chunk_tokens, window=window))
    return int(np.flatnonzero(usable)[-1])


def chunks_to_load(
    kind: LayerKind, *, hit_chunks: int, chunk_tokens: int, window: int = 0
) -> range:
    """Chunks of one group that a hit of `hit_chunks` needs."""
    reach = _reach(kind, chunk_tokens=chunk_tokens, window=window)
    return range(0 if reach is None else max(0, hit_chunks - reach), hit_chunks)


def usable_tokens(
    *, hit_chunks: int, chunk_tokens: int, prompt_tokens: int, block_tokens: int = 1
) -> int:
    """Tokens of a prompt to take from the store: whole blocks, with one token left to compute."""
    if prompt_tokens < 1 or block_tokens < 1:
        raise ValueError("a prompt and a block have at least one token")
    return min(hit_chunks * chunk_tokens, prompt_tokens - 1) // block_tokens * block_tokens


def _reach(kind: LayerKind, *, chunk_tokens: int, window: int) -> int | None:
    """How many chunks before the end of a hit are needed; None for all of them."""
    match kind:
        case LayerKind.FULL | LayerKind.MLA:
            return None
        case LayerKind.SLIDING:
            if window < 1:
                raise ValueError("a sliding group needs its window")
            return -(-(window - 1) // chunk_tokens)
        case LayerKind.STATE:
            return 1


def _serves(row: Presence, *, reach: int | None) -> Presence:
    """(chunks + 1,) bool: whether a hit of h chunks can be served, h = 0 .. chunks."""
    lengths = np.arange(len(row) + 1)
    # Chunks in a row that are present, ending just before h.
    last_gap = np.maximum.accumulate(np.where(row, 0, lengths[1:])) if len(row) else lengths[:0]
    unbroken = lengths - np.concatenate((np.zeros(1, np.int64), last_gap))
    needed = lengths if reach is None else np.minimum(lengths, reach)
    served: Presence = unbroken >= needed
    return served
