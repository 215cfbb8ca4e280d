"""Exports, imports, forks: golden bytes, round trips, what is not believed and not copied."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from storage import bundle as bundle_module
from storage import imports as imports_module
from storage.bundle import export_agent, write_bundle
from storage.cache_file import PAGE, Chain, header_bytes, load, parse_header, read_header, sha256
from storage.card import (
    AgentId,
    BlockRef,
    BranchCard,
    CacheCard,
    OpenTurn,
    Owner,
    Reply,
    to_json,
)
from storage.claims import Claim, new_card
from storage.codec import encode_rows, get_codec, slice_rows
from storage.errors import (
    AgentExists,
    CorruptData,
    Fenced,
    Incompatible,
    StorageError,
    StoreUnavailable,
    Unsupported,
)
from storage.fork import fork
from storage.imports import Bundle, import_bundle, open_bundle, open_file
from storage.spec import GroupRows, LayerSpec, ModelCacheSpec, canonical_json
from storage.store import CacheStore
from storage.tiers import pack_block, unpack_block
from tests.store_contract import (
    AGENT,
    ALICE,
    BOB,
    KEY,
    SPEC,
    card_path,
    flip,
    sample_rows,
    template,
)

GOLDEN = Path(__file__).parent / "golden"
SIGNING_KEY = b"a signing key of the store"
Q4 = get_codec("q4")
NEW = AgentId("acme", "imported")


def put(store: CacheStore, block_id: str, rows: int, tensors, part="full", tenant="acme"):
    raw = pack_block(Q4, block_id, rows, tensors, part)
    return store.put_block(tenant, block_id, part, raw)


def put_run(store: CacheStore, block_id: str, start: int, rows: int, window: int = 0) -> BlockRef:
    """A run whose rows are sample rows `start` on; with the last `window` of its sliding rows."""
    every = sample_rows(64)
    tensors = slice_rows(encode_rows(SPEC, Q4, every), start, start + rows)
    parts = {"full": put(store, block_id, rows, tensors)}
    if window:
        sliding = encode_rows(SPEC, Q4, every, "sliding")
        sliding = slice_rows(sliding, start + rows - window, start + rows)
        parts["sliding"] = put(store, block_id, window, sliding, "sliding")
    return BlockRef(block_id, rows, parts)


def sample_branches(store: CacheStore, salt: str = "") -> tuple[BranchCard, ...]:
    """Two branches that share a block and part after it; a tail of two segments; a window kept."""
    chain = Chain(KEY.digest, "q4", "acme", salt)
    tokens, other = tuple(range(100, 140)), (*range(100, 116), *range(300, 310))
    first = chain.block_id("", tokens[:16])
    second = chain.block_id(first, tokens[16:32])
    shared = put_run(store, first, 0, 16)
    block = put_run(store, second, 16, 16, window=8)
    tail = (
        put_run(store, chain.segment_id(second, tokens[32:35], 0), 32, 3),
        put_run(store, chain.segment_id(second, tokens[32:38], 3), 35, 3),
    )
    fork_tail = (put_run(store, chain.segment_id(first, other[16:21], 0), 40, 5),)
    turn = OpenTurn("turn-7", 38)
    return (
        BranchCard(0, tokens, (shared, block), tail, (Reply(8, 20, "…"),), (32,), turn, 17.25),
        BranchCard(5, other, (shared,), fork_tail, (), (), None, 18.5),
        BranchCard(6, ()),
    )


def sample_agent(store: CacheStore, salt: str = "") -> CacheCard:
    claimed = store.claim(template(ALICE)).card
    branches = sample_branches(store, salt)
    card = replace(claimed, generation=1, branches=branches, cache_salt=salt)
    return store.commit(card).card


@pytest.fixture
def store(tmp_path) -> CacheStore:
    return CacheStore(f"file://{tmp_path}/store")


@pytest.fixture
def card(store) -> CacheCard:
    return sample_agent(store)


def exported(store: CacheStore, card: CacheCard, signing_key: bytes | None = None) -> bytes:
    file = io.BytesIO()
    write_bundle(store, card, file, signing_key=signing_key)
    return file.getvalue()


def opened(raw: bytes, signing_key: bytes | None = None) -> Bundle:
    return open_bundle(lambda a, b: raw[a:b], len(raw), "the/path", signing_key=signing_key)


def imported(
    store: CacheStore, raw: bytes, agent: AgentId = NEW, signing_key: bytes | None = None, **options
) -> CacheCard:
    return import_bundle(store, opened(raw, signing_key), template(BOB, agent), **options).card


def rows_of(store: CacheStore, card: CacheCard) -> list[dict[str, bytes]]:
    """The stored bytes of every tensor of every run, branch by branch."""
    found = []
    for branch in card.branches:
        for ref in (*branch.blocks, *branch.tail):
            tensors = {}
            for part in ref.parts:
                raw = store.get_block(card.agent.tenant, ref, part)
                rows = load(raw, "p")[1]["rows"]
                tensors |= unpack_block(raw, "p", SPEC, Q4, ref.id, rows, part)
            found.append({name: x.tobytes() for name, x in tensors.items()})
    return found


def text_of(card: CacheCard) -> list[tuple]:
    """What a card says but ids and files."""
    return [
        (b.id, b.tokens, [r.rows for r in b.blocks], [r.rows for r in b.tail], b.replies,
         b.checkpoints, b.last_used) for b in card.branches
    ]  # fmt: skip


# ---- the file


def golden_card() -> tuple[CacheStore, CacheCard]:
    store = CacheStore("memory://golden-export")
    bare = new_card(AGENT, KEY, "q4", Owner("node-a", "1"), provenance={"engine": "sample 1.0"})
    card = replace(
        bare, epoch=3, generation=2, nonce="0123456789abcdef", branches=sample_branches(store),
        created=1600000000.5, updated=1700000000.125,
    )  # fmt: skip
    return store, card


@pytest.mark.parametrize(("name", "key"), [("export", None), ("export.signed", SIGNING_KEY)])
def test_golden_exports(name, key):
    raw = (GOLDEN / f"{name}.safetensors").read_bytes()
    store, card = golden_card()
    assert exported(store, card, key) == raw
    bundle = opened(raw, key)
    assert (bundle.card, bundle.signed) == (card, key is not None)


def test_an_export_is_readable_without_us():
    """Any safetensors reader: tokens, rows and digests as tensors; the seal as documented."""
    raw = (GOLDEN / "export.signed.safetensors").read_bytes()
    _, card = golden_card()
    tensors = safetensors.numpy.load(raw)
    (header,) = np.frombuffer(raw, "<u8", 1)
    assert (8 + header) % PAGE == 0
    table = json.loads(raw[8 : 8 + header])
    metadata = json.loads(table.pop("__metadata__")["kvferry"])
    assert metadata == {
        "schema": "kvferry.export.v1",
        "card_schema": "kvferry.card.v1",
        "card": json.loads(canonical_json(to_json(card))),
    }
    assert tensors["tokens.5"].tolist() == list(card.branches[1].tokens)
    whole = encode_rows(SPEC, Q4, sample_rows(64))
    window = encode_rows(SPEC, Q4, sample_rows(64), "sliding")
    for name, x in whole.items():
        assert tensors[f"runs.1.{name}"].tobytes() == x[:, 16:32].tobytes()
    for name, x in window.items():
        assert tensors[f"runs.1.{name}"].tobytes() == x[:, 24:32].tobytes()
        assert f"runs.0.{name}" not in tensors
    assert {name.split(".")[1] for name in tensors if name.startswith("runs.")} == set("01234")
    assert list(table)[-3:] == ["digests", "seal", "signature"]
    starts = [8 + header + x["data_offsets"][0] for x in table.values()]
    assert starts == sorted(starts)
    first_run = starts[3]
    sealed = raw[:first_run] + tensors["digests"].tobytes()
    assert tensors["seal"].tobytes() == hashlib.sha256(sealed).digest()
    assert tensors["signature"].tobytes() == hmac.digest(SIGNING_KEY, sealed, "sha256")
    full = b"".join(tensors[n].tobytes() for n in table if n.startswith("runs.0."))
    assert tensors["digests"][0].tobytes() == hashlib.sha256(full).digest()
    assert len(tensors["digests"]) == 6


def test_an_import_is_the_same_memory_under_another_name(store, card):
    found = imported(store, exported(store, card))
    assert (found.agent, found.owner, found.epoch, found.generation) == (NEW, BOB, 1, 0)
    assert found.key == card.key
    assert text_of(found) == text_of(card)
    assert rows_of(store, found) == rows_of(store, card)
    assert found.branches[0].turn is None
    assert found.provenance["imported"] == "acme/session-1 1-1"
    assert store.latest(NEW, KEY).card == found
    assert exported(store, card) == exported(store, store.latest(AGENT, KEY).card)


def test_an_import_into_another_store_and_from_a_file(store, card, tmp_path):
    path = tmp_path / "agent.safetensors"
    size = export_agent(store, card, path)
    assert size == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600
    other = CacheStore(f"file://{tmp_path}/other")
    for url in (str(path), f"file://{path}"):
        read, length = open_file(url)
        bundle = open_bundle(read, length, url)
        found = import_bundle(other, bundle, template(BOB), replacing=True).card
        assert rows_of(other, found) == rows_of(store, card)
    assert found.epoch == 2


def test_an_export_over_memory_urls(store, card):
    raw = exported(store, card)
    import fsspec

    fsspec.filesystem("memory").pipe_file("/exports/a", raw)
    read, size = open_file("memory://exports/a")
    assert open_bundle(read, size, "a").card == card
    with pytest.raises(FileNotFoundError):
        open_file("memory://exports/b")
    with pytest.raises(StoreUnavailable):
        open_file("nonsense://exports/b")


def test_an_export_is_there_whole_or_not_at_all(store, card, tmp_path):
    path = tmp_path / "agent.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        export_agent(store, card, path)
    assert path.read_bytes() == b"mine"
    os.unlink(store.block_path("acme", card.branches[0].tail[1], "full"))
    for target in (path, tmp_path / "other"):
        with pytest.raises(CorruptData, match="the block is missing"):
            export_agent(store, card, target, overwrite=True)
    assert path.read_bytes() == b"mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["agent.safetensors", "store"]


def test_a_damaged_block_is_not_exported(store, card):
    path = Path(store.block_path("acme", card.branches[0].blocks[0], "full"))
    sound = path.read_bytes()
    for position in range(0, len(sound), 97):
        path.write_bytes(flip(sound, position))
        with pytest.raises(CorruptData):
            exported(store, card)


def test_a_header_that_is_not_the_verified_files_is_refused(store, card, monkeypatch):
    """Headers are read in ranges, which no digest covers."""

    def moved(read, path):
        header = read_header(read, path)
        tensors = {
            name: replace(info, start=info.start + PAGE, stop=info.stop + PAGE)
            for name, info in header.tensors.items()
        }
        return replace(header, tensors=tensors)

    monkeypatch.setattr(bundle_module, "read_header", moved)
    with pytest.raises(CorruptData, match="changed while it was exported"):
        exported(store, card)


def test_an_agent_too_large_for_one_header_is_refused(store, card, monkeypatch):
    monkeypatch.setattr("storage.cache_file.MAX_HEADER", 5000)
    with pytest.raises(ValueError, match="above the limit"):
        exported(store, card)


# ---- memory


BIG = ModelCacheSpec("big", (LayerSpec("full", 4, 64, 64),) * 8)
BIG_KEY = replace(KEY, spec=BIG)


def big_agent(store: CacheStore, n_blocks: int) -> tuple[CacheCard, int]:
    """An agent of n blocks, and the size of the largest."""
    lead = (8, 256, 4, 64)
    rng = np.random.default_rng(7)
    chain, parent, blocks = Chain(BIG_KEY.digest, "q4", "acme"), "", []
    tokens = tuple(range(256 * n_blocks))
    for n in range(n_blocks):
        rows = (GroupRows(*(rng.standard_normal(lead).astype(np.float16) for _ in "kv")),)
        parent = chain.block_id(parent, tokens[256 * n : 256 * (n + 1)])
        ref = put(store, parent, 256, encode_rows(BIG, Q4, rows))
        blocks.append(BlockRef(parent, 256, {"full": ref}))
    bare = new_card(AGENT, BIG_KEY, "q4", ALICE)
    claimed = store.claim(bare).card
    branch = BranchCard(0, tokens, tuple(blocks))
    card = store.commit(replace(claimed, generation=1, branches=(branch,))).card
    return card, max(ref.size for ref in blocks)


def test_neither_side_holds_more_than_one_block(store, tmp_path):
    """24 blocks of 0.6 MB: the peak is a few blocks, not the agent."""
    card, block = big_agent(store, 24)
    path = tmp_path / "big.safetensors"

    def peak(action: Callable[[], object]) -> int:
        tracemalloc.start()
        action()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(lambda: export_agent(store, card, path)) < 4 * block
    assert path.stat().st_size > 20 * block
    read, size = open_file(str(path))
    bundle = open_bundle(read, size, "p")
    other = CacheStore(f"file://{tmp_path}/other")
    target = new_card(NEW, BIG_KEY, "q4", BOB)
    assert peak(lambda: import_bundle(other, bundle, target)) < 6 * block


def test_an_export_is_opened_without_reading_its_rows(store, tmp_path):
    card, block = big_agent(store, 4)
    raw = exported(store, card)
    asked = []

    def read(start: int, stop: int) -> bytes:
        asked.append(stop - start)
        return raw[start:stop]

    open_bundle(read, len(raw), "p")
    assert sum(asked) < block / 4


# ---- trust


def block_ids(card: CacheCard) -> set[str]:
    return {ref.id for b in card.branches for ref in (*b.blocks, *b.tail)}


@pytest.mark.parametrize(
    ("written_with", "read_with", "tenant"),
    [
        (None, None, "acme"),
        (None, SIGNING_KEY, "acme"),
        (SIGNING_KEY, None, "acme"),
        (b"a foreign key", SIGNING_KEY, "acme"),
        (SIGNING_KEY, SIGNING_KEY, "other"),
    ],
)
def test_an_import_nobody_vouches_for_meets_no_shared_block(
    store, card, written_with, read_with, tenant
):
    raw = exported(store, card, written_with)
    agents = [AgentId(tenant, name) for name in "ab"]
    cards = [imported(store, raw, agent, read_with) for agent in agents]
    salts = {found.cache_salt for found in (card, *cards)}
    assert len(salts) == 3
    assert all(len(found.cache_salt) == 32 for found in cards)
    ids = [block_ids(found) for found in (card, *cards)]
    assert len(set.union(*ids)) == sum(len(x) for x in ids)
    for found in cards:
        chain = Chain(KEY.digest, "q4", tenant, found.cache_salt)
        assert found.branches[0].blocks[0].id == chain.block_id("", range(100, 116))
        assert rows_of(store, found) == rows_of(store, card)


def test_our_own_export_keeps_its_chain(store, tmp_path):
    card = sample_agent(store, "a salt of its own")
    found = imported(store, exported(store, card, SIGNING_KEY), signing_key=SIGNING_KEY)
    assert found.cache_salt == "a salt of its own"
    assert [(b.blocks, b.tail) for b in found.branches] == [
        (b.blocks, b.tail) for b in card.branches
    ]


def test_a_signed_id_that_is_not_the_chains_is_refused(store, card):
    raw = exported(store, replace(card, cache_salt="another"), SIGNING_KEY)
    with pytest.raises(CorruptData, match="does not follow from its tokens"):
        imported(store, raw, signing_key=SIGNING_KEY)


def test_the_key_must_fit(store, card):
    raw = exported(store, card)
    other = replace(KEY, weights="00" * 32, rope=(("base", 1.0),))
    with pytest.raises(Incompatible) as caught:
        import_bundle(store, opened(raw), new_card(NEW, other, "f16", BOB))
    assert caught.value.path == "the/path"
    assert caught.value.fields == [
        "rope.base: 10000.0 != 1.0",
        "rope.type: neox != absent",
        f"weights: {'1f' * 32} != {'00' * 32}",
        "codec: q4 != f16",
    ]


def test_token_ids_must_be_in_the_vocabulary(store, card):
    raw = exported(store, card)
    with pytest.raises(CorruptData, match="outside the vocabulary of 309"):
        imported(store, raw, n_vocab=309)
    assert imported(store, raw, n_vocab=310).branches[1].tokens[-1] == 309


def test_a_living_agent_is_not_overwritten(store, card):
    raw = exported(store, card)
    with pytest.raises(AgentExists) as caught:
        imported(store, raw, AGENT)
    assert caught.value.epoch == 1
    assert store.latest(AGENT, KEY).card == card
    before = len(store.files.fs.find(f"{store.files.root}/blocks"))
    with pytest.raises(AgentExists):
        imported(store, raw, AGENT)
    assert len(store.files.fs.find(f"{store.files.root}/blocks")) == before
    found = imported(store, raw, AGENT, replacing=True)
    assert (found.epoch, found.generation) == (2, 0)
    assert found.base is not None
    assert store.latest(AGENT, KEY).card == found
    store.delete(template(ALICE))
    assert imported(store, raw, AGENT).epoch == 4
    with pytest.raises(Fenced):
        store.commit(replace(card, generation=2))


def test_an_agent_created_meanwhile_wins(store, card, monkeypatch):
    raw = exported(store, card)
    put_block = store.put_block

    def slow(*arguments):
        if not store.epoch(NEW, KEY):
            store.claim(template(ALICE, NEW))
        return put_block(*arguments)

    monkeypatch.setattr(store, "put_block", slow)
    with pytest.raises(AgentExists):
        imported(store, raw)
    assert store.latest(NEW, KEY).card.owner == ALICE


# ---- what is not believed


def rewritten(raw: bytes, change: Callable[[dict, dict], None]) -> bytes:
    """An export that someone changed who can compute the seal; `change` gets card and tensors."""
    header = parse_header(raw, "p")
    metadata = header.metadata
    tensors = {
        name: np.frombuffer(raw[info.start : info.stop], info.dtype).reshape(info.shape)
        for name, info in header.tensors.items()
        if name not in ("seal", "signature", "digests")
    }
    change(metadata, tensors)
    pieces: dict[str, bytes] = {}
    for name, x in tensors.items():
        if name.startswith("runs."):
            part = ".".join(name.split(".")[:3])
            pieces[part] = pieces.get(part, b"") + x.tobytes()
    sums = np.frombuffer(
        b"".join(hashlib.sha256(x).digest() for x in pieces.values()), np.uint8
    ).reshape(-1, 32)
    tensors["digests"] = sums
    table = [(name, x.dtype, x.shape) for name, x in tensors.items()]
    head = header_bytes([*table, ("seal", np.dtype("u1"), (32,))], metadata, align=PAGE)
    raw = head + b"".join(x.tobytes() for x in tensors.values())
    placed = parse_header(head, "p").tensors
    end = max((x.stop for n, x in placed.items() if n.startswith("tokens.")), default=len(head))
    return raw + hashlib.sha256(raw[:end] + sums.tobytes()).digest()


def test_rewritten_is_what_it_says():
    raw = (GOLDEN / "export.safetensors").read_bytes()
    assert rewritten(raw, lambda metadata, tensors: None) == raw


def branch_of(metadata: dict, n: int = 0) -> dict:
    return metadata["card"]["branches"][n]


def widen(name: str, change: Callable[[np.ndarray], np.ndarray]):
    return lambda metadata, tensors: tensors.update({name: change(tensors[name])})


def drop(name: str):
    return lambda metadata, tensors: tensors.pop(name)


def use_twice(metadata: dict, tensors: dict) -> None:
    """One stored block as the first and the second of a branch."""
    branch = branch_of(metadata, 1)
    branch["blocks"] = branch["blocks"] * 2
    branch["tail"] = []
    tensors["tokens.5"] = np.arange(32, dtype=np.uint32)
    for name in list(tensors):
        if name.startswith("runs.4."):
            tensors.pop(name)


def last(name: str):
    """The tensor after all others."""
    return lambda metadata, tensors: tensors.update({name: tensors.pop(name)})


def mixed_up(metadata: dict, tensors: dict) -> None:
    """Two runs whose tensors alternate."""
    names = [n for n in tensors if n.startswith(("runs.2.", "runs.3."))]
    names.sort(key=lambda n: n[7:])
    for name in names + [n for n in tensors if n.startswith("runs.4.")]:
        tensors.update({name: tensors.pop(name)})


def digests_first(metadata: dict, tensors: dict) -> None:
    tensors["digests"] = np.zeros((0, 32), np.uint8)  # filled in later, in this place
    for name in [n for n in tensors if n.startswith("runs.")]:
        tensors.update({name: tensors.pop(name)})


def one_prefix_two_ids(metadata: dict, tensors: dict) -> None:
    branch_of(metadata)["blocks"][0]["id"] = "0" * 64
    # the other branch still names the block by its id: two ids, one run of tokens
    runs = [branch_of(metadata)["blocks"][0], branch_of(metadata, 1)["blocks"][0]]
    assert runs[0]["id"] != runs[1]["id"]
    moved = {}
    for name in list(tensors):
        if name.startswith("runs.4."):
            moved[name.replace("runs.4.", "runs.5.")] = tensors.pop(name)
    for name in list(tensors):
        if name.startswith("runs.0."):
            tensors[name.replace("runs.0.", "runs.4.")] = tensors[name]
    tensors.update(moved)


REFUSED = {
    "another schema": lambda m, t: m.update(schema="kvferry.card.v1"),
    "no card": lambda m, t: m.pop("card"),
    "a card that is none": lambda m, t: m.update(card=["x"]),
    "no schema of a card": lambda m, t: m.update(card_schema=7),
    "an unknown field": lambda m, t: m["card"].update(surprise=1),
    "a huge time": lambda m, t: m["card"].update(created=10**400),
    "a block without rows": lambda m, t: branch_of(m)["blocks"].pop(),
    "a block more": lambda m, t: branch_of(m, 2)["tail"].append(branch_of(m)["tail"][0]),
    "other rows": lambda m, t: branch_of(m)["tail"][0].update(rows=4),
    "a part without rows": lambda m, t: branch_of(m)["tail"][0]["parts"].update(
        sliding=branch_of(m)["tail"][0]["parts"]["full"]
    ),
    "a tensor missing": drop("runs.0.full.0.k.codes"),
    "a run missing": lambda m, t: [t.pop(n) for n in list(t) if n.startswith("runs.2.")],
    "a tensor more": lambda m, t: t.update({"runs.9.full.0.k.codes": t["runs.0.full.0.k.codes"]}),
    "a tensor of no run": lambda m, t: t.update(other=np.zeros(0, np.uint8)),
    "a run without number": lambda m, t: t.update({"runs.01.full.0.k.codes": np.zeros(4, "u1")}),
    "another dtype": widen("runs.0.full.0.k.scales", lambda x: x.astype(np.float32)),
    "another shape": widen("runs.0.full.0.k.codes", lambda x: x.swapaxes(1, 2)),
    "fewer rows": widen("runs.0.full.0.k.codes", lambda x: x[:, :15]),
    "a wider window": widen("runs.1.sliding.0.k.codes", lambda x: np.repeat(x, 4, axis=1)),
    "other windows": widen("runs.1.sliding.0.k.codes", lambda x: x[:, :4]),
    "no tokens": drop("tokens.0"),
    "fewer tokens": widen("tokens.0", lambda x: x[:37]),
    "signed tokens": widen("tokens.0", lambda x: x.astype(np.int32)),
    "tokens of nobody": lambda m, t: t.update({"tokens.9": np.zeros(1, np.uint32)}),
    "tokens after the rows": last("tokens.5"),
    "rows in another order": last("runs.2.full.0.k.codes"),
    "rows of two runs mixed up": mixed_up,
    "digests before the rows": digests_first,
    "a geometry no codec stores": lambda m, t: m["card"]["key"]["spec"]["layers"][0].update(
        key_dim=2
    ),
    "one block at two places": use_twice,
    "one place, two blocks": one_prefix_two_ids,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_export_is_corrupt_even_under_a_good_seal(name, store):
    raw = (GOLDEN / "export.safetensors").read_bytes()
    bad = rewritten(raw, REFUSED[name])
    with pytest.raises(CorruptData) as caught:
        imported(store, bad)
    assert caught.value.path == "the/path"
    assert store.epoch(NEW, KEY) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_refused(value, store):
    """Whatever the codec's own check of a block refuses is refused here."""

    def poison(metadata, tensors):
        scales = tensors["runs.0.full.0.k.scales"].copy()
        scales.flat[3] = value
        tensors["runs.0.full.0.k.scales"] = scales

    raw = (GOLDEN / "export.safetensors").read_bytes()
    with pytest.raises(CorruptData):
        imported(store, rewritten(raw, poison))


