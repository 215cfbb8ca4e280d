"""A store on the disks of the cluster itself: copies, buddies, who is asked, what is made again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.blocks import BLOCK_NAME
from storage.buddies import Copy, missing_copies, ranked
from storage.card import BlockRef
from storage.disks import PAUSE_S, DisksBackend, FolderDisk
from storage.errors import StoreUnavailable
from storage.files import Files
from storage.store import CacheStore
from tests.store_contract import AGENT, ALICE, KEY, StoreContract, template, with_tokens
from tests.test_files import FilesContract

NODES = ("a", "b", "c")
RAW = b"the rows"


class Silent(FolderDisk):
    """A node that does not answer."""

    calls = 0

    def _ask(self, *_: object) -> NoReturn:
        Silent.calls += 1
        raise TimeoutError("no answer in 2.0 s")

    names = entries = read = create = rename = remove = clock = _ask  # type: ignore[assignment]


class Machines:
    """Nodes with a folder each, as one of them, or the head, sees them."""

    def __init__(self, folder: Path, own: str = "a", nodes: tuple[str, ...] = NODES) -> None:
        self.folder, self.name = folder, own
        self.disks = {node: FolderDisk(str(folder / node)) for node in nodes}
        self.cards: FolderDisk = FolderDisk(str(folder / "cards"))

    def head(self) -> FolderDisk:
        return self.cards

    def own(self) -> tuple[str, FolderDisk] | None:
        return (self.name, self.disks[self.name]) if self.name in self.disks else None

    def living(self) -> dict[str, FolderDisk]:
        return dict(self.disks)

    def holders(self) -> dict[str, list[str]]:
        """Block file -> the nodes that have it."""
        found: dict[str, list[str]] = {}
        for path in sorted(self.folder.rglob("*.safetensors")):
            if BLOCK_NAME.match(path.name):
                found.setdefault(path.name, []).append(path.relative_to(self.folder).parts[0])
        return found


class Union:
    """What the contracts do behind a store's back, on all of its disks."""

    def __init__(self, machines: Machines) -> None:
        self._folder = machines.folder

    def _paths(self, path: str) -> list[Path]:
        name = path.removeprefix("cluster").removeprefix("/")
        return [d / name for d in sorted(self._folder.iterdir()) if (d / name).exists()]

    def exists(self, path: str) -> bool:
        return bool(self._folder.exists() and self._paths(path))

    def find(self, path: str) -> list[str]:
        if not self._folder.exists():
            return []
        found = {
            "/".join(("cluster", *file.relative_to(self._folder).parts[1:]))
            for top in self._paths(path)
            for file in ([top] if top.is_file() else top.rglob("*"))
            if file.is_file()
        }
        return sorted(found)

    def cat_file(self, path: str) -> bytes:
        return self._paths(path)[0].read_bytes()

    def pipe_file(self, path: str, raw: bytes) -> None:
        name = path.removeprefix("cluster/")
        for file in self._paths(path) or [self._folder / "cards" / name]:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(raw)

    def mv(self, path: str, target: str) -> None:
        for file in self._paths(path):
            new = file.parents[len(Path(path).parts) - 2] / target.removeprefix("cluster/")
            new.parent.mkdir(parents=True, exist_ok=True)
            file.rename(new)

    def rm_file(self, path: str) -> None:
        for file in self._paths(path):
            file.unlink()

    def rm(self, path: str, recursive: bool) -> None:
        assert recursive
        for top in self._paths(path):
            shutil.rmtree(top)


@pytest.fixture
def machines(tmp_path: Path) -> Machines:
    return Machines(tmp_path / "disks")


@pytest.fixture
def backend_of(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], DisksBackend]:
    def opened(url: str) -> DisksBackend:
        backend = DisksBackend(machines, 2)
        backend.fs = Union(machines)
        return backend

    monkeypatch.setattr("cluster.disks.open_backend", opened)
    return opened


