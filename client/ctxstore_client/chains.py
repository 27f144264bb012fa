"""Prefix chains with the secret of this process's environment.

Owns only where the secret comes from: the core, which makes the keys, reads no environment.
"""

from __future__ import annotations

from ctxstore.keys import GROUP_CHUNKS_DEFAULT, PrefixChain
from ctxstore.layouts import KVLayout
from ctxstore_client.discovery import environment_secret


def prefix_chain(
    layout: KVLayout | bytes,
    chunk_tokens: int | None = None,
    *,
    group_chunks: int | None = None,
    secret: bytes | str | None = None,
    lora_digest: bytes = b"",
    salt: bytes = b"",
) -> PrefixChain:
    """An empty chain that names the chunks of one token sequence; see `ctxstore.keys.PrefixChain`.

    `layout`: a KVLayout, or its 16-byte fingerprint together with `chunk_tokens` (and
    `group_chunks`, unless it is the default). `secret` (at most 64 bytes) keeps others from
    computing the keys of a text they guess: None takes it from CTXSTORE_SECRET, b"" uses none even
    where that is set. Everybody who is to find the same shards needs the same secret.

    Raises ValueError. Not thread-safe, like the chain.
    """
    if isinstance(layout, KVLayout):
        for name, given, own in (
            ("chunk_tokens", chunk_tokens, layout.chunk_tokens),
            ("group_chunks", group_chunks, layout.group_chunks),
        ):
            if given is not None and given != own:
                raise ValueError(f"{name} is {given}, that of the layout is {own}; leave it out")
        fingerprint = layout.fingerprint
        chunk_tokens, group_chunks = layout.chunk_tokens, layout.group_chunks
    else:
        if not isinstance(layout, (bytes, bytearray, memoryview)):
            raise ValueError(f"layout is a {type(layout).__name__}, not a KVLayout or fingerprint")
        fingerprint = bytes(layout)
        if chunk_tokens is None:
            raise ValueError("a fingerprint does not tell chunk_tokens; pass it, or the layout")
    return PrefixChain(
        fingerprint=fingerprint,
        chunk_tokens=chunk_tokens,
        group_chunks=GROUP_CHUNKS_DEFAULT if group_chunks is None else group_chunks,
        secret=environment_secret() if secret is None else secret,
        lora_digest=lora_digest,
        salt=salt,
    )
