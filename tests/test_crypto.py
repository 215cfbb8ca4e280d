"""Encrypted stores: what opens, what is refused and how, and that nothing leaks."""

from __future__ import annotations

import base64
import logging
import os
import pickle
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from storage.card import BlockRef
from storage.crypto import MAGIC, OVERHEAD, Cipher, key_id, parse_keys, read_keys
from storage.errors import CorruptData, Locked, StoreUnavailable
from storage.store import CacheStore
from tests.store_contract import AGENT, ALICE, BOB, KEY, card_path, flip, template
from tests.store_contract import with_tokens as tokens

OLD, NEW, OTHER = b"o" * 32, b"n" * 32, b"x" * 32
BLOCK = "3c" * 32
ROWS = b"rows of a very private conversation"


def cipher(*keys: bytes, tenant: str = "*") -> Cipher:
    return Cipher({tenant: keys})


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/store"


def store_with(url: str, *keys: bytes, **options) -> CacheStore:
    return CacheStore(url, cipher=cipher(*keys) if keys else None, **options)


def put(store: CacheStore, raw: bytes = ROWS, tenant: str = "acme") -> BlockRef:
    return BlockRef(BLOCK, 16, {"full": store.put_block(tenant, BLOCK, "full", raw)})


# ---- the format


def test_the_format_is_what_the_documents_say():
    raw = cipher(NEW).seal("acme", "blocks/acme/3c3/x.full", b"content")
    assert raw[:8] == b"kvfgcm01" == MAGIC
    assert raw[8:16] == key_id(NEW)
    assert len(raw) == len(b"content") + OVERHEAD == 7 + 44
    place = b"kvfgcm01" + key_id(NEW) + b"blocks/acme/3c3/x.full"
    assert AESGCM(NEW).decrypt(raw[16:28], raw[28:], place) == b"content"


@given(st.binary(max_size=200), st.text(max_size=20))
def test_what_was_sealed_opens(raw, place):
    one = cipher(NEW)
    sealed = one.seal("acme", place, raw)
    assert one.open("acme", place, sealed, "p") == raw
    assert sealed != one.seal("acme", place, raw)  # never the same nonce


def test_a_file_opens_only_where_it_was_sealed():
    one = cipher(NEW)
    sealed = one.seal("acme", "here", b"x")
    with pytest.raises(CorruptData, match="not from here"):
        one.open("acme", "there", sealed, "p")


def test_every_flipped_bit_is_refused():
    one = cipher(NEW)
    sealed = one.seal("acme", "here", b"content")
    for position in range(len(sealed)):
        with pytest.raises((CorruptData, Locked)):
            one.open("acme", "here", flip(sealed, position), "p")


@pytest.mark.parametrize("length", range(8, 44))
def test_a_file_that_is_too_short_is_corrupt(length):
    sealed = cipher(NEW).seal("acme", "here", b"")
    with pytest.raises(CorruptData):
        cipher(NEW).open("acme", "here", sealed[:length], "p")


# ---- blocks and cards


def test_blocks_and_cards_come_back_and_nothing_of_them_shows(url, tmp_path):
    store = store_with(url, NEW)
    store.probe()
    ref = put(store)
    card = store.commit(tokens(store.claim(template(ALICE)).card, *range(1000, 1100))).card
    assert store.get_block("acme", ref, "full") == ROWS
    assert store.latest(AGENT, KEY).card == card
    assert store.claim(template(BOB)).card.branches == card.branches
    assert [loaded.card.epoch for loaded in store.cards(["acme"], KEY)] == [2]
    seen = b"".join(p.read_bytes() for p in tmp_path.rglob("*.safetensors"))
    needle = b"".join(n.to_bytes(4, "little") for n in range(1000, 1010))
    assert ROWS not in seen
    assert needle not in seen
    assert b"session-1" not in seen


def test_the_name_is_the_digest_of_the_ciphertext(url):
    store = store_with(url, NEW)
    ref = put(store)
    raw = Path(store.block_path("acme", ref, "full")).read_bytes()
    assert raw.startswith(MAGIC)
    assert len(raw) == ref.parts["full"].size == len(ROWS) + OVERHEAD
    assert put(store) == ref  # adopted, although encrypting again gives other bytes