class TestDisksFiles(FilesContract):
    @pytest.fixture
    def url(self, backend_of):
        return "cluster:///disks"

    def test_a_file_set_aside_is_of_all_disks(self, files, machines):
        path = files.path("blocks", "acme", "3c3", "some-file")
        files.create(path, b"x")
        files.set_aside(path)
        assert files.names(files.path("blocks", "acme", "3c3")) == ["some-file.corrupt"]
        files.remove(f"{path}.corrupt")
        assert files.names(files.path("blocks", "acme", "3c3")) == []


class TestDisksBlockFiles(TestDisksFiles):
    """The same for files that lie on the nodes' disks; their creates are exclusive per disk."""

    @pytest.fixture
    def folder(self, files):
        return files.path("blocks", "folder")

    def test_names_and_entries_are_sorted_and_complete(self, files, folder):
        for name in ("c", "a", "b"):
            files.create(f"{folder}/{name}", name.encode() * 5)
        assert files.names(folder) == ["a", "b", "c"]
        assert [(e.name, e.size) for e in files.entries(folder)] == [("a", 5), ("b", 5), ("c", 5)]
        assert all(abs(e.modified - files.now()) < 5 for e in files.entries(folder))


class TestDisksStore(StoreContract):
    @pytest.fixture
    def url(self, backend_of):
        return "cluster:///disks"


@pytest.fixture
def store(backend_of) -> CacheStore:
    return CacheStore("cluster:///disks")


def put(store: CacheStore, raw: bytes = RAW, block_id: str = "3c" * 32) -> BlockRef:
    return BlockRef(block_id, 16, {"full": store.put_block("acme", block_id, "full", raw)})


# ---- copies


def test_a_block_is_on_the_own_disk_and_on_a_buddys(store, machines):
    ref = put(store)
    ((name, holders),) = machines.holders().items()
    assert holders == sorted({"a", ranked(name, ["b", "c"])[0]})
    assert store.get_block("acme", ref, "full") == RAW


def test_the_death_of_a_node_loses_no_block_of_two(store, machines):
    refs = [put(store, os.urandom(500), f"{n:02x}" * 32) for n in range(20)]
    assert {len(nodes) for nodes in machines.holders().values()} == {2}
    del machines.disks["a"]
    shutil.rmtree(machines.folder / "a")
    for name in ("b", "c"):
        machines.name = name
        assert all(store.get_block("acme", ref, "full") for ref in refs)


def test_with_one_copy_it_does(machines, monkeypatch):
    monkeypatch.setattr("cluster.disks.open_backend", lambda url: DisksBackend(machines, 1))
    store = CacheStore("cluster:///disks")
    ref = put(store)
    assert list(machines.holders().values()) == [["a"]]
    del machines.disks["a"]
    machines.name = "b"
    assert store.get_block("acme", ref, "full") is None


def test_one_node_alone_takes_blocks(store, machines):
    """Fewer nodes than copies: they are missing, and that is no error."""
    machines.disks = {"a": machines.disks["a"]}
    ref = put(store)
    assert store.get_block("acme", ref, "full") == RAW
    assert missing_copies({"a": machines.disks["a"].blocks()}, 2) == ([], 1)


def test_a_damaged_copy_gives_way_to_a_sound_one(store, machines):
    """I3: and is set aside, so that it is made anew."""
    ref = put(store)
    path = store.block_path("acme", ref, "full").removeprefix("cluster/")
    own = machines.folder / "a" / path
    own.write_bytes(b"the rowz")
    assert store.get_block("acme", ref, "full") == RAW
    assert not own.exists()
    assert own.with_name(own.name + ".corrupt").exists()
    assert missing_copies({n: d.blocks() for n, d in machines.disks.items()}, 2)[1] == 1


def test_a_buddy_that_is_silent_is_passed_over_and_left_alone(machines, monkeypatch):
    now = [0.0]
    backend = DisksBackend(machines, 2, clock=lambda: now[0])
    monkeypatch.setattr("cluster.disks.open_backend", lambda url: backend)
    store = CacheStore("cluster:///disks")
    machines.disks["b"] = Silent(str(machines.folder / "b"))
    Silent.calls = 0
    refs = [put(store, os.urandom(500), f"{n:02x}" * 32) for n in range(8)]
    assert set(map(tuple, machines.holders().values())) == {("a", "c")}
    assert Silent.calls == 1
    assert all(store.get_block("acme", ref, "full") for ref in refs)
    now[0] = PAUSE_S
    store.files.names(store.files.path("blocks"))
    assert Silent.calls == 2


