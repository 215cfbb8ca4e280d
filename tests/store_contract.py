"""What every backend of CacheStore must do, as a class to inherit, and the samples it works on.

A backend's test class overrides the fixture `url`. Used by test_store; the samples also by the
tests of card, cache_file and tiers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings

from storage.cache_file import Chain, sha256
from storage.card import (
    AgentId,
    BlockRef,
    BranchCard,
    CacheCard,
    CardRef,
    OpenTurn,
    Owner,
    PartRef,
    Reply,
    encode_card,
)
from storage.claims import new_card
from storage.errors import CorruptData, Fenced, Incompatible, StorageError, StoreUnavailable
from storage.spec import CompatibilityKey, GroupRows, KVRows, LayerSpec, ModelCacheSpec
from storage.store import CacheStore

FIXED = settings(deadline=None, derandomize=True, database=None)

SPEC = ModelCacheSpec(
    "sample",
    (
        LayerSpec("full", 2, 32, 32),
        LayerSpec("sliding", 1, 32, 32, window=8),
        LayerSpec("full", 2, 32, 32),
        LayerSpec("latent", 1, 96, 0),
    ),
    block_tokens=16,
)
KEY = CompatibilityKey("1f" * 32, "2e" * 32, (("base", 10000.0), ("type", "neox")), SPEC)
AGENT = AgentId("acme", "session-1")
ALICE, BOB = Owner("node-a", "1"), Owner("node-b", "1")


def sample_vectors(*shape: int) -> np.ndarray:
    """float16 in [-4, 4) from integer arithmetic alone: the same on every machine and version."""
    index = np.arange(np.prod(shape), dtype=np.uint64).reshape(shape)
    mixed = (index + np.uint64(1)) * np.uint64(2654435761) % np.uint64(1 << 32) >> np.uint64(16)
    return ((mixed.astype(np.float32) - 32768) / 8192).astype(np.float16)


def sample_rows(n_rows: int, spec: ModelCacheSpec = SPEC) -> KVRows:
    rows = []
    for g in spec.groups:
        lead = (len(g.layers), n_rows, g.n_kv_heads)
        rows.append(
            GroupRows(sample_vectors(*lead, g.key_dim), -sample_vectors(*lead, g.value_dim))
        )
    return tuple(rows)


def sample_card() -> CacheCard:
    """Every field set to something."""
    chain = Chain(KEY.digest, "q4", AGENT.tenant, "salt")
    block = chain.block_id("", range(16))
    part = PartRef("ab" * 32, 4711)
    branch = BranchCard(
        id=0,
        tokens=tuple(range(20)),
        blocks=(BlockRef(block, 16, {"full": part, "sliding": part}),),
        tail=(BlockRef(chain.segment_id(block, range(16, 19), 0), 3, {"full": part}),),
        replies=(Reply(8, 19, "…\n"),),
        checkpoints=(8, 19),
        turn=OpenTurn("turn-7", 19),
        last_used=1700000000.25,
    )
    return CacheCard(
        agent=AgentId("acme", "session-1", "planner"),
        epoch=3,
        generation=2,
        base=CardRef(2, 9, "cd" * 32),
        key=KEY,
        codec="q4",
        codec_parameters={"full.0.k": {"bits": 4, "group": 32, "hadamard": 32}},
        owner=ALICE,
        nonce="0123456789abcdef0123456789abcdef",
        branches=(branch, BranchCard(id=5, tokens=())),
        cache_salt="salt",
        parent=CardRef(1, 1, "ef" * 32),
        provenance={"engine": "sample 1.0"},
        created=1600000000.5,
        updated=1700000000.123,
    )


def template(owner: Owner, agent: AgentId = AGENT, codec: str = "q4") -> CacheCard:
    return new_card(agent, KEY, codec, owner)


def with_tokens(card: CacheCard, *tokens: int) -> CacheCard:
    """The owner's next generation, remembering these tokens."""
    branch = BranchCard(id=0, tokens=tokens)
    return replace(card, generation=card.generation + 1, branches=(branch,))


