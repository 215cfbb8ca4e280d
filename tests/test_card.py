"""CacheCard: golden bytes, round trips, seals, and cards that must be refused."""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.faults import Faults
from storage import cache_file, card_json
from storage import card as card_module
from storage.card import (
    TENANT_PATTERN,
    AgentId,
    BlockRef,
    BranchCard,
    CacheCard,
    CardRef,
    OpenTurn,
    Owner,
    PartRef,
    Reply,
    card_name,
    decode_card,
    encode_card,
    parse_name,
)
from storage.card_json import MAX_BRANCHES
from storage.errors import CorruptData, Incompatible, StorageError, Unsupported
from storage.spec import CompatibilityKey, LayerSpec, ModelCacheSpec, canonical_json
from storage.store import CacheStore
from tests.store_contract import (
    AGENT,
    ALICE,
    BOB,
    FIXED,
    KEY,
    SPEC,
    card_files,
    card_path,
    flip,
    sample_card,
    template,
    with_tokens,
)

GOLDEN = Path(__file__).parent / "golden"
SIGNING_KEY = b"a signing key"
CARD = sample_card()

# ---- golden bytes


@pytest.mark.parametrize(("name", "key"), [("card", None), ("card.signed", SIGNING_KEY)])
def test_golden_card_files(name, key):
    raw = (GOLDEN / f"{name}.safetensors").read_bytes()
    assert encode_card(CARD, key) == raw
    assert decode_card(raw, name, key=KEY, signing_key=key) == CARD


def test_a_card_is_readable_without_us():
    """Any safetensors reader: token ids as tensors, the rest as JSON; the seal as documented."""
    raw = (GOLDEN / "card.signed.safetensors").read_bytes()
    tensors = safetensors.numpy.load(raw)
    assert {name: x.tolist() for name, x in tensors.items()} == {
        "tokens.0": list(range(20)),
        "tokens.5": [],
    }
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    metadata = json.loads(header["__metadata__"]["kvferry"])
    card = metadata["card"]
    assert metadata["schema"] == "kvferry.card.v1"
    assert (card["epoch"], card["generation"]) == (3, 2)
    assert card["base"] == {"epoch": 2, "generation": 9, "sha256": "cd" * 32}
    assert card["nonce"] == "0123456789abcdef0123456789abcdef"
    assert CompatibilityKey.from_json(card["key"]) == KEY
    sealed = canonical_json(card)
    sealed += b'["tokens.0",20]' + np.arange(20, dtype="<u4").tobytes() + b'["tokens.5",0]'
    assert metadata["seal"] == {
        "kind": "hmac-sha256",
        "value": hmac.new(SIGNING_KEY, sealed, hashlib.sha256).hexdigest(),
    }
    unsigned = cache_file.load_metadata((GOLDEN / "card.safetensors").read_bytes(), "p")
    assert unsigned["seal"] == {"kind": "sha256", "value": hashlib.sha256(sealed).hexdigest()}


def test_agent_digest_is_the_documented_hash():
    agent = AgentId("acme", "../ü", "planner")
    text = f'kvferry.agent.v1["acme","../\\u00fc","planner","{KEY.digest}"]'
    assert agent.digest(KEY.digest) == hashlib.sha256(text.encode()).hexdigest()[:40]
    others = [AgentId("acme", "../ü"), AgentId("acm", "e../ü", "planner"), AgentId("b", "../ü")]
    digests = {x.digest(KEY.digest) for x in (agent, *others)} | {agent.digest("00")}
    assert len(digests) == 5
    assert (str(agent), str(others[0])) == ("../ü/planner", "../ü")


# ---- round trips

counts = st.integers(0, 10**7)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
moments = st.floats(0, 4e9)
words = st.text(max_size=8)
part_refs = st.builds(PartRef, digests, counts)
parts = st.dictionaries(st.sampled_from(["full", "sliding"]), part_refs, min_size=1)
card_refs = st.none() | st.builds(CardRef, counts, counts, digests)
BLOCK_TOKENS = 4


