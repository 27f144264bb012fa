"""One turn of the demo in a process of its own: a request as JSON in, a reply as JSON out.

Owns the order of a turn: answer with the store, make the new context durable, answer once more
without the store. Holds no state: what it must remember is in the request or in the store.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ctxstore_client.demo.conversation import closed, document, prompt
from ctxstore_client.demo.messages import TurnReply, TurnRequest

if TYPE_CHECKING:
    from ctxstore_client.integrations.transformers import ContextSession

_TINY_HANDBOOK_CHARACTERS: Final = 1500
"""The tiny model's tokens are bytes: so much of the handbook is a context of 1600 tokens."""

_CHUNK_TOKENS: Final = 64
"""Below the usual 256, so that a turn of forty tokens already leaves something to find again."""

_WARM_UP_TOKENS: Final = 512
_STORE_TIMEOUT_S: Final = 60.0


def answer(request: TurnRequest) -> TurnReply:
    """Run one turn. Raises what the model or, when making the context durable, the store raises."""
    from ctxstore_client import connect
    from ctxstore_client.integrations.transformers import ContextSession
    from ctxstore_client.integrations.transformers.demo_models import DemoModel, load_demo_model

    kind = DemoModel(request.model)
    loaded = load_demo_model(kind, Path(request.cache_dir), progress=_progress)
    tiny = kind is DemoModel.TINY
    tokens = prompt(
        loaded.encode,
        history=request.history,
        question=request.question,
        handbook=document(characters_max=_TINY_HANDBOOK_CHARACTERS if tiny else None),
    )
    with (
        connect(request.address) as store,
        ContextSession(
            loaded.model,
            store,
            chunk_tokens=_CHUNK_TOKENS,
            durability="group",
        ) as session,
    ):
        arguments = {"max_new_tokens": request.max_new_tokens, "do_sample": False}
        _warm_up(session, tokens)
        _progress("answering, with the store")
        generation = session.generate(tokens, **arguments)
        session.wait(_STORE_TIMEOUT_S)
        store.flush(timeout_s=_STORE_TIMEOUT_S)
        _progress("answering once more, without the store")
        reference = session.generate_reference(
            tokens, cut_tokens=generation.stats.rehydrated_tokens, **arguments
        )
        offloaded = session.offload_stats
    stats = generation.stats
    return TurnReply(
        context_tokens=stats.context_tokens,
        matched_tokens=stats.matched_tokens,
        rehydrated_tokens=stats.rehydrated_tokens,
        load_s=stats.load_s,
        load_bytes=stats.load_bytes,
        ttft_with_s=stats.ttft_s,
        ttft_without_s=reference.stats.ttft_s,
        answer=loaded.decode(generation.new_tokens).strip(),
        new_tokens=generation.new_tokens,
        reference_tokens=reference.new_tokens,
        history=closed([*tokens, *generation.new_tokens], end_of_turn=loaded.end_of_turn),
        stored_chunks=offloaded.stored_chunks,
        failed_chunks=offloaded.failed_chunks,
    )


def _warm_up(session: ContextSession, tokens: list[int]) -> None:
    """Run the model once before anything is timed: a process's first matrix product is slow."""
    few = tokens[:_WARM_UP_TOKENS]
    session.generate_reference(few, cut_tokens=len(few) // 2, max_new_tokens=2, do_sample=False)


def _progress(text: str) -> None:
    sys.stderr.write(f"         ({text})\n")
    sys.stderr.flush()


def main() -> int:
    """Read a request from stdin, write the reply as the last line of stdout."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    reply = answer(TurnRequest.from_json(sys.stdin.read()))
    sys.stdout.write(reply.to_json() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
