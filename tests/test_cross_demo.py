"""kvferry demo cross-engine, as a user starts it; and engines of single nodes."""

import importlib.util
import json
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from actors.config import ReplicaConfig
from bench.cross_engine import Conversation, Turn, _failures
from cluster.config import ClusterConfig, load_config
from cluster.errors import ConfigError
from cluster.nodes import named
from cluster.pool import ReplicaPool
from tests.require import require
from tests.test_demo import KVFERRY, environment


def entry(name: str, **labels: str) -> dict[str, Any]:
    return {
        "NodeID": name,
        "Alive": True,
        "NodeManagerHostname": name,
        "NodeManagerAddress": "127.0.0.1",
        "Resources": {"kvferry_device": 1},
        "Labels": labels,
    }


def test_a_nodes_label_names_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, labelled = "1a" * 28, "2b" * 28  # as Ray's ids
    nodes = named([entry(plain), entry(labelled, **{"kvferry.io/engine": "mlx"})])
    assert [nodes[name].engine for name in (plain, labelled)] == ["", "mlx"]
    started: list[ReplicaConfig] = []

    class Actor:
        def options(self, **_: object) -> "Actor":
            return self

        def remote(self, config: ReplicaConfig, node: str, weights: object) -> None:
            started.append(config)

    monkeypatch.setattr("cluster.pool.ray.remote", lambda cls: Actor())
    pool = ReplicaPool(ReplicaConfig(engine="llama.cpp"), lambda r: None, lambda n: None)
    for node in nodes.values():
        pool._start(node)
    assert [config.engine for config in started] == ["llama.cpp", "mlx"]


def test_engines_of_the_nodes_of_a_local_cluster() -> None:
    assert load_config(None, {}, {}).engines == ClusterConfig().engines == ""
    config = load_config(None, {"KVFERRY_ENGINES": "llama.cpp,mlx"}, {"nodes": 3})
    assert config.engines == "llama.cpp,mlx"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"engines": "llama.cpp,torch"}, "engine = 'torch'"),
        ({"engines": "llama.cpp,mlx,mlx"}, "more of them than the 2 nodes"),
        ({"engines": "llama.cpp,mlx", "profile": "auto"}, "profile: a setting of llama.cpp"),
        ({"engines": "llama.cpp,mlx", "kv_type": "q4_1"}, "cells of llama.cpp, not of mlx"),
    ],
)
def test_engines_that_a_node_cannot_have(flags: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(None, {}, flags)


def test_what_a_conversation_must_hold() -> None:
    def turn(engine: str, prompt: int, cached: int) -> Turn:
        return Turn(engine, "n", prompt, cached, prompt - cached, 0.1)

    good = [turn("mlx", 20, 0), turn("llama.cpp", 40, 31), turn("mlx", 60, 51)]
    assert _failures(Conversation(good, [12, 12, 12], "a")) == []
    lost = [good[0], turn("llama.cpp", 40, 30), turn("llama.cpp", 60, 52)]
    assert _failures(Conversation(lost, [12, 12, 12], "a")) == [
        "turn 2: 30 of 32 tokens were cached",
        "turn 3 ran on llama.cpp again",
    ]


@pytest.mark.cluster
@pytest.mark.timeout(240)
def test_a_conversation_that_changes_engine_at_every_turn(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    for package in ("mlx", "mlx_lm"):
        found = importlib.util.find_spec(package) is not None
        require("mlx", found, f"{package} is not installed")
    model = str(tiny_models["llama64"])
    done = subprocess.run(
        [*KVFERRY, "demo", "cross-engine", "--json", "--model", model],
        cwd=tmp_path, env=environment() | {"KVFERRY_CODEC": "f16", "KVFERRY_THREADS": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report.keys() == {"turns", "kl"}
    turns = [Turn(**turn) for turn in report["turns"]]
    assert {turn.engine for turn in turns} == {"llama.cpp", "mlx"}
    assert all(a.engine != b.engine for a, b in pairwise(turns))
    assert turns[0].cached_tokens == 0
    for before, turn in pairwise(turns):
        assert turn.cached_tokens > before.prompt_tokens
        assert turn.prompt_tokens == turn.cached_tokens + turn.prefilled_tokens
        assert turn.ttft_s > 0
    assert 0 < report["kl"] < 1e-3  # the codec is f16: the same rows on other kernels
    assert "KL to the run that changed nothing" in done.stdout


@pytest.mark.parametrize("model", ["fake://", "missing.gguf"])
def test_a_model_that_not_both_can_serve_is_refused(model: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [*KVFERRY, "demo", "cross-engine", "--model", model],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("kvferry: ")
    assert done.stderr.count("\n") == 1