@st.composite
def branches(draw: st.DrawFn) -> BranchCard:
    """Rows of whole blocks and a short tail, at least as many tokens, all positions inside."""

    def refs(rows: list[int]) -> tuple[BlockRef, ...]:
        return tuple(BlockRef(draw(digests), n, draw(parts)) for n in rows)

    blocks = refs([BLOCK_TOKENS] * draw(st.integers(0, 3)))
    tail = refs(draw(st.sampled_from([[], [1], [3], [1, 2], [1, 1, 1]])))
    rows = sum(ref.rows for ref in (*blocks, *tail))
    token = st.integers(0, 2**32 - 1)
    tokens = tuple(draw(st.lists(token, min_size=rows, max_size=rows + 4)))
    inside = st.integers(0, len(tokens))
    spans = st.tuples(inside, inside).map(sorted)
    return BranchCard(
        id=draw(counts),
        tokens=tokens,
        blocks=blocks,
        tail=tail,
        replies=tuple(Reply(*span, draw(words)) for span in draw(st.lists(spans, max_size=2))),
        checkpoints=tuple(draw(st.lists(inside, max_size=3))),
        turn=draw(st.none() | st.builds(OpenTurn, words, inside)),
        last_used=draw(moments),
    )


layers = st.builds(
    LayerSpec,
    st.sampled_from(["full", "sliding", "latent"]),
    st.integers(1, 8),
    st.sampled_from([32, 64, 96]),
    st.sampled_from([0, 32]),
    st.integers(0, 4096),
)
keys = st.builds(
    CompatibilityKey,
    digests,
    digests,
    st.dictionaries(words, st.floats(-1e6, 1e6) | words, max_size=3).map(
        lambda rope: tuple(sorted(rope.items()))
    ),
    st.builds(
        ModelCacheSpec, words, st.lists(layers, max_size=3).map(tuple), st.just(BLOCK_TOKENS)
    ),
)
cards = st.builds(
    CacheCard,
    agent=st.builds(AgentId, words, words, words),
    epoch=counts,
    generation=counts,
    base=card_refs,
    key=keys,
    codec=words,
    codec_parameters=st.dictionaries(words, st.dictionaries(words, counts), max_size=2),
    owner=st.builds(Owner, words, words),
    nonce=words,
    branches=st.lists(branches(), max_size=3, unique_by=lambda b: b.id).map(tuple),
    cache_salt=words,
    tombstone=st.booleans(),
    parent=card_refs,
    provenance=st.dictionaries(words, words, max_size=2),
    created=moments,
    updated=moments,
)


@settings(FIXED, max_examples=150)
@given(cards, st.none() | st.binary(min_size=1))
def test_every_card_comes_back(card, signing_key):
    raw = encode_card(card, signing_key)
    again = decode_card(raw, "p", key=card.key, signing_key=signing_key)
    assert again == card
    assert encode_card(again, signing_key) == raw
    assert again.key.digest == card.key.digest


def test_sizes_and_rows():
    assert CARD.branches[0].rows == 19
    assert CARD.branches[0].blocks[0].size == 2 * 4711
    assert CARD.bytes_stored == 3 * 4711
    twice = replace(CARD, branches=(CARD.branches[0], replace(CARD.branches[0], id=1)))
    assert twice.bytes_stored == CARD.bytes_stored


# ---- names


def test_names_sort_as_epochs_and_generations_do():
    pairs = [(1, 0), (1, 9), (1, 10), (2, 0), (10, 3), (99999999, 99999999)]
    names = [card_name(*pair) for pair in pairs]
    assert names[0] == "00000001-00000000.safetensors"
    assert sorted(names) == names
    assert [parse_name(name) for name in names] == pairs
    assert CARD.name == "00000003-00000002.safetensors"


