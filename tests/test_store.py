"""CacheStore over its backends, its failures, and the ownership protocol (invariant I5)."""

from __future__ import annotations

import errno
import os
import stat
import sys

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from storage.errors import Fenced, StoreUnavailable
from storage.store import CacheStore
from tests.require import require
from tests.store_contract import (
    AGENT,
    ALICE,
    BOB,
    KEY,
    Interleaved,
    StoreContract,
    card_files,
    template,
    tokens_of,
    with_tokens,
)


class TestFileStore(StoreContract):
    @pytest.fixture
    def url(self, tmp_path):
        return f"file://{tmp_path}/store"

    def test_files_are_private_and_nothing_temporary_remains(self, store, tmp_path):
        self.put(store)
        store.commit(with_tokens(store.claim(template(ALICE)).card, 1))
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
        assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}
        assert len(files) == 3
        assert all(path.suffix == ".safetensors" for path in files)
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}

    def test_a_create_that_dies_leaves_no_card(self, store, monkeypatch):
        def die(*args):
            raise OSError(errno.EIO, "device is gone")

        with monkeypatch.context() as patch:
            patch.setattr(os, "link", die)
            with pytest.raises(StoreUnavailable, match="device is gone"):
                store.claim(template(ALICE))
        assert store.epoch(AGENT, KEY) == 0
        assert card_files(store) == []
        assert store.claim(template(ALICE)).card.epoch == 1

    def test_a_full_disk_leaves_no_part_of_a_block(self, store, monkeypatch):
        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StoreUnavailable, match="No space left"):
                self.put(store)
        assert store.files.fs.find(store.files.root) == []

    def test_everything_is_synced_before_it_is_reported(self, store, monkeypatch):
        events = []
        real = {name: getattr(os, name) for name in ("fsync", "link", "mkdir")}

        def record(name, *args):
            target = args[1] if name == "link" else args[0]
            if name == "fsync":
                target = os.readlink(f"/proc/self/fd/{target}")
            events.append((name, os.path.basename(target)))
            return real[name](*args)

        require("proc", os.path.exists("/proc/self/fd"), "there is no /proc to name descriptors")
        store.claim(template(ALICE))
        for name in real:
            monkeypatch.setattr(os, name, lambda *args, name=name: record(name, *args))
        self.put(store)
        names = [name for _, name in events]
        assert [name for name, _ in events] == ["mkdir", "fsync"] * 3 + ["fsync", "link", "fsync"]
        assert names[:6] == ["blocks", "store", "acme", "blocks", "3c3", "acme"]
        assert names[6].endswith(".tmp")
        assert names[7].endswith(".safetensors")
        assert names[8] == "3c3"

    def test_a_block_is_not_reported_stored_where_no_folder_can_be(self, store, tmp_path):
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "blocks").write_text("a file")
        with pytest.raises(StoreUnavailable):
            self.put(store)

    def test_a_path_is_taken_as_it_is(self, tmp_path):
        store = CacheStore(f"{tmp_path}/with space & ümlaut%20")
        store.probe()
        assert os.listdir(tmp_path) == ["with space & ümlaut%20"]

    def test_an_unreadable_store_is_unavailable_not_empty(self, store, monkeypatch):
        def refuse(*args, **kwargs):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(os, "listdir", refuse)
        for call in (
            lambda: store.latest(AGENT, KEY),
            lambda: store.claim(template(ALICE)),
            lambda: store.epoch(AGENT, KEY),
            store.tenants,
        ):
            with pytest.raises(StoreUnavailable, match="Permission denied"):
                call()


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def url(self):
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)  # so that the races are races
        yield "memory://contract"
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("url", ["gs://b", "http://host/x", "nonsense://"])
def test_an_unsupported_scheme_is_refused(url):
    with pytest.raises(ValueError, match=r"scheme .* is not supported; use file://, memory:"):
        CacheStore(url)


def test_a_url_keeps_its_scheme():
    assert CacheStore("memory://").files.path("x") == "/x"
    assert CacheStore("memory:///a/b/").files.path("x") == "/a/b/x"
    assert CacheStore("memory:///a/b/").url == "memory:///a/b"
    assert CacheStore("file:///a/b/").files.path("x") == "/a/b/x"


class Lax(MemoryFileSystem):
    """Lets a second create succeed, like an object store without conditional writes."""

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        super().pipe_file(path, value)


class Unanswering(MemoryFileSystem):
    """Writes, then loses the connection; `blind`: it cannot be read back either."""

    blind = False

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        super().pipe_file(path, value, mode=mode)
        raise OSError("connection lost")

    def cat_file(self, path, start=None, end=None, **kwargs):
        if self.blind:
            raise OSError("connection lost")
        return super().cat_file(path, start, end)


@pytest.fixture
def memory_store():
    store = CacheStore("memory://backend")
    yield store
    if store.files.fs.exists("/backend"):
        store.files.fs.rm("/backend", recursive=True)


def test_a_store_that_overwrites_fails_the_probe(memory_store):
    memory_store.files.fs = Lax()
    with pytest.raises(StoreUnavailable, match="a second create of one file succeeds"):
        memory_store.probe()
    assert memory_store.files.fs.find("/backend") == []


def test_a_create_without_an_answer_counts_when_our_bytes_are_there(memory_store):
    memory_store.files.fs = Unanswering()
    card = memory_store.claim(template(ALICE)).card
    assert memory_store.latest(AGENT, KEY).card == card
    assert memory_store.commit(with_tokens(card, 1)).card.generation == 1
    assert tokens_of(memory_store) == (1,)


def test_a_create_without_an_answer_is_fenced_when_others_were_there(memory_store):
    slow = Interleaved("memory://backend")
    slow.files.fs = Unanswering()
    slow.before_create = lambda: memory_store.claim(template(BOB))
    with pytest.raises(Fenced):
        slow.claim(template(ALICE))
    assert memory_store.latest(AGENT, KEY).card.owner == BOB


def test_a_create_that_cannot_be_read_back_owns_nothing(memory_store, monkeypatch):
    memory_store.files.fs = Unanswering()
    monkeypatch.setattr(memory_store.files.fs, "blind", True)
    with pytest.raises(StoreUnavailable, match="connection lost"):
        memory_store.claim(template(ALICE))
    monkeypatch.setattr(memory_store.files.fs, "blind", False)
    assert memory_store.claim(template(BOB)).card.epoch == 2
