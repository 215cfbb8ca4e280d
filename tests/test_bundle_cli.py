"""kvferry export and import: from a store to a file and back, and one line for what is wrong.

2 is what the caller can mend, 1 is storage that failed.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actors.engines.fake_engine import FakeEngine
from cluster.cli import app
from storage.cache_file import Chain
from storage.card import AgentId, BlockRef, BranchCard, CacheCard, Owner, encode_card
from storage.claims import new_card
from storage.codec import encode_rows, get_codec
from storage.spec import CompatibilityKey
from storage.store import CacheStore
from storage.tiers import pack_block
from tests.store_contract import flip, sample_rows

ENGINE = FakeEngine(1, 512)
KEY = ENGINE.key
Q4 = get_codec("q4")


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings but the test's, no Ray, and files only below tmp_path."""
    for name in list(os.environ):
        if name.startswith("KVFERRY_"):
            monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVFERRY_STORE", "store")


@pytest.fixture
def store(tmp_path: Path) -> CacheStore:
    return CacheStore(f"file://{tmp_path}/store")


def put_agent(
    store: CacheStore, agent: AgentId, key: CompatibilityKey = KEY, tokens: int = 10
) -> CacheCard:
    """An agent with a tail of 5 rows."""
    rows = encode_rows(key.spec, Q4, sample_rows(5, key.spec))
    run_id = Chain(key.digest, "q4", agent.tenant).segment_id("", range(5), 0)
    part = store.put_block(agent.tenant, run_id, "full", pack_block(Q4, run_id, 5, rows))
    ref = BlockRef(run_id, 5, {"full": part})
    branch = BranchCard(0, tuple(range(tokens)), tail=(ref,))
    claimed = store.claim(new_card(agent, key, "q4", Owner("node", "1"))).card
    return store.commit(replace(claimed, generation=1, branches=(branch,))).card