@pytest.mark.parametrize("name", [
    "", "1-0.safetensors", "00000001-00000000", "00000001-00000000.safetensors.corrupt",
    "00000001-00000000.safetensors\n", "x00000001-00000000.safetensors", ".0123456789abcdef.tmp",
    "٠٠٠٠٠٠٠٩-00000000.safetensors", "-0000001-00000000.safetensors",
])  # fmt: skip
def test_other_names_are_no_cards(name):
    assert parse_name(name) is None


@pytest.mark.parametrize("name", ["", "A", "a/b", "..", "-a", "a\n", "a" * 65, "ü", "a b"])
def test_a_tenant_is_safe_as_a_folder_name(name):
    assert not TENANT_PATTERN.match(name)
    assert TENANT_PATTERN.match("acme-2_x")


# ---- refused

RAW, SIGNED = encode_card(CARD), encode_card(CARD, SIGNING_KEY)
SMALL_CARD = replace(
    CARD,
    key=replace(KEY, spec=replace(SPEC, layers=SPEC.layers[:1])),
    branches=(replace(CARD.branches[0], tail=(), tokens=(*range(18), 2**32 - 1)),),
)
SMALL, SMALL_SIGNED = encode_card(SMALL_CARD), encode_card(SMALL_CARD, SIGNING_KEY)


@pytest.mark.parametrize(("raw", "signing_key"), [(SMALL, None), (SMALL_SIGNED, SIGNING_KEY)])
def test_a_flipped_bit_anywhere_is_refused(raw, signing_key):
    for position in range(len(raw)):
        for bit in range(8):
            assert_corrupt(flip(raw, position, 1 << bit), signing_key)


def test_a_byte_that_json_could_take_for_another_is_refused():
    """White space, other forms of a number (0.5 and 0e5, 1.25 and 1e25), other dtypes."""
    for position, byte in enumerate(SMALL):
        for other in b" \t\n+-.eE0I":
            if other != byte:
                assert_corrupt(flip(SMALL, position, byte ^ other))


def assert_corrupt(raw: bytes, signing_key: bytes | None = None) -> None:
    with pytest.raises(CorruptData) as caught:
        decode_card(raw, "the/path", signing_key=signing_key)
    assert caught.value.path == "the/path"


def test_every_truncation_is_refused():
    for length in range(len(RAW)):
        assert_corrupt(RAW[:length])
    assert_corrupt(RAW + b"\0")


@pytest.mark.parametrize(
    ("raw", "signing_key", "reason"),
    [
        (RAW, SIGNING_KEY, "sealed by sha256, wanted hmac-sha256"),
        (SIGNED, None, "sealed by hmac-sha256, wanted sha256"),
        (SIGNED, b"another key", "hmac-sha256 does not match"),
    ],
)
def test_the_wrong_seal_is_refused(raw, signing_key, reason):
    with pytest.raises(CorruptData, match=reason):
        decode_card(raw, "p", key=KEY, signing_key=signing_key)


def test_another_key_is_refused_field_by_field():
    other = replace(KEY, weights="00" * 32, spec=replace(SPEC, block_tokens=256))
    with pytest.raises(Incompatible) as caught:
        decode_card(RAW, "the/path", key=other)
    assert caught.value.path == "the/path"
    assert caught.value.fields == [
        "spec.block_tokens: 16 != 256",
        f"weights: {'1f' * 32} != {'00' * 32}",
    ]
    assert decode_card(RAW, "p") == CARD


def resealed(change, tokens: dict[str, np.ndarray] | None = None) -> bytes:
    """A card whose description or tensors were changed by someone who can compute the seal."""
    tensors, metadata = cache_file.load(RAW, "p")
    description = metadata["card"]
    change(description)
    tensors = {**tensors, **(tokens or {})}
    sealed = canonical_json(description)
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name], dtype="<u4")
        sealed += canonical_json([name, array.size]) + array.tobytes()
    metadata["seal"]["value"] = hashlib.sha256(sealed).hexdigest()
    return cache_file.save(tensors, metadata)


