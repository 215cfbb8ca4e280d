"""A cluster on hosts that really differ: addresses, links and disks of their own. Two replicas of
the ingress carry its HTTP."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.clusters import START, WAIT, InBackground, assistant, command, recital, until, user
from tests.hosts import Hosts, cluster
from tests.s3_proxy import Rule

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
FAKE = "fake://?step_delay=0.01"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    settings = {"model": FAKE, "codec": "f16", "hysteresis_s": 60, "n_ctx": 8192}
    with cluster(["a", "b"], ingresses=2, **settings) as running:
        until(lambda: len(ingresses(running)) == 2, "two ingresses", START)
        yield running


def ingresses(hosts: Hosts) -> list[psutil.Process]:
    name = "ray::ServeReplica:kvferry:ingress"
    return [p for p in hosts["head"].processes() if command(p).startswith(name)]


def busiest(processes: list[psutil.Process]) -> psutil.Process:
    """Who computes most in a second: clocks of processes tick a hundred times in it."""

    def spent() -> list[float]:
        return [sum(p.cpu_times()[:2]) for p in processes]

    before = spent()
    time.sleep(1.0)
    took = [now - then for now, then in zip(spent(), before, strict=True)]
    return processes[took.index(max(took))]


def durable(hosts: Hosts, session: str) -> int:
    record = hosts.agent(session)
    return int(record["durable_tokens"]) if record else 0


def test_an_agent_moves_between_hosts(hosts: Hosts) -> None:
    question = recital()
    one = hosts.chat(question, "moves", max_tokens=24)
    target = hosts.other(one.node)
    assert hosts.migrate("moves", target).status_code == 200
    messages = [*question, assistant(one.text), user("And now?")]
    two = hosts.chat(messages, "moves", max_tokens=8)
    assert two.node == target
    assert two.cached == one.usage.prompt + one.usage.completion - 1


def test_a_stream_goes_on_while_its_agent_moves_between_hosts(hosts: Hosts) -> None:
    question = recital("Lamp")
    quiet = hosts.chat(question, "still", max_tokens=120)
    with hosts.stream(question, "mover", max_tokens=120) as stream:
        stream.take(10)
        moved = hosts.migrate("mover", hosts.other(stream.node))
        text = stream.rest()
    assert moved.status_code == 200
    assert text == quiet.text
    done = moved.json()
    assert done["loaded_rows"] == done["rows"] > 0
    assert done["total_s"] > done["freeze_s"] > 0
    record = hosts.agent("mover")
    assert record is not None
    assert record["epoch"] == 2


def test_an_agent_moves_from_disk_to_disk_while_the_store_takes_no_blocks(hosts: Hosts) -> None:
    """Its next owner brings them there, when the store takes them again."""
    question = recital("Moon")
    hosts.faults.hold(Rule("PUT", "/agents/blocks/"))
    one = hosts.chat(question, "debtor", max_tokens=24)
    hosts.faults.held()
    target = hosts.other(one.node)
    done = hosts.migrate("debtor", target).json()
    assert done["loaded_rows"] == done["rows"] == one.usage.prompt + one.usage.completion - 1
    assert done["peer_bytes"] == done["bytes"] > 0
    messages = [*question, assistant(one.text), user("And now?")]
    two = hosts.chat(messages, "debtor", max_tokens=8)
    assert (two.node, two.cached) == (target, one.usage.prompt + one.usage.completion - 1)
    assert f"peer {one.node}" in hosts.nodes()[target]["links"]
    hosts.faults.release()
    hosts.wait_stored("debtor")


def test_a_stream_outlives_the_host_that_speaks(hosts: Hosts) -> None:
    """The host is cut off: its processes live on, its words reach nobody."""
    question = recital("Tree")
    quiet = hosts.chat(question, "quiet", max_tokens=120)
    with hosts.stream(question, "cut", max_tokens=120) as stream:
        stream.take(10)
        hosts[stream.node].cut()
        text = stream.rest()
    assert text == quiet.text
    hosts[stream.node].heal()
    hosts.wait_ready(2)


def test_a_claim_whose_answer_is_lost_is_a_claim(hosts: Hosts) -> None:
    question = recital()
    one = hosts.chat(question, "lost", max_tokens=24)
    hosts.wait_stored("lost")
    target = hosts.other(one.node)
    hosts.faults.hold(Rule("PUT", r"/agents/agents/.*00000002-00000000"))
    moving = InBackground(lambda: hosts.migrate("lost", target))
    hosts.faults.held()
    hosts.faults.release("lose")
    assert moving.result().status_code == 200
    messages = [*question, assistant(one.text), user("And now?")]
    two = hosts.chat(messages, "lost", max_tokens=8)
    assert (two.node, two.cached) == (target, one.usage.prompt + one.usage.completion - 1)
    record = hosts.agent("lost")
    assert record is not None
    assert record["epoch"] == 2


# ---- the store is lost


def test_serving_goes_on_without_the_store_and_the_lag_is_told(hosts: Hosts) -> None:
    question = recital("Piano", 20)
    one = hosts.chat(question, "lags", max_tokens=24)
    held = one.usage.prompt + one.usage.completion - 1
    until(lambda: durable(hosts, "lags") == held, "the rows in the store")
    second = [*question, assistant(one.text), user("And now?")]
    wanted = hosts.chat(second, max_tokens=24).text
    third = [*second, assistant(wanted), user("And then?")]
    wanted_then = hosts.chat(third, max_tokens=24).text
    assert hosts.metric("kvferry_lagging_bytes", node=one.node) == 0
    hosts["store"].cut()
    try:
        two = hosts.chat(second, "lags", max_tokens=24)
        assert (two.text, two.cached, two.node) == (wanted, held, one.node)
        assert int(two.headers["x-kvferry-durable-tokens"]) == held
        three = hosts.chat(third, "lags", max_tokens=24)
        assert (three.text, three.node) == (wanted_then, one.node)
        assert three.cached == two.usage.prompt + two.usage.completion - 1
        assert int(three.headers["x-kvferry-durable-tokens"]) == held < three.cached
        until(lambda: hosts.metric("kvferry_lagging_bytes", node=one.node), "the lag to be told")
        assert hosts.nodes()[one.node]["local"]["lagging_agents"] == 1
        assert one.node in hosts.get("/readyz").json()["without_store"]
        record = hosts.agent("lags")
        assert record is not None
        assert record["durable_tokens"] == held < record["tokens"]
    finally:
        hosts["store"].heal()
    held = three.usage.prompt + three.usage.completion - 1
    until(lambda: durable(hosts, "lags") == held, "the rows in the store")
    until(lambda: not hosts.metric("kvferry_lagging_bytes", node=one.node), "the lag to go")
    until(lambda: not hosts.get("/readyz").json()["without_store"], "the store to be seen again")
    assert hosts.nodes()[one.node]["local"]["lagging_agents"] == 0
    fourth = [*third, assistant(three.text), user("And in the end?")]
    four = hosts.chat(fourth, "lags", max_tokens=2)
    assert int(four.headers["x-kvferry-durable-tokens"]) == four.cached == held
    assert hosts.migrate("lags", hosts.other(one.node)).status_code == 200  # the store has it all
    five = hosts.chat(fourth, "lags", max_tokens=2)
    assert (five.text, five.cached >= held) == (four.text, True)


# ---- two ingresses


def carried(hosts: Hosts) -> Counter[str]:
    """How many turns each has logged as answered."""
    logs = hosts["head"].disk.glob("ray/session_2*/logs/serve/replica_kvferry_ingress_*.log")
    return Counter({path.name: path.read_text().count("POST /v1/chat") for path in logs})


def test_two_ingresses_agree(hosts: Hosts) -> None:
    """Turns of one agent, at the same time, through both."""
    question = recital("Boat", 20)
    one = hosts.chat(question, "both", max_tokens=8)
    wanted = {}
    for n in range(4):
        messages = [*question, assistant(one.text), user(f"And {n}?")]
        wanted[n] = hosts.chat(messages, max_tokens=8).text

    def ask(n: int) -> tuple[int, str, str]:
        messages = [*question, assistant(one.text), user(f"And {n % 4}?")]
        reply = hosts.chat(messages, "both", max_tokens=8)
        return n % 4, reply.text, reply.node

    before = carried(hosts)
    asked = [InBackground(lambda n=n: ask(n)) for n in range(12)]  # type: ignore[misc]
    replies = [turn.result() for turn in asked]
    assert all(text == wanted[n] for n, text, _ in replies)
    assert {node for _, _, node in replies} == {one.node}

    def used() -> int:
        return sum(now > before[name] for name, now in carried(hosts).items())

    until(lambda: used() == 2, "turns of both ingresses in their logs")
    hosts.wait_stored("both")
    hosts.check_owner("both", one.node)
    record = hosts.agent("both")
    assert record is not None
    assert record["epoch"] == 1


def test_an_ingress_dies_in_the_middle_of_its_streams(hosts: Hosts) -> None:
    """Its clients' streams break, and say so; the other's go on. Whoever asks again is answered as
    if nothing had been, and nobody speaks to the dead."""
    questions = {f"ingress-{n}": recital("Rose", 30 + n) for n in range(4)}
    wanted = {s: hosts.chat(question, max_tokens=400).text for s, question in questions.items()}
    begun = threading.Barrier(len(questions) + 1)

    def ask(session: str) -> str | None:
        try:
            with hosts.stream(questions[session], session, max_tokens=400) as stream:
                stream.take(2)
                begun.wait(WAIT)
                return stream.rest()
        except (httpx.TransportError, StopIteration):  # no more lines, and no last one
            return None

    asked = {session: InBackground(lambda s=session: ask(s)) for session in questions}  # type: ignore[misc]
    begun.wait(WAIT)
    busiest(ingresses(hosts)).kill()
    texts = {session: turn.result() for session, turn in asked.items()}
    broken = [session for session, text in texts.items() if text is None]
    assert broken  # how many went through it is Serve's choice
    assert all(text in (None, wanted[session]) for session, text in texts.items())
    until(lambda: not any(n["running"] + n["waiting"] for n in hosts.nodes().values()), "silence")
    for session in broken:
        assert hosts.chat(questions[session], session, max_tokens=400).text == wanted[session]


def test_turns_whose_ingress_died_end(hosts: Hosts) -> None:
    """Ray does not tell their replicas that nobody reads them any more."""
    turn = {"max_tokens": 6000, "ignore_eos": True}  # a minute
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(hosts.stream(recital("Iris", 60 + n), f"ghost-{n}", **turn))
            for n in range(3)
        ]
        for stream in streams:
            stream.take(2)
        for process in ingresses(hosts):
            process.kill()
        killed = time.monotonic()
        until(hosts.answers, "an ingress", START)
        assert sum(node["running"] for node in hosts.nodes().values()) == 3
        until(lambda: not any(n["running"] for n in hosts.nodes().values()), "silence", 30)
        assert time.monotonic() - killed < 30
