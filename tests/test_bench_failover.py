"""kvferry bench failover and bench migrate --link: what they hold, and as a user starts them."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from typing import Any

import pytest

from bench.failover import Lost, Quiet, correct, fast
from bench.links import Case, crossover
from bench.migrate import Moved, targets
from bench.sites import check_hosts, parse_links
from bench.ttft import BenchFailed
from cluster.errors import ConfigError
from tests.require import require
from tests.test_demo import KVFERRY, ROOT, environment

# Prefilling a token of this engine costs more than bringing its row, as with a real one.
FAKE = "fake://?step_delay=0.02&token_delay=0.002"
LOST = Lost("process", "a", "b", 0.1, 0.5, 60, 4096, 40, "identical")
MOVED = Moved(1024, 0.03, 0.1, 1.0, 2, 1000, 10_000_000, 0.8, 0.1)
CASE = Case("1gbit", 1024, 1.0, 2.0, 1.1, 2.1, "load", 1.0)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*KVFERRY, "bench", *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


# ---- texts


def test_a_text_that_parts_at_a_near_tie_is_told_from_one_that_is_wrong() -> None:
    quiet = Quiet("one two three", ((0, 3.0), (4, 0.05), (8, 2.0)))
    assert quiet.compare("one two three") == "identical"
    assert quiet.compare("one ten three") == "near tie"
    assert quiet.compare("one two trees") == "differs"
    assert quiet.compare("one t") == "differs", "tokens are missing, whatever their gaps"
    assert quiet.compare("one two three four") == "differs"


# ---- what must hold


def held(*found: Lost) -> dict[str, bool]:
    return correct(found) | fast(found)


def test_one_wrong_text_is_one_too_many() -> None:
    text = "the text is that of the undisturbed run"
    assert held(LOST, replace(LOST, equal="near tie"))[text]
    assert not held(LOST, replace(LOST, equal="differs"))[text]


def test_a_block_and_the_new_message_may_be_prefilled_again() -> None:
    name = "prefilled again <= 256 + the new message"
    assert held(replace(LOST, again_tokens=296))[name]
    assert not held(LOST, replace(LOST, again_tokens=297))[name]


def test_times_of_a_dead_process() -> None:
    assert held(LOST)["process: next token <= 1 s"]
    assert not held(replace(LOST, next_token_s=1.1))["process: next token <= 1 s"]


@pytest.mark.parametrize("kill", ["node", "host"])
def test_times_of_a_dead_node(kill: Any) -> None:
    lost = replace(LOST, kill=kill, detection_s=2.9, next_token_s=3.8)
    assert all(held(lost).values())
    assert not held(replace(lost, detection_s=3.1))[f"{kill}: detection <= 3 s"]
    late = held(replace(lost, next_token_s=4.0))
    assert not late[f"{kill}: next token <= detection + 1 s"]


def test_every_link_is_held_against_its_own_times() -> None:
    slow = replace(LOST, link="100mbit", next_token_s=1.4)
    times = held(replace(LOST, link="1gbit"), slow)
    assert times["process, 1gbit: next token <= 1 s"]
    assert not times["process, 100mbit: next token <= 1 s"]


def test_a_migration_is_held_against_the_slower_of_link_and_restore() -> None:
    assert MOVED.limit_s == pytest.approx(1.3 * 0.8 + 0.15)
    assert replace(MOVED, restore_s=2.0).limit_s == pytest.approx(1.3 * 2.0 + 0.15)
    assert all(targets([MOVED], 100.0).values())
    assert not all(targets([MOVED, replace(MOVED, total_s=1.2)], 100.0).values())
    assert all(targets([replace(MOVED, total_s=1.2)], None).values()), "nothing known of the link"
    assert not all(targets([MOVED, replace(MOVED, freeze_s=0.11)], 100.0).values())
    assert not all(targets([MOVED, replace(MOVED, gap_s=0.26)], 100.0).values())
    longer = replace(MOVED, context=4096, freeze_s=0.06)
    assert not all(targets([MOVED, longer], 100.0).values()), "the freeze grows with the context"


# ---- links


def test_links_by_name() -> None:
    links = parse_links("100mbit,2.5gbit,500kbit,unlimited")
    assert links == {"100mbit": 100.0, "2.5gbit": 2500.0, "500kbit": 0.5, "unlimited": 0.0}


@pytest.mark.parametrize("link", ["fast", "100", "0mbit", "100mbit,,1gbit", "-1mbit"])
def test_links_that_are_none(link: str) -> None:
    with pytest.raises(ConfigError, match="--link"):
        parse_links(link)


def test_where_shipping_becomes_faster() -> None:
    shorter = replace(CASE, context=256, ship_s=0.5, prefill_s=0.25)
    assert crossover([CASE]) == 0
    assert crossover([shorter, CASE]) == 410  # by interpolation: -0.25 at 256, 1.0 at 1024
    assert crossover([shorter]) is None


def test_a_choice_is_held_against_the_better_one() -> None:
    assert CASE.over == 1.0
    assert replace(CASE, chosen="prefill", chosen_s=2.0).over == 2.0


# ---- refusals


def test_hosts_of_their_own_need_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BenchFailed, match="root"):
        check_hosts()


def test_hosts_of_their_own_need_iproute2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BenchFailed, match="iproute2"):
        check_hosts()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["failover", "--kills", "process,power"], "'power'"),
        (["migrate", "--link", "fast"], "'fast'"),
        (["migrate", "--link", "1gbit", "--url", "http://127.0.0.1:1"], "--url"),
    ],
)
def test_what_is_not_understood_is_refused(arguments: list[str], reason: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


# ---- as a user starts them


def last(done: subprocess.CompletedProcess[str], name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])[name]
    return found


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_bench_failover_on_nodes_of_this_machine() -> None:
    done = bench("failover", "--model", FAKE, "--tokens", "600", "--runs", "1", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = last(done, "failover")
    assert [lost["kill"] for lost in report["runs"]] == ["process", "node"]
    assert report["medians"].keys() == {"process", "node"}
    for lost in report["runs"]:
        assert lost["equal"] == "identical"
        assert lost["node"] != lost["to"]
        assert 0 < lost["detection_s"] < lost["next_token_s"] < 30
        assert 0 < lost["again_tokens"] <= 256 + lost["new"]
        assert lost["held"] > 600


def require_hosts() -> None:
    able = os.geteuid() == 0 and all(map(shutil.which, ("ip", "tc")))
    require("netns", able, "network namespaces need root and iproute2")


@pytest.mark.cluster
@pytest.mark.timeout(300)
@pytest.mark.soak
def test_bench_failover_of_a_host_that_is_cut_off() -> None:
    require_hosts()
    few = ["--tokens", "600", "--runs", "1", "--kills", "host", "--link", "100mbit"]
    done = bench("failover", "--model", FAKE, *few, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = last(done, "failover")
    (lost,) = report["runs"]
    assert report["hosts"]
    assert (lost["kill"], lost["link"], lost["equal"]) == ("host", "100mbit", "identical")
    assert report["medians"].keys() == {"host, 100mbit"}
    assert 1 < lost["detection_s"] < lost["next_token_s"] < 30, "silence tells, and not Ray"
    assert 0 < lost["again_tokens"] <= 256 + lost["new"]


@pytest.mark.cluster
@pytest.mark.timeout(300)
@pytest.mark.soak
def test_bench_migrate_over_a_limited_link() -> None:
    require_hosts()
    contexts, link = ["--contexts", "600"], ["--link", "10mbit"]
    done = bench("migrate", "--model", FAKE, *contexts, *link, "--runs", "1")
    assert done.stdout, done.stderr
    report = last(done, "migrate")
    (moved,), (case,) = report["moves"]["10mbit"], report["choices"]
    assert moved["n_bytes"] > 50_000, "everything came over the link"
    assert moved["floor_s"] == pytest.approx(8e-7 * moved["n_bytes"])
    assert moved["total_s"] > moved["floor_s"]
    assert (case["link"], case["chosen"]) == ("10mbit", "load")
    assert case["prefill_s"] > 600 * 0.002
    assert report["crossover"] == {"10mbit": 0}
