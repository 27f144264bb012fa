"""Tiny models whose contexts live in a real daemon: the same tokens, whatever happens to it."""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ctxstore.keys import PrefixChain
from ctxstore_client import connect
from ctxstore_client.demo.node import DemoNode
from ctxstore_client.integrations.transformers import ContextSession
from tests.engines.tiny import CHUNK_TOKENS, GREEDY, SMALL, tiny_llama, tokens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

pytestmark = pytest.mark.engines

PROMPT = tokens(6 * CHUNK_TOKENS + 3)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[DemoNode]:
    node = DemoNode(tmp_path, memory="128MiB", disk="1GiB")
    try:
        yield node
    finally:
        node.stop()


def session_of(model: Any, store: Any, **options: Any) -> ContextSession:
    return ContextSession(
        model, store, **{"chunk_tokens": CHUNK_TOKENS, "durability": "group", **options}
    )


def chain_of(session: ContextSession, ids: list[int]) -> PrefixChain:
    chain = PrefixChain(fingerprint=session.layout.fingerprint, chunk_tokens=CHUNK_TOKENS)
    chain.append(ids)
    return chain


def plain(model: Any, ids: list[int]) -> list[int]:
    """What the model says without any of this."""
    prompt = torch.tensor([ids])
    whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
    answer: list[int] = whole[0, len(ids) :].tolist()
    return answer


def run_turn(
    model: Any, address: str, ids: list[int], *, shm: str = "auto"
) -> tuple[Any, list[int]]:
    """One turn over a fresh connection, made durable; returns it and its reference's tokens."""
    with connect(address, shm=shm) as store, session_of(model, store) as session:
        generation = session.generate(ids, **GREEDY)
        assert session.wait(30)
        assert session.offload_stats.failed_chunks == 0
        store.flush()
        reference = session.generate_reference(
            ids, cut_tokens=generation.stats.rehydrated_tokens, **GREEDY
        )
    return generation, reference.new_tokens


def test_a_conversation_outlives_three_kills(model: Any, node: DemoNode) -> None:
    ids = PROMPT
    address = node.start()
    first, reference = run_turn(model, address, ids)
    assert first.stats.rehydrated_tokens == 0
    assert first.new_tokens == reference == plain(model, ids)
    for turn in range(3):
        stored = len(ids) + 40 - 1
        ids = [*ids, *first.new_tokens, *tokens(25, seed=10 + turn)]
        node.kill()
        address = node.start()
        first, reference = run_turn(model, address, ids)
        assert first.stats.rehydrated_tokens == stored // CHUNK_TOKENS * CHUNK_TOKENS
        assert first.stats.load_bytes > 0
        assert first.new_tokens == reference


def test_another_process_of_the_same_model_finds_the_context(model: Any, node: DemoNode) -> None:
    address = node.start()
    run_turn(model, address, PROMPT)
    again, reference = run_turn(tiny_llama(), address, PROMPT)
    assert again.stats.rehydrated_tokens == 6 * CHUNK_TOKENS
    assert again.new_tokens == reference
    other, _ = run_turn(tiny_llama(seed=7), address, PROMPT)
    assert other.stats.matched_tokens == 0, "other weights, other keys"


def test_over_tcp_as_over_shared_memory(model: Any, node: DemoNode) -> None:
    address = node.start()
    run_turn(model, address, PROMPT, shm="off")
    for shm in ("off", "require"):
        generation, reference = run_turn(model, address, PROMPT, shm=shm)
        assert generation.stats.rehydrated_tokens == 6 * CHUNK_TOKENS
        assert generation.new_tokens == reference


def test_a_shared_prefix_is_a_partial_hit(model: Any, node: DemoNode) -> None:
    address = node.start()
    run_turn(model, address, PROMPT)
    other = [*PROMPT[: 3 * CHUNK_TOKENS + 9], *tokens(70, seed=3)]
    generation, reference = run_turn(model, address, other)
    assert generation.stats.rehydrated_tokens == 3 * CHUNK_TOKENS
    assert generation.new_tokens == reference == plain(model, other)


def test_a_removed_cell_shortens_the_hit_and_is_stored_again(model: Any, node: DemoNode) -> None:
    address = node.start()
    run_turn(model, address, PROMPT)
    with connect(address) as store, session_of(model, store) as session:
        store.remove(chain_of(session, PROMPT).cell_keys((1,), first=4, stop=5))
    generation, reference = run_turn(model, address, PROMPT)
    assert generation.stats.matched_tokens == 6 * CHUNK_TOKENS
    assert generation.stats.rehydrated_tokens == 4 * CHUNK_TOKENS
    assert generation.new_tokens == reference
    healed, _ = run_turn(model, address, PROMPT)
    assert healed.stats.rehydrated_tokens == 6 * CHUNK_TOKENS


