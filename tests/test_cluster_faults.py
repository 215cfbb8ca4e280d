"""Stored memory that cannot be used: the turn is served by prefill, with the right text; a metric
counts it by reason, and a warning names the file and the reason."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from storage.cache_file import sha256
from storage.card import CacheCard, decode_card, encode_card
from storage.store import CacheStore
from tests.clusters import Up, kill, recital, shared_cluster, until

pytestmark = [pytest.mark.cluster, pytest.mark.model, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster(
    request: pytest.FixtureRequest, smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Up:
    return shared_cluster(request.config, tmp_path_factory)


def cards(store: Path, session: str) -> list[tuple[Path, CacheCard]]:
    """The agent's cards, oldest first."""
    found = []
    for path in sorted((store / "agents").glob("*/*/*.safetensors")):
        card = decode_card(path.read_bytes(), str(path))
        if card.agent.session == session:
            found.append((path, card))
    return found


def flip(store: Path, session: str) -> Path:
    path = first_block(store, session)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    return path


def truncate(store: Path, session: str) -> Path:
    path = first_block(store, session)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def remove(store: Path, session: str) -> Path:
    path = first_block(store, session)
    path.unlink()
    return path


def first_block(store: Path, session: str) -> Path:
    _, card = cards(store, session)[-1]
    block = card.branches[0].blocks[0]
    return Path(CacheStore(str(store)).block_path(card.agent.tenant, block, "full"))


def sound(path: Path) -> bool:
    """Whether the bytes are those that the file's name promises."""
    return path.exists() and sha256(path.read_bytes()) == path.name.split(".")[2]


def foreign_cards(store: Path, session: str) -> Path:
    """Every card of the agent is one of another model's."""
    for path, card in cards(store, session):
        path.write_bytes(encode_card(replace(card, key=replace(card.key, weights="0" * 64))))
    return path


def damage_and_take_over(
    cluster: Up, session: str, node: str, damage: Callable[[Path, str], Path]
) -> tuple[str, Path]:
    """The agent's next owner will read its rows from the store, where they are damaged. Returns
    that node and the damaged file."""
    target = cluster.other(node)
    if damage is foreign_cards:  # a live owner would write another card when it gives the agent up
        kill(cluster.nodes()[node]["pid"])
        return target, damage(cluster.store, session)
    path = damage(cluster.store, session)  # before the target reads ahead
    assert cluster.migrate(session, target).status_code == 200
    return target, path


@pytest.mark.parametrize(
    ("noun", "damage", "reason", "says"),
    [
        ("Piano", flip, "corrupt", "sha256 does not match"),
        ("Tree", truncate, "corrupt", "the card says"),
        ("Cat", remove, "missing", "the block is missing"),
        ("Lamp", foreign_cards, "incompatible", "weights"),
    ],
)
def test_damaged_memory_is_prefilled(
    cluster: Up,
    noun: str,
    damage: Callable[[Path, str], Path],
    reason: str,
    says: str,
) -> None:
    session = f"damaged-{noun}"
    question = recital(noun, 27, "Please repeat after me")  # blocks that no other test has
    one = cluster.chat(question, session, max_tokens=12)
    cluster.wait_stored(session)
    faults = "kvferry_memory_faults_total"
    before = cluster.metric(faults, node=cluster.other(one.node), reason=reason)
    target, path = damage_and_take_over(cluster, session, one.node, damage)
    two = cluster.chat(question, session, max_tokens=12)
    assert two.node == target
    # What other agents' prompts begin with, too; and a sound block that no sound card names.
    assert two.cached <= (256 if damage is foreign_cards else 63)
    assert two.text == one.text
    assert cluster.metric(faults, node=target, reason=reason) >= before + 1
    lines = [line for line in cluster.logged().splitlines() if path.name in line]
    assert any(says in line and str(path) in line for line in lines), lines
    following = cluster.chat(question, session, max_tokens=12)
    assert following.cached == following.usage.prompt - 1
    assert following.text == one.text
    cluster.wait_ready(2)


def test_what_was_damaged_is_stored_again(cluster: Up) -> None:
    """After the prefill the store holds sound rows, and the next owner reads them."""
    question = recital("Guard", 27)
    one = cluster.chat(question, "healed", max_tokens=2)
    cluster.wait_stored("healed")
    flip(cluster.store, "healed")
    assert not sound(first_block(cluster.store, "healed"))
    assert cluster.migrate("healed", cluster.other(one.node)).status_code == 200
    assert cluster.chat(question, "healed", max_tokens=2).cached < 64  # shared
    until(lambda: sound(first_block(cluster.store, "healed")), "a sound block in its place")
