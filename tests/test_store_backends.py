"""The store's contract on an S3 endpoint and on an SSH server, and what is special about each."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import time

import fsspec
import paramiko
import pytest

from storage.errors import StoreUnavailable
from storage.files import Files, FilesOptions
from storage.store import CacheStore
from tests.require import require
from tests.servers import BUCKET, s3_server, ssh_server
from tests.store_contract import AGENT, ALICE, KEY, StoreContract, template, with_tokens
from tests.test_files import FilesContract

pytestmark = pytest.mark.slow
QUICK = FilesOptions(timeout_s=0.3)


@pytest.fixture(scope="module")
def s3_settings():
    with s3_server() as settings:
        yield settings


@pytest.fixture(scope="module")
def sshd(tmp_path_factory):
    with ssh_server(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def s3_url(s3_settings, monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "s3", s3_settings)
    return f"s3://{BUCKET}/{secrets.token_hex(4)}/store"


@pytest.fixture
def sftp_url(sshd, tmp_path, monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "sftp", sshd.settings)
    return f"{sshd.url}{tmp_path}/store"


@pytest.fixture
def black_hole():
    """host:port of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def assert_ends_in_time(store: CacheStore) -> None:
    """Claims take several calls, each with a deadline; the first that fails ends it."""
    for call in (
        store.tenants,
        lambda: store.files.read(store.files.path("a")),
        lambda: store.claim(template(ALICE)),
        store.probe,
    ):
        start = time.monotonic()
        with pytest.raises(StoreUnavailable):
            call()
        assert time.monotonic() - start < 4


def until_it_works(call):
    deadline = time.monotonic() + 20
    while True:
        try:
            return call()
        except StoreUnavailable:
            assert time.monotonic() < deadline


# ---- S3


class TestS3Files(FilesContract):
    @pytest.fixture
    def url(self, s3_url):
        return s3_url


class TestS3Store(StoreContract):
    @pytest.fixture
    def url(self, s3_url):
        return s3_url

    def test_a_bucket_that_is_not_there_is_unavailable_not_empty(self, url):
        store = CacheStore("s3://no-such-bucket/store")
        for call in (
            store.probe,
            store.tenants,
            lambda: store.latest(AGENT, KEY),
            lambda: store.files.entries(store.files.path("blocks")),
            lambda: self.put(store),
        ):
            with pytest.raises(StoreUnavailable, match="no such bucket"):
                call()

    def test_folders_of_many_pages_are_listed_whole(self, store):
        store.files.backend.page_size = 2
        for name in ("a", "b", "c", "d/x", "e/x", "f/x", "g/x"):
            store.files.create(store.files.path("many", name), b"raw")
        assert store.files.names(store.files.path("many")) == list("abcdefg")
        assert [e.name for e in store.files.entries(store.files.path("many"))] == list("abc")

    def test_a_folder_made_by_other_tools_is_no_file_of_its_own(self, store):
        store.files.fs.pipe_file(store.files.path("folder") + "/", b"")
        store.files.create(store.files.path("folder", "a"), b"")
        assert store.files.names(store.files.path("folder")) == ["a"]
        assert [e.name for e in store.files.entries(store.files.path("folder"))] == ["a"]

    def test_a_server_that_ignores_the_condition_fails_the_probe(self, store, monkeypatch):
        overwrite = store.files.fs.pipe_file
        monkeypatch.setattr(
            store.files.fs, "pipe_file", lambda path, raw, mode: overwrite(path, raw)
        )
        with pytest.raises(StoreUnavailable, match="a second create of one file succeeds"):
            store.probe()

    def test_a_refusal_that_does_not_name_its_condition_is_one(self, store, monkeypatch):
        from botocore.exceptions import ClientError
        from s3fs.errors import translate_boto_error

        def refuse(path, raw, mode):
            error = ClientError({"Error": {"Code": "PreconditionFailed"}}, "PutObject")
            raise translate_boto_error(error)

        monkeypatch.setattr(store.files.fs, "pipe_file", refuse)
        with pytest.raises(FileExistsError):
            store.files.create(store.files.path("a"), b"")


