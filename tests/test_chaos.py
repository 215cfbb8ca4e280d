"""Every fault at every moment of an agent's life: its stream ends in time with the text of an
undisturbed run, no token lost or doubled; each epoch has one owner; everybody is served afterwards,
and what was stored before is not prefilled again.

The hosts, links and processes are real. The store is an S3 endpoint that holds the very request
which marks a moment of a migration, so that the fault happens there and nowhere else; elsewhere the
test fails when the moment had passed. Registry and router are one actor: killing it is both of
these faults. `make test` runs some of the cells, chosen by KVFERRY_SEED or by the day;
KVFERRY_CHAOS=all runs all of them.
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

from storage.condemned import MAX_AGE_S
from tests.clusters import InBackground, Reply, Stream, assistant, recital, user
from tests.hosts import Hosts, cluster
from tests.s3_proxy import Rule

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(400)]
STEP_S, TOKEN_S = 0.02, 0.0005
MODEL = f"fake://?step_delay={STEP_S}&token_delay={TOKEN_S}"
SEED = int(os.environ.get("KVFERRY_SEED", datetime.date.today().toordinal()))
PAUSE = 10.0  # s
N = 150  # tokens of a reply
MOVING = 300  # of one that is not to end before its agent has moved
NEW = 6000  # tokens of a message that takes seconds to prefill
NEXT = user("And now?")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    settings = {"codec": "f16", "hysteresis_s": 60, "request_timeout_s": 50}
    with cluster(["a", "b", "c"], model=MODEL, **settings) as running:
        yield running


@dataclass
class Bystander:
    """An agent that nothing happens to, but that its host may be the victim."""

    session: str
    question: list[dict[str, str]]
    text: str


@pytest.fixture(scope="module")
def bystanders(hosts: Hosts) -> list[Bystander]:
    """One on each host, with memories of their own."""
    made = []
    for noun, target in zip(("Piano", "Guard", "Boat"), hosts.devices, strict=True):
        question = recital(noun, 20)
        one = hosts.chat(question, f"bystander-{noun}", max_tokens=10)
        assert hosts.migrate(f"bystander-{noun}", target).status_code == 200
        made.append(Bystander(f"bystander-{noun}", question, one.text))
    return made


@dataclass
class Scene:
    """An agent with a memory, where it lives and where it may go."""

    hosts: Hosts
    session: str
    messages: list[dict[str, str]]
    node: str
    target: str
    random: random.Random
    folder: str  # of its cards in the store
    fault: Fault
    n: int  # tokens of the reply
    slow: float  # how many times its time an undisturbed run takes now
    began: float = 0.0  # when the fault happened
    ended: float = 0.0  # the stream, where something else is waited for after it
    waking: InBackground | None = None

    def happens(self, host: str) -> None:
        """Now."""
        self.fault(self, host)
        self.began = time.monotonic()

    @property
    def deadline(self) -> float:
        """Seconds from the fault to the end of the stream."""
        return FAULTS[self.fault] * self.slow

    @property
    def address(self) -> str:
        """The target's."""
        return self.hosts[self.target].address

    @property
    def victim(self) -> str:
        """One of the two hosts that matter in a migration."""
        return self.random.choice([self.node, self.target])

    @property
    def failovers(self) -> float:
        return self.hosts.metric("kvferry_failovers_total")


# ---- the faults: each does its harm to a host


def replica_killed(scene: Scene, host: str) -> None:
    scene.hosts.device_of(host).kill()


def raylet_killed(scene: Scene, host: str) -> None:
    scene.hosts[host].raylet.kill()


def host_cut(scene: Scene, host: str) -> None:
    scene.hosts[host].cut()


def host_paused(scene: Scene, host: str) -> None:
    scene.hosts[host].pause()

    def wake() -> None:
        time.sleep(PAUSE)
        scene.hosts[host].wake()

    scene.waking = InBackground(wake)


def router_killed(scene: Scene, _: str) -> None:
    scene.hosts["head"].process("ray::PlacementRouter").kill()


def store_fails(scene: Scene, _: str) -> None:
    scene.hosts.faults.refuse(0.2, scene.random.randrange(1 << 30))


def store_gone(scene: Scene, _: str) -> None:
    scene.hosts["store"].cut()


