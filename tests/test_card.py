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

from storage import cache_file
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
from storage.errors import CorruptData, Incompatible
from storage.spec import CompatibilityKey, LayerSpec, ModelCacheSpec, canonical_json
from tests.store_contract import FIXED, KEY, SPEC, flip, sample_card

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
block_refs = st.builds(
    BlockRef,
    digests,
    counts,
    st.dictionaries(st.sampled_from(["full", "sliding"]), part_refs, min_size=1),
)
card_refs = st.none() | st.builds(CardRef, counts, counts, digests)
branches = st.builds(
    BranchCard,
    id=counts,
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=20).map(tuple),
    blocks=st.lists(block_refs, max_size=3).map(tuple),
    tail=st.lists(block_refs, max_size=2).map(tuple),
    replies=st.lists(st.builds(Reply, counts, counts, words), max_size=2).map(tuple),
    checkpoints=st.lists(counts, max_size=3).map(tuple),
    turn=st.none() | st.builds(OpenTurn, words, counts),
    last_used=moments,
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
    st.builds(ModelCacheSpec, words, st.lists(layers, max_size=3).map(tuple), st.integers(1, 512)),
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
    branches=st.lists(branches, max_size=3, unique_by=lambda b: b.id).map(tuple),
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
    branches=(replace(CARD.branches[0], tail=(), tokens=(1, 2, 2**32 - 1)),),
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


def block_of(card: dict) -> dict:
    return card["branches"][0]["blocks"][0]


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
