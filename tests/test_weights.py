"""A model's files by digest: what is fetched is what was promised, whatever a source, a link, a
disk or a kill does; and it is fetched once."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from storage import digests, fetch
from storage.digests import PIECE, WeightsFile, describe
from storage.errors import StoreUnavailable, WeightsUnavailable
from storage.fetch import Fetch, FetchOptions, Progress
from storage.files import Files
from storage.weights import (
    Manifest,
    SourceFailed,
    StoreSource,
    directory_digest,
    holds,
    manifest_of,
    publish,
)
from tests.clusters import until
from tests.servers import BUCKET, s3_server

pytestmark = pytest.mark.long

SIZE = 3 * PIECE + 12_345
QUICK = FetchOptions(stall_s=1.0, read_s=0.3, spare=0, poll_s=0.01)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "head" / "model.gguf"
    path.parent.mkdir()
    path.write_bytes(random.Random(5).randbytes(SIZE))
    return path


class Local:
    """A source that reads a file, and counts."""

    def __init__(self, folder: Path, name: str = "the head") -> None:
        self.name, self.folder = name, folder
        self.bytes = 0
        self.before: Callable[[int], None] = lambda start: None
        self.change: Callable[[int, bytes], bytes] = lambda start, raw: raw

    def read(self, file: WeightsFile, start: int, stop: int) -> bytes:
        self.before(start)
        with (self.folder / file.name).open("rb") as data:
            data.seek(start)
            raw = self.change(start, data.read(stop - start))
        self.bytes += len(raw)
        return raw


def get(model: Path, folder: Path, *sources: Any, **kwargs: Any) -> Path:
    manifest = manifest_of(model)
    return Fetch(manifest, folder, sources or (Local(model.parent),), options=QUICK, **kwargs).run()


def left_over(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]


# ---- digests


def test_a_file_is_read_once_until_it_changes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(digests, "_read", lambda p, f=digests._read: (read.append(p), f(p))[1])
    one, two = describe(model), describe(model)
    assert one == two
    assert one.sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    assert len(read) == 1
    os.utime(model, (1, 1))
    describe(model)
    assert len(read) == 2


def test_pieces_are_the_files_bytes_in_order(model: Path) -> None:
    file, raw = describe(model), model.read_bytes()
    assert len(file.pieces) == 4
    for index, digest in enumerate(file.pieces):
        start, stop = file.span(index)
        assert hashlib.sha256(raw[start:stop]).hexdigest() == digest
    assert file.span(3)[1] == SIZE


def test_a_cache_that_holds_nonsense_is_not_believed(model: Path, tmp_path: Path) -> None:
    one = describe(model)
    (entry,) = (tmp_path / "cache" / "kvferry" / "digests").iterdir()
    for text in ("3", "[]", "not json", '{"a": 1}'):
        entry.write_text(text)
        assert describe(model) == one


# ---- fetching


def test_a_model_comes_whole(model: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    path = get(model, tmp_path / "node", report=seen.append)
    assert path.read_bytes() == model.read_bytes()
    assert path == tmp_path / "node" / manifest_of(model).digest / "model.gguf"
    assert left_over(tmp_path / "node") == ["model.gguf"]
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert (seen[-1].done, seen[-1].total, seen[-1].source) == (SIZE, SIZE, "the head")
    assert seen[-1].rate > 0


def test_what_is_there_is_not_fetched_again(model: Path, tmp_path: Path) -> None:
    get(model, tmp_path / "node")
    source = Local(model.parent)
    get(model, tmp_path / "node", source)
    assert source.bytes == 0


def test_a_copy_that_went_bad_is_fetched_again(model: Path, tmp_path: Path) -> None:
    path = get(model, tmp_path / "node")
    raw = bytearray(path.read_bytes())
    raw[PIECE + 7] ^= 1
    path.write_bytes(raw)
    assert get(model, tmp_path / "node").read_bytes() == model.read_bytes()


@pytest.mark.parametrize("seed", range(8))
def test_it_resumes_at_any_byte(model: Path, tmp_path: Path, seed: int) -> None:
    n_bytes = random.Random(seed).randrange(SIZE)
    part = tmp_path / "node" / manifest_of(model).digest / ".model.gguf.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(model.read_bytes()[:n_bytes])
    source = Local(model.parent)
    assert get(model, tmp_path / "node", source).read_bytes() == model.read_bytes()
    assert source.bytes == SIZE - n_bytes // PIECE * PIECE


def test_a_part_with_a_flipped_byte_is_taken_up_before_it(model: Path, tmp_path: Path) -> None:
    part = tmp_path / "node" / manifest_of(model).digest / ".model.gguf.part"
    part.parent.mkdir(parents=True)
    raw = bytearray(model.read_bytes())
    raw[PIECE + 100] ^= 4
    part.write_bytes(raw)
    source = Local(model.parent)
    assert get(model, tmp_path / "node", source).read_bytes() == model.read_bytes()
    assert source.bytes == SIZE - PIECE


def _until_killed(model: Path, folder: Path, go_on: Any) -> None:
    source = Local(model.parent)

    def before(start: int) -> None:
        if start >= 2 * PIECE:
            go_on.set()
            time.sleep(60)

    source.before = before
    Fetch(manifest_of(model), folder, [source], options=FetchOptions(spare=0)).run()


def test_a_killed_fetch_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    there = context.Event()
    process = context.Process(target=_until_killed, args=(model, tmp_path / "node", there))
    process.start()
    assert there.wait(30)
    process.kill()
    process.join(30)
    source = Local(model.parent)
    assert get(model, tmp_path / "node", source).read_bytes() == model.read_bytes()
    assert source.bytes == SIZE - 2 * PIECE


# ---- sources that do not do what they should


def test_flipped_bytes_never_reach_the_file_and_the_next_source_helps(
    model: Path, tmp_path: Path
) -> None:
    bad, good = Local(model.parent, "the store"), Local(model.parent)
    bad.change = lambda start, raw: bytes([raw[0] ^ 1]) + raw[1:]
    path = get(model, tmp_path / "node", bad, good)
    assert path.read_bytes() == model.read_bytes()
    assert bad.bytes <= 3 * PIECE  # then it is not asked again
    assert good.bytes >= SIZE - PIECE


def test_only_bad_sources_are_an_error_and_leave_nothing_to_load(
    model: Path, tmp_path: Path
) -> None:
    bad = Local(model.parent)
    bad.change = lambda start, raw: bytes([raw[0] ^ 1]) + raw[1:]
    with pytest.raises(WeightsUnavailable, match=r"piece 0 of model\.gguf has other bytes there"):
        get(model, tmp_path / "node", bad)
    assert left_over(tmp_path / "node") == [".model.gguf.part"]
    assert (next(iter((tmp_path / "node").rglob(".*.part")))).stat().st_size == 0


def test_sound_pieces_of_another_whole_are_removed(model: Path, tmp_path: Path) -> None:
    file = describe(model)
    lie = Manifest("model.gguf", False, (WeightsFile(file.name, SIZE, "0" * 64, file.pieces),))
    with pytest.raises(WeightsUnavailable, match="their sum is not its sha256"):
        Fetch(lie, tmp_path / "node", [Local(model.parent)], options=QUICK).run()
    assert left_over(tmp_path / "node") == []


def test_a_source_that_ends_early_makes_room(model: Path, tmp_path: Path) -> None:
    short, good = Local(model.parent, "the store"), Local(model.parent)
    short.change = lambda start, raw: raw[:-5]
    assert get(model, tmp_path / "node", short, good).read_bytes() == model.read_bytes()
    with pytest.raises(WeightsUnavailable, match=r"stopped at .* of .* bytes \(the store: "):
        get(model, tmp_path / "other", short)


def test_a_source_that_stalls_makes_room(model: Path, tmp_path: Path) -> None:
    free = threading.Event()
    hangs, good = Local(model.parent, "the store"), Local(model.parent)
    hangs.before = lambda start: start < PIECE or free.wait(20)
    began = time.monotonic()
    try:
        assert get(model, tmp_path / "node", hangs, good).read_bytes() == model.read_bytes()
    finally:
        free.set()
    assert time.monotonic() - began < 10


def test_a_stall_of_all_sources_is_noticed_and_what_came_is_kept(
    model: Path, tmp_path: Path
) -> None:
    free = threading.Event()
    hangs = Local(model.parent)
    hangs.before = lambda start: start < 2 * PIECE or free.wait(20)
    began = time.monotonic()
    try:
        with pytest.raises(WeightsUnavailable, match=r"stopped at 8388608 of .*no answer within"):
            get(model, tmp_path / "node", hangs)
    finally:
        free.set()
    assert time.monotonic() - began < 10
    source = Local(model.parent)
    get(model, tmp_path / "node", source)
    assert source.bytes == SIZE - 2 * PIECE


@pytest.mark.slow
def test_a_slow_source_is_no_stall(model: Path, tmp_path: Path) -> None:
    """It takes longer than the deadline of a stall, and longer than that of a read for as much as
    is asked for at first."""
    slow = Local(model.parent)
    sent = 0

    def change(start: int, raw: bytes) -> bytes:
        nonlocal sent
        time.sleep(len(raw) / 4e6)  # 256 KiB in 65 ms
        sent += len(raw)
        return raw

    slow.change = change
    options = FetchOptions(stall_s=0.5, read_s=0.05, spare=0, poll_s=0.005)
    began = time.monotonic()
    path = Fetch(manifest_of(model), tmp_path / "node", [slow], options=options).run()
    assert path.read_bytes() == model.read_bytes()
    assert time.monotonic() - began > 2 * options.stall_s


# ---- the disk


def test_a_full_disk_is_said_before_the_first_byte(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": SIZE - 1})
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage)
    source = Local(model.parent)
    with pytest.raises(WeightsUnavailable, match=r"needs 13 MB more in .*where 13 MB are free"):
        get(model, tmp_path / "node", source)
    assert source.bytes == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_fills_up_is_an_error_of_one_line(model: Path, tmp_path: Path) -> None:
    part = tmp_path / "node" / manifest_of(model).digest / ".model.gguf.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    with pytest.raises(WeightsUnavailable, match=r"cannot keep model.gguf in"):
        get(model, tmp_path / "node")


# ---- two at once


def test_two_on_one_host_fetch_once(model: Path, tmp_path: Path) -> None:
    started, go = threading.Event(), threading.Event()
    first, second = Local(model.parent), Local(model.parent)

    def before(start: int) -> None:
        started.set()
        go.wait(20)

    first.before = before
    manifest, found, seen = manifest_of(model), [], []
    options = FetchOptions(spare=0, poll_s=0.01)

    def run(source: Local, report: Any) -> None:
        found.append(Fetch(manifest, tmp_path / "node", [source], report, options).run())

    one = threading.Thread(target=run, args=(first, lambda p: None), daemon=True)
    one.start()
    assert started.wait(20)
    two = threading.Thread(target=run, args=(second, seen.append), daemon=True)
    two.start()
    until(lambda: seen, "word of the second", 20)
    assert "another replica" in seen[0].waiting
    go.set()
    for thread in (one, two):
        thread.join(20)
    assert found[0] == found[1]
    assert (first.bytes, second.bytes) == (SIZE, 0)


@pytest.mark.slow
def test_one_that_waits_for_a_fetch_that_is_stuck_gives_up(model: Path, tmp_path: Path) -> None:
    go = threading.Event()
    first = Local(model.parent)
    first.before = lambda start: go.wait(20)
    manifest = manifest_of(model)
    patient = FetchOptions(spare=0, stall_s=30, read_s=30)
    one = threading.Thread(target=Fetch(manifest, tmp_path / "node", [first], options=patient).run)
    one.start()
    try:
        until(lambda: (tmp_path / "node").exists(), "the folder of the first", 20)
        time.sleep(0.2)
        with pytest.raises(WeightsUnavailable, match="another process fetches it"):
            get(model, tmp_path / "node")
    finally:
        go.set()
        one.join(20)


# ---- directories, and models in several files


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "head" / "mlx-model"
    path.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model-1.safetensors", "model-2.safetensors"):
        path.joinpath(name).write_bytes(random.Random(name).randbytes(50_000))
    path.joinpath("README.md").write_text("not needed")
    return path


def test_a_directory_comes_with_what_an_engine_needs(directory: Path, tmp_path: Path) -> None:
    manifest = manifest_of(directory)
    path = Fetch(manifest, tmp_path / "node", [Local(directory)], options=QUICK).run()
    assert sorted(p.name for p in path.iterdir() if not p.name.startswith(".")) == [
        "config.json", "model-1.safetensors", "model-2.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert holds(path, manifest)
    assert manifest_of(path) == manifest
    (path / "config.json").write_text("{}")
    assert not holds(path, manifest)
    assert manifest_of(path).weights != manifest.weights


def test_the_weights_digest_of_a_directory_is_that_of_the_compatibility_key(
    directory: Path,
) -> None:
    files = [describe(directory / n) for n in ("config.json", "model-1.safetensors")]
    files.append(describe(directory / "model-2.safetensors"))
    assert manifest_of(directory).weights == directory_digest(files)


def test_a_gguf_in_parts_comes_with_all_of_them(tmp_path: Path) -> None:
    head = tmp_path / "head"
    head.mkdir()
    for n in (1, 2):
        (head / f"m-0000{n}-of-00002.gguf").write_bytes(random.Random(n).randbytes(1000))
    first = head / "m-00001-of-00002.gguf"
    path = get(first, tmp_path / "node", Local(head))
    assert path.name == first.name
    assert (path.parent / "m-00002-of-00002.gguf").read_bytes() == random.Random(2).randbytes(1000)


def test_a_name_that_leads_elsewhere_is_refused(model: Path, tmp_path: Path) -> None:
    file = describe(model)
    out = Manifest("../x", False, (WeightsFile("../x", file.size, file.sha256, file.pieces),))
    with pytest.raises(WeightsUnavailable, match="no plain name"):
        Fetch(out, tmp_path / "node", [Local(model.parent)], options=QUICK).run()


# ---- a shared store


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    with s3_server() as settings:
        yield settings


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    if request.param == "file":
        return Files(f"file://{tmp_path}/store")
    settings = request.getfixturevalue("s3")
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    return Files(f"s3://{BUCKET}/{tmp_path.name}")


def test_a_store_gives_what_the_head_put_there(store: Files, model: Path, tmp_path: Path) -> None:
    manifest = manifest_of(model)
    assert publish(store, model, manifest) == SIZE
    assert publish(store, model, manifest) == 0
    assert len(store.names(store.path("models", manifest.digest))) == 4
    assert get(model, tmp_path / "node", StoreSource(store)).read_bytes() == model.read_bytes()


def test_what_a_store_lacks_comes_from_the_head(store: Files, model: Path, tmp_path: Path) -> None:
    manifest = manifest_of(model)
    publish(store, model, manifest)
    store.remove(store.path("models", manifest.digest, "00000001"))
    head = Local(model.parent)
    path = get(model, tmp_path / "node", StoreSource(store), head)
    assert path.read_bytes() == model.read_bytes()
    assert PIECE <= head.bytes < SIZE
    assert publish(store, model, manifest) == PIECE  # only that


def test_a_store_with_flipped_bytes_harms_nobody(store: Files, model: Path, tmp_path: Path) -> None:
    manifest = manifest_of(model)
    publish(store, model, manifest)
    place = store.path("models", manifest.digest, "00000000")
    raw = bytearray(store.read(place))
    raw[99] ^= 1
    store.remove(place)
    store.create(place, bytes(raw))
    head = Local(model.parent)
    path = get(model, tmp_path / "node", StoreSource(store), head)
    assert path.read_bytes() == model.read_bytes()


def test_a_store_that_is_gone_is_a_source_that_failed(model: Path, tmp_path: Path) -> None:
    class Gone:
        def path(self, *parts: str) -> str:
            return "/".join(parts)

        def read(self, path: str, start: int, stop: int) -> bytes:
            raise StoreUnavailable("s3://gone", "no route")

    gone: Any = Gone()
    with pytest.raises(SourceFailed, match="no route"):
        StoreSource(gone).read(describe(model), 0, 10)
    path = get(model, tmp_path / "node", StoreSource(gone), Local(model.parent))
    assert path.read_bytes() == model.read_bytes()


def test_a_model_that_changes_while_it_is_published_is_noticed(model: Path, tmp_path: Path) -> None:
    manifest = manifest_of(model)
    model.write_bytes(b"another")
    with pytest.raises(OSError, match="has changed"):
        publish(Files(f"file://{tmp_path}/store"), model, manifest)
