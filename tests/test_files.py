"""Files: what every backend must do, deadlines, retries, and exclusive create under races."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from storage.backends import LocalBackend, is_temporary, temporary_name
from storage.errors import StoreUnavailable
from storage.files import Entry, Files, FilesOptions
from storage.workers import DeadlinePassed, Workers
from tests.faulty import Boundaries, Crashed, DictBackend, Faulty, Rates
from tests.store_contract import race


class FilesContract:
    """Inherited by every backend's tests; they override `url`."""

    @pytest.fixture
    def url(self, tmp_path):
        raise NotImplementedError

    @pytest.fixture
    def files(self, url):
        return Files(url)

    @pytest.fixture
    def folder(self, files):
        return files.path("some", "folder")

    def test_a_file_comes_back_whole_and_in_ranges(self, files, folder):
        raw = os.urandom(300_000)
        path = f"{folder}/a"
        files.create(path, raw)
        assert files.read(path) == raw
        for start, stop in [(0, 10), (7, 100_000), (299_999, 300_000), (None, 5), (5, None)]:
            assert files.read(path, start, stop) == raw[start:stop]

    def test_a_range_ends_where_the_file_ends(self, files, folder):
        files.create(f"{folder}/a", b"0123456789")
        assert files.read(f"{folder}/a", 8, 4096) == b"89"
        assert files.read(f"{folder}/a", 10, 4096) == b""
        assert files.read(f"{folder}/a", 50, 60) == b""
        assert files.read(f"{folder}/a", 50) == b""
        assert files.read(f"{folder}/a", 3, 3) == b""

    def test_an_empty_file_is_a_file(self, files, folder):
        files.create(f"{folder}/a", b"")
        assert files.read(f"{folder}/a") == b""
        with pytest.raises(FileExistsError):
            files.create(f"{folder}/a", b"x")
        assert files.read(f"{folder}/a") == b""

    def test_a_missing_file_is_missing(self, files, folder):
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                files.read(f"{folder}/a")
            with pytest.raises(FileNotFoundError):
                files.read(f"{folder}/a", 0, 10)
            assert (files.names(folder), files.entries(folder)) == ([], [])
            files.create(f"{folder}/b", b"")

            files.remove(f"{folder}/b")

    def test_names_and_entries_are_sorted_and_complete(self, files, folder):
        before = files.now()
        for name in ("c", "a", "b"):
            files.create(f"{folder}/{name}", name.encode() * 5)
        files.create(f"{folder}/d/e", b"inside")
        assert files.names(folder) == ["a", "b", "c", "d"]
        assert files.names(files.path("some")) == ["folder"]
        found = files.entries(folder)
        assert [(entry.name, entry.size) for entry in found] == [("a", 5), ("b", 5), ("c", 5)]
        after = files.now()
        assert all(before - 2 <= entry.modified <= after + 2 for entry in found)
        assert files.entries(files.path("some")) == []

    def test_the_stores_clock_runs_and_leaves_nothing(self, files):
        first = files.now()
        assert abs(first - time.time()) < 30  # these stores are all on this machine
        assert files.now() >= first
        assert files.entries(files.path("probe")) == []

    def test_temporary_files_are_hidden_but_can_be_found(self, files, folder):
        abandoned = temporary_name()
        files.create(f"{folder}/{abandoned}", b"half a bl")
        files.create(f"{folder}/a", b"")
        assert files.names(folder) == ["a"]
        assert [entry.name for entry in files.entries(folder)] == [abandoned, "a"]

    def test_a_create_leaves_no_temporary_file(self, files, folder):
        files.create(f"{folder}/a", b"one")
        with pytest.raises(FileExistsError):
            files.create(f"{folder}/a", b"two")
        assert [entry.name for entry in files.entries(folder)] == ["a"]
        assert files.read(f"{folder}/a") == b"one"

    def test_racing_creates_have_one_winner(self, files, folder):
        for n in range(4):

            def create(i, path=f"{folder}/{n}"):
                try:
                    files.create(path, bytes([i]) * 4000)
                except FileExistsError:
                    return None
                return i

            winners = [i for i in race(6, create) if i is not None]
            assert len(winners) == 1
            assert files.read(f"{folder}/{n}") == bytes(winners) * 4000

    def test_set_aside_replaces_what_was_set_aside_before(self, files, folder):
        for content in (b"first", b"second"):
            files.create(f"{folder}/a", content)
            files.set_aside(f"{folder}/a")
        assert files.names(folder) == ["a.corrupt"]
        assert files.read(f"{folder}/a.corrupt") == b"second"
        files.set_aside(f"{folder}/a")

    def test_removing_twice_is_no_error(self, files, folder):
        files.create(f"{folder}/a", b"")
        files.remove(f"{folder}/a")
        files.remove(f"{folder}/a")
        assert files.names(folder) == []

    def test_map_reads_many_in_order(self, files, folder):
        paths = [f"{folder}/{n}" for n in range(12)]
        for path in paths:
            files.create(path, path.encode())
        assert files.map(files.read, paths) == [path.encode() for path in paths]
        with pytest.raises(FileNotFoundError):
            files.map(files.read, [*paths, f"{folder}/none", *paths])