def test_resealed_is_what_it_says():
    assert resealed(lambda card: None) == RAW


def branch_of(card: dict) -> dict:
    return card["branches"][0]


def block_of(card: dict) -> dict:
    return branch_of(card)["blocks"][0]


@pytest.mark.parametrize(
    "bad", ["", "../../../../etc/passwd", "g" * 64, "A" * 64, "0" * 63, "0" * 64 + "\n", 7, None]
)
def test_an_id_that_is_no_digest_is_refused(bad):
    assert_corrupt(resealed(lambda card: block_of(card).update(id=bad)))
    assert_corrupt(resealed(lambda card: block_of(card)["parts"]["full"].update(sha256=bad)))


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card.pop("owner"),
        lambda card: card.update(epoch="3"),
        lambda card: card.update(epoch=-1),
        lambda card: card.update(generation=2.0),
        lambda card: card.update(epoch=True),
        lambda card: card.update(agent="acme"),
        lambda card: card["agent"].update(extra=1),
        lambda card: card.update(base=[1, 2]),
        lambda card: card.update(branches=None),
        lambda card: card["branches"][0].update(id=9),
        lambda card: card["branches"].append("x"),
        lambda card: card["key"].update(rope=[]),
        lambda card: card["key"]["spec"].update(layers=[{"kind": "full"}]),
        lambda card: block_of(card).update(rows=-1),
        lambda card: block_of(card).update(rows="16"),
        lambda card: block_of(card).update(parts={}),
        lambda card: block_of(card).update(parts={"../x": {"sha256": "0" * 64, "size": 1}}),
        lambda card: block_of(card)["parts"]["full"].update(size=-1),
        lambda card: block_of(card)["parts"]["full"].pop("size"),
        lambda card: card.clear(),
        lambda card: card.update(surprise=1),
        lambda card: card.update(epoch=10**8),
        lambda card: card.update(generation=10**8),
        lambda card: card.update(tombstone=0),
        lambda card: card.update(codec=["q4"]),
        lambda card: card.update(cache_salt=None),
        lambda card: card.update(created="now"),
        lambda card: card.update(provenance={"engine": 7}),
        lambda card: card.update(codec_parameters={"full.0.k": {"bits": "4"}}),
        lambda card: card["agent"].update(session=7),
        lambda card: card["owner"].update(node=None),
        lambda card: card["base"].update(sha256="../x"),
        lambda card: card["parent"].update(epoch=-1),
        lambda card: card["key"]["spec"].update(block_tokens=8),
        lambda card: card["branches"].append(card["branches"][1]),  # one id twice
        lambda card: card["branches"].extend({**card["branches"][1], "id": n} for n in (6, 7)),
        lambda card: branch_of(card).update(id="0"),
        lambda card: branch_of(card).update(surprise=1),
        lambda card: branch_of(card).update(last_used=None),
        lambda card: branch_of(card).update(blocks=branch_of(card)["blocks"] * 2),
        lambda card: block_of(card).update(rows=15),
        lambda card: block_of(card).update(rows=17),
        lambda card: branch_of(card)["tail"][0].update(rows=0),
        lambda card: branch_of(card)["tail"][0].update(rows=5),  # 21 rows of 20 tokens
        lambda card: branch_of(card).update(blocks=[], tail=branch_of(card)["tail"] * 6),
        lambda card: branch_of(card)["replies"][0].update(stop=21),
        lambda card: branch_of(card)["replies"][0].update(start=20),
        lambda card: branch_of(card)["replies"][0].update(start=-1),
        lambda card: branch_of(card)["replies"][0].update(tail=None),
        lambda card: branch_of(card).update(checkpoints=[21]),
        lambda card: branch_of(card).update(checkpoints=[-1]),
        lambda card: branch_of(card).update(checkpoints=["8"]),
        lambda card: branch_of(card)["turn"].update(prompt_tokens=21),
        lambda card: branch_of(card)["turn"].update(id=7),
    ],
)
def test_a_malformed_card_is_corrupt_even_under_a_good_seal(change):
    assert_corrupt(resealed(change))