def working(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def failing(*arguments: str, code: int = 2) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("kvferry: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_there_and_back(store: CacheStore, tmp_path: Path) -> None:
    card = put_agent(store, AgentId("default", "demo", "planner"))
    put_agent(store, AgentId("default", "other"))
    line = working("export", "demo/planner", "a.safetensors")
    size = (tmp_path / "a.safetensors").stat().st_size
    assert line == (
        f"1 branches, 10 tokens, {card.bytes_stored} bytes of rows of default/demo/planner "
        f"-> a.safetensors, {size} bytes\n"
    )
    line = working("import", "a.safetensors", "--session", "copy", "--tenant", "acme")
    assert line.endswith("-> acme/copy, epoch 1\n")
    found = store.latest(AgentId("acme", "copy"), KEY)
    assert found is not None
    assert found.card.branches[0].tokens == card.branches[0].tokens
    assert found.card.cache_salt != ""


def test_another_store_and_its_signing_key(store: CacheStore, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sixteen bytes and more")
    (tmp_path / "c.toml").write_text('signing_key_file = "key"\nstore = "signed"\n')
    working_store = CacheStore(f"file://{tmp_path}/signed", signing_key=b"sixteen bytes and more")
    card = put_agent(working_store, AgentId("default", "demo"))
    assert "no agent 'demo'" in failing("export", "demo", "a.safetensors")
    # flags win over the environment, the environment over the file
    options = ["--store", "signed", "--config", "c.toml"]
    working("export", "demo", "a.safetensors", *options)
    working("import", "a.safetensors", "--session", "copy", "--name", "x", *options)
    found = working_store.latest(AgentId("default", "copy", "x"), KEY)
    assert found is not None
    assert found.card.branches == card.branches  # our own signature: the chain is kept


def test_a_model_checks_the_file(store: CacheStore) -> None:
    put_agent(store, AgentId("default", "demo"))
    put_agent(store, AgentId("default", "odd"), tokens=ENGINE.vocab.size + 1)
    put_agent(store, AgentId("default", "alien"), replace(KEY, weights="0" * 64))
    for name in ("demo", "odd", "alien"):
        working("export", name, name)
    working("import", "demo", "--session", "a", "--model", "fake://")
    message = failing("import", "alien", "--session", "b", "--model", "fake://")
    assert f"weights: {'0' * 64} != {KEY.weights}" in message
    message = failing("import", "odd", "--session", "b", "--model", "fake://", code=1)
    assert f"outside the vocabulary of {ENGINE.vocab.size}" in message
    assert "cannot read it" in failing("import", "demo", "--session", "b", "--model", "no.gguf")
    working("import", "odd", "--session", "b")


def test_what_lives_is_overwritten_only_when_told(store: CacheStore, tmp_path: Path) -> None:
    put_agent(store, AgentId("default", "demo"))
    working("export", "demo", "a")
    before = (tmp_path / "a").read_bytes()
    assert "--force" in failing("export", "demo", "a")
    assert (tmp_path / "a").read_bytes() == before
    working("export", "demo", "a", "--force")
    assert "--replace" in failing("import", "a", "--session", "demo")
    assert "epoch 2" in working("import", "a", "--session", "demo", "--replace")


def test_two_models_of_one_session(store: CacheStore) -> None:
    other = replace(KEY, weights="0" * 64)
    put_agent(store, AgentId("default", "demo"))
    put_agent(store, AgentId("default", "demo"), other)
    message = failing("export", "demo", "a")
    assert KEY.digest[:12] in message
    assert other.digest[:12] in message
    working("export", "demo", "a", "--key", other.digest[:12])
    assert "choose one" in failing("export", "demo", "b", "--key", "xyz")


def test_an_agent_that_is_not_there(store: CacheStore) -> None:
    assert "no agent 'demo' of tenant 'default'" in failing("export", "demo", "a")
    put_agent(store, AgentId("default", "demo"))
    assert "tenant 'acme'" in failing("export", "demo", "a", "--tenant", "acme")
    store.delete(new_card(AgentId("default", "demo"), KEY, "q4", Owner("node", "1")))
    assert "no agent 'demo'" in failing("export", "demo", "a")


def test_cards_that_cannot_be_read_are_mentioned(store: CacheStore) -> None:
    card = put_agent(store, AgentId("default", "demo"))
    for path in store.files.fs.find(f"{store.files.root}/agents"):
        store.files.fs.pipe_file(path, flip(encode_card(card), 900))
    assert "2 cards cannot be read" in failing("export", "demo", "a")


def test_damage_is_1(store: CacheStore, tmp_path: Path) -> None:
    card = put_agent(store, AgentId("default", "demo"))
    working("export", "demo", "a")
    raw = (tmp_path / "a").read_bytes()
    (tmp_path / "b").write_bytes(flip(raw, len(raw) - 100))
    assert "does not match" in failing("import", "b", "--session", "x", code=1)
    block = store.block_path("default", card.branches[0].tail[0], "full")
    store.files.fs.pipe_file(block, flip(store.files.read(block), 4200))
    assert "sha256 does not match" in failing("export", "demo", "c", code=1)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["import", "missing", "--session", "x"], "missing: no such file"),
        (["import", "a", "--session", "x", "--tenant", "A/B"], "--tenant 'A/B'"),
        (["export", "x", "a", "--tenant", "../up"], "--tenant '../up'"),
        (["export", "x", "a", "--store", "nonsense://x"], "is not supported"),
        (["export", "x", "a", "--config", "none.toml"], "none.toml"),
    ],
)
def test_what_the_caller_can_mend_is_2(arguments: list[str], reason: str) -> None:
    assert reason in failing(*arguments)


def test_a_folder_that_is_not_there(store: CacheStore) -> None:
    put_agent(store, AgentId("default", "demo"))
    assert "no/such/file" in failing("export", "demo", "no/such/file")