def tokens_of(store: CacheStore, agent: AgentId = AGENT) -> tuple[int, ...] | None:
    """What a reader finds: None for an unknown, deleted or cold agent."""
    found = store.latest(agent, KEY)
    if found is None or found.card.tombstone or not found.card.branches:
        return None
    return found.card.branches[0].tokens


def card_path(store: CacheStore, epoch: int, generation: int, agent: AgentId = AGENT) -> str:
    name = f"{epoch:08d}-{generation:08d}.safetensors"
    return f"{store.files.root}/agents/{agent.tenant}/{agent.digest(KEY.digest)}/{name}"


def card_files(store: CacheStore, agent: AgentId = AGENT) -> list[str]:
    """`<epoch>-<generation>` of everything in the agent's folder, without the leading zeros."""
    folder = card_path(store, 0, 0, agent).rsplit("/", 1)[0]
    names = [path.rsplit("/", 1)[1] for path in store.files.fs.find(folder)]
    assert all(name.endswith(".safetensors") for name in names), names
    return ["-".join(str(int(x)) for x in name.split(".")[0].split("-")) for name in names]


def flip(raw: bytes, position: int, mask: int = 1) -> bytes:
    changed = bytearray(raw)
    changed[position] ^= mask
    return bytes(changed)


def race(n: int, attempt: Callable[[int], object]) -> list[object]:
    """attempt(i) on n threads that start together; results, or the StorageError raised."""
    barrier = threading.Barrier(n)
    results: list[object] = [None] * n

    def run(i: int) -> None:
        barrier.wait(timeout=10)
        try:
            results[i] = attempt(i)
        except StorageError as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return results