Fault = Callable[[Scene, str], None]
# Seconds from the fault to the end of the stream, where an undisturbed one takes what its steps do;
# on a machine that others use, as many times that. A freeze whose router dies ends at its own
# deadline; a store that is gone may cost several calls theirs before serving goes on without it.
FAULTS: dict[Fault, float] = {
    replica_killed: 20, raylet_killed: 20, host_cut: 25, host_paused: 25, router_killed: 20,
    store_fails: 20, store_gone: 45,
}  # fmt: skip
ON_A_HOST = {replica_killed, raylet_killed, host_cut, host_paused}


# ---- the moments: each brings the scene to a point, lets the fault happen, and returns the stream


def prefill(scene: Scene) -> Stream:
    """Of a message that takes seconds."""
    before = scene.failovers
    with _stream(scene) as stream:
        headers = time.monotonic()
        scene.happens(stream.node)
        assert scene.began - headers < NEW * TOKEN_S, "the prefill was over before the fault"
        stream.rest()
    return _taken_over(scene, stream, before)


def decode(scene: Scene) -> Stream:
    before = scene.failovers
    with _stream(scene) as stream:
        stream.take(scene.random.randrange(2, N // 4))
        scene.happens(stream.node)
        stream.rest()
    return _taken_over(scene, stream, before)


def _taken_over(scene: Scene, stream: Stream, before: float) -> Stream:
    """A host that was lost while it spoke: another one has gone on."""
    if scene.fault in ON_A_HOST:
        assert scene.failovers > before, "the reply ended before the fault was felt"
    return stream


def pre_copy(scene: Scene) -> Stream:
    """The target reads blocks or, where they come from the source's disk, looks which it must not
    name. What it knows of these is too old by then."""
    time.sleep(MAX_AGE_S)
    read = r"/agents/blocks/.*\.safe|gc(/|%2F)condemned"
    return _while_it_moves(scene, Rule("GET", read, scene.address))


def freeze(scene: Scene) -> Stream:
    """The source has stopped, and the target asks the store for the first thing since: what is
    there to claim, or, where the source's word for that is enough, the claim."""
    first = Rule(
        "GET|PUT", rf"(prefix=.*{scene.folder}/|{scene.folder}/.*-00000000)", scene.address
    )
    return _while_it_moves(scene, first, silent=True)


def before_the_claim(scene: Scene) -> Stream:
    """The target has verified what it will own."""
    return _while_it_moves(scene, _claim(scene))


def claim_lost(scene: Scene) -> Stream:
    """The claim is in the store, its answer on no way: the target is about to read it back."""
    readback = Rule("GET", rf"{scene.folder}/\d+-00000000", scene.address)
    return _while_it_moves(scene, _claim(scene), readback, lose=True)


def release(scene: Scene) -> Stream:
    """The target has its claim, and looks at it once more before it tells; the source is frozen."""
    looked = Rule("GET", rf"prefix=.*{scene.folder}/", scene.address)
    return _while_it_moves(scene, _claim(scene), looked)


def idle(scene: Scene) -> Stream:
    scene.happens(scene.node)
    with _stream(scene) as stream:
        stream.rest()
        return stream


Moment = Callable[[Scene], Stream]
MOMENTS: list[Moment] = [
    prefill, decode, pre_copy, freeze, before_the_claim, claim_lost, release, idle
]  # fmt: skip


def _claim(scene: Scene) -> Rule:
    return Rule("PUT", rf"{scene.folder}/\d+-00000000\.safe", scene.address)


def _stream(scene: Scene):  # type: ignore[no-untyped-def]
    return scene.hosts.stream(scene.messages, scene.session, max_tokens=scene.n)


def _while_it_moves(
    scene: Scene,
    first: Rule,
    second: Rule | None = None,
    *,
    lose: bool = False,
    silent: bool = False,
) -> Stream:
    """The agent speaks and is migrated; the fault comes while the store holds a request of the
    target: the first that matches (and, with `silent`, during which the agent does not speak), or
    after it, the second."""
    faults = scene.hosts.faults
    with _stream(scene) as stream:
        stream.take(5)
        assert stream.node == scene.node
        hearing = InBackground(stream.rest)
        faults.hold(first)
        moving = InBackground(lambda: scene.hosts.migrate(scene.session, scene.target))
        faults.held()
        while silent and _speaks(stream):
            faults.release("pass", first)
            faults.held()
        if second is not None:
            faults.release("lose" if lose else "pass", second)
            faults.held()
        assert stream.reason is None, "the reply had ended before the fault"
        scene.happens(scene.victim)
        faults.release()
        hearing.result()
        answered = scene.ended = time.monotonic()
        assert moving.result().status_code in (200, 409, 502, 503)
        assert time.monotonic() - answered < scene.deadline
    return stream


def _speaks(stream: Stream) -> bool:
    said = len(stream.pieces)
    time.sleep(20 * STEP_S)
    return len(stream.pieces) > said


# ---- the cells


def cells() -> list[tuple[Fault, Moment]]:
    """All of them, or so many that every fault and every moment is among them."""
    every = list(itertools.product(FAULTS, MOMENTS))
    if os.environ.get("KVFERRY_CHAOS") == "all":
        return every
    chosen = random.Random(SEED)
    faults = [*FAULTS, *chosen.sample([*FAULTS], len(MOMENTS) - len(FAULTS))]
    chosen.shuffle(faults)
    return list(zip(faults, MOMENTS, strict=True))


def _name(cell: object) -> str:
    return getattr(cell, "__name__", str(cell))


@pytest.mark.parametrize(("fault", "moment"), cells(), ids=_name)
def test_nothing_is_lost(
    hosts: Hosts, bystanders: list[Bystander], fault: Fault, moment: Moment
) -> None:
    chance = random.Random(f"{SEED} {fault.__name__} {moment.__name__}")
    question = recital(chance.choice(["Cat", "Tree", "Lamp"]), 60)
    session = f"{fault.__name__}-{moment.__name__}-{chance.randrange(1 << 30)}"
    first = hosts.chat(question, session, max_tokens=20)
    hosts.wait_stored(session)
    held = first.usage.prompt + first.usage.completion - 1  # rows that are in the store now
    new = user("".join(chance.choices("abcdef ", k=NEW))) if moment is prefill else NEXT
    messages = [*question, assistant(first.text), new]
    n = N if moment in (prefill, decode, idle) else MOVING
    began = time.monotonic()
    wanted = hosts.chat(messages, max_tokens=n)
    slow = max(1.0, (time.monotonic() - began) / (2 + n * STEP_S + wanted.usage.prompt * TOKEN_S))
    target = chance.choice([node for node in hosts.devices if node != first.node])
    folder = hosts.cards(session)[0][0]
    scene = Scene(hosts, session, messages, first.node, target, chance, folder, fault, n, slow)
    print(f"KVFERRY_SEED={SEED}: {session} on {scene.node}, to {target}")
    try:
        stream = moment(scene)
        took = (scene.ended or time.monotonic()) - scene.began
        print(f"{took:.1f} s from the fault to the end, {slow:.1f} times slower than calm")
        assert stream.text == wanted.text
        assert (stream.reason, stream.usage.completion) == (wanted.reason, wanted.usage.completion)
        assert took < scene.deadline
        during = [*messages, assistant(wanted.text), user("And while it is broken?")]
        if fault in (store_fails, store_gone):  # serving goes on
            check(hosts.chat(during, session, max_tokens=10), hosts.chat(during, max_tokens=10))
        if scene.waking is not None:
            scene.waking.result()
    finally:
        began = time.monotonic()
        hosts.restore()
        print(f"{time.monotonic() - began:.1f} s until all is well again")
    last = [*messages, assistant(wanted.text), user("And in the end?")]
    reply = hosts.chat(last, session, max_tokens=10)
    check(reply, hosts.chat(last, max_tokens=10))
    assert reply.cached >= held
    hosts.check_owner(session, reply.node)
    for bystander in bystanders:
        again = hosts.chat(bystander.question, bystander.session, max_tokens=10)
        assert again.text == bystander.text
        assert again.cached == again.usage.prompt - 1


def check(reply: Reply, undisturbed: Reply) -> None:
    assert (reply.text, reply.reason) == (undisturbed.text, undisturbed.reason)
    assert reply.usage.completion == undisturbed.usage.completion
