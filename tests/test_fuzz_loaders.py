"""Files that somebody damaged or forged: read, or refused as documented, within bounds.

Two mutators. One works on bytes and knows nothing: flips, cuts, splices, digits. The other works on
the JSON of cards and exports and seals its forgery, so that it comes past the checksum.
"""

from __future__ import annotations

import contextlib
import copy
import random
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import cache_file
from storage import card as card_module
from storage.cache_file import MAX_HEADER, load, load_metadata, read_header
from storage.card import AgentId, BlockRef, decode_card
from storage.codec import get_codec
from storage.errors import CorruptData, Incompatible, StorageError, Unsupported
from storage.imports import import_bundle, open_bundle
from storage.store import CacheStore
from storage.tiers import unpack_block
from tests.store_contract import ALICE, BOB, FIXED, KEY, SPEC, card_path, flip, template
from tests.test_bundle import SIGNING_KEY, opened, rewritten, sample_agent
from tests.test_card import SIGNING_KEY as CARD_KEY

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden"
SEEDS = {path.stem: path.read_bytes() for path in sorted(GOLDEN.glob("*.safetensors"))}
NEW = AgentId("acme", "imported")

# ---- the loaders, as their callers call them


def load_block(raw: bytes) -> object:
    tensors, metadata = load(raw, "p")
    assert sum(x.nbytes for x in tensors.values()) <= len(raw)
    return unpack_block(raw, "p", SPEC, get_codec("q4"), str(metadata.get("id")), 16)


def import_agent(raw: bytes) -> object:
    store = CacheStore("memory://fuzz-imports")
    try:
        return import_bundle(store, opened(raw, SIGNING_KEY), template(BOB, NEW))
    finally:
        if store.files.fs.exists(store.files.root):
            store.files.fs.rm(store.files.root, recursive=True)


LOADERS: dict[str, Callable[[bytes], object]] = {
    "load": lambda raw: load(raw, "p"),
    "load_metadata": lambda raw: load_metadata(raw, "p"),
    "read_header": lambda raw: read_header(lambda a, b: raw[a:b], "p"),
    "unpack_block": load_block,
    "decode_card": lambda raw: decode_card(raw, "p", key=KEY),
    "decode_signed_card": lambda raw: decode_card(raw, "p", signing_key=CARD_KEY),
    "open_bundle": lambda raw: open_bundle(lambda a, b: raw[a:b], len(raw), "p"),
    "import": import_agent,
}
DOCUMENTED = (CorruptData, Incompatible, Unsupported)


def outcome(name: str, raw: bytes) -> str:
    """How a loader ends: "read", or the documented error; anything else fails the test."""
    tracemalloc.start()
    try:
        LOADERS[name](raw)
        end = "read"
    except DOCUMENTED as error:
        end = type(error).__name__
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= 3 * len(raw) + (1 << 20), f"{name} took {peak} bytes for {len(raw)}"
    return end


# ---- mutated bytes


def mutate(rng: random.Random, raw: bytes) -> bytes:
    """One to four changes, most of them in the header, where they do the most."""
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        size = len(changed)
        if size < 16:
            break
        header = min(struct.unpack_from("<Q", changed)[0], size)
        at = rng.randrange(rng.choice([8, max(header, 8), size]))
        other = rng.choice(list(SEEDS.values()))
        length = rng.choice([1, 2, 7, 8, 64, 4096])
        start = rng.randrange(len(other))
        match rng.randrange(9):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.randrange(256)
            case 2:
                del changed[at:]
            case 3:
                del changed[at : at + length]
            case 4:
                changed[at:at] = other[start : start + length]
            case 5:
                changed[at : at + length] = other[start : start + length]
            case 6:
                changed[at:at] = changed[at : at + length]
            case 7:  # another number in the header
                digits = [i for i in range(8, header) if 48 <= changed[i] <= 57]
                if digits:
                    changed[rng.choice(digits)] = rng.choice(b"0123456789")
            case 8:
                struct.pack_into(
                    "<Q", changed, 0, rng.choice([0, 1, header + 1, 2**31, 2**63, size])
                )
    return bytes(changed)