class TestFileFiles(FilesContract):
    @pytest.fixture
    def url(self, tmp_path):
        return f"file://{tmp_path}/store"

    def test_files_and_folders_are_private_whatever_the_umask(self, files, folder):
        before = os.umask(0)
        try:
            files.create(f"{folder}/a", b"")
        finally:
            os.umask(before)
        assert stat.S_IMODE(os.stat(f"{folder}/a").st_mode) == 0o600
        for path in (folder, os.path.dirname(folder), files.root):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o700

    def test_what_was_read_does_not_change_with_the_file(self, files, folder):
        """Bytes are checked after they were read: a map would show what is written later, and kill
        the process when the file shrinks."""
        path = f"{folder}/a"
        files.create(path, b"x" * 100_000)
        raw = files.read(path)
        with open(path, "r+b") as file:
            file.write(b"y" * 10)
            file.truncate(10)
        assert raw == b"x" * 100_000

    def test_a_writer_that_dies_leaves_a_temporary_file_and_no_other(self, files, folder):
        def die(temporary, path):
            raise Crashed

        files.backend.link = die
        files.backend.unlink = lambda path: None  # the dead clean nothing up
        with pytest.raises(Crashed):
            files.create(f"{folder}/a", b"rows")
        assert files.names(folder) == []
        (left,) = files.entries(folder)
        assert is_temporary(left.name)

    def test_processes_race_for_files_and_each_has_one_winner(self, files, folder):
        program = (
            "import sys\n"
            "from storage.files import Files\n"
            "files, name = Files(sys.argv[1]), sys.argv[2]\n"
            "files.create(files.path('ready', name), b'')\n"
            "while len(files.names(files.path('ready'))) < 4: pass\n"
            "for n in range(100):\n"
            "    try:\n"
            "        files.create(files.path('some', 'folder', str(n)), name.encode() * 999)\n"
            "        print(n)\n"
            "    except FileExistsError:\n"
            "        pass\n"
        )
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, files.url, f"writer-{i}"], stdout=subprocess.PIPE
            )
            for i in range(4)
        ]
        won: dict[int, str] = {}
        for i, process in enumerate(processes):
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            for line in output.split():
                assert int(line) not in won, "two winners"
                won[int(line)] = f"writer-{i}"
        assert sorted(won) == list(range(100))
        for n, winner in won.items():
            assert files.read(f"{folder}/{n}") == winner.encode() * 999
        assert not [entry for entry in files.entries(folder) if is_temporary(entry.name)]


class TestMemoryFiles(FilesContract):
    @pytest.fixture
    def url(self):
        yield "memory://files"
        fs = Files("memory://files").fs
        if fs.exists("/files"):
            fs.rm("/files", recursive=True)


# ---- deadlines


class Hanging(LocalBackend):
    """A mount whose server is gone: calls return only when it is back."""

    def __init__(self, folder) -> None:
        super().__init__(f"file://{folder}")
        self.back = threading.Event()
        self.calls = 0

    def read(self, path, start, stop):
        self.calls += 1
        self.back.wait(20)
        return super().read(path, start, stop)

    def create(self, path, raw):
        self.back.wait(20)
        super().create(path, raw)


