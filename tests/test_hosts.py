"""A cluster on hosts that really differ: addresses, links and disks of their own."""

from collections.abc import Iterator

import pytest

from tests.clusters import InBackground, assistant, recital, user
from tests.hosts import Hosts, cluster
from tests.s3_proxy import Rule

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
FAKE = "fake://?step_delay=0.01"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with cluster(["a", "b"], model=FAKE, codec="f16", hysteresis_s=60) as running:
        yield running


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
    hosts.faults.hold("PUT", r"/agents/blocks/")
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
