"""kvferry verify, gc and agents --bytes: on a store, without a cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import load_config
from cluster.errors import ConfigError
from storage.card import AgentId, BlockRef
from storage.crypto import Cipher
from storage.store import CacheStore
from tests.store_contract import ALICE, flip, template
from tests.test_collector import block_id, put, raw_block, with_blocks

KEY = b"k" * 32


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVFERRY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> CacheStore:
    """Two agents that share a block."""
    store = CacheStore(str(tmp_path / "store"))
    fill(store)
    return store


def fill(store: CacheStore) -> None:
    for number, session in enumerate(("first", "second")):
        card = store.claim(template(ALICE, AgentId("acme", session))).card
        store.commit(with_blocks(card, put(store, 9), put(store, number)))


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def age(store: CacheStore, seconds: float) -> None:
    """Everything in the store is that much older."""
    for folder, _, names in os.walk(store.files.root):
        for name in names:
            path = Path(folder) / name
            when = path.stat().st_mtime - seconds
            os.utime(path, (when, when))


def test_verify(store: CacheStore) -> None:
    assert "4 cards, 3 blocks" in run("verify", "--store", store.url)
    assert "clean" in run("verify", "--store", store.url)
    ref = put(store, 9)
    path = Path(store.block_path("acme", ref, "full"))
    path.write_bytes(flip(path.read_bytes(), -1))
    out = run("verify", "--store", store.url, code=1)
    assert f"corrupt: {path}: sha256 does not match its name" in out
    assert "not clean" in out
    out = run("verify", "--store", store.url, "--quarantine", code=1)
    assert "1 files set aside" in out
    assert not path.exists()
    assert f"missing: {path}" in run("verify", "--store", store.url, code=1)


def test_gc_in_two_runs(store: CacheStore) -> None:
    orphan = put(store, 5)
    age(store, 3601)
    out = run("gc", "--store", store.url, "--dry-run")
    assert "would be" in out
    assert "condemned" not in os.listdir(store.files.root)
    out = run("gc", "--store", store.url)
    assert "may be deleted in 3600 s: run gc again" in out
    assert store.get_block("acme", orphan, "full") is not None
    age(store, 3601)
    run("gc", "--store", store.url)
    assert store.get_block("acme", orphan, "full") is None
    assert "clean" in run("verify", "--store", store.url)


def test_gc_skips_loudly(store: CacheStore) -> None:
    signed = CacheStore(store.url, signing_key=b"k" * 16)
    signed.claim(template(ALICE, AgentId("acme", "signed")))
    assert "skipped acme: " in run("gc", "--store", store.url, code=1)


def test_gc_applies_quota_and_time_to_live(
    store: CacheStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    age(store, 3601)
    monkeypatch.setenv("KVFERRY_QUOTA_BYTES", "400")
    out = run("gc", "--store", store.url)
    assert "agents stripped of their blocks │ 1" in out
    out = run("agents", "--bytes", "--store", store.url)
    assert out.count(" 0 B") >= 2


def test_a_second_collector_is_refused(store: CacheStore) -> None:
    folder = Path(store.files.root) / "gc" / "lease"
    folder.mkdir(parents=True)
    (folder / "00000001.json").write_text("x")
    assert "another collector is at work" in run("gc", "--store", store.url, code=1)


def test_agents_by_bytes(store: CacheStore) -> None:
    out = run("agents", "--bytes", "--store", store.url)
    one = len(raw_block(1))
    row = next(line for line in out.splitlines() if "first" in line)
    assert [cell.strip() for cell in row.split("│")[1:7]] == [
        "first", "acme", "32", "32", f"{2 * one} B", f"{one} B",
    ]  # fmt: skip
    total = out.splitlines()[-2]
    assert [cell.strip() for cell in total.split("│")[1:5]] == [
        "acme", "2", f"{3 * one} B", f"{one} B",
    ]  # fmt: skip


def test_an_encrypted_store_wants_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CacheStore(str(tmp_path / "store"), cipher=Cipher({"*": [KEY]}))
    fill(store)
    assert "unreadable: " in run("verify", "--store", store.url, code=1)
    assert "unreadable: " in run("agents", "--bytes", "--store", store.url, code=1)
    assert "skipped acme" in run("gc", "--store", store.url, code=1)
    keys = tmp_path / "keys"
    keys.write_text(f"* = {KEY.hex()}\n")
    keys.chmod(0o644)
    monkeypatch.setenv("KVFERRY_ENCRYPTION_KEYS_FILE", "keys")
    assert "wants 600" in run("verify", "--store", store.url, code=2)
    keys.chmod(0o600)
    assert "clean" in run("verify", "--store", store.url)
    monkeypatch.setenv("KVFERRY_ENCRYPTION_KEYS", f"* = {KEY.hex()}")
    assert "set one of them" in run("verify", "--store", store.url, code=2)
    monkeypatch.delenv("KVFERRY_ENCRYPTION_KEYS_FILE")
    assert "clean" in run("verify", "--store", store.url)
    ref = BlockRef(block_id(9), 16, {"full": store.put_block("acme", block_id(9), "full", b"")})
    assert store.get_block("acme", ref, "full") == raw_block(9)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["verify", "--store", "nothing"], "there is no store"),
        (["gc", "--store", "s3x://bucket"], "is not supported"),
        (["gc", "--store", "x", "--grace", "10"], "600"),
        (["agents", "--store", "x"], "go with --bytes"),
        (["verify", "--config", "nothing.toml"], "nothing.toml"),
    ],
)
def test_what_the_caller_can_mend_is_2(arguments: list[str], reason: str) -> None:
    assert reason in run(*arguments, code=2)


def test_keys_are_not_shown_in_messages(monkeypatch: pytest.MonkeyPatch, store: CacheStore) -> None:
    monkeypatch.setenv("KVFERRY_ENCRYPTION_KEYS", f"acme = {KEY.hex()}ff")
    assert KEY.hex() not in run("verify", "--store", store.url, code=2)


def test_the_settings_do_not_show_keys() -> None:
    config = load_config(None, {"KVFERRY_ENCRYPTION_KEYS": f"* = {KEY.hex()}"})
    assert config.replica.encryption_keys == f"* = {KEY.hex()}"
    assert KEY.hex() not in repr(config)
    with pytest.raises(ConfigError) as caught:
        load_config(None, {}, {"encryption_keys": [KEY.hex()]})
    assert KEY.hex() not in str(caught.value)