class StoreContract:
    @pytest.fixture
    def url(self, tmp_path):
        raise NotImplementedError

    @pytest.fixture
    def faults(self):
        return []

    @pytest.fixture
    def store(self, url, faults):
        store = CacheStore(url, on_fault=faults.append)
        yield store
        if store.files.fs.exists(store.files.root):
            store.files.fs.rm(store.files.root, recursive=True)

    def test_probe_passes_and_leaves_nothing(self, store):
        store.probe()
        store.probe()
        assert store.files.fs.find(store.files.root) == []

    # ---- blocks

    def put(self, store, raw=b"the rows", block_id="3c" * 32):
        part = store.put_block("acme", block_id, "full", raw)
        ref = BlockRef(block_id, 16, {"full": part})
        return ref, store.block_path("acme", ref, "full")

    def test_a_block_comes_back(self, store):
        ref, path = self.put(store)
        assert store.get_block("acme", ref, "full") == b"the rows"
        assert ref.parts["full"] == PartRef(sha256(b"the rows"), 8)
        assert path.endswith(f"/blocks/acme/3c3/{'3c' * 32}.full.{sha256(b'the rows')}.safetensors")
        assert store.files.fs.find(store.files.root) == [path]

    def test_a_missing_block_is_none(self, store):
        ref, path = self.put(store)
        assert store.get_block("other", ref, "full") is None
        store.files.fs.rm_file(path)
        assert store.get_block("acme", ref, "full") is None

    @pytest.mark.parametrize("bad", [b"", b"the row", b"the rowz", b"the rows!"])
    def test_a_damaged_block_is_refused_by_name(self, store, bad):
        ref, path = self.put(store)
        store.files.fs.pipe_file(path, bad)
        with pytest.raises(CorruptData) as caught:
            store.get_block("acme", ref, "full")
        assert caught.value.path == path

    def test_a_sound_variant_is_adopted(self, store):
        first, _ = self.put(store, b"one encoder")
        second, _ = self.put(store, b"another encoder's bytes")
        assert second == first
        assert len(store.files.fs.find(store.files.root)) == 1
        assert self.put(store, b"other id", "4d" * 32)[0] != first

    def test_a_block_is_found_by_its_id(self, store):
        assert store.find_block("acme", "3c" * 32, "full") is None
        ref, path = self.put(store)
        assert store.find_block("acme", ref.id, "full") == ref.parts["full"]
        assert store.find_block("acme", ref.id, "sliding") is None
        assert store.find_block("acme", "3c" * 31 + "3d", "full") is None
        assert store.find_block("other", ref.id, "full") is None
        store.files.fs.mv(path, f"{path}.corrupt")
        assert store.find_block("acme", ref.id, "full") is None

    def test_a_corrupt_variant_is_set_aside_once(self, store, faults):
        _, path = self.put(store)
        store.files.fs.pipe_file(path, b"the rowz")
        ref, again = self.put(store)
        assert again == path
        assert store.get_block("acme", ref, "full") == b"the rows"
        assert [type(fault) for fault in faults] == [CorruptData]
        assert faults[0].path == path
        self.put(store, b"a third writer")
        assert sorted(store.files.fs.find(store.files.root)) == [path, f"{path}.corrupt"]
        assert store.files.fs.cat_file(f"{path}.corrupt") == b"the rowz"
        assert len(faults) == 1

    def test_a_twin_that_wrote_other_bytes_is_not_taken_for_ours(self, store, url):
        ref, path = self.put(store)
        store.files.fs.rm_file(path)
        writer = Interleaved(url)
        writer.before_create = lambda: store.files.create(path, b"the rowz")
        with pytest.raises(StoreUnavailable):
            self.put(writer)
        assert self.put(writer) == (ref, path)

    def test_what_was_set_aside_is_not_looked_at_again(self, store, faults):
        _, path = self.put(store)
        store.files.fs.rm_file(path)
        first_in_order = path.replace(sha256(b"the rows"), "0" * 64)
        store.files.create(first_in_order, b"the rowz")
        for _ in range(3):
            assert self.put(store)[1] == path
        assert [fault.path for fault in faults] == [first_in_order]
        assert sorted(store.files.fs.find(store.files.root)) == [f"{first_in_order}.corrupt", path]

    def test_parts_and_tenants_do_not_meet(self, store):
        ref, _ = self.put(store)
        sliding = store.put_block("acme", ref.id, "sliding", b"window rows")
        other = store.put_block("other", ref.id, "full", b"their rows")
        assert len({ref.parts["full"], sliding, other}) == 3
        assert len(store.files.fs.find(store.files.root)) == 3

    def test_racing_writers_agree_on_one_sound_block(self, store):
        results = race(8, lambda i: self.put(store, b"same bytes")[0])
        assert len({str(result) for result in results}) == 1
        assert store.get_block("acme", results[0], "full") == b"same bytes"
        assert len(store.files.fs.find(store.files.root)) == 1

    def test_nothing_is_overwritten(self, store):
        _, path = self.put(store)
        with pytest.raises(FileExistsError):
            store.files.create(path, b"other")
        assert store.files.fs.cat_file(path) == b"the rows"

    # ---- claim

    def test_an_unknown_agent(self, store):
        assert store.latest(AGENT, KEY) is None
        assert store.epoch(AGENT, KEY) == 0
        assert list(store.cards(["acme"], KEY)) == []

    def test_a_claim_raises_the_epoch_and_inherits(self, store):
        first = store.claim(template(ALICE))
        assert (first.card.epoch, first.card.generation, first.card.base) == (1, 0, None)
        assert first.previous is None
        committed = store.commit(with_tokens(first.card, 1, 2, 3))
        second = store.claim(template(BOB))
        assert (second.card.epoch, second.card.generation) == (2, 0)
        assert second.card.base == committed.ref
        assert second.card.branches == committed.card.branches
        assert second.card.owner == BOB
        assert second.card.nonce not in ("", first.card.nonce)
        assert second.card.created == first.card.created
        assert second.previous == committed.card
        assert store.latest(AGENT, KEY).card == second.card
        assert store.epoch(AGENT, KEY) == 2

    def test_base_is_the_digest_of_the_cards_file(self, store):
        first = store.claim(template(ALICE)).card
        raw = store.files.fs.cat_file(card_path(store, 1, 0))
        assert store.claim(template(BOB)).card.base == CardRef(1, 0, sha256(raw))
        assert raw == encode_card(first)

    def test_a_claim_after_a_given_epoch(self, store):
        store.claim(template(ALICE), after=0)
        with pytest.raises(Fenced) as caught:
            store.claim(template(BOB), after=0)
        assert caught.value.epoch == 1
        assert store.claim(template(BOB), after=1).card.epoch == 2

    def test_a_racing_claim_has_one_winner(self, store):
        for epoch in range(5):

            def claim(i, epoch=epoch):
                return store.claim(template(Owner(f"n{i}", "1")), after=epoch).card

            results = race(8, claim)
            won = [result for result in results if isinstance(result, CacheCard)]
            lost = [result for result in results if isinstance(result, Fenced)]
            assert (len(won), len(lost)) == (1, 7), results
            assert store.latest(AGENT, KEY).card == won[0]

    def test_a_free_race_has_one_owner_per_epoch(self, store):
        results = race(8, lambda i: store.claim(template(Owner(f"n{i}", "1"))).card)
        won = [result for result in results if isinstance(result, CacheCard)]
        assert len(won) + sum(isinstance(result, Fenced) for result in results) == 8
        assert len({card.epoch for card in won}) == len(won) >= 1
        newest = max(won, key=lambda card: card.epoch)
        assert store.latest(AGENT, KEY).card == newest
        assert store.epoch(AGENT, KEY) == newest.epoch

    def test_an_epoch_taken_and_cleaned_up_meanwhile_is_not_won(self, store, url):
        slow = Interleaved(url)

        def others():
            store.claim(template(BOB))
            store.commit(with_tokens(store.claim(template(BOB)).card, 1))

        slow.before_create = others
        with pytest.raises(Fenced):
            slow.claim(template(ALICE))
        assert tokens_of(store) == (1,)
        store.commit(with_tokens(store.latest(AGENT, KEY).card, 2))
        assert card_files(store) == ["2-0", "2-1", "2-2"]

    def test_another_codec_starts_cold_and_says_so(self, store, faults):
        owned = store.claim(template(ALICE)).card
        store.commit(with_tokens(owned, 1, 2, 3))
        claim = store.claim(template(BOB, codec="f16"))
        assert claim.card.branches == ()
        assert claim.card.codec == "f16"
        assert [type(fault) for fault in faults] == [Incompatible]
        assert faults[0].fields == ["codec: q4 != f16"]
        assert faults[0].path == card_path(store, 1, 1)

    # ---- commit

    def test_commits_keep_the_claim_and_the_last_two(self, store):
        card = store.claim(template(ALICE)).card
        for n in range(1, 5):
            loaded = store.commit(with_tokens(card, n))
            card = loaded.card
            assert loaded.ref.generation == n
            assert store.latest(AGENT, KEY) == loaded
        assert card_files(store) == ["1-0", "1-3", "1-4"]

    def test_a_gap_in_the_generations_costs_no_spare(self, store):
        card = store.commit(with_tokens(store.claim(template(ALICE)).card, 1)).card
        store.commit(with_tokens(replace(card, generation=6), 7))
        assert card_files(store) == ["1-0", "1-1", "1-7"]

    def test_the_first_commit_of_an_epoch_removes_the_older_ones(self, store):
        store.commit(with_tokens(store.claim(template(ALICE)).card, 1))
        second = store.claim(template(BOB)).card
        assert card_files(store) == ["1-0", "1-1", "2-0"]
        store.commit(with_tokens(second, 1, 2))
        assert card_files(store) == ["2-0", "2-1"]

    def test_a_commit_after_a_newer_claim_is_fenced(self, store):
        old = store.commit(with_tokens(store.claim(template(ALICE)).card, 1)).card
        store.claim(template(BOB))
        with pytest.raises(Fenced) as caught:
            store.commit(with_tokens(old, 1, 666))
        assert caught.value.epoch == 2
        assert tokens_of(store) == (1,)
        assert card_files(store) == ["1-0", "1-1", "2-0"]

    def test_a_commit_overtaken_by_a_claim_is_fenced_and_never_read(self, store, url):
        zombie = Interleaved(url)
        old = zombie.commit(with_tokens(zombie.claim(template(ALICE)).card, 1)).card
        zombie.before_create = lambda: store.claim(template(BOB))
        with pytest.raises(Fenced):
            zombie.commit(with_tokens(old, 1, 666))
        assert "1-2" in card_files(store)
        assert tokens_of(store) == (1,)
        assert store.claim(template(BOB)).card.branches[0].tokens == (1,)

    def test_what_a_zombie_writes_is_not_read_even_if_the_newest_epoch_is_broken(
        self, store, faults
    ):
        old = store.claim(template(ALICE)).card
        store.claim(template(BOB))
        zombie = with_tokens(old, 666)
        store.files.create(card_path(store, 1, 1), encode_card(zombie))
        path = card_path(store, 2, 0)
        store.files.fs.pipe_file(path, flip(store.files.fs.cat_file(path), -1))
        assert store.latest(AGENT, KEY) is None
        assert [fault.path for fault in faults] == [path]
        assert list(store.cards(["acme"], KEY)) == []
        claim = store.claim(template(BOB))
        assert (claim.card.epoch, claim.card.base, claim.card.branches) == (3, None, ())

    def test_an_unanswered_commit_does_not_fence_its_own_writer(self, store):
        card = store.claim(template(ALICE)).card
        store.files.create(card_path(store, 1, 1), encode_card(with_tokens(card, 1)))
        loaded = store.commit(with_tokens(card, 1, 2))
        assert loaded.card.generation == loaded.ref.generation == 2
        assert tokens_of(store) == (1, 2)

    def test_a_generation_of_another_writer_fences(self, store):
        card = store.claim(template(ALICE)).card
        other = replace(with_tokens(card, 666), nonce="f" * 32)
        store.files.create(card_path(store, 1, 1), encode_card(other))
        with pytest.raises(Fenced):
            store.commit(with_tokens(card, 1))
        assert tokens_of(store) == (666,)

    # ---- reading

    def test_a_corrupt_card_falls_back_to_the_generation_before(self, store, faults):
        card = store.claim(template(ALICE)).card
        for n in (1, 2):
            card = store.commit(with_tokens(card, n)).card
        path = card_path(store, 1, 2)
        store.files.fs.pipe_file(path, store.files.fs.cat_file(path)[:-1])
        assert tokens_of(store) == (1,)
        assert [(type(fault), fault.path) for fault in faults] == [(CorruptData, path)]
        assert [loaded.card.generation for loaded in store.cards(["acme"], KEY)] == [1]

    def test_when_nothing_verifies_the_agent_is_cold_and_that_is_told(self, store, faults):
        card = store.claim(template(ALICE)).card
        for n in (1, 2):
            card = store.commit(with_tokens(card, n)).card
        paths = [card_path(store, 1, generation) for generation in (2, 1, 0)]
        for path in paths:
            store.files.fs.pipe_file(path, b"")
        assert store.latest(AGENT, KEY) is None
        assert [fault.path for fault in faults] == paths
        assert store.claim(template(BOB)).card.epoch == 2

    def test_cards_removed_while_they_are_read_are_looked_up_again(self, store, url):
        card = store.commit(with_tokens(store.claim(template(ALICE)).card, 1)).card
        reader = Interleaved(url)

        def owner_goes_on():
            owned = card
            for n in range(2, 6):
                owned = store.commit(with_tokens(owned, n)).card

        reader.before_read = owner_goes_on
        assert tokens_of(reader) == (5,)

    def test_a_card_copied_from_elsewhere_is_refused(self, store, faults):
        other = AgentId("other", "session-1")
        store.commit(with_tokens(store.claim(template(ALICE, other)).card, 1))
        store.claim(template(ALICE))
        copied = store.files.fs.cat_file(card_path(store, 1, 1, other))
        store.files.create(card_path(store, 1, 1), copied)
        renamed = store.files.fs.cat_file(card_path(store, 1, 0))
        store.files.create(card_path(store, 1, 2), renamed)
        assert tokens_of(store) is None
        assert [fault.path for fault in faults] == [card_path(store, 1, n) for n in (2, 1)]

    def test_files_that_are_no_cards_are_passed_over(self, store):
        store.claim(template(ALICE))
        folder = card_path(store, 0, 0).rsplit("/", 1)[0]
        for name in (".0123.tmp", "notes.txt", "00000009-00000000.safetensors.corrupt"):
            store.files.create(f"{folder}/{name}", b"?")
        assert store.epoch(AGENT, KEY) == 1
        assert store.latest(AGENT, KEY).card.epoch == 1

    def test_cards_lists_the_newest_of_every_agent(self, store):
        agents = [AgentId("acme", f"s{n}") for n in range(3)] + [AgentId("other", "s0")]
        for n, agent in enumerate(agents):
            store.commit(with_tokens(store.claim(template(ALICE, agent)).card, n))
        store.claim(template(BOB, agents[1]))
        store.delete(template(BOB, agents[2]))
        another_model = replace(template(ALICE), key=replace(KEY, weights="99" * 32))
        store.claim(another_model)
        assert store.tenants() == ["acme", "other"]
        found = [loaded.card for loaded in store.cards(["other", "acme"], KEY)]
        assert [card.agent.tenant for card in found] == ["other", "acme", "acme"]
        assert {(card.agent.session, card.epoch) for card in found[1:]} == {("s0", 1), ("s1", 2)}
        assert list(store.cards(["nobody"], KEY)) == []

    def test_signed_stores_refuse_what_another_key_signed(self, store, url, faults):
        signed = CacheStore(url, signing_key=b"secret", on_fault=faults.append)
        signed.claim(template(ALICE))
        assert signed.latest(AGENT, KEY) is not None
        assert store.latest(AGENT, KEY) is None
        assert CacheStore(url, signing_key=b"wrong").latest(AGENT, KEY) is None
        assert [type(fault) for fault in faults] == [CorruptData]

    # ---- delete

    def test_delete_leaves_a_tombstone(self, store):
        store.commit(with_tokens(store.claim(template(ALICE)).card, 1))
        store.delete(template(BOB))
        found = store.latest(AGENT, KEY).card
        assert (found.tombstone, found.branches, found.epoch) == (True, (), 2)
        assert card_files(store) == ["2-0"]

    def test_a_late_commit_does_not_resurrect(self, store, url):
        zombie = Interleaved(url)
        old = zombie.claim(template(ALICE)).card
        zombie.before_create = lambda: store.delete(template(BOB))
        with pytest.raises(Fenced):
            zombie.commit(with_tokens(old, 666))
        with pytest.raises(Fenced):
            zombie.commit(with_tokens(old, 666))
        assert tokens_of(store) is None
        assert list(store.cards(["acme"], KEY)) == []

    def test_a_claim_after_delete_starts_empty(self, store):
        owned = replace(store.claim(template(ALICE)).card, cache_salt="old")
        store.commit(with_tokens(owned, 1))
        store.delete(replace(template(BOB), cache_salt="old"))
        claim = store.claim(template(ALICE))
        assert (claim.card.epoch, claim.card.branches, claim.card.cache_salt) == (3, (), "")
        assert not claim.card.tombstone
        store.commit(with_tokens(claim.card, 5))
        assert card_files(store) == ["3-0", "3-1"]


class Interleaved(CacheStore):
    """A writer that others overtake: the hooks run once, right before its next create or read."""

    before_create: Callable[[], object] | None = None
    before_read: Callable[[], object] | None = None

    def __init__(self, url, **options):
        super().__init__(url, **options)
        create = self.files.create

        def hooked(path: str, raw: bytes) -> None:
            hook, self.before_create = self.before_create, None
            if hook:
                hook()
            create(path, raw)

        self.files.create = hooked

    def _read_card(self, path, key):
        hook, self.before_read = self.before_read, None
        if hook:
            hook()
        return super()._read_card(path, key)