@pytest.mark.parametrize(
    "tokens",
    [
        np.arange(20, dtype=np.int32),
        np.arange(20, dtype=np.float32),
        np.arange(20, dtype=np.uint64),
        np.arange(20, dtype=np.uint32).reshape(4, 5),
    ],
)
def test_token_ids_of_another_type_are_refused(tokens):
    assert_corrupt(resealed(lambda card: None, {"tokens.0": tokens}))


def test_too_many_branches_are_refused():
    branches = tuple(BranchCard(id=n, tokens=()) for n in range(MAX_BRANCHES))
    full = replace(CARD, branches=branches)
    assert decode_card(encode_card(full), "p") == full
    with pytest.raises(ValueError, match=f"{MAX_BRANCHES + 1} branches"):
        encode_card(replace(CARD, branches=(*branches, BranchCard(id=MAX_BRANCHES, tokens=()))))


@pytest.mark.parametrize(
    "change",
    [
        {"id": 5},
        {"tokens": tuple(range(18))},
        {"tail": (replace(CARD.branches[0].tail[0], rows=16),)},
        {"replies": (Reply(8, 21),)},
        {"checkpoints": (21,)},
    ],
)
def test_a_card_that_would_be_refused_is_not_written(change):
    branches = (replace(CARD.branches[0], **change), *CARD.branches[1:])
    with pytest.raises(ValueError, match=r"."):
        encode_card(replace(CARD, branches=branches))


# ---- versions


def written_as(version: int, change=lambda card: card, signing_key=None) -> bytes:
    """The card as a later or an earlier kvferry would write it."""
    tensors, metadata = cache_file.load(SIGNED if signing_key else RAW, "p")
    description = change(metadata["card"])
    schema = f"kvferry.card.v{version}"
    seal = card_module._seal(schema, description, tensors, signing_key)
    return cache_file.save(tensors, {"schema": schema, "card": description, "seal": seal})


@pytest.fixture
def later_reader(monkeypatch):
    """A reader of version 3: v2 calls the salt `salt`, v3 counts generations from 1."""

    def to_v2(card):
        return {"salt": card.pop("cache_salt"), **card}

    def to_v3(card):
        return {"cache_salt": card.pop("salt"), **card, "generation": card["generation"] + 1}

    monkeypatch.setattr(card_json, "UPGRADES", {1: to_v2, 2: to_v3})
    monkeypatch.setattr(card_module, "VERSION", 3)
    return to_v2


def test_older_versions_are_read_through_the_chain_of_upgrades(later_reader):
    """The golden v1 card, a v2 card, and what the reader itself writes, sealed as their writers
    sealed them."""
    expected = replace(CARD, generation=CARD.generation + 1)
    for name, key in (("card", None), ("card.signed", SIGNING_KEY)):
        raw = (GOLDEN / f"{name}.safetensors").read_bytes()
        assert decode_card(raw, "p", key=KEY, signing_key=key) == expected
    assert decode_card(written_as(2, later_reader), "p") == expected
    assert decode_card(written_as(3), "p") == CARD


def test_an_old_card_that_is_malformed_is_still_corrupt(later_reader):
    """A v2 card without its salt, and one whose salt is no text."""
    assert_corrupt(written_as(2))
    assert_corrupt(written_as(2, lambda card: {"salt": 7, "cut": card.pop("cache_salt"), **card}))
    assert_corrupt(written_as(2, lambda card: {**later_reader(card), "salt": 7}))