def test_newer_exports_are_unsupported(store):
    raw = (GOLDEN / "export.safetensors").read_bytes()
    for change in (
        lambda m, t: m.update(schema="kvferry.export.v2"),
        lambda m, t: m.update(card_schema="kvferry.card.v2"),
    ):
        with pytest.raises(Unsupported):
            imported(store, rewritten(raw, change))


def test_an_unknown_codec_is_named(store):
    raw = (GOLDEN / "export.safetensors").read_bytes()
    with pytest.raises(Incompatible, match="unknown codec 'q0'"):
        opened(rewritten(raw, lambda m, t: m["card"].update(codec="q0")))


@pytest.mark.slow
def test_a_flipped_bit_anywhere_is_refused():
    """In head and trailer when it is opened, in the rows when they are read; a signature that is
    damaged is a foreign one."""
    raw = (GOLDEN / "export.signed.safetensors").read_bytes()
    store = CacheStore("memory://flipped")
    header = parse_header(raw, "p")
    signature = header.tensors["signature"].start
    for position in [*range(0, header.data + 400, 3), *range(header.data, len(raw), 41)]:
        bad = flip(raw, position, 1 << position % 8)
        if position >= signature:
            assert not opened(bad, SIGNING_KEY).signed
            continue
        with pytest.raises((CorruptData, Unsupported)):
            imported(store, bad, signing_key=SIGNING_KEY)
    assert store.epoch(NEW, KEY) == 0


