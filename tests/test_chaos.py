"""Every fault at every moment of an agent's life: its stream ends with the text of an undisturbed
run, no token lost or doubled, one owner, and everybody is served afterwards.

The hosts, links and processes are real, the store is an S3 endpoint that holds a request where the
test wants the fault to happen. `make test` runs some of the cells, chosen by KVFERRY_SEED or by
the day; KVFERRY_CHAOS=all runs all of them.
"""

from __future__ import annotations

import datetime
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.clusters import InBackground, assistant, recital, user
from tests.hosts import Hosts, cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]
MODEL = "fake://?step_delay=0.02&token_delay=0.0005"
SEED = int(os.environ.get("KVFERRY_SEED", datetime.date.today().toordinal()))
DEADLINE = 60.0  # s: of a turn, whatever happens
PAUSE = 10.0  # s
N = 150  # tokens of a reply


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    settings = {"codec": "f16", "hysteresis_s": 60, "request_timeout_s": 50}
    with cluster(["a", "b", "c"], model=MODEL, **settings) as running:
        yield running


@dataclass
class Scene:
    """An agent with a memory, where it lives and where it may go."""

    hosts: Hosts
    session: str
    messages: list[dict[str, str]]
    node: str
    target: str
    random: random.Random

    @property
    def victim(self) -> str:
        """One of the two hosts that matter in a migration."""
        return self.random.choice([self.node, self.target])


# ---- the faults: each does its harm to a host


def replica_killed(scene: Scene, host: str) -> None:
    scene.hosts.device_of(host).kill()


def raylet_killed(scene: Scene, host: str) -> None:
    next(p for p in scene.hosts[host].processes() if p.name() == "raylet").kill()


def host_cut(scene: Scene, host: str) -> None:
    scene.hosts[host].cut()


def host_paused(scene: Scene, host: str) -> None:
    scene.hosts[host].pause()

    def wake() -> None:
        time.sleep(PAUSE)
        scene.hosts[host].wake()

    InBackground(wake)


def router_killed(scene: Scene, _: str) -> None:
    scene.hosts["head"].process("ray::PlacementRouter").kill()


def store_fails(scene: Scene, _: str) -> None:
    scene.hosts.faults.refuse(0.2, scene.random.randrange(1 << 30))


def store_gone(scene: Scene, _: str) -> None:
    scene.hosts["store"].cut()


Fault = Callable[[Scene, str], None]
FAULTS: list[Fault] = [
    replica_killed, raylet_killed, host_cut, host_paused, router_killed, store_fails, store_gone
]  # fmt: skip


# ---- the moments: each brings the scene to a point, lets the fault happen, and returns a text


def prefill(scene: Scene, fault: Fault) -> str:
    with _stream(scene) as stream:
        fault(scene, scene.node)
        return stream.rest()


def decode(scene: Scene, fault: Fault) -> str:
    with _stream(scene) as stream:
        stream.take(scene.random.randrange(2, N // 2))
        fault(scene, stream.node)
        return stream.rest()


def pre_copy(scene: Scene, fault: Fault) -> str:
    """The card or, where they do not come from the source's disk, the blocks."""
    return _while_it_moves(scene, fault, "GET", r"/agents/(blocks|agents)/.*\.safe")


def freeze(scene: Scene, fault: Fault) -> str:
    return _while_it_moves(scene, fault, "PUT", r"/agents/(blocks|agents)/.*(?<!-00000000)\.safe")


def before_the_claim(scene: Scene, fault: Fault) -> str:
    return _while_it_moves(scene, fault, "PUT", r"/agents/agents/.*-00000000\.safe")


def claim_lost(scene: Scene, fault: Fault) -> str:
    return _while_it_moves(scene, fault, "PUT", r"/agents/agents/.*-00000000\.safe", lose=True)


def release(scene: Scene, fault: Fault) -> str:
    return _while_it_moves(scene, fault, "PUT", r"/agents/agents/.*-00000000\.safe", after=True)


def idle(scene: Scene, fault: Fault) -> str:
    fault(scene, scene.node)
    with _stream(scene) as stream:
        return stream.rest()


Moment = Callable[[Scene, Fault], str]
MOMENTS: list[Moment] = [
    prefill, decode, pre_copy, freeze, before_the_claim, claim_lost, release, idle
]  # fmt: skip


def _stream(scene: Scene):  # type: ignore[no-untyped-def]
    return scene.hosts.stream(scene.messages, scene.session, max_tokens=N)


def _while_it_moves(
    scene: Scene, fault: Fault, method: str, path: str, *, lose: bool = False, after: bool = False
) -> str:
    """The agent speaks and is migrated; the fault comes while the store holds a request of that."""
    faults = scene.hosts.faults
    with _stream(scene) as stream:
        stream.take(5)
        faults.hold(method, path)
        moving = InBackground(lambda: scene.hosts.migrate(scene.session, scene.target))
        faults.held()
        if after:
            faults.release()
        fault(scene, scene.victim)
        faults.release("lose" if lose else "pass")
        text = stream.rest()
        moving.result()
        return text


# ---- the cells


def cells() -> list[tuple[Fault, Moment]]:
    """All of them, or so many that every fault and every moment is among them."""
    every = list(itertools.product(FAULTS, MOMENTS))
    if os.environ.get("KVFERRY_CHAOS") == "all":
        return every
    chosen = random.Random(SEED)
    faults = FAULTS + chosen.sample(FAULTS, len(MOMENTS) - len(FAULTS))
    chosen.shuffle(faults)
    return list(zip(faults, MOMENTS, strict=True))


def _name(cell: object) -> str:
    return getattr(cell, "__name__", str(cell))


@pytest.mark.parametrize(("fault", "moment"), cells(), ids=_name)
def test_nothing_is_lost(hosts: Hosts, fault: Fault, moment: Moment) -> None:
    print(f"KVFERRY_SEED={SEED}")
    chance = random.Random(f"{SEED} {fault.__name__} {moment.__name__}")
    question = recital(chance.choice(["Cat", "Tree", "Lamp"]), 60)
    session = f"{fault.__name__}-{moment.__name__}-{chance.randrange(1 << 30)}"
    first = hosts.chat(question, session, max_tokens=20)
    hosts.wait_stored(session)
    messages = [*question, assistant(first.text), user("And now?")]
    wanted = hosts.chat(messages, max_tokens=N).text
    scene = Scene(hosts, session, messages, first.node, hosts.other(first.node), chance)
    began = time.monotonic()
    try:
        assert moment(scene, fault) == wanted
        assert time.monotonic() - began < DEADLINE
    finally:
        hosts.restore()
    _served_by_one(hosts, session, [*messages, assistant(wanted), user("And in the end?")])


def _served_by_one(hosts: Hosts, session: str, messages: list[dict[str, str]]) -> None:
    expected = hosts.chat(messages, max_tokens=10).text
    assert hosts.chat(messages, session, max_tokens=10).text == expected
    record = hosts.agent(session)
    assert record is not None
    assert record["node"] in hosts.devices