@pytest.fixture
def hanging(tmp_path):
    (tmp_path / "a").write_bytes(b"rows")
    files = Files(str(tmp_path), FilesOptions(timeout_s=0.2, workers=3))
    files.backend = Hanging(tmp_path)
    yield files
    files.backend.back.set()


def test_every_call_of_a_hung_store_ends_at_its_deadline(hanging, tmp_path):
    path = str(tmp_path / "a")
    for call in (lambda: hanging.read(path), lambda: hanging.create(f"{path}b", b"")):
        start = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"no answer within 0\.2 s"):
            call()
        assert 0.2 <= time.monotonic() - start < 1


def test_calls_of_a_hung_store_do_not_pile_up(hanging, tmp_path):
    path = str(tmp_path / "a")
    before = threading.active_count()
    results = race(12, lambda i: hanging.read(path))
    assert all(isinstance(result, StoreUnavailable) for result in results)
    assert hanging.backend.calls == 3  # one per worker; the others never began
    assert threading.active_count() - before <= 3
    start = time.monotonic()
    for _ in range(20):
        with pytest.raises(StoreUnavailable, match="all 3 workers hang"):
            hanging.read(path)
    assert time.monotonic() - start < 0.2  # nobody waits for what cannot begin
    assert hanging.backend.calls == 3
    hanging.backend.back.set()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert hanging.read(path) == b"rows"
            break
        except StoreUnavailable:
            time.sleep(0.01)
    else:
        pytest.fail("the store came back, its workers did not")
    assert hanging.map(hanging.read, [path] * 9) == [b"rows"] * 9