@pytest.mark.parametrize("name", LOADERS)
def test_mutated_files_are_read_or_refused(name):
    """2,000 files per loader, 500 for the import, which also writes."""
    rng = random.Random(f"fuzz {name}")
    ends: Counter[str] = Counter()
    for _ in range(500 if name == "import" else 2000):
        ends[outcome(name, mutate(rng, rng.choice(list(SEEDS.values()))))] += 1
    assert ends["CorruptData"] > ends.total() / 2
    print(name, dict(ends))


def test_the_loaders_read_what_is_sound():
    """Or the tests here would prove nothing."""
    kinds = {"load": SEEDS, "load_metadata": SEEDS, "read_header": SEEDS}
    kinds |= {
        "unpack_block": ["block.q4"],
        "decode_card": ["card"],
        "decode_signed_card": ["card.signed"],
        "open_bundle": ["export"],
        "import": ["export", "export.signed"],
    }  # fmt: skip
    for name, seeds in kinds.items():
        assert {outcome(name, SEEDS[seed]) for seed in seeds} == {"read"}, name


@settings(FIXED, max_examples=300)
@given(st.binary(max_size=300), st.sampled_from(sorted(LOADERS)))
def test_any_bytes_are_refused(raw, name):
    assert outcome(name, raw) == "CorruptData"


@settings(FIXED, max_examples=300)
@given(st.binary(max_size=300), st.sampled_from(sorted(LOADERS)))
def test_any_header_is_refused(text, name):
    assert outcome(name, struct.pack("<Q", len(text)) + text) == "CorruptData"


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("shape", [[1 << 40], [1 << 20, 1 << 20], [0, 1 << 62], [1 << 62, 0], [-1]])
def test_a_declared_size_allocates_nothing(name, shape):
    size = int(np.prod(shape, dtype=object))
    tensor = {"dtype": "U8", "shape": shape, "data_offsets": [0, size]}
    text = cache_file._compact_json({"__metadata__": {"kvferry": "{}"}, "x": tensor})
    raw = struct.pack("<Q", len(text)) + text
    assert outcome(name, raw) in ("CorruptData", "read")


@pytest.mark.parametrize("length", [MAX_HEADER, MAX_HEADER + 1, 1 << 40, 2**64 - 1])
@pytest.mark.parametrize("name", LOADERS)
def test_a_declared_header_allocates_nothing(name, length):
    assert outcome(name, struct.pack("<Q", length) + b'{"__metadata__":{') == "CorruptData"


@pytest.mark.parametrize("dense", ["[],", "{},", '"ab",', "1.5,", "[[[[]]]],", "[12345678],"])
@pytest.mark.parametrize("name", ["load", "read_header", "decode_card"])
def test_a_dense_header_takes_a_bounded_multiple_of_itself(name, dense):
    """Python's objects are larger than the JSON they come from; the header's limit bounds both."""
    values = "[" + dense * ((1 << 20) // len(dense)) + "0]"
    inner = cache_file._compact_json({"__metadata__": {"kvferry": '{"x":' + values + "}"}})
    outer = b'{"__metadata__":{"kvferry":"{}"},"x":' + values.encode() + b"}"
    for text in (inner, outer):
        raw = struct.pack("<Q", len(text)) + text
        tracemalloc.start()
        with contextlib.suppress(CorruptData):
            LOADERS[name](raw)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 20 * len(raw)


# ---- forged JSON, under a good seal

JUNK: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**300, 10**400, 0.5, -1e308, "", "x", "\ud800", "0" * 64,
    "../../x", [], [[]], {}, {"x": {}}, ["x"] * 50,
]  # fmt: skip


