"""What `kvferry up` does for its store now and then."""

import logging
import os
import threading
from pathlib import Path

import pytest

from cluster.upkeep import Upkeep
from storage.errors import Busy, StoreUnavailable
from storage.retention import RetentionPolicy
from storage.store import CacheStore
from tests.store_contract import ALICE, template

POLICY = RetentionPolicy()


@pytest.fixture
def store(tmp_path: Path) -> CacheStore:
    return CacheStore(f"file://{tmp_path}/store")


def test_a_round_condemns_what_nobody_names(store: CacheStore) -> None:
    store.claim(template(ALICE))
    ref = store.put_block("acme", "ab" * 32, "full", b"x")
    path = Path(store.files.root, "blocks", "acme", "aba", f"{'ab' * 32}.full.{ref.sha256}")
    path = path.with_name(path.name + ".safetensors")
    old = path.stat().st_mtime - 90_000
    os.utime(path, (old, old))
    Upkeep(store, POLICY, 1.0).once()
    assert path.name in {n for one in store.condemned.lists("acme") for n in one.names}


def test_rounds_come_at_the_interval_until_the_end(
    store: CacheStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = threading.Semaphore(0)
    monkeypatch.setattr(Upkeep, "once", lambda self: rounds.release())
    with Upkeep(store, POLICY, 0.01):
        assert all(rounds.acquire(timeout=5) for _ in range(3))
    with Upkeep(store, POLICY, 0.0):
        while rounds.acquire(timeout=0.1):
            pass
    assert not rounds.acquire(timeout=0.1)


@pytest.mark.parametrize(
    ("error", "warned"), [(Busy("s", "another"), False), (StoreUnavailable("s", "gone"), True)]
)
def test_a_round_that_fails_is_logged_and_no_more(
    store: CacheStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    warned: bool,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("cluster.upkeep.collect", fail)
    with caplog.at_level(logging.WARNING):
        Upkeep(store, POLICY, 1.0).once()
    assert bool(caplog.records) == warned