@pytest.mark.parametrize("signing_key", [None, SIGNING_KEY])
def test_a_newer_card_is_unsupported_and_not_corrupt(signing_key):
    """Even one whose fields nobody here can read; but only under its seal."""
    raw = written_as(2, lambda card: {"unheard": "of"}, signing_key)
    with pytest.raises(Unsupported) as caught:
        decode_card(raw, "the/path", key=KEY, signing_key=signing_key)
    assert str(caught.value) == (
        "the/path: written as kvferry.card.v2, this kvferry reads up to kvferry.card.v1"
    )
    assert not isinstance(caught.value, (CorruptData, Incompatible))
    for position in range(len(raw)):
        assert_corrupt(flip(raw, position), signing_key)


def test_a_version_cannot_be_relabelled():
    """Nobody without the key makes an old card look new, or a new one old."""
    tensors, metadata = cache_file.load(SIGNED, "p")
    metadata["schema"] = "kvferry.card.v2"
    assert_corrupt(cache_file.save(tensors, metadata), SIGNING_KEY)
    tensors, metadata = cache_file.load(written_as(2, signing_key=SIGNING_KEY), "p")
    metadata["schema"] = "kvferry.card.v1"
    assert_corrupt(cache_file.save(tensors, metadata), SIGNING_KEY)


@pytest.mark.parametrize(
    "schema", ["", "kvferry.card.v0", "kvferry.card.v01", "kvferry.card.v", "kvferry.card.v1\n",
    "kvferry.card.v-1", "kvferry.card.v١", "kvferry.block.v1", 1, True],
)  # fmt: skip
def test_what_is_no_schema_is_corrupt(schema):
    tensors, metadata = cache_file.load(RAW, "p")
    assert_corrupt(cache_file.save(tensors, {**metadata, "schema": schema}))


@pytest.fixture
def store_with_a_newer_card(tmp_path):
    """The owner's node was upgraded: its last card is of the next version."""
    faults: list[StorageError] = []
    store = CacheStore(f"file://{tmp_path}", on_fault=faults.append)
    claimed = store.claim(template(BOB)).card
    store.commit(with_tokens(claimed, 1, 2))
    raw = written_as(2, lambda card: {**card, "agent": {"later": 1}})
    store.files.create(card_path(store, 1, 2), raw)
    return store, faults, raw


def test_a_newer_card_is_never_buried(store_with_a_newer_card):
    """No older generation is served instead, no claim is made past it, no file is touched."""
    store, faults, raw = store_with_a_newer_card
    for action in (
        lambda: store.latest(AGENT, KEY),
        lambda: store.claim(template(ALICE)),
        lambda: store.delete(template(ALICE)),
    ):
        with pytest.raises(Unsupported):
            action()
    assert card_files(store) == ["1-0", "1-1", "1-2"]
    assert store.files.read(card_path(store, 1, 2)) == raw
    assert faults == []


def test_a_newer_card_does_not_hide_other_agents(store_with_a_newer_card):
    store, faults, _ = store_with_a_newer_card
    other = store.claim(template(ALICE, AgentId("acme", "another"))).card
    assert [found.card for found in store.cards(["acme"], KEY)] == [other]
    assert [type(fault) for fault in faults] == [Unsupported]
    counted = Faults()
    counted.card(faults[0])
    assert counted == {"incompatible": 1}


def test_other_files_of_ours_are_no_cards():
    assert_corrupt((GOLDEN / "block.q4.safetensors").read_bytes())
    metadata = cache_file.load_metadata(RAW, "p")
    for key in ("card", "seal", "schema"):
        for value in (None, "x", [], {}):
            tensors, _ = cache_file.load(RAW, "p")
            assert_corrupt(cache_file.save(tensors, {**metadata, key: value}))


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_id_that_is_no_u32_cannot_be_written(token):
    with pytest.raises(OverflowError):
        encode_card(replace(CARD, branches=(BranchCard(0, (token,)),)))
