"""200 agents take 1,000 turns on the real SmolLM2, over four slots. `make soak` runs it."""

import os
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from actors.engines.base import Engine
from bench.texts import context
from tests.loops import make_loop, run, user
from tests.test_admission import (
    _WIDE,
    Crowd,
    Told,
    all_free,
    check_crowd,
    check_parted,
    check_told,
    resident_bytes,
)

pytestmark = [pytest.mark.soak, pytest.mark.model, pytest.mark.timeout(3600)]

TURNS = int(os.environ.get("KVFERRY_SOAK_TURNS", "1000"))
CELLS = 2048
# Others' cells come free before a sequence's own, and llama.cpp adds values up in float16 in the
# order of the cells: measured, logits move by up to 0.8. Another's memory would move them more.
OUT_OF_ORDER = 0.5
_SYLLABLES = ("ba", "de", "ki", "lo", "mu", "na", "po", "ri", "su", "ta", "ve", "zo")


def secret_of(session: str) -> str:
    """A word that no text has, another for each agent."""
    draw = random.Random(session)
    return "".join(draw.choices(_SYLLABLES, k=4)).capitalize() + session.removeprefix("agent")


@dataclass
class Secretive(Crowd):
    """Each has a secret word, and asks in its own words: mostly a few, at times a page."""

    began: float = field(default_factory=time.monotonic)

    def question(self, rng: random.Random, session: str) -> str:
        n_tokens = 160 if rng.random() < 0.08 else rng.randrange(4, self.words)
        notes = context(rng.randrange(1 << 30), n_tokens)
        return f"My secret word is {secret_of(session)}. {notes} What is my secret word?"

    def note(self, turns: int) -> None:
        loop, seconds = self.loop, time.monotonic() - self.began
        print(
            f"{turns} turns in {seconds:.0f} s: resident {resident_bytes() >> 20} MiB, "
            f"cells {loop.residency.cells_used}, evictions {loop.residency.evictions}, "
            f"preemptions {loop.cells.preemptions}",
            flush=True,
        )


def check_secrets(told: Told) -> int:
    """No reply has another agent's word; how many have the agent's own."""
    words = {secret_of(session): session for session in told}
    assert len(words) == len(told)
    own = 0
    for session, turns in told.items():
        said = " ".join(text for _, _, text in turns)
        spoken = {words[word] for word in re.findall(r"[A-Z][a-z]+\d+", said) if word in words}
        assert spoken <= {session}, (session, spoken)
        own += bool(spoken)
    return own


@pytest.fixture
def engines(smollm2_gguf: Path) -> Iterator[list[Engine]]:
    """Those that a test opens; closed at its end."""
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()


def test_two_hundred_agents_over_four_slots_of_smollm2(
    smollm2_gguf: Path, tmp_path: Path, engines: list[Engine]
) -> None:
    from actors.engines.llama_engine import LlamaEngine

    def engine(slots: int) -> LlamaEngine:
        return LlamaEngine(
            smollm2_gguf, n_seq_max=slots, n_ctx=CELLS, n_cells=CELLS, n_threads=os.cpu_count() or 2
        )

    loop = make_loop(engine(4), tmp_path / "crowd", loop=_WIDE, pool_bytes=32 << 20)
    try:
        filling = context(1, CELLS * 7 // 8)  # cells take memory once they are written to
        run(loop, [user(filling)], n=100, persist=False)
        crowd = Secretive(loop, min(200, TURNS // 5), TURNS, most=16, words=60)
        told = check_crowd(loop, crowd)
        assert loop.engine.kv_bytes == CELLS * loop.engine.key.spec.f16_row_bytes
        assert loop.residency.evictions > TURNS // 2
        all_free(loop)
    finally:
        loop.close()
    own = check_secrets(told)
    print(f"{own} of {len(told)} agents said their own word; none another's")
    assert own > len(told) // 4  # or looking for others would prove nothing
    lone = make_loop(engine(1), tmp_path / "lone")
    try:
        parted, total = check_told(lone, told, sorted(told)[::10])
    finally:
        lone.close()
    engines.append(engine(1))
    check_parted(engines[0], parted, total, OUT_OF_ORDER)
    assert len(parted) < total // 8