def spots(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, inner in items:
        yield (*path, name)
        if isinstance(inner, (dict, list)):
            yield from spots(inner, (*path, name))


def at(value: Any, path: Iterable[Any]) -> Any:
    for name in path:
        value = value[name]
    return value


def forge(rng: random.Random, description: dict[str, Any]) -> dict[str, Any]:
    """Something replaced by junk or by another part, left out, or doubled."""
    forged = copy.deepcopy(description)
    for _ in range(rng.randint(1, 2)):
        every = list(spots(forged))
        *path, last = rng.choice(every)
        place = at(forged, path)
        match rng.randrange(4):
            case 0:
                del place[last]
            case 1 if isinstance(place, list):
                place.append(copy.deepcopy(place[last]))
            case 2:
                place[last] = copy.deepcopy(at(forged, rng.choice(every)))
            case _:
                place[last] = copy.deepcopy(rng.choice(JUNK))
        if not forged:
            break
    return forged


def sealed_card(description: dict[str, Any], tensors: dict[str, Any]) -> bytes:
    schema = "kvferry.card.v1"
    seal = card_module._seal(schema, description, tensors, None)
    return cache_file.save(tensors, {"schema": schema, "card": description, "seal": seal})


def test_forged_cards_are_read_or_refused():
    """1,500 sealed forgeries; what is read can be written again, and is the same."""
    rng = random.Random("forged cards")
    tensors, metadata = load(SEEDS["card"], "p")
    ends: Counter[str] = Counter()
    for _ in range(1500):
        raw = sealed_card(forge(rng, metadata["card"]), tensors)
        ends[outcome("decode_card", raw)] += 1
        try:
            card = decode_card(raw, "p")
        except CorruptData:
            continue
        again = card_module.encode_card(card)
        assert decode_card(again, "p") == card
    print(dict(ends))
    assert ends["CorruptData"] > 750
    assert ends["read"] > 50


def test_forged_exports_are_read_or_refused():
    """Whatever is imported has rows for every token its card claims them for."""
    rng = random.Random("forged exports")
    ends: Counter[str] = Counter()
    for _ in range(300):

        def change(metadata, tensors):
            metadata["card"] = forge(rng, metadata["card"])

        ends[outcome("import", rewritten(SEEDS["export"], change))] += 1
    print(dict(ends))
    assert ends["CorruptData"] > 150
    assert ends["read"] > 5


def test_rewritten_seals_are_good():
    assert rewritten(SEEDS["export"], lambda metadata, tensors: None) == SEEDS["export"]
    tensors, metadata = load(SEEDS["card"], "p")
    assert sealed_card(metadata["card"], tensors) == SEEDS["card"]


# ---- what loads although it was damaged never comes out of a store


def test_a_damaged_block_never_leaves_the_store():
    """load has no checksum; the store has. Every byte of the file counts."""
    store = CacheStore("memory://fuzz-blocks")
    raw = SEEDS["block.q4"]
    part = store.put_block("acme", "3c" * 32, "full", raw)
    ref = BlockRef("3c" * 32, 16, {"full": part})
    path = store.block_path("acme", ref, "full")
    loads = 0
    for position in range(len(raw)):
        bad = flip(raw, position, 1 << position % 8)
        store.files.fs.pipe_file(path, bad)
        with pytest.raises(CorruptData):
            store.get_block("acme", ref, "full")
        try:
            load(bad, "p")
            loads += 1
        except CorruptData:
            pass
    assert loads > 1000  # so it is the store that protects, not the format
    store.files.fs.pipe_file(path, raw)
    assert store.get_block("acme", ref, "full") == raw


def test_a_damaged_card_makes_the_reader_fall_back():
    """To the generation before; the damage is told."""
    faults: list[StorageError] = []
    store = CacheStore("memory://fuzz-cards", on_fault=faults.append)
    card = sample_agent(store)
    path = card_path(store, 1, 1)
    raw = store.files.read(path)
    claimed = store.claim(template(ALICE, AgentId("acme", "another"))).card
    for position in range(0, len(raw), 5):
        store.files.fs.pipe_file(path, flip(raw, position, 1 << position % 8))
        found = store.latest(card.agent, KEY)
        assert found is not None
        assert (found.card.epoch, found.card.generation) == (1, 0)
    assert len(faults) == len(range(0, len(raw), 5))
    assert {type(fault) for fault in faults} == {CorruptData}
    assert store.latest(claimed.agent, KEY) is not None
    store.files.fs.pipe_file(path, raw)
    assert store.latest(card.agent, KEY).card == card
    store.files.fs.rm(store.files.root, recursive=True)