def test_what_a_silent_node_may_have_is_a_fault_and_no_miss(store, machines):
    ref = put(store)
    machines.name = "c"
    machines.disks = {n: Silent(str(machines.folder / n)) for n in ("a", "b")}
    machines.disks["c"] = FolderDisk(str(machines.folder / "empty"))
    with pytest.raises(StoreUnavailable):
        store.files.read(store.block_path("acme", ref, "full"))


@pytest.mark.slow
def test_without_the_head_nothing_is_claimed_and_blocks_are_read(store, machines):
    ref = put(store)
    card = store.claim(template(ALICE)).card
    machines.cards = Silent(str(machines.folder / "cards"))
    for call in (lambda: store.claim(template(ALICE)), lambda: store.commit(with_tokens(card, 1))):
        with pytest.raises(StoreUnavailable):
            call()
    assert store.get_block("acme", ref, "full") == RAW
    machines.cards = FolderDisk(str(machines.folder / "cards"))
    assert store.epoch(AGENT, KEY) == 1


@pytest.mark.parametrize("path", ["../x", "blocks/../../x", "/etc/passwd", "a//b", "a\nb", ".."])
def test_no_path_leads_out_of_a_disk(machines, path):
    for call in (
        lambda d: d.read(path),
        lambda d: d.create(path, b""),
        lambda d: d.remove(path),
        lambda d: d.names(path),
        lambda d: d.rename("a", path),
    ):
        with pytest.raises(ValueError, match="no path below"):
            call(machines.disks["a"])


# ---- made again


names = st.sampled_from([f"{n:02x}" for n in range(6)])
holdings = st.dictionaries(st.sampled_from("abcde"), st.dictionaries(names, st.just(1)), min_size=1)


@given(holdings, st.integers(1, 4))
def test_copies_make_up_what_is_missing_and_no_more(held, replicas):
    copies, short = missing_copies(held, replicas)
    files = {path for paths in held.values() for path in paths}
    before = {path: {n for n in held if path in held[n]} for path in files}
    assert short == sum(len(nodes) < replicas for nodes in before.values())
    after = {path: set(nodes) for path, nodes in before.items()}
    for copy in copies:
        assert copy.source in before[copy.path]
        assert copy.target not in after[copy.path]
        after[copy.path].add(copy.target)
    for path, nodes in after.items():
        assert len(nodes) == max(len(before[path]), min(replicas, len(held)))


@given(st.sets(st.sampled_from("abcdefgh"), min_size=2), names)
def test_a_node_that_leaves_changes_nothing_for_the_others(nodes, name):
    order = ranked(name, nodes)
    gone = order[0]
    assert ranked(name, nodes - {gone}) == order[1:]


def test_a_copy_is_made_where_a_reader_looks_first():
    held = {"a": {"blocks/t/0/x": 1}, "b": {}, "c": {}}
    copies, _ = missing_copies(held, 2)
    assert copies == [Copy("blocks/t/0/x", "a", ranked("x", ["b", "c"])[0])]


def test_a_copy_that_is_not_what_its_name_says_is_not_kept(store, machines):
    ref = put(store)
    path = store.block_path("acme", ref, "full").removeprefix("cluster/")
    spare = FolderDisk(str(machines.folder / "spare"))
    assert not spare.keep(path, b"the rowz")
    assert spare.keep(path, RAW)
    assert spare.keep(path, RAW)
    assert spare.read(path) == RAW


def test_files_of_a_cluster_need_no_connection_to_be_named():
    assert Files("cluster:///somewhere?replicas=3").root == "cluster"
    for url in ("cluster://", "cluster://relative", "cluster:///a?replicas=0", "cluster:///a?x=1"):
        with pytest.raises(ValueError, match="cluster:///a/folder"):
            Files(url)
