"""A session whose store misbehaves: generation goes on, and nothing wrong is loaded or promised.

The faults are those a real daemon shows too rarely to test against; the rest is in
test_transformers_daemon.py.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from ctxstore.errors import Overloaded
from ctxstore.keys import PrefixChain, key_list
from ctxstore.wire.messages import Lookup, PutResult
from ctxstore_client.integrations.transformers import ContextSession
from ctxstore_client.integrations.transformers import offload as offload_module
from tests.engines.memory_store import MemoryStore
from tests.engines.tiny import CHUNK_TOKENS, GREEDY, tiny_llama, tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

pytestmark = pytest.mark.engines

PROMPT = tokens(5 * CHUNK_TOKENS + 3)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def expected(model: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    answer: list[int] = whole[0, len(PROMPT) :].tolist()
    return answer


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def session_of(model: Any, store: Any, *, secret: str = "s") -> ContextSession:
    return ContextSession(model, store, chunk_tokens=CHUNK_TOKENS, model_id="tiny", secret=secret)


@pytest.fixture
def session(model: Any, store: MemoryStore) -> Iterator[ContextSession]:
    with session_of(model, store) as session:
        yield session


def chain_of(session: ContextSession, ids: list[int]) -> PrefixChain:
    chain = PrefixChain(
        fingerprint=session.layout.fingerprint, chunk_tokens=CHUNK_TOKENS, secret="s"
    )
    chain.append(ids)
    return chain


def fill(session: ContextSession) -> PrefixChain:
    """Store the whole conversation; returns the chain of what was stored."""
    generation = session.generate(PROMPT, **GREEDY)
    assert session.wait(20)
    return chain_of(session, generation.sequences[0, :-1].tolist())


def test_a_store_that_raises_everywhere_changes_nothing(
    session: ContextSession, store: MemoryStore, expected: list[int]
) -> None:
    store.raises = RuntimeError("broken")
    generation = session.generate(PROMPT, **GREEDY)
    assert generation.new_tokens == expected
    assert generation.stats.rehydrated_tokens == 0
    assert session.wait(20)
    assert session.offload_stats.failed_chunks > 0
    assert session.offload_stats.pending_chunks == 0
    store.raises = None
    fill(session)
    assert session.generate(PROMPT, **GREEDY).stats.rehydrated_tokens == 5 * CHUNK_TOKENS


@pytest.mark.parametrize("outcome", [Lookup.MISS, Lookup.TIMEOUT, Lookup.OVERLOADED])
@pytest.mark.parametrize("bad_chunk", [0, 2])
def test_only_what_arrived_whole_is_used(
    session: ContextSession,
    store: MemoryStore,
    expected: list[int],
    outcome: Lookup,
    bad_chunk: int,
) -> None:
    chain = fill(session)
    cells = key_list(chain.cell_keys(session.layout.cells, first=bad_chunk, stop=bad_chunk + 1))
    store.lookups[cells[-1]] = outcome
    before = dict(store.shards)
    generation = session.generate(PROMPT, **GREEDY)
    assert generation.stats.matched_tokens == 5 * CHUNK_TOKENS
    assert generation.stats.rehydrated_tokens == bad_chunk * CHUNK_TOKENS
    assert generation.new_tokens == expected
    assert session.wait(20)
    assert store.shards == before, "a load failure neither removes nor replaces anything"


def test_a_lost_cell_is_stored_again_by_the_next_run(
    session: ContextSession, store: MemoryStore
) -> None:
    chain = fill(session)
    lost = key_list(chain.cell_keys((1,), first=3, stop=4))[0]
    shard = store.shards.pop(lost)
    assert session.generate(PROMPT, **GREEDY).stats.rehydrated_tokens == 3 * CHUNK_TOKENS
    assert session.wait(20)
    assert len(store.shards[lost]) == len(shard)
    assert session.generate(PROMPT, **GREEDY).stats.rehydrated_tokens == 5 * CHUNK_TOKENS


def test_batches_that_arrived_stay_when_a_later_one_fails(
    session: ContextSession, store: MemoryStore, expected: list[int], monkeypatch: Any
) -> None:
    fill(session)
    monkeypatch.setattr(
        "ctxstore_client.integrations.transformers.load.LOAD_BATCH_BYTES_MAX",
        2 * session.layout.cells * len(next(iter(store.shards.values()))),
    )
    store.get_raises_at_call = store.gets + 2
    generation = session.generate(PROMPT, **GREEDY)
    assert generation.stats.rehydrated_tokens == 2 * CHUNK_TOKENS
    assert generation.new_tokens == expected


def test_a_manifest_follows_all_cells_of_its_chunk(
    session: ContextSession, store: MemoryStore
) -> None:
    chain = fill(session)
    place = {key: at for at, key in enumerate(store.order)}
    manifests = key_list(chain.manifest_keys())
    for chunk, manifest in enumerate(manifests):
        cells = key_list(chain.cell_keys(session.layout.cells, first=chunk, stop=chunk + 1))
        assert max(place[cell] for cell in cells) < place[manifest]
    assert sorted(manifests, key=place.__getitem__) == manifests, "visible in prefix order"


def test_the_answer_is_stored_too(session: ContextSession, store: MemoryStore) -> None:
    generation = session.generate(PROMPT, **GREEDY)
    assert session.wait(20)
    longer = [*generation.sequences[0].tolist(), *tokens(10, seed=5)]
    again = session.generate(longer, **GREEDY)
    computed = len(PROMPT) + 40 - 1
    assert again.stats.rehydrated_tokens == computed // CHUNK_TOKENS * CHUNK_TOKENS
    assert again.stats.rehydrated_tokens > len(PROMPT)


def test_a_refused_cell_keeps_its_chunk_and_all_later_ones_invisible(
    session: ContextSession, store: MemoryStore
) -> None:
    probe = chain_of(session, PROMPT)
    refused = key_list(probe.cell_keys((0,), first=2, stop=3))[0]
    store.put_results[refused] = [PutResult.REFUSED]
    session.generate(PROMPT, **GREEDY)
    assert session.wait(20)
    assert store.match(probe.manifest_keys()) == 2
    assert key_list(probe.manifest_keys(first=2))[0] not in store.shards
    assert session.offload_stats.stored_chunks == 2


def test_an_overloaded_store_is_asked_again(
    session: ContextSession, store: MemoryStore, monkeypatch: Any
) -> None:
    monkeypatch.setattr(offload_module, "_PAUSE_FIRST_S", 0.001)
    probe = chain_of(session, PROMPT)
    cell = key_list(probe.cell_keys((0,), first=1, stop=2))[0]
    manifest = key_list(probe.manifest_keys())[3]
    store.put_results[cell] = [PutResult.OVERLOADED] * 2
    store.put_results[manifest] = [PutResult.OVERLOADED]
    fill(session)
    assert session.offload_stats.failed_chunks == 0
    assert store.match(probe.manifest_keys()) == 5


def test_a_full_queue_drops_contexts_and_never_waits(
    session: ContextSession, store: MemoryStore, expected: list[int]
) -> None:
    store.release.clear()
    try:
        for _ in range(offload_module.JOBS_MAX + 3):
            generation = session.generate(PROMPT, **GREEDY)
            assert generation.new_tokens == expected
        assert session.offload_stats.failed_chunks > 0
        assert not session.wait(0.01)
    finally:
        store.release.set()
    assert session.wait(20)
    assert session.offload_stats.pending_chunks == 0


def test_closing_gives_up_what_takes_too_long(model: Any, store: MemoryStore) -> None:
    session = session_of(model, store)
    store.release.clear()
    session.generate(PROMPT, **GREEDY)
    threading.Timer(0.3, store.release.set).start()
    assert session.close(0.05) is False
    assert session.close() is True, "idempotent"
    stats = session.offload_stats
    assert stats.pending_chunks == 0
    assert stats.failed_chunks > 0
    assert session.generate(PROMPT, **GREEDY).new_tokens, "a closed session still generates"


def test_offload_errors_at_submit_are_counted(session: ContextSession, store: MemoryStore) -> None:
    store.raises = Overloaded("full")
    session.generate(PROMPT, **GREEDY)
    assert session.wait(20)
    assert session.offload_stats.stored_chunks == 0
    assert session.offload_stats.failed_chunks == (len(PROMPT) + 39) // CHUNK_TOKENS


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"use_cache": False}, "use_cache"),
        ({"past_key_values": object()}, "past_key_values"),
        ({"attention_mask": torch.zeros(1, len(PROMPT))}, "padded"),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, "pixel_values"),
    ],
)
def test_arguments_a_stored_context_cannot_serve(
    session: ContextSession, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        session.generate(PROMPT, **{**GREEDY, **arguments})


@pytest.mark.parametrize("bad", [[], [[1, 2], [3, 4]], [1.5, 2.5]])
def test_prompts_that_are_none(session: ContextSession, bad: Any) -> None:
    with pytest.raises(ValueError, match="input_ids"):
        session.generate(bad, **GREEDY)


def test_the_callers_own_stopping_criteria_and_output_class_work(session: ContextSession) -> None:
    class AfterThree(transformers.StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return torch.tensor([input_ids.shape[1] >= len(PROMPT) + 3])

    generation = session.generate(
        torch.tensor([PROMPT]),
        stopping_criteria=transformers.StoppingCriteriaList([AfterThree()]),
        return_dict_in_generate=True,
        output_scores=True,
        attention_mask=torch.ones(1, len(PROMPT)),
        **GREEDY,
    )
    assert len(generation.new_tokens) == 3
    assert len(generation.output.scores) == 3
    assert 0 < generation.stats.ttft_s < generation.stats.total_s


def test_a_prompt_of_whole_chunks_leaves_one_token_to_compute(session: ContextSession) -> None:
    fill(session)
    for count in (CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS):
        stats = session.generate(PROMPT[:count], **GREEDY).stats
        assert stats.rehydrated_tokens == (count - 1) // CHUNK_TOKENS * CHUNK_TOKENS


def test_rehydrate_alone_gives_a_cache_for_generate(
    model: Any, session: ContextSession, expected: list[int]
) -> None:
    fill(session)
    cache, loaded = session.rehydrate(PROMPT)
    assert loaded.tokens == cache.get_seq_length() == 5 * CHUNK_TOKENS
    ids = torch.tensor([PROMPT])
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY
    )
    assert whole[0, len(PROMPT) :].tolist() == expected


def test_another_secret_finds_nothing(
    model: Any, session: ContextSession, store: MemoryStore
) -> None:
    fill(session)
    with session_of(model, store, secret="t") as other:
        assert other.generate(PROMPT, **GREEDY).stats.matched_tokens == 0