def test_every_truncation_is_refused():
    raw = (GOLDEN / "export.safetensors").read_bytes()
    for length in [*range(0, len(raw), 53), *range(len(raw) - 40, len(raw))]:
        with pytest.raises(CorruptData):
            opened(raw[:length])
    with pytest.raises(CorruptData):
        opened(raw + b"\0")


def test_a_file_that_shrinks_meanwhile_is_corrupt(store):
    raw = (GOLDEN / "export.safetensors").read_bytes()
    bundle = opened(raw)
    short = replace(bundle, read=lambda a, b: raw[a : min(b, bundle.pieces[2].start + 5)])
    with pytest.raises(CorruptData, match="ends at byte"):
        import_bundle(store, short, template(BOB, NEW))


def test_too_many_tokens_are_not_read(monkeypatch):
    raw = (GOLDEN / "export.safetensors").read_bytes()
    monkeypatch.setattr(imports_module, "MAX_TOKENS", 50)
    with pytest.raises(CorruptData, match="more than 50 token ids"):
        opened(raw)


def test_a_part_above_the_limit_is_not_read(monkeypatch):
    raw = (GOLDEN / "export.safetensors").read_bytes()
    monkeypatch.setattr(bundle_module, "MAX_PART", 100)
    with pytest.raises(CorruptData, match=r"takes .* bytes"):
        opened(raw)