@pytest.mark.parametrize("keys", [(), (OTHER,)])
def test_without_the_key_nothing_is_read_set_aside_or_replaced(url, tmp_path, keys):
    store = store_with(url, NEW)
    ref = put(store)
    store.commit(tokens(store.claim(template(ALICE)).card, 1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    faults: list[Exception] = []
    blind = store_with(url, *keys, on_fault=faults.append)
    named = key_id(NEW).hex()
    with pytest.raises(Locked, match=named):
        blind.get_block("acme", ref, "full")
    with pytest.raises(Locked, match=named):
        blind.latest(AGENT, KEY)
    with pytest.raises(Locked, match=named):
        blind.claim(template(BOB))
    assert list(blind.cards(["acme"], KEY)) == []
    assert [type(fault) for fault in faults] == [Locked]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert store.latest(AGENT, KEY).card.epoch == 1


def test_a_plain_writer_is_refused_where_encrypted_blocks_are(url):
    put(store_with(url, NEW))
    with pytest.raises(Locked):
        put(store_with(url))


def test_a_writer_with_another_key_leaves_what_it_cannot_open(url):
    first = put(store_with(url, NEW))
    faults: list[Exception] = []
    other = store_with(url, OTHER, on_fault=faults.append)
    second = put(other)
    assert second != first
    assert other.get_block("acme", second, "full") == ROWS
    assert store_with(url, NEW).get_block("acme", first, "full") == ROWS
    assert faults == []


def test_plain_files_are_refused_when_there_are_keys(url):
    plain = store_with(url)
    ref = put(plain)
    plain.claim(template(ALICE))
    with pytest.raises(Locked, match="not encrypted"):
        store_with(url, NEW).get_block("acme", ref, "full")
    with pytest.raises(Locked, match="not encrypted"):
        store_with(url, NEW).latest(AGENT, KEY)


def test_the_probe_compares_store_and_keys(url, tmp_path):
    store_with(url, NEW).probe()
    store_with(url, NEW).probe()
    with pytest.raises(Locked, match="no encryption keys"):
        store_with(url).probe()
    plain = store_with(f"{tmp_path}/plain")
    plain.probe()
    put(plain)
    with pytest.raises(Locked, match="plain files"):
        store_with(f"{tmp_path}/plain", NEW).probe()


def test_a_damaged_encrypted_file_is_corrupt(url):
    store = store_with(url, NEW)
    ref = put(store)
    path = Path(store.block_path("acme", ref, "full"))
    path.write_bytes(flip(path.read_bytes(), -1))
    with pytest.raises(CorruptData):
        store.get_block("acme", ref, "full")
    assert put(store) != ref
    assert path.with_name(f"{path.name}.corrupt").exists()


def test_a_card_copied_to_another_tenant_does_not_open(url, tmp_path):
    faults: list[Exception] = []
    store = store_with(url, NEW, on_fault=faults.append)
    card = store.claim(template(ALICE)).card
    source = Path(card_path(store, 1, 0))
    agent = type(AGENT)("other", AGENT.session)
    target = Path(card_path(store, 1, 0, agent))
    target.parent.mkdir(parents=True)
    target.write_bytes(source.read_bytes())
    assert store.latest(agent, KEY) is None
    assert [type(fault) for fault in faults] == [CorruptData]
    assert card.agent == AGENT


# ---- keys


def test_the_first_key_writes_and_all_read(url):
    old = put(store_with(url, OLD))
    both = store_with(url, NEW, OLD)
    assert both.get_block("acme", old, "full") == ROWS
    assert put(both) == old  # adopted
    fresh = both.put_block("acme", "4d" * 32, "full", ROWS)
    ref = BlockRef("4d" * 32, 16, {"full": fresh})
    assert store_with(url, NEW).get_block("acme", ref, "full") == ROWS
    with pytest.raises(Locked, match=key_id(NEW).hex()):
        store_with(url, OLD).get_block("acme", ref, "full")


def test_every_tenant_needs_a_key(url):
    store = CacheStore(url, cipher=Cipher({"acme": [NEW]}))
    put(store)
    with pytest.raises(Locked, match="tenant other has no encryption key"):
        put(store, tenant="other")
    shared = CacheStore(url, cipher=Cipher({"acme": [NEW], "*": [OTHER]}))
    put(shared, tenant="other")
    assert shared.get_block("acme", put(shared), "full") == ROWS


def test_keys_are_parsed():
    one = parse_keys(
        f"# keys\nacme = {NEW.hex()}, {base64.b64encode(OLD).decode()}\n\n* = {OTHER.hex()}\n", "f"
    )
    place = "p"
    assert one.seal("acme", place, b"")[8:16] == key_id(NEW)
    assert one.open("acme", place, Cipher({"acme": [OLD]}).seal("acme", place, b"1"), "") == b"1"
    assert one.seal("other", place, b"")[8:16] == key_id(OTHER)
    assert parse_keys(f"acme={NEW.hex()};*={OTHER.hex()}", "env").seal("b", place, b"")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no encryption key"),
        ("acme", "32 bytes"),
        ("acme = abc", "32 bytes"),
        (f"acme = {'g' * 64}", "32 bytes"),
        (f"acme = {NEW.hex()},", "32 bytes"),
        (f"ACME = {NEW.hex()}", "wants `tenant = key`"),
        (f"a = {NEW.hex()}\na = {OLD.hex()}", "line 2: tenant a again"),
    ],
)
def test_a_bad_key_line_is_named_without_its_key(text, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        parse_keys(text, "keys.txt")
    assert str(caught.value).startswith("keys.txt: ")
    for secret in ("abc", "g" * 64, NEW.hex(), OLD.hex()):
        assert secret not in str(caught.value)


def test_a_key_file_that_others_may_read_is_refused(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"* = {NEW.hex()}\n")
    os.chmod(path, 0o600)
    read_keys(path)
    os.chmod(path, 0o640)
    with pytest.raises(ValueError, match="mode 640, wants 600"):
        read_keys(path)
    with pytest.raises(OSError, match="nothing"):
        read_keys(tmp_path / "nothing")


def test_no_key_is_shown(url, caplog):
    caplog.set_level(logging.DEBUG)
    store = store_with(url, NEW)
    put(store)
    shown = [repr(store.cipher), str(store.cipher), caplog.text]
    try:
        store_with(url, OTHER).get_block("acme", put(store), "full")
    except Locked as error:
        shown += [str(error), repr(error)]
    assert len(shown) == 5
    for text in shown:
        assert NEW.hex() not in text
        assert repr(NEW)[2:-1] not in text


def test_locked_survives_pickling_and_is_an_unavailable_store():
    error = pickle.loads(pickle.dumps(Locked("path", "reason")))
    assert isinstance(error, StoreUnavailable)
    assert (str(error), error.path, error.reason) == ("path: reason", "path", "reason")
