"""Settings: where they come from, who wins, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig, load_config
from cluster.errors import ConfigError


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "kvferry.toml"
    path.write_text(text)
    return path


def test_defaults() -> None:
    config = load_config()
    assert config.nodes == 2
    assert config.http == ClusterConfig().http
    assert (config.replica.codec, config.replica.slots) == ("q4", 4)
    assert config.replica.model == ClusterConfig().replica.model
    assert config.http.host == "127.0.0.1"


def test_later_sources_win(tmp_path: Path) -> None:
    path = toml(tmp_path, 'slots = 1\nnodes = 1\nport = 1001\ncodec = "f16"\n')
    environment = {"KVFERRY_SLOTS": "2", "KVFERRY_NODES": "3"}
    config = load_config(path, environment, {"slots": 5, "model": None})
    assert config.replica.slots == 5  # a flag
    assert config.nodes == 3  # the environment
    assert config.http.port == 1001  # the file
    assert config.replica.codec == "f16"
    assert config.replica.n_ctx == 8192  # a default


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, "slots = 7")
    assert load_config(None, {"KVFERRY_CONFIG": str(path)}).replica.slots == 7
    other = tmp_path / "other.toml"
    other.write_text("slots = 8")
    assert load_config(other, {"KVFERRY_CONFIG": str(path)}).replica.slots == 8


def test_variables_that_are_no_settings_are_left_alone() -> None:
    environment = {"KVFERRY_URL": "x", "KVFERRY_DATA": "x", "KVFERRY_REQUIRE": "x", "SLOTS": "9"}
    assert load_config(None, environment) == load_config()


@pytest.mark.parametrize(
    ("environment", "flags", "source"),
    [
        ({"KVFERRY_SLOT": "2"}, {}, "environment"),
        ({}, {"slot": 2}, "flags"),
    ],
)
def test_an_unknown_setting_is_refused(
    environment: dict[str, str], flags: dict[str, Any], source: str
) -> None:
    with pytest.raises(ConfigError, match=f"{source}: unknown setting 'slot'.*slots"):
        load_config(None, environment, flags)


def test_an_unknown_setting_of_a_file_names_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, "slot = 2")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "'slot'" in str(caught.value)


@pytest.mark.parametrize("text", ["slots = ", "slots = 1\nslots = 2", "\x00"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    path = toml(tmp_path, text)
    with pytest.raises(ConfigError, match=r"kvferry\.toml"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml"):
        load_config(tmp_path / "nothing.toml")
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'model = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml"):
        load_config(latin)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slots", "0"),
        ("slots", "256"),
        ("slots", "two"),
        ("slots", "1.5"),
        ("slots", "-1"),
        ("nodes", "0"),
        ("nodes", "65"),
        ("port", "0"),
        ("port", "65536"),
        ("n_ctx", "8"),
        ("max_waiting", "0"),
        ("max_tokens", "0"),
        ("prefill_chunk", "0"),
        ("prefill_chunk", "513"),
        ("codec", "q3"),
        ("codec", ""),
        ("kv_type", "q5_1"),
        ("profile", "fast"),
        ("flash_attention", "yes"),
        ("ubatch", "513"),
        ("kv_budget", "1GB"),
        ("kv_type", ""),
        ("speculation", "mtp"),
        ("speculation", "draft"),
        ("speculation", "fast"),
        ("draft_tokens", "0"),
        ("draft_tokens", "33"),
        ("draft_model", "small.gguf"),
        ("pool_bytes", "many"),
        ("pool_bytes", "1XB"),
        ("temperature", "hot"),
        ("store", "gs://bucket/prefix"),
        ("store", "s3://"),
        ("store", "sftp://host"),
        ("store", "sftp://me:secret@host/path"),
        ("store", "memory://"),
        ("api_keys", "key-without-a-tenant"),
        ("api_keys", "key:Not A Tenant"),
        ("api_keys", "key:../up"),
        ("equivalent_digests", "ab:cd"),
        ("equivalent_digests", "a" * 64),
        ("equivalent_digests", f"{'a' * 64}:{'b' * 64},{'b' * 64}:{'c' * 64}"),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {f"KVFERRY_{name.upper()}": value})
    message = str(caught.value)
    assert name in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "other", [{"codec": "k8v4"}, {"codec": "q8"}, {"codec": "f16"}, {"model": "fake://"}]
)
def test_quantized_cells_want_codes_that_fit_them(other: dict[str, str]) -> None:
    assert load_config(None, {}, {"kv_type": "q4_1", "codec": "q4"}).replica.kv_type == "q4_1"
    with pytest.raises(ConfigError, match=r"^kv_type = q4_1: [^\n]+$"):
        load_config(None, {}, {"kv_type": "q4_1"} | other)


@pytest.mark.parametrize("value", [True, ["a"], {"a": 1}, 5])
def test_a_string_setting_wants_a_string(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match="codec"):
        load_config(None, {}, {"codec": value})


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("512", 512),
        ("64k", 64 << 10),
        ("64KB", 64 << 10),
        ("64MB", 64 << 20),
        (" 64 MiB ", 64 << 20),
        ("2GiB", 2 << 30),
        ("2g", 2 << 30),
        ("1TB", 1 << 40),
    ],
)
def test_sizes_in_bytes(text: str, count: int) -> None:
    assert load_config(None, {"KVFERRY_POOL_BYTES": text}).replica.pool_bytes == count


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = load_config(None, {}, {"store": "some/store", "model": "models/a.gguf"})
    assert config.replica.store == f"file://{tmp_path}/some/store"
    assert config.replica.model == str(tmp_path / "models/a.gguf")
    assert load_config().replica.store == f"file://{tmp_path}/.kvferry/store"
    home = load_config(None, {}, {"store": "~/store", "model": "~/a.gguf"})
    assert home.replica.store == f"file://{tmp_path}/home/store"
    assert home.replica.model == str(tmp_path / "home/a.gguf")


def test_references_with_a_scheme_stay_as_they_are() -> None:
    for model in ("pkg://package/file.gguf", "hf://owner/repo/file.gguf", "fake://"):
        assert load_config(None, {}, {"model": model}).replica.model == model
    for store in ("file:///x/y", "s3://bucket/prefix", "sftp://me@host:2222/path"):
        assert load_config(None, {}, {"store": store}).replica.store == store


def test_api_keys_from_everywhere(tmp_path: Path) -> None:
    keys = {"k1": "alice", "k2": "bob_2"}
    path = toml(tmp_path, '[api_keys]\nk1 = "alice"\nk2 = "bob_2"\n')
    assert load_config(path).http.api_keys == keys
    environment = {"KVFERRY_API_KEYS": "k1:alice,k2:bob_2,"}
    assert load_config(None, environment).http.api_keys == keys
    assert load_config(None, {}, {"api_keys": keys}).http.api_keys == keys


def test_equivalent_digests_from_everywhere(tmp_path: Path) -> None:
    table = {"a" * 64: "c" * 64, "b" * 64: "c" * 64}
    lines = "".join(f'{digest} = "{canonical}"\n' for digest, canonical in table.items())
    path = toml(tmp_path, f"[equivalent_digests]\n{lines}")
    assert load_config(path).replica.equivalent_digests == table
    text = ",".join(":".join(pair) for pair in table.items())
    environment = {"KVFERRY_EQUIVALENT_DIGESTS": text}
    assert load_config(None, environment).replica.equivalent_digests == table
    assert load_config().replica.equivalent_digests == {}


def test_a_store_whose_path_has_odd_letters_keeps_them(tmp_path: Path) -> None:
    """What the store opens is the directory that was named."""
    from storage.store import CacheStore

    folder = tmp_path / "my store 100%"
    config = load_config(None, {}, {"store": str(folder)})
    CacheStore(config.replica.store).probe()
    assert folder.is_dir()


@pytest.mark.parametrize(
    "line",
    [
        "slots = 'two'", "slots = 2.5", "slots = true", "slots = [2]", "temperature = 'warm'",
        "temperature = true", "model = 3", "host = ['a']", "api_keys = ['a']", "api_keys = 1",
        "api_keys = 'key'",
    ],
)  # fmt: skip
def test_a_wrong_type_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "kvferry.toml"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: {line.split()[0]} = ")


@pytest.mark.parametrize(
    "line",
    [
        "request_timeout_s = -1",
        "temperature = nan",
        "top_p = 0",
        "cells = -1",
        "slots = 0",
        "max_step_s = -1",
        "turn_timeout_s = 0",
    ],
)
def test_a_value_out_of_bounds_is_named(line: str, tmp_path: Path) -> None:
    name = line.split()[0]
    with pytest.raises(ConfigError, match=f"^{name} = .*must be between"):
        load_config(toml(tmp_path, line + "\n"))


def test_an_api_key_is_not_printed() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environment={"KVFERRY_API_KEYS": "sk-secret"})
    assert "sk-secret" not in str(caught.value)


# ---- a store on the nodes' own disks


def test_a_store_on_the_nodes_disks_keeps_two_copies(tmp_path: Path) -> None:
    def store(**flags: Any) -> str:
        return load_config(flags={"store": f"cluster://{tmp_path}", **flags}).replica.store

    assert store() == f"cluster://{tmp_path}?replicas=2"
    assert store(replicas=3) == f"cluster://{tmp_path}?replicas=3"
    assert load_config(flags={"store": "cluster://"}).replica.store.startswith("cluster:///")
    assert load_config(flags={"store": f"cluster://{tmp_path}"}).replica.local == ""


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"replicas": 2}, "want store = cluster://"),
        ({"replicas": 2, "store": "s3://bucket/agents"}, "want store = cluster://"),
        ({"store": "cluster:///x", "local": "/disk"}, "blocks are on the nodes' disks"),
        ({"store": "cluster:///x?replicas=2", "replicas": 3}, "set one"),
        ({"store": "cluster:///x?copies=2"}, "cluster:///a/folder"),
        ({"store": "cluster:///x", "replicas": 17}, "between 0 and 16"),
    ],
)
def test_copies_where_they_cannot_be_kept_are_refused(flags: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(flags=flags)