def test_a_hung_store_does_not_keep_the_process(tmp_path):
    (tmp_path / "a").write_bytes(b"rows")
    program = (
        "import sys, threading\n"
        "from storage.errors import StoreUnavailable\n"
        "from storage.files import Files, FilesOptions\n"
        "files = Files(sys.argv[1], FilesOptions(timeout_s=0.1))\n"
        "files.backend.read = lambda *args: threading.Event().wait()\n"
        "try:\n"
        "    files.read(files.path('a'))\n"
        "except StoreUnavailable:\n"
        "    print('refused')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, timeout=30, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "refused\n", "")


def _square(workers, i):
    return workers.call(lambda: i * i, 5)


def test_workers_end_with_their_owner():
    before = threading.active_count()
    workers = Workers(4)
    assert race(4, partial(_square, workers)) == [0, 1, 4, 9]
    assert threading.active_count() > before
    del workers
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_workers_bound_what_runs_at_once():
    workers = Workers(2)
    running, most = 0, 0
    lock = threading.Lock()

    def count():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    race(8, lambda i: workers.call(count, 5))
    assert most == 2
    with pytest.raises(DeadlinePassed):
        workers.call(lambda: time.sleep(0.5), 0.05)


def test_a_thread_that_cannot_start_costs_no_worker(monkeypatch):
    workers = Workers(1)

    def refuse(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                workers.call(int, 0.1)
    assert workers.call(int, 5) == 0


# ---- retries


class Counting(DictBackend):
    """Fails with the given errors, one a call, before it works."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.errors = list(errors)
        self.calls = 0

    def read(self, path, start, stop):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return super().read(path, start, stop)

    def create(self, path, raw):
        self.calls += 1
        super().create(path, raw)
        if self.errors:
            raise self.errors.pop(0)


def files_on(backend, **options) -> Files:
    files = Files("memory://x", FilesOptions(**options))
    files.backend = backend
    return files


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "reset"),
        TimeoutError("slow"),
        OSError(errno.ESTALE, "stale handle"),
        OSError("a client library's"),
    ],
)
def test_an_error_that_may_pass_is_tried_again(error):
    backend = Counting(error, error)
    backend.files["/a"] = (b"rows", 0.0)
    assert files_on(backend).read("/a") == b"rows"
    assert backend.calls == 3


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (FileNotFoundError(errno.ENOENT, "gone"), FileNotFoundError),
        (PermissionError(errno.EACCES, "not yours"), StoreUnavailable),
        (OSError(errno.ENOSPC, "full"), StoreUnavailable),
        (OSError(errno.EINVAL, "no"), StoreUnavailable),
        (ValueError("a bug"), StoreUnavailable),
    ],
)
def test_an_error_that_stays_is_not(error, seen):
    backend = Counting(error)
    with pytest.raises(seen):
        files_on(backend).read("/a")
    assert backend.calls == 1


def test_retries_are_few_and_end_before_the_deadline():
    backend = Counting(*[TimeoutError() for _ in range(100)])
    with pytest.raises(StoreUnavailable):
        files_on(backend, attempts=3).read("/a")
    assert backend.calls == 3
    start = time.monotonic()
    with pytest.raises(StoreUnavailable):
        files_on(backend, attempts=1000, timeout_s=0.3).read("/a")
    assert time.monotonic() - start < 0.5


def test_pauses_grow_and_are_random(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr("storage.files.time.sleep", pauses.append)
    for _ in range(50):
        backend = Counting(*[TimeoutError() for _ in range(4)])
        backend.files["/a"] = (b"", 0.0)
        files_on(backend).read("/a")
    rounds = [pauses[n::4] for n in range(4)]
    assert all(0 <= pause <= 0.05 * 2 ** (n + 1) for n in range(4) for pause in rounds[n])
    assert all(len(set(some)) == 50 for some in rounds)
    assert max(rounds[3]) > 4 * max(rounds[0])


def test_a_create_without_an_answer_is_not_tried_again():
    """Only what the store holds says what became of it, and that is the caller's question."""
    backend = Counting(ConnectionResetError(errno.ECONNRESET, "reset"))
    files = files_on(backend)
    with pytest.raises(ConnectionResetError):
        files.create("/a", b"rows")
    assert backend.calls == 1
    assert files.read("/a") == b"rows"


def test_racing_creates_have_one_winner_on_a_failing_store():
    inner = DictBackend()
    outcomes = set()
    for n in range(50):
        backend = Faulty(inner, Rates(error_before=0.2, error_after=0.3), seed=n)
        files = files_on(backend)
        winners = []
        for i in range(4):
            before = inner.files.get(f"/{n}")
            try:
                files.create(f"/{n}", bytes([i]))
                winners.append(i)
            except FileExistsError:
                assert before is not None
            except ConnectionResetError:  # what the store holds decides
                outcomes.add(inner.files.get(f"/{n}") == before)
                if inner.files.get(f"/{n}") != before:
                    winners.append(i)
            assert before in (None, inner.files.get(f"/{n}"))
        assert len(winners) <= 1
    assert outcomes == {True, False}


def test_map_is_bounded_and_raises_what_the_first_raised(tmp_path):
    files = Files(str(tmp_path), FilesOptions(workers=3))
    running, most = 0, 0
    lock = threading.Lock()

    def work(n):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1
        if n % 10 == 7:
            raise KeyError(n)
        return n * n

    assert files.map(work, range(7)) == [n * n for n in range(7)]
    assert 1 < most <= 3
    with pytest.raises(KeyError, match="7"):
        files.map(work, range(20))
    assert files.map(work, []) == []


def test_an_entry_says_what_it_is():
    backend = DictBackend()
    backend.create("/folder/a", b"rows")
    backend.clock += 60
    backend.create("/folder/.0.tmp", b"")
    files = files_on(backend)
    assert files.entries("/folder") == [Entry(".0.tmp", 0, 1.7e9 + 60), Entry("a", 4, 1.7e9)]


# ---- which stores there are


@pytest.mark.parametrize(
    ("url", "library", "extra"), [("s3://b/x", "s3fs", "s3"), ("sftp://h/x", "paramiko", "sftp")]
)
def test_a_missing_library_names_the_extra_to_install(url, library, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf"needs {library}.* pip install '\.\[{extra}\]'"):
        Files(url)


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "sftp://host", "sftp:///path", "sftp://host/"])
def test_a_url_without_its_parts_is_refused(url):
    with pytest.raises(ValueError, match=r"names no bucket|wants sftp://"):
        Files(url)


def test_a_password_in_a_url_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match="FSSPEC_SFTP_PASSWORD") as caught:
        Files("sftp://me:secret@host/path")
    assert "secret" not in str(caught.value)


def test_a_crash_is_not_handled():
    files = files_on(Faulty(DictBackend(), boundaries=Boundaries(crash_at=0)))
    with pytest.raises(Crashed):
        files.create("/a", b"")
    with pytest.raises(Crashed):
        files.names("/")
