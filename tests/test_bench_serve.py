"""kvferry bench serve: its arithmetic, what it refuses, and small runs of the whole.

A peer takes part where KVFERRY_LLAMA_SERVER names the program that `make llama-server` builds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.engines.fake_engine import FakeVocab
from bench.serve_figures import Agreement, Answer, Compared, parting
from bench.serve_load import rate_of
from bench.serve_sides import SideFailed, _events
from cluster.cli import app
from tests.require import require

ROOT = Path(__file__).resolve().parent.parent
PEER = os.environ.get("KVFERRY_LLAMA_SERVER", "")
_MAIN = "from cluster.cli import main; main()"


def test_a_ratio_is_of_the_medians_and_its_spread_of_neighbouring_runs() -> None:
    figure = Compared("x", "tok/s", "peer", [10.0, 30.0, 20.0], [10.0, 10.0, 40.0], target=2.0)
    assert figure.ratio == 2.0
    assert figure.spread == (0.5, 3.0)
    assert figure.met is True
    figure.ours = [19.0]
    assert figure.met is False


def test_a_greatest_ratio_is_met_from_below() -> None:
    size = Compared("bytes", "MB", "peer", [3.0], [10.0], target=0.3, at_most=True)
    assert size.met is True
    size.ours = [3.1]
    assert size.met is False


def test_without_a_peer_nothing_is_met_or_missed() -> None:
    figure = Compared("x", "tok/s", "", [10.0], target=1.0)
    assert (figure.ratio, figure.spread, figure.met) == (None, None, None)


def test_replies_part_at_a_near_tie_or_count_as_a_fault() -> None:
    seen = Agreement()
    seen.add("the same", "the same", lambda: pytest.fail("equal replies need no look"))
    seen.add("a red hat", "a blue hat", lambda: 0.3)
    seen.add("a red hat", "a blue hat", lambda: 0.6)
    assert (seen.replies, seen.equal, seen.near) == (3, 1, 1)
    assert seen.apart == ["after 'a ': 'red hat' and 'blue hat', 0.60 nats apart"]


def test_only_a_few_partings_are_looked_into() -> None:
    seen, looks = Agreement(), []
    for _ in range(20):
        seen.add("a", "b", lambda: float(bool(looks.append(0))))
    assert len(looks) == seen.near == 8
    assert seen.unchecked == 12


def test_the_place_of_a_parting_is_told_in_tokens() -> None:
    vocab = FakeVocab()
    ids = vocab.tokenize("a blue hat")
    pieces = [vocab.token_bytes(i).decode() for i in ids]
    n = len("a ")
    assert len("".join(pieces[:n])) == n  # one character, one token
    assert parting(vocab, ids, "a red hat", "a blue hat") == [n, n - 1]
    assert parting(vocab, ids, "red", "a blue hat") == [0]


def test_the_rate_of_requests_at_once_runs_from_the_first_post_to_the_last_text() -> None:
    answers = [
        Answer(began=10.0, first=11.0, ended=14.0, tokens=30),
        Answer(began=10.5, first=12.0, ended=15.0, tokens=20),
    ]
    assert rate_of(answers) == 10.0
    assert answers[0].prefill_s == 1.0
    answers[0].text, answers[0].head = "0123456789", 2
    assert answers[0].decode_tokens_per_s == pytest.approx(30 * 0.8 / 3)
    all_at_once = Answer(began=10.0, first=11.0, ended=11.0, text="ab", head=2, tokens=2)
    assert all_at_once.decode_tokens_per_s == 2.0


def test_events_are_timed_by_their_last_byte() -> None:
    pieces = [
        (1.0, b'data: {"a": 1}\n\nda'),
        (2.0, b'ta: {"a": 2}\n\ndata: [DO'),
        (3.0, b"NE]\n\n"),
    ]
    assert _events(pieces) == [(1.0, {"a": 1}), (2.0, {"a": 2})]
    with pytest.raises(SideFailed, match="too long"):
        _events([(1.0, b'data: {"error": "too long"}\n\n')])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--peer", "vllm=/bin/true"], "llama-server=PATH"),
        (["--peer", "llama-server=missing"], "make llama-server"),
        (["--parts", "one,two"], "two"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("KVFERRY_")]:
        monkeypatch.delenv(name)
    result = CliRunner().invoke(app, ["bench", "serve", *options])
    assert result.exit_code == 2, result.output
    assert says in result.stderr


def quick(model: Path, folder: Path, *options: str, timeout: float) -> dict[str, Any]:
    """The figures of a --quick run that must succeed."""
    env = {name: v for name, v in os.environ.items() if not name.startswith("KVFERRY_")}
    env |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    file = folder / "figures.json"
    command = [
        sys.executable, "-c", _MAIN, "bench", "serve", "--quick", "--threads", "1",
        "--model", str(model), "--json", str(file), *options,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(file.read_text())["serve"]
    assert json.loads(done.stdout.splitlines()[-1])["serve"] == report
    return report


@pytest.mark.slow
def test_the_overhead_of_a_step_is_measured(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    report = quick(tiny_models["llama"], tmp_path, "--parts", "overhead", timeout=110)
    for entry in report["overhead"]:
        assert entry["agents"] == 8
        assert entry["steps"] > 30
        assert 0 < entry["compute_s"] < entry["step_s"]
        assert 0 < entry["share"] < 1


@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_a_quick_run_measures_kvferry_alone(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    options = ("--parts", "one,together,crowd")
    report = quick(tiny_models["llama"], tmp_path, *options, timeout=390)
    figures = {entry["name"]: entry for entry in report["compared"]}
    assert all(entry["ours"] and not entry["theirs"] for entry in figures.values())
    assert all(min(entry["ours"]) > 0 for entry in figures.values())
    sizes = report["sizes"]
    computed = figures["computed of a prompt"]["ours"]
    assert len(computed) == sizes["rounds"]
    assert max(computed) < sizes["context"] / 2  # they were restored, not prefilled again


@pytest.mark.cluster
@pytest.mark.model
@pytest.mark.timeout(900)
def test_a_quick_run_beside_llama_server_agrees_with_it(smollm2_gguf: Path, tmp_path: Path) -> None:
    require("llama-server", bool(PEER), "KVFERRY_LLAMA_SERVER does not name a llama-server")
    options = ("--parts", "one,together,crowd", "--peer", f"llama-server={PEER}")
    report = quick(smollm2_gguf, tmp_path, *options, timeout=890)
    assert all(entry["ours"] and entry["theirs"] for entry in report["compared"])
    for agreement in report["agreement"].values():
        assert agreement["replies"] == agreement["equal"] + agreement["near"] > 0
    by_peer = {e["peer"]: e for e in report["compared"] if e["name"] == "computed of a prompt"}
    alone, saved = (by_peer[f"llama-server, {name}"] for name in ("alone", "saved slots"))
    assert min(alone["theirs"]) > report["sizes"]["context"] / 2  # it must prefill again
    assert max(saved["theirs"]) < report["sizes"]["context"] / 2  # it need not
