"""verify: what is wrong with a store is found, and named for what it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from storage.cache_file import sha256
from storage.card import encode_card
from storage.crypto import Cipher
from storage.errors import CorruptData
from storage.survey import survey
from storage.verify import verify
from tests.sim_store import Disk, sim_store
from tests.store_contract import AGENT, ALICE, BOB, KEY, flip, template, tokens_of, with_tokens
from tests.test_collector import card_file, put, raw_block, with_blocks


class Place:
    """A store with one agent of two blocks."""

    def __init__(self, **options) -> None:
        self.disk = Disk()
        self.store = sim_store(self.disk, **options)
        self.first, self.second = put(self.store, 1), put(self.store, 2)
        claimed = self.store.claim(template(ALICE)).card
        self.card = self.store.commit(with_blocks(claimed, self.first, self.second)).card

    def damage(self, path: str) -> None:
        self.disk.files[path] = (flip(self.disk.files[path][0], -1), self.disk.clock)

    def block(self, ref) -> str:
        return self.store.block_path("acme", ref, "full")

    def verify(self, **options):
        return verify(sim_store(self.disk), **options)

    def found(self, **options) -> list[tuple[str, str]]:
        return [(found.kind, found.path) for found in self.verify(**options).findings]


@pytest.fixture
def place():
    return Place()


def test_a_sound_store_is_clean(place):
    report = place.verify()
    assert report.is_clean
    assert (report.cards, report.blocks, report.findings) == (2, 2, [])
    assert report.bytes == sum(len(raw) for raw, _ in place.disk.files.values())


def test_a_damaged_block_is_found_and_set_aside_if_wished(place):
    path = place.block(place.first)
    place.damage(path)
    assert place.found() == [("corrupt", path)]
    assert path in place.disk.files
    report = place.verify(quarantine=True)
    assert (report.is_clean, report.set_aside) == (False, 1)
    assert f"{path}.corrupt" in place.disk.files
    assert place.found() == [("leftover", f"{path}.corrupt"), ("missing", path)]
    put(place.store, 1)
    assert place.verify().is_clean


def test_a_missing_block_is_found(place):
    path = place.block(place.second)
    place.disk.remove(path)
    (finding,) = place.verify().findings
    assert (finding.kind, finding.path) == ("missing", path)
    assert card_file(place.card) in finding.reason


def test_only_what_the_newest_card_names_is_missed(place):
    place.disk.remove(place.block(place.second))
    place.store.commit(with_blocks(place.card, place.first))
    assert place.verify().is_clean


def test_a_block_that_comes_or_goes_meanwhile_is_no_finding(place):
    """The collector and the writers do not stand still for us."""
    path = place.block(place.second)
    kept = place.disk.files[path][0]
    orphan = put(place.store, 3)

    def step(operation: str, name: str) -> None:
        if (operation, name) == ("list", "sim/blocks/acme"):
            place.disk.remove(path)
        elif operation == "list" and "/agents/acme/" in name and path not in place.disk.files:
            if walked:
                place.disk.add(path, kept)
            walked.append(name)
        elif operation == "read" and name == place.block(orphan):
            place.disk.remove(name)

    walked = ["the first time is the walk"]
    assert verify(sim_store(place.disk, step)).is_clean
    assert len(walked) == 2


def test_an_orphan_is_no_problem(place):
    path = place.block(put(place.store, 3))
    report = place.verify()
    assert [(found.kind, found.path) for found in report.findings] == [("orphan", path)]
    assert report.is_clean
    assert report.sizes["orphan"] == len(raw_block(3))


def test_foreign_files_and_leftovers_are_told_apart(place):
    folder = f"sim/agents/acme/{AGENT.digest(KEY.digest)}"
    block = place.block(place.first)
    for path in (
        f"{folder}/notes.txt",
        f"{folder}/.1.tmp",
        "sim/agents/acme/not-an-agent/x",
        "sim/blocks/acme/fff/" + block.rsplit("/", 1)[1],
        "sim/blocks/acme/README",
    ):
        place.disk.add(path, b"?")
    report = place.verify()
    assert (report.counts["foreign"], report.counts["leftover"]) == (4, 1)
    assert report.is_clean


def test_a_damaged_card_is_found_and_set_aside(place):
    place.store.commit(with_blocks(place.card, place.first))
    damaged = card_file(replace(place.card, generation=2))
    place.damage(damaged)
    assert place.found() == [("corrupt", damaged)]
    assert place.verify(quarantine=True).set_aside == 1
    assert place.verify().is_clean
    assert place.store.latest(AGENT, KEY).card == place.card


def test_the_newest_claim_is_never_set_aside(place):
    """Without it, what a zombie wrote in the epoch before would count again."""
    place.store.claim(template(BOB))
    late = with_tokens(place.card, 666)
    place.disk.add(card_file(late), encode_card(late))
    claim = card_file(replace(place.card, epoch=2, generation=0))
    place.damage(claim)
    report = place.verify(quarantine=True)
    assert (report.counts["corrupt"], report.set_aside) == (1, 0)
    assert claim in place.disk.files
    assert tokens_of(place.store) is None
    assert place.store.epoch(AGENT, KEY) == 2


@pytest.mark.parametrize("how", ["encrypted", "signed"])
def test_what_other_keys_open_is_unreadable_and_never_set_aside(how):
    options = {
        "encrypted": {"cipher": Cipher({"*": [b"k" * 32]})},
        "signed": {"signing_key": b"k" * 16},
    }[how]
    place = Place(**options)
    assert verify(place.store).is_clean
    before = dict(place.disk.files)
    report = place.verify(quarantine=True)
    assert not report.is_clean
    assert report.counts == {"unreadable": 4 if how == "encrypted" else 2}
    assert place.disk.files == before


def test_a_block_that_does_not_decrypt_is_corrupt():
    one = Cipher({"*": [b"k" * 32]})
    place = Place(cipher=one)
    raw = one.seal("acme", "another place", b"x")
    path = f"sim/blocks/acme/010/{'01' * 32}.full.{sha256(raw)}.safetensors"
    place.disk.add(path, raw)
    report = verify(place.store)
    assert [(found.kind, found.path) for found in report.findings] == [("corrupt", path)]


def test_findings_are_told_as_they_come(place):
    place.damage(place.block(place.first))
    told: list[str] = []
    place.verify(on_finding=lambda finding: told.append(finding.kind))
    assert told == ["corrupt"]


def test_a_survey_begins_again_when_a_card_vanishes(place):
    """The one that took its place may not have been in the first list."""
    folder = card_file(place.card).rsplit("/", 1)[0]
    went_on = []

    def step(operation: str, path: str) -> None:
        if operation == "read" and path == card_file(place.card) and not went_on:
            went_on.append(path)
            card = place.card
            for _ in range(2):
                card = place.store.commit(with_blocks(card, place.first)).card

    found = survey(sim_store(place.disk, step), folder)
    assert went_on
    assert [card.generation for card in found.cards] == [0, 2, 3]
    assert found.newest is found.cards[-1]
    assert not any(isinstance(card.error, CorruptData) for card in found.cards)


def test_an_agent_that_is_gone_when_we_look_again_misses_nothing(place):
    place.disk.remove(place.block(place.second))

    def step(operation: str, path: str) -> None:
        if operation == "list" and path.startswith("sim/blocks"):
            for name in [name for name in place.disk.files if "/agents/" in name]:
                place.disk.remove(name)

    assert verify(sim_store(place.disk, step)).is_clean