def test_an_s3_server_that_does_not_answer_ends_calls_at_their_deadlines(black_hole, monkeypatch):
    settings = {"endpoint_url": f"http://{black_hole}", "key": "test", "secret": "test"}
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    assert_ends_in_time(CacheStore(f"s3://{BUCKET}/x", options=QUICK))


def test_an_s3_server_that_is_not_there_is_unavailable(monkeypatch):
    settings = {"endpoint_url": "http://127.0.0.1:9", "key": "test", "secret": "test"}
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    assert_ends_in_time(CacheStore(f"s3://{BUCKET}/x", options=QUICK))


def probe_elsewhere(url: str, **environment: str) -> None:
    """In a process of its own: fsspec reads its settings when it is imported."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "FSSPEC_"))}
    program = "import sys; from storage.store import CacheStore; CacheStore(sys.argv[1]).probe()"
    command = [sys.executable, "-c", program, url]
    subprocess.run(command, check=True, timeout=60, env=clean | environment)


def test_s3_settings_come_from_aws_variables(s3_settings, s3_url):
    probe_elsewhere(
        s3_url,
        AWS_ENDPOINT_URL=s3_settings["endpoint_url"],
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
    )


def test_s3_settings_come_from_fsspec_variables(s3_settings, s3_url):
    probe_elsewhere(
        s3_url,
        FSSPEC_S3_ENDPOINT_URL=s3_settings["endpoint_url"],
        FSSPEC_S3=json.dumps({"key": "test", "secret": "test"}),
    )


# ---- SFTP


class TestSftpFiles(FilesContract):
    @pytest.fixture
    def url(self, sftp_url):
        return sftp_url


class TestSftpStore(StoreContract):
    @pytest.fixture
    def url(self, sftp_url):
        return sftp_url

    @pytest.fixture
    def store(self, url, faults, tmp_path):
        yield CacheStore(url, on_fault=faults.append)
        shutil.rmtree(tmp_path / "store", ignore_errors=True)

    def test_files_are_private_and_nothing_temporary_remains(self, store, tmp_path):
        self.put(store)
        store.commit(with_tokens(store.claim(template(ALICE)).card, 1))
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
        assert len(files) == 3
        assert all(path.suffix == ".safetensors" for path in files)
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
        assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}

    def test_a_server_whose_rename_overwrites_fails_the_probe(self, store, monkeypatch):
        monkeypatch.setattr(paramiko.SFTPClient, "rename", paramiko.SFTPClient.posix_rename)
        with pytest.raises(StoreUnavailable, match="a second create of one file succeeds"):
            store.probe()

    def test_a_write_that_fell_short_is_no_file(self, store, monkeypatch):
        write = paramiko.SFTPFile.write
        monkeypatch.setattr(paramiko.SFTPFile, "write", lambda file, raw: write(file, raw[:-1]))
        with pytest.raises(StoreUnavailable, match="7 of 8 bytes written"):
            self.put(store)
        monkeypatch.undo()
        assert store.files.names(store.files.path("blocks", "acme", "3c3")) == []

    def test_every_file_is_synced_before_it_gets_its_name(self, store, monkeypatch):
        requests: list[str] = []
        request = paramiko.SFTPClient._request

        def record(self, kind, *arguments):
            if kind in (paramiko.sftp.CMD_EXTENDED, paramiko.sftp.CMD_RENAME):
                requests.append(
                    str(arguments[0]) if kind == paramiko.sftp.CMD_EXTENDED else "rename"
                )
            return request(self, kind, *arguments)

        monkeypatch.setattr(paramiko.SFTPClient, "_request", record)
        self.put(store)
        assert requests == ["fsync@openssh.com", "rename"]


def test_a_server_without_fsync_is_used_without(sftp_url, monkeypatch):
    request = paramiko.SFTPClient._request

    def unknown(self, kind, *arguments):
        if arguments[0] == "fsync@openssh.com":
            raise OSError("Operation unsupported")
        return request(self, kind, *arguments)

    monkeypatch.setattr(paramiko.SFTPClient, "_request", unknown)
    files = Files(sftp_url)
    files.create(files.path("a"), b"rows")
    assert files.read(files.path("a")) == b"rows"


def test_an_unknown_host_is_refused(sshd, sftp_url, tmp_path, monkeypatch):
    (tmp_path / "nobody").write_text("")
    settings = sshd.settings | {"known_hosts": str(tmp_path / "nobody")}
    monkeypatch.setitem(fsspec.config.conf, "sftp", settings)
    with pytest.raises(StoreUnavailable, match="not in known_hosts: its key is SHA256:"):
        CacheStore(sftp_url).probe()


def test_a_host_with_another_key_is_refused(sshd, sftp_url, tmp_path, monkeypatch):
    other = (sshd.folder / "user.pub").read_text()
    (tmp_path / "known_hosts").write_text(f"[127.0.0.1]:{sshd.port} {other}")
    settings = sshd.settings | {"known_hosts": str(tmp_path / "known_hosts")}
    monkeypatch.setitem(fsspec.config.conf, "sftp", settings)
    with pytest.raises(StoreUnavailable, match="does not match: got"):
        CacheStore(sftp_url).probe()


def test_a_key_that_the_server_refuses_is_offered_once(sshd, sftp_url, tmp_path, monkeypatch):
    settings = sshd.settings | {"key_filename": str(sshd.folder / "host")}
    monkeypatch.setitem(fsspec.config.conf, "sftp", settings)
    offered: list[str] = []
    authenticate = paramiko.Transport.auth_publickey

    def record(self, username, key, *arguments):
        offered.append(username)
        return authenticate(self, username, key, *arguments)

    monkeypatch.setattr(paramiko.Transport, "auth_publickey", record)
    with pytest.raises(StoreUnavailable, match="Authentication failed"):
        CacheStore(sftp_url).tenants()
    assert len(offered) == 1


def test_a_server_that_does_not_answer_ends_calls_at_their_deadlines(black_hole):
    assert_ends_in_time(CacheStore(f"sftp://{black_hole}/x", options=QUICK))


def test_a_server_that_was_started_again_is_used_again(tmp_path, monkeypatch):
    (tmp_path / "keys").mkdir()
    require("proc", os.path.exists("/proc/self/stat"), "there is no /proc to find connections in")
    with ssh_server(tmp_path / "keys") as server:
        monkeypatch.setitem(fsspec.config.conf, "sftp", server.settings)
        files = Files(f"{server.url}{tmp_path}/store")
        files.create(files.path("a"), b"rows")
        server.kill()
        with pytest.raises(StoreUnavailable):
            files.read(files.path("a"))
    with ssh_server(tmp_path / "keys", server.port):
        assert files.read(files.path("a")) == b"rows"
        files.create(files.path("b"), b"more rows")
        assert files.names(files.root) == ["a", "b"]


def test_a_connection_that_hangs_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "keys").mkdir()
    require("proc", os.path.exists("/proc/self/stat"), "there is no /proc to find connections in")
    with ssh_server(tmp_path / "keys") as server:
        monkeypatch.setitem(fsspec.config.conf, "sftp", server.settings)
        files = Files(f"{server.url}{tmp_path}/store", FilesOptions(timeout_s=2.0, workers=2))
        files.create(files.path("a"), b"rows")
        server.stop_connections()
        start = time.monotonic()
        with pytest.raises(StoreUnavailable):
            files.read(files.path("a"))
        assert time.monotonic() - start < 5
        assert until_it_works(lambda: files.read(files.path("a"))) == b"rows"
        assert files.map(files.read, [files.path("a")] * 4) == [b"rows"] * 4


def test_sftp_settings_come_from_fsspec_variables(sshd, sftp_url):
    probe_elsewhere(
        sftp_url,
        FSSPEC_SFTP_KEY_FILENAME=sshd.settings["key_filename"],
        FSSPEC_SFTP_KNOWN_HOSTS=sshd.settings["known_hosts"],
    )


def test_a_full_server_is_unavailable_and_leaves_no_temporary_file(sftp_url, monkeypatch):
    files = Files(sftp_url)
    files.create(files.path("a"), b"rows")

    def full(self, old, new):
        raise OSError("Failure")  # all that SFTP version 3 has to say

    monkeypatch.setattr(paramiko.SFTPClient, "rename", full)
    with pytest.raises(OSError, match="Failure") as caught:
        files.create(files.path("b"), b"more rows")
    assert caught.value.errno != errno.EEXIST
    assert [entry.name for entry in files.entries(files.root)] == ["a"]