# ---- fork


def test_a_fork_reads_and_writes_no_block(store, card, monkeypatch):
    for name in ("put_block", "get_block"):
        monkeypatch.setattr(store, name, lambda *arguments: pytest.fail("a block is touched"))
    files = store.files.fs.find(store.files.root)
    claim = fork(store, AGENT, template(BOB, NEW))
    assert isinstance(claim, Claim)
    found = claim.card
    written = set(store.files.fs.find(store.files.root)) - set(files)
    assert written == {card_path(store, 1, 0, NEW)}
    assert (found.agent, found.owner, found.epoch, found.generation) == (NEW, BOB, 1, 0)
    raw = store.files.read(card_path(store, 1, 1))
    assert (found.parent.epoch, found.parent.generation) == (1, 1)
    assert found.parent.sha256 == sha256(raw)
    assert [b.blocks for b in found.branches] == [b.blocks for b in card.branches]
    assert text_of(found) == text_of(card)
    assert all(branch.turn is None for branch in found.branches)
    assert store.latest(NEW, KEY).card == found
    assert store.latest(AGENT, KEY).card == card


def test_forks_of_a_salted_agent_stay_in_its_chain(store):
    sample_agent(store, "pepper")
    assert fork(store, AGENT, template(BOB, NEW)).card.cache_salt == "pepper"


def test_a_fork_of_nobody_is_a_miss(store):
    assert fork(store, AGENT, template(BOB, NEW)) is None
    store.claim(template(ALICE))
    store.delete(template(ALICE))
    assert fork(store, AGENT, template(BOB, NEW)) is None
    assert store.epoch(NEW, KEY) == 0


def test_a_fork_overwrites_nobody(store, card):
    store.claim(template(BOB, NEW))
    with pytest.raises(AgentExists):
        fork(store, AGENT, template(BOB, NEW))
    store.delete(template(BOB, NEW))
    assert fork(store, AGENT, template(BOB, NEW)).card.epoch == 3


def test_a_fork_stays_in_its_tenant_and_codec(store, card):
    with pytest.raises(ValueError, match="cannot be forked by other"):
        fork(store, AGENT, template(BOB, AgentId("other", "imported")))
    with pytest.raises(Incompatible, match="codec: q4 != f16"):
        fork(store, AGENT, template(BOB, NEW, "f16"))
    assert issubclass(AgentExists, StorageError)
