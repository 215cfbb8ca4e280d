"""kvferry doctor: every check that can fail, made to fail for real; and a machine that is well."""

import importlib.metadata
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors import checks
from actors.checks import Check
from actors.config import ReplicaConfig
from cluster import doctor
from cluster.cli import app
from storage.files import FilesOptions
from tests.faulty import DictBackend, store_on


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings but the test's, no Ray, and files only below tmp_path."""
    for name in list(os.environ):
        if name.startswith(("KVFERRY_", "RAY_")):
            monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("KVFERRY_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("KVFERRY_MODEL", "fake://")
    monkeypatch.setenv("KVFERRY_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "passive"))
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> tuple[int, dict[str, Check]]:
    """(exit code, checks by name)."""
    result = CliRunner().invoke(app, ["doctor", "--json", *arguments])
    assert result.stdout.count("\n") == 1, result.output
    report = json.loads(result.stdout)
    found = {entry["name"]: Check(**entry) for entry in report["checks"]}
    assert len(found) == len(report["checks"])
    failed = [check for check in found.values() if check.status == "fail"]
    assert all(check.todo for check in found.values() if check.status != "ok")
    assert (result.exit_code, report["ok"]) == ((1, False) if failed else (0, True))
    return result.exit_code, found


def failing(name: str, *arguments: str) -> str:
    """What the only failing check says."""
    code, found = run(*arguments)
    assert code == 1
    assert [check.name for check in found.values() if check.status == "fail"] == [name]
    return found[name].text


def test_a_machine_that_is_well() -> None:
    code, found = run()
    assert code == 0
    assert found["model"].status == "warn"  # the fake engine
    names = {"python", "ray", "ray auth", "port", "codec", "llama.cpp", "signing key"}
    assert names | {"encryption keys", "store", "clock", "local tier", "model"} == found.keys()
    assert "creates are exclusive" in found["store"].text
    assert not list((Path.cwd() / ".kvferry/store/probe").iterdir())


def test_lines_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["doctor"])
    lines = result.stdout.splitlines()
    assert (result.exit_code, lines[-1]) == (0, "Nothing would fail")
    assert all(line.startswith(("ok   ", "warn ")) for line in lines[:-1])
    monkeypatch.setenv("KVFERRY_SIGNING_KEY_FILE", "missing.key")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "fail signing key: " in result.stdout
    assert result.stdout.splitlines()[-1].startswith("1 of ")


@pytest.mark.slow
def test_the_layers_of_a_real_model(smollm2_gguf: Path) -> None:
    code, found = run("--model", str(smollm2_gguf))
    assert code == 0
    assert found["layers"].text == "30 quantized, 0 rotating, 0 refused (codec q4)"
    assert "engine llama.cpp, device cpu" in found["model"].text
    assert "32768 cells" in found["memory"].text


def test_layers_that_slide(tiny_models: dict[str, Path]) -> None:
    _, found = run("--model", str(tiny_models["gemma3"]))
    assert found["layers"].text == "1 quantized, 6 rotating, 0 refused (codec q4)"


@pytest.mark.parametrize(
    ("model", "reason"),
    [("missing.gguf", "cannot read it"), ("gs://bucket/m.gguf", "unknown scheme")],
)
def test_a_model_that_is_not_there(model: str, reason: str) -> None:
    assert reason in failing("model", "--model", model)


@pytest.mark.parametrize("model", ["mamba", "truncated"])
def test_a_model_that_cannot_be_served(tiny_models: dict[str, Path], model: str) -> None:
    assert str(tiny_models[model]) in failing("model", "--model", str(tiny_models[model]))


def test_layers_that_the_codec_refuses(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head dims of real models are all sound: one that is not is put into the spec."""
    engine = checks.open_engine(
        ReplicaConfig(model=str(tiny_models["llama64"]), cells=256, threads=1)
    )
    spec = engine.key.spec
    odd = checks.replace(spec.layers[0], key_dim=7)
    engine.key = checks.replace(engine.key, spec=checks.replace(spec, layers=(odd, spec.layers[1])))
    check = checks.check_layers(engine, ReplicaConfig())
    engine.close()
    assert check.status == "fail"
    assert "1 quantized, 0 rotating, 1 refused (codec q4); layers 0:" in check.text


@pytest.mark.parametrize(
    ("ram", "status"), [((10**6, 10**6), "fail"), ((1 << 30, 1 << 30), "warn"), (None, "warn")]
)
def test_too_little_memory(
    tiny_models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    ram: tuple[int, int] | None,
    status: str,
) -> None:
    monkeypatch.setattr(checks, "ram_bytes", lambda: ram)
    _, found = run("--model", str(tiny_models["llama64"]))
    assert found["memory"].status == status


def test_more_cells_than_memory(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFERRY_SLOTS", "255")
    monkeypatch.setenv("KVFERRY_N_CTX", str(1 << 20))
    assert " GB (267386880 cells)" in failing("memory", "--model", str(tiny_models["llama64"]))


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("KVFERRY_PORT", port)
        assert f"cannot listen on 127.0.0.1:{port}" in failing("port")


# ---- store and keys


def test_a_store_where_no_folder_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert "NotADirectoryError" in failing("store", "--store", "file/below")


@pytest.mark.slow
def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("REGION", "x")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(checks, "_STORE_TIMEOUT_S", 3.0)
    with socket.socket() as bound:  # a port nobody listens on
        bound.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        assert "s3://bucket/prefix" in failing("store", "--store", "s3://bucket/prefix")


class _Overwrites(DictBackend):
    """A second create of one file succeeds."""

    def create(self, path: str, raw: bytes) -> None:
        self.files[path] = (raw, self.clock)


def on(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    store = store_on(backend, FilesOptions(timeout_s=2, attempts=1))
    monkeypatch.setattr(checks, "open_quickly", lambda config: store)


def test_a_store_without_exclusive_create(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = _Overwrites()
    backend.clock = time.time()
    on(monkeypatch, backend)
    assert "a second create of one file succeeds" in failing("store")


@pytest.mark.parametrize(
    ("ahead", "status"), [(0.5, "ok"), (-30, "warn"), (30, "warn"), (-600, "fail"), (600, "fail")]
)
def test_clocks_that_disagree(monkeypatch: pytest.MonkeyPatch, ahead: float, status: str) -> None:
    backend = DictBackend()
    backend.clock = time.time() + ahead
    on(monkeypatch, backend)
    _, found = run()
    assert found["store"].status == "ok"
    assert found["clock"].status == status
    assert ("ahead" if ahead > 0 else "behind") in found["clock"].text


def test_a_store_that_is_encrypted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".kvferry/store").mkdir(parents=True)
    (tmp_path / ".kvferry/store/encrypted").write_text("aes-256-gcm")
    assert "no encryption keys are configured" in failing("store")


@pytest.mark.parametrize("kind", ["signing_key", "encryption_keys"])
@pytest.mark.parametrize("content", [None, "short"])
def test_keys_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, content: str | None
) -> None:
    if content:
        (tmp_path / "keys").write_text(content)
    monkeypatch.setenv(f"KVFERRY_{kind.upper()}_FILE", str(tmp_path / "keys"))
    failing(kind.replace("_", " "))


# ---- the node's own disk, and what is installed


def test_a_local_tier_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("KVFERRY_LOCAL", str(tmp_path / "file"))
    assert str(tmp_path / "file") in failing("local tier")


def test_a_disk_smaller_than_the_local_tier(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVFERRY_LOCAL", str(tmp_path / "local"))
    monkeypatch.setenv("KVFERRY_LOCAL_BYTES", str(1 << 50))
    _, found = run()
    assert found["local tier"].status == "warn"
    assert not list((tmp_path / "local").iterdir())


def without(package: str, monkeypatch: pytest.MonkeyPatch, instead: str | None = None) -> None:
    """The package is not installed, or another version is."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name != package:
            return real(name)
        if instead is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return instead

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("version", [None, "2.9.3"])
def test_no_ray_or_an_old_one(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    without("ray", monkeypatch, version)
    failing("ray")


def test_an_old_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    without("llama-cpp-python", monkeypatch, "0.3.9")
    assert "0.3.9" in failing("llama.cpp")


@pytest.mark.parametrize(("version", "told"), [("0.3.36", True), ("0.3.36+kvferry.0", False)])
def test_llama_cpp_without_patches(
    monkeypatch: pytest.MonkeyPatch, version: str, told: bool
) -> None:
    without("llama-cpp-python", monkeypatch, version)
    check = checks.check_build("llama.cpp")[-1]
    assert (check.status, "without patches" in check.text) == ("ok", told)


def test_no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails where the model needs it."""
    without("llama-cpp-python", monkeypatch)
    assert run()[1]["llama.cpp"].status == "warn"
    assert checks.check_build("llama.cpp")[-1].status == "fail"


@pytest.mark.parametrize("package", ["mlx", "mlx-lm"])
def test_no_mlx(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setenv("KVFERRY_ENGINE", "mlx")
    without(package, monkeypatch)
    failed = {check.name: check for check in checks.check_build("mlx") if check.status == "fail"}
    assert failed["mlx"].text == f"{package} is not installed"


def test_no_c_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "storage._codec", None)
    assert run()[1]["codec"].status == "warn"


def test_ray_on_macos_and_who_may_speak_to_it() -> None:
    def look(platform: str, **environment: str) -> dict[str, str]:
        return {c.name: c.status for c in doctor.check_ray(environment, platform)}

    assert look("darwin")["ray on macOS"] == "warn"
    allowed = look("darwin", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="1", RAY_AUTH_MODE="token")
    assert allowed == {"ray": "ok", "ray on macOS": "ok", "ray auth": "ok"}
    assert look("linux", RAY_AUTH_MODE="disabled") == {"ray": "ok", "ray auth": "warn"}


def test_settings_that_are_wrong_are_refused_as_everywhere() -> None:
    result = CliRunner().invoke(app, ["doctor", "--store", "gs://bucket/kv"])
    assert result.exit_code == 2
    assert "is not supported" in result.stderr