def test_a_cell_corrupted_on_disk_is_never_loaded(model: Any, node: DemoNode) -> None:
    address = node.start()
    run_turn(model, address, PROMPT)
    with connect(address) as store, session_of(model, store) as session:
        keys = chain_of(session, PROMPT).cell_keys((0,), first=2, stop=3)
        (known,) = store.stat(keys)
        assert known is not None
        cell = np.empty(known.length, np.uint8)
        store.get_into(keys, [cell])
    node.kill()
    assert _flip_a_byte(node.data_dir, cell.tobytes()) == 1
    address = node.start()
    generation, reference = run_turn(model, address, PROMPT)
    assert generation.stats.rehydrated_tokens == 2 * CHUNK_TOKENS
    assert generation.new_tokens == reference
    node.kill()
    healed, _ = run_turn(model, node.start(), PROMPT)
    assert healed.stats.rehydrated_tokens == 6 * CHUNK_TOKENS


def _flip_a_byte(directory: Path, needle: bytes) -> int:
    """Flip the middle byte of every copy of `needle` in the directory's files; returns how many."""
    found = 0
    for path in sorted(directory.rglob("*")):
        if not path.is_file():
            continue
        at = path.read_bytes().find(needle)
        if at >= 0:
            found += 1
            with path.open("r+b") as file:
                file.seek(at + len(needle) // 2)
                byte = file.read(1)[0]
                file.seek(at + len(needle) // 2)
                file.write(bytes([byte ^ 0x10]))
    return found


def test_a_daemon_that_was_never_there_costs_nothing_but_the_hit(model: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with connect(f"ctxstore://127.0.0.1:{port}", timeout_s=1.0) as store:
        started = time.monotonic()
        with session_of(model, store, offload_timeout_s=1.0) as session:
            generation = session.generate(PROMPT, **GREEDY)
            assert generation.new_tokens == plain(model, PROMPT)
            assert session.wait(20)
            assert session.offload_stats.stored_chunks == 0
        assert time.monotonic() - started < 15


def test_a_daemon_that_dies_and_returns_under_a_session(model: Any, tmp_path: Path) -> None:
    node = DemoNode(tmp_path, memory="128MiB", disk="1GiB", listen=f"127.0.0.1:{_three_ports()}")
    try:
        address = node.start()
        with (
            connect(address, timeout_s=5.0) as store,
            session_of(model, store, load_timeout_s=3.0, offload_timeout_s=3.0) as session,
        ):
            expected = session.generate(PROMPT, **GREEDY).new_tokens
            assert session.wait(30)
            store.flush()
            node.kill()
            alone = session.generate(PROMPT, **GREEDY)
            assert alone.stats.rehydrated_tokens == 0
            assert alone.new_tokens == expected
            session.wait(30)
            node.start()
            until = time.monotonic() + 20
            while True:
                again = session.generate(PROMPT, **GREEDY)
                assert again.new_tokens == expected
                if again.stats.rehydrated_tokens == 6 * CHUNK_TOKENS:
                    break
                assert time.monotonic() < until, "the session did not find its daemon again"
    finally:
        node.stop()


def test_a_stopped_daemon_delays_a_call_by_its_deadline_at_most(model: Any, node: DemoNode) -> None:
    address = node.start()
    expected = run_turn(model, address, PROMPT)[0].new_tokens
    with (
        connect(address) as store,
        session_of(model, store, load_timeout_s=1.0, offload_timeout_s=1.0) as session,
    ):
        assert session.generate(PROMPT, **GREEDY).stats.rehydrated_tokens == 6 * CHUNK_TOKENS
        session.wait(30)
        os.kill(node.pid, signal.SIGSTOP)
        try:
            stopped = session.generate(PROMPT, **GREEDY)
        finally:
            os.kill(node.pid, signal.SIGCONT)
        assert stopped.new_tokens == expected
        assert stopped.stats.rehydrated_tokens == 0
        assert stopped.stats.load_s < 3
        assert session.wait(30)


def _three_ports() -> int:
    """A port whose two successors are free too (control, data, HTTP)."""
    for _ in range(50):
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
            try:
                for other in (port + 1, port + 2):
                    socket.create_server(("127.0.0.1", other)).close()
            except OSError:
                continue
        return port
    raise AssertionError("no three free ports in a row")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_state_comes_back_bit_identical(dtype: str, node: DemoNode) -> None:
    model = tiny_llama(dtype=dtype)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([PROMPT]), past_key_values=cache, use_cache=True)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    address = node.start()
    with connect(address) as store, session_of(model, store) as session:
        assert session.offload(PROMPT, cache)
        assert session.wait(30)
        store.flush()
    node.kill()
    address = node.start()
    with connect(address) as store, session_of(model, store) as session:
        back, loaded = session.rehydrate(PROMPT)
    assert loaded.tokens == 6 * CHUNK_TOKENS
    for layer, (keys, values) in zip(back.layers, before, strict=True):
        assert torch.equal(layer.keys, keys[:, :, : loaded.tokens])
        assert torch.equal(layer.values, values[:, :, : loaded.tokens])


def test_an_unsupported_model_is_refused_before_the_store_is_touched() -> None:
    config = transformers.MistralConfig(**SMALL, sliding_window=16)
    with (
        connect("ctxstore://127.0.0.1:1", timeout_s=0.5) as store,
        pytest.raises(ValueError, match="DynamicSlidingWindowLayer"),
    ):
        ContextSession(transformers.MistralForCausalLM(config).eval(), store)
