"""I6: tenants and cache salts never share a block id or a file, whatever their prompts say."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actors.engines.fake_engine import FakeEngine
from actors.sequence import SamplingParams
from actors.turn import TurnRequest
from storage.bundle import write_bundle
from storage.cache_file import Chain
from storage.card import AgentId, CacheCard
from storage.fork import fork
from storage.imports import import_bundle, open_bundle
from storage.store import CacheStore
from tests.loops import Stream, make_loop, settle, user
from tests.store_contract import AGENT, BOB, FIXED, KEY, template
from tests.test_bundle import sample_agent

LONG = "Tell me about the sea, the wind and the old harbour of the town. " * 10


def ids_of(chain: Chain, tokens: list[int], size: int = 4) -> set[str]:
    """Every id the chain gives to these tokens: of whole blocks, and of all segments after each."""
    found, parent = set(), ""
    for start in range(0, len(tokens), size):
        block = tokens[start : start + size]
        for stop in range(1, len(block) + 1):
            for first in range(stop):
                found.add(chain.segment_id(parent, block[:stop], first))
        if len(block) == size:
            parent = chain.block_id(parent, block)
            found.add(parent)
    return found


# Few letters, so that tenants and salts are often the same text, cut in two at another place.
names = st.text("ab-", max_size=3)
chains = st.builds(Chain, st.sampled_from(["00" * 32, "0a" * 32]), st.sampled_from(["q4", "f16"]),
                   names, names)  # fmt: skip
prompts = st.lists(st.integers(0, 2), min_size=1, max_size=10)


@settings(FIXED, max_examples=300)
@given(chains, chains, prompts, prompts)
@example(Chain("00", "q4", "ab", ""), Chain("00", "q4", "a", "b"), [1], [1])
@example(Chain("00", "q4", "a", "b"), Chain("00", "q4a", "", "b"), [1], [1])
def test_chains_share_ids_only_when_all_is_equal(one, other, prompt, second):
    """Same chain: exactly the ids of the common prefix. Any field different: none, even for equal
    prompts."""
    ours, theirs = ids_of(one, prompt), ids_of(other, second)
    if one != other:
        assert not ours & theirs
        assert not ours & ids_of(other, prompt)
        return
    same = next((i for i, (a, b) in enumerate(zip(prompt, second, strict=False)) if a != b), None)
    common = prompt[: min(len(prompt), len(second)) if same is None else same]
    assert ours & theirs == ids_of(one, common)


@settings(FIXED, max_examples=100)
@given(st.text(min_size=1, max_size=32), st.text(max_size=32), prompts)
def test_salted_memory_never_meets_a_shared_chain(salt, other_salt, prompt):
    """What is not the plain prefill of its chain (a range, compacted, encoded again, imported)
    starts from a random salt: no id of it is one of the shared chain or of another salt's."""
    shared = Chain(KEY.digest, "q4", "acme")
    salted = replace(shared, cache_salt=salt)
    assert not ids_of(salted, prompt) & ids_of(shared, prompt)
    if salt != other_salt:
        assert not ids_of(salted, prompt) & ids_of(replace(shared, cache_salt=other_salt), prompt)
    # and nothing that follows it: a salted block cannot be a parent in the shared chain
    block = salted.block_id("", prompt)
    assert salted.block_id(block, prompt) != shared.block_id(shared.block_id("", prompt), prompt)


def files_of(store: CacheStore, tenant: str) -> set[str]:
    return set(store.files.fs.find(f"{store.files.root}/blocks/{tenant}"))


def runs_of(card: CacheCard) -> set[str]:
    return {ref.id for b in card.branches for ref in (*b.blocks, *b.tail)}


def test_equal_prompts_of_two_tenants_share_nothing(tmp_path: Path) -> None:
    """Through the whole replica: the same conversation in two tenants, and twice in one."""
    loop = make_loop(FakeEngine(4), tmp_path / "store")
    agents = [AgentId(tenant, name) for tenant in ("acme", "other") for name in ("x", "y")]
    answers = []
    try:
        for n, agent in enumerate(agents):
            turn = TurnRequest(f"turn-{n}", agent, (user(LONG),), SamplingParams(20, 0.0))
            stream = Stream(turn)
            loop.submit(turn, stream)
            answers.append(stream.result())
        settle(loop)
        store, key = loop.memory.store, loop.memory.key
        found = [store.latest(agent, key) for agent in agents]
    finally:
        loop.close()
    assert len({tuple(answer.prompt) for answer in answers}) == 1
    cards = [loaded.card for loaded in found if loaded is not None]
    ids = [runs_of(card) for card in cards]
    assert len(cards) == 4
    assert min(len(x) for x in ids) >= 2
    assert ids[0] & ids[1]  # one tenant's agents share their prefix, or this proves nothing
    assert ids[2] & ids[3]
    assert not (ids[0] | ids[1]) & (ids[2] | ids[3])
    stored = {tenant: files_of(store, tenant) for tenant in ("acme", "other")}
    names = {
        tenant: {p.rsplit("/", 1)[1].split(".")[0] for p in stored[tenant]} for tenant in stored
    }
    assert names == {"acme": ids[0] | ids[1], "other": ids[2] | ids[3]}
    block = cards[0].branches[0].blocks[0]
    assert store.get_block("acme", block, "full") is not None
    assert store.get_block("other", block, "full") is None


@pytest.mark.parametrize("tenant", ["acme", "other"])
def test_an_import_and_what_follows_it_meets_no_shared_chain(tenant: str) -> None:
    """Its own blocks, those a fork of it takes over, and those computed after it."""
    store = CacheStore(f"memory://isolation-{tenant}")
    card = sample_agent(store)
    file = io.BytesIO()
    write_bundle(store, card, file)
    raw = file.getvalue()
    bundle = open_bundle(lambda a, b: raw[a:b], len(raw), "p")
    found = import_bundle(store, bundle, template(BOB, AgentId(tenant, "imported"))).card
    forked = fork(store, found.agent, template(BOB, AgentId(tenant, "forked")))
    assert forked is not None
    assert forked.card.cache_salt == found.cache_salt != card.cache_salt
    shared = runs_of(card)
    assert not shared & (runs_of(found) | runs_of(forked.card))
    tokens = list(card.branches[0].tokens)
    chain = Chain(KEY.digest, "q4", tenant, found.cache_salt)
    plain = Chain(KEY.digest, "q4", tenant, card.cache_salt)
    later = ids_of(chain, tokens + tokens, KEY.spec.block_tokens)
    assert runs_of(found) & later  # it goes on in its own chain
    assert not later & (shared | ids_of(plain, tokens + tokens, KEY.spec.block_tokens))
    assert store.latest(AGENT, KEY).card == card
    store.files.fs.rm(store.files.root, recursive=True)
