"""Speculative decoding changes how many steps a reply takes, and nothing else."""

import gc
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.book import Book
from actors.branches import Branch
from actors.cells import Cells
from actors.config import ReplicaConfig
from actors.draft_model import DraftModel, check_draft
from actors.drafts import NGrams
from actors.engine_settings import speculation_of
from actors.engines.base import Chunk, Engine, Logits
from actors.engines.fake_engine import FakeEngine, FakeVocab
from actors.errors import EngineFault, ModelUnavailable
from actors.grammar import GrammarCompiler
from actors.loop import LoopConfig, ReplicaLoop
from actors.models import open_draft, open_engine
from actors.payoff import Offer, Payoff
from actors.residency import Residency
from actors.sampling import Sampler
from actors.scheduler import Scheduler, SchedulerConfig
from actors.sequence import Sequence as Running
from actors.sequence import TextStream
from actors.speculation import Kind, SpeculationConfig
from actors.turn import Guide, Resume, SamplingParams, TurnMoved
from tests.loops import (
    Answer,
    agent_id,
    assistant,
    block_files,
    evict,
    make_loop,
    memory_of,
    run,
    settle,
    start,
    user,
)

pytestmark = pytest.mark.long

Messages = list[dict[str, str]]
MakeLoop = Callable[..., ReplicaLoop]
K = 5


class Always(Payoff):
    """Drafts whatever is offered."""

    def choose(self, offers: Sequence[Offer]) -> list[int]:
        return [offer.most for offer in offers]


class Counting(FakeEngine):
    """Knows its steps; checks that drafts are within what is reserved."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps: list[list[Chunk]] = []

    def step(self, chunks: Sequence[Chunk]) -> dict[int, Logits]:
        self.steps.append(list(chunks))
        return super().step(chunks)

    @property
    def most_drafted(self) -> int:
        return max(chunk.n_logits - 1 for step in self.steps for chunk in step)


class Half(FakeEngine):
    """Drafts that are right at two positions of three."""

    def _logits(self, state: bytes) -> Logits:
        logits = super()._logits(state)
        return np.roll(logits, 1) if state[0] % 3 == 0 else logits


@pytest.fixture
def loop_on(tmp_path: Path) -> Iterator[MakeLoop]:
    """A loop with speculation, `kind` or what the draft engine asks for; always, unless `fair`."""
    loops: list[ReplicaLoop] = []

    def make(
        engine: Engine,
        store: str = "store",
        kind: Kind = "off",
        draft: Engine | None = None,
        *,
        fair: bool = False,
        k: int = K,
        **config: Any,
    ) -> ReplicaLoop:
        chosen = SpeculationConfig("draft" if draft is not None else kind, k)
        options = LoopConfig(speculation=chosen, **config)
        loop = make_loop(engine, tmp_path / store, loop=options, draft=draft)
        if not fair:
            loop.speculator.payoff = Always(0)
        loops.append(loop)
        return loop

    yield make
    for loop in loops:
        loop.close()


def drafters() -> dict[str, tuple[Kind, Callable[[], Engine | None]]]:
    return {
        "ngram": ("ngram", lambda: None),
        "perfect": ("draft", FakeEngine),
        "half": ("draft", Half),
        "wrong": ("draft", lambda: relabelled(FakeEngine(seed=1))),
    }


def relabelled(engine: FakeEngine) -> FakeEngine:
    """With the tokenizer of the fake engine with seed 0."""
    engine.key = replace(engine.key, tokenizer=FakeEngine().key.tokenizer)
    return engine


REFRAIN = Guide("regex", "(la la lo ){40}end", "guided_regex")
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 11},
    "filtered": {"temperature": 0.8, "seed": 3, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    "seeded penalties": {"temperature": 1.2, "seed": 5, "frequency_penalty": 1.0},
    "one letter": {"logit_bias": ((120, 50.0),)},
    "grammar": {"guide": REFRAIN},
    "seeded grammar": {"guide": Guide("regex", "([a-d]{3} ){30}", "x"), "temperature": 1.0},
    "stop string": {"guide": REFRAIN, "stop": ("lo la la lo la la lo la",)},
    "stop in a letter's run": {"logit_bias": ((120, 50.0),), "stop": ("x" * 35,)},
    "stop token": {"guide": REFRAIN, "stop_token_ids": (ord("o"),)},
    "one token": {"n": 1},
    "seven tokens": {"logit_bias": ((120, 50.0),), "n": 7},
    "logprobs": {"logprobs": 2, "guide": REFRAIN},
    "no end": {"ignore_eos": True, "n": 90},
}
ASKED: Messages = [user("Sing la la lo la la lo, " * 11)]


def listened(loop: ReplicaLoop, messages: Messages, **options: Any) -> tuple[Answer, list[Any]]:
    """(the answer, the log probabilities that came with it)"""
    stream = start(loop, messages, **options)
    logprobs = [p for item in stream for p in getattr(item, "logprobs", ())]
    return stream.result(), logprobs


@pytest.mark.parametrize("drafter", drafters())
@pytest.mark.parametrize("case", CASES)
def test_a_reply_is_the_same_with_drafts(
    loop_on: MakeLoop, tmp_path: Path, case: str, drafter: str
) -> None:
    kind, draft = drafters()[drafter]
    options = {"n": 300} | CASES[case]
    engines = Counting(n_ctx=2048), Counting(n_ctx=2048)
    plain = loop_on(engines[0], "plain")
    drafted = loop_on(engines[1], "drafted", kind, draft())
    answers = []
    for loop in (plain, drafted):
        first, logprobs = listened(loop, ASKED, **options)
        messages = [*ASKED, assistant(first.text), user("And again.")]
        second = run(loop, messages, n=40)  # from the rows that the first turn left
        settle(loop)
        assert loop.residency.cells_reserved == 0
        answers.append(
            (
                first.ids,
                first.text,
                first.reason,
                logprobs,
                second.ids,
                second.cached,
                second.text,
                loop.residency.cells_used,
                memory_of(loop).branches[0].rows,
            )
        )
        assert loop.call(loop.residency.evict_idle).result() == 1
        assert loop.residency.cells_used == 0
    assert answers[0] == answers[1]
    assert block_files(tmp_path / "plain") == block_files(tmp_path / "drafted")
    assert len(engines[1].steps) <= len(engines[0].steps)
    assert drafted.served["draft_tokens_accepted"] <= drafted.served["draft_tokens"]
    if drafter == "wrong" and case == "greedy":
        assert drafted.served["draft_tokens"] > 100


def test_a_repetitive_reply_takes_fewer_steps(loop_on: MakeLoop) -> None:
    engine = Counting(n_ctx=2048)
    loop = loop_on(engine, kind="ngram")
    answer = run(loop, ASKED, n=300, guide=REFRAIN)
    assert len(answer.ids) == 300
    assert len(engine.steps) < 300 / (K - 1)
    assert loop.served["draft_tokens_accepted"] > 230


def test_a_perfect_draft_model_makes_every_step_k_tokens_longer(loop_on: MakeLoop) -> None:
    engine, draft = Counting(n_ctx=2048), Counting(n_ctx=2048)
    loop = loop_on(engine, draft=draft)
    answer = run(loop, ASKED, n=120, ignore_eos=True)
    assert len(answer.ids) == 120
    verifying = [s for s in engine.steps if s[0].n_logits > 1]
    assert {s[0].n_logits for s in verifying[:-1]} == {K + 1}
    assert len(verifying) == 120 // (K + 1)
    assert loop.served["draft_tokens"] == loop.served["draft_tokens_accepted"]


def test_what_a_failure_would_cost_is_looked_at_whatever_the_steps(loop_on: MakeLoop) -> None:
    loop = loop_on(FakeEngine(n_ctx=2048), draft=FakeEngine(n_ctx=2048), k=1)
    looks: list[int] = []
    loop._exporter._long = lambda *at: looks.append(at[2]) or False  # type: ignore
    for odd in ("", "x"):  # two rows a step: either prompt or the other has an odd number
        looks.clear()
        answer = run(loop, [user("Hello" + odd)], session=odd or "a", n=100, ignore_eos=True)
        rows = len(answer.prompt) + 99
        assert np.diff([*looks, rows]).max() <= 9, (len(answer.prompt), looks)
        assert 10 <= len(looks) <= 15


def test_several_ids_leave_as_one_item(loop_on: MakeLoop) -> None:
    loop = loop_on(FakeEngine(), draft=FakeEngine())
    stream = start(loop, ASKED, n=60, ignore_eos=True)
    sizes = [len(item.ids) for item in stream if hasattr(item, "ids")]
    stream.result()  # checks their indices
    assert max(sizes) == K + 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ngram", "draft"])
def test_agents_that_share_few_cells_leave_and_come_back_the_same(
    loop_on: MakeLoop, kind: str
) -> None:
    """Preempted with drafts all around, restored, and nobody sees another's text."""
    answers: list[list[Answer]] = []
    engine = Counting()
    for speculating in (False, True):
        engine = Counting(3, 400, n_cells=500, step_delay=0.001)  # so that they meet
        draft = Half(3, 400, n_cells=600) if speculating and kind == "draft" else None
        name = f"{kind}-{speculating}"
        loop = loop_on(engine, name, "ngram" if speculating else "off", draft)
        guided = {"guide": Guide("regex", "(na na nu ){60}", "x")} if kind == "ngram" else {}
        streams = [
            start(loop, [user(f"Agent {i}: na na nu na na nu")], session=f"s{i}", n=200,
                  turn_id=f"t{i}", temperature=float(i % 2), seed=i, ignore_eos=True, **guided)
            for i in range(6)
        ]  # fmt: skip
        answers.append([stream.result() for stream in streams])
        settle(loop)
        evict(loop)
        assert loop.cells.preemptions > 0
        assert loop.residency.cells_used == 0
        assert not any(engine.n_rows(i) for i in range(3))
        if speculating:
            assert engine.most_drafted == K
            assert loop.served["draft_tokens_accepted"] > 20
    assert [a.ids for a in answers[0]] == [a.ids for a in answers[1]]


def test_rows_in_the_engine_are_those_of_the_tokens_between_any_two_steps(
    loop_on: MakeLoop,
) -> None:
    loop = loop_on(FakeEngine(step_delay=0.002), draft=Half())
    streams = [start(loop, ASKED, session=f"s{i}", turn_id=f"t{i}", n=150, temperature=float(i),
                     ignore_eos=True) for i in range(2)]  # fmt: skip

    def look() -> list[bool]:
        return [
            loop.engine.n_rows(s.seq_id) == s.n_rows < len(s.tokens) for s in loop.scheduler.running
        ]

    looks = list[bool]()
    while any(stream.answer.last is None for stream in streams):
        looks += loop.call(look).result(10)
        for stream in streams:
            stream.take(len(stream.answer.ids) + 7)
    assert len(looks) > 10
    assert all(looks)
    assert loop.served["draft_tokens"] > loop.served["draft_tokens_accepted"] > 0


def test_a_turn_that_migrates_is_frozen_without_drafts(loop_on: MakeLoop, tmp_path: Path) -> None:
    expected = run(loop_on(FakeEngine(), "reference"), ASKED, n=200, ignore_eos=True)
    source = loop_on(FakeEngine(step_delay=0.002), draft=Half())
    stream = start(source, ASKED, n=200, ignore_eos=True)
    stream.take(40)
    source.call(lambda: source.handoff.freeze(agent_id())).result(10)[1].result(10)
    sequence = source.scheduler.running[0]
    assert source.engine.n_rows(sequence.seq_id) == sequence.n_rows == len(sequence.tokens) - 1
    assert memory_of(source).branches[0].exported == sequence.n_rows
    target = loop_on(FakeEngine(), draft=Half())
    target.memory.adopt(agent_id())
    source.call(lambda: source.handoff.release(agent_id())).result(10)
    moved = stream.result()
    assert isinstance(moved.last, TurnMoved)
    resume = Resume(tuple(moved.prompt), tuple(moved.ids))
    rest = run(target, ASKED, n=200, ignore_eos=True, resume=resume, attempt=1)
    assert moved.ids + rest.ids == expected.ids
    assert rest.cached > 0


def test_a_failed_replica_s_turn_goes_on_elsewhere_the_same(loop_on: MakeLoop) -> None:
    options: dict[str, Any] = {"n": 200, "guide": REFRAIN, "temperature": 1.0, "seed": 4}
    expected = run(loop_on(FakeEngine(), "reference"), ASKED, **options)
    emitted = expected.ids[:77]
    resume = Resume(tuple(expected.prompt), tuple(emitted))
    loop = loop_on(FakeEngine(), "other", "ngram")
    rest = run(loop, ASKED, resume=resume, attempt=1, **options)
    assert emitted + rest.ids == expected.ids
    assert loop.served["draft_tokens_accepted"] > 50


# ---- where drafts may not be


def test_no_drafts_where_cells_are_short(loop_on: MakeLoop) -> None:
    """The engine refuses a step that it has no cells for, and with it every turn."""
    engine = Counting(2, 400, n_cells=400, step_delay=0.01)
    loop = loop_on(engine, kind="ngram")
    streams = [start(loop, [user(f"{i} " + "la la lo " * 14)], session=f"s{i}", turn_id=f"t{i}",
                     n=100, guide=REFRAIN) for i in range(2)]  # fmt: skip
    assert [stream.result().reason for stream in streams] == ["length", "length"]
    assert engine.most_drafted == K
    assert loop.cells.preemptions > 0


@pytest.mark.parametrize(("reserved", "drafts"), [(95, 0), (98, 3), (60, 8)])
def test_drafts_have_the_cells_that_are_left(reserved: int, drafts: int) -> None:
    engine = FakeEngine(2, 100, n_cells=100)
    residency = Residency(engine)
    made: Scheduler[Any] = Scheduler(SchedulerConfig())
    cells = Cells(engine, residency, made, Book(), None)  # type: ignore[arg-type]
    seq_id = residency.acquire(Branch(1), reserved)
    assert seq_id is not None
    running = sequence([97] * min(reserved, 95), seq_id)
    assert cells.for_drafts(running, 8) == drafts
    assert residency.reserved(seq_id) >= len(running.tokens) + drafts


def test_no_idle_agent_leaves_for_drafts(loop_on: MakeLoop) -> None:
    """63 tokens are what a turn has cells for at its start; drafts reach beyond."""
    engine = Counting(2, 400, n_cells=400)
    loop = loop_on(engine, kind="ngram", k=20)
    run(loop, [user("x" * 150)], session="idle", n=5)
    settle(loop)
    guide = Guide("regex", "(la la lo ){7}", "x")
    answer = run(loop, [user("la " * 50)], session="other", n=240, guide=guide)
    drafted_to = max(c.start + len(c.token_ids) for s in engine.steps for c in s if c.n_logits > 1)
    assert drafted_to > len(answer.prompt) + 64
    assert loop.residency.evictions == 0


@pytest.mark.parametrize("drafter", ["ngram", "half"])
def test_no_drafts_where_rows_could_not_be_taken_back(
    loop_on: MakeLoop, tmp_path: Path, drafter: str
) -> None:
    """This engine keeps no more than the window: past it nothing can be taken back."""
    kind = drafters()[drafter][0]
    options: dict[str, Any] = {"n": 260, "guide": REFRAIN} if kind == "ngram" else {"n": 260}
    engines = Counting(window=64), Counting(window=64)
    plain = loop_on(engines[0], "plain")
    drafted = loop_on(engines[1], "drafted", kind, Half() if kind == "draft" else None)
    asked = [user("la la lo la la")]
    answers = [run(loop, asked, ignore_eos=True, **options) for loop in (plain, drafted)]
    assert answers[0].ids == answers[1].ids
    for loop in (plain, drafted):
        settle(loop)
    assert block_files(tmp_path / "plain") == block_files(tmp_path / "drafted")
    assert drafted.cells.preemptions == 0  # of the way out that is left when it is refused
    sent = [c for step in engines[1].steps for c in step if c.n_logits > 1]
    assert sent
    assert all(c.start + len(c.token_ids) < 64 for c in sent)


class Keeping(Counting):
    """Keeps every sliding row, so that all can be taken back."""

    def _slide(self, seq_id: int) -> None:
        pass


def test_windows_are_kept_at_the_same_places(
    loop_on: MakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block's end is reached, not jumped over: there the window is kept."""
    monkeypatch.setattr("actors.exporter._MOST_AT_RISK_S", math.inf)  # else it hangs on the time
    engine = Keeping(window=64)
    plain, drafted = loop_on(Keeping(window=64), "plain"), loop_on(engine, "drafted", "ngram")
    options: dict[str, Any] = {"n": 390, "guide": REFRAIN}
    asked = [user("la la lo la la")]
    answers = [run(loop, asked, **options) for loop in (plain, drafted)]
    assert answers[0].ids == answers[1].ids
    for loop in (plain, drafted):
        settle(loop)
    assert block_files(tmp_path / "plain") == block_files(tmp_path / "drafted")
    sent = [c for step in engine.steps for c in step if c.n_logits > 1]
    assert max(c.start for c in sent) > 300


class Forgetful(FakeEngine):
    """Loses what it could have cut to."""

    def can_truncate(self, seq_id: int, n_rows: int) -> bool:
        cut = 0 < n_rows < self.n_rows(seq_id) and n_rows > 300
        return not cut and super().can_truncate(seq_id, n_rows)


def test_a_turn_whose_rows_cannot_be_taken_back_goes_on_from_what_is_stored(
    loop_on: MakeLoop,
) -> None:
    expected = run(loop_on(FakeEngine(), "plain"), ASKED, n=80, ignore_eos=True)
    loop = loop_on(Forgetful(), "drafted", draft=Half())
    assert run(loop, ASKED, n=80, ignore_eos=True).ids == expected.ids
    assert loop.cells.preemptions > 0


def test_drafts_beside_a_prefill_take_an_eighth_of_its_budget(loop_on: MakeLoop) -> None:
    engine = Counting(4, 4096, step_delay=0.001)
    loop = loop_on(engine, kind="ngram", k=8,
                   scheduler=SchedulerConfig(prefill_chunk_busy=32, max_step_s=0))  # fmt: skip
    singer = start(loop, ASKED, session="singer", n=900, turn_id="a",
                   guide=Guide("regex", "(la la lo ){200}", "x"))  # fmt: skip
    singer.take(100)
    run(loop, [user("y" * 1500)], session="reader", turn_id="b", n=2)
    loop.cancel("a")
    singer.result()
    mixed = [step for step in engine.steps if len(step) == 2 and len(step[1].token_ids) > 16]
    assert len(mixed) > 20
    assert {sum(len(c.token_ids) for c in step) - 1 for step in mixed[:-1]} == {32}
    assert max(step[0].n_logits for step in mixed) == 1 + 32 // 8


def test_a_step_has_room_for_the_drafts_of_all() -> None:
    made: Scheduler[Any] = Scheduler(SchedulerConfig(prefill_chunk=100))
    assert made.draft_room(40, 0) == 60
    assert made.draft_room(200, 0) == 0


# ---- the draft model


def sequence(tokens: list[int], seq_id: int = 0) -> Running:
    text = TextStream(FakeVocab(), ())
    return Running("t", tokens, len(tokens), SamplingParams(), 99, text, seq_id, len(tokens) - 1)


def continued(tokens: list[int], k: int) -> list[int]:
    """What the engine itself would say, from scratch."""
    engine, ids = FakeEngine(), list(tokens)
    for at in range(0, len(ids), 512):
        logits = engine.step([Chunk(0, ids[at : at + 512], at, 1)])
    while len(ids) < len(tokens) + k:
        token = int(logits[0][-1].argmax())
        if token in engine.vocab.eog:
            break
        logits = engine.step([Chunk(0, [token], len(ids), 1)])
        ids.append(token)
    return ids[len(tokens) :]


def test_a_draft_model_follows_whatever_happens_to_a_sequence() -> None:
    rng = np.random.default_rng(7)
    engine = Counting(2, 4096)
    model = DraftModel(engine)
    a, b = sequence(list(range(97, 110))), sequence(list(range(65, 90)), 1)
    for turn in range(60):
        what = rng.integers(5)
        if what == 0:
            a.tokens += [int(x) for x in rng.integers(97, 120, rng.integers(1, 9))]
        elif what == 1:
            a = sequence(a.tokens[: int(rng.integers(2, len(a.tokens) + 1))])  # another turn
        elif what == 2:
            b = sequence([int(x) for x in rng.integers(97, 120, 30)], 1)  # another agent
        else:
            b.tokens += continued(b.tokens, 4)[: int(rng.integers(5))] or [120]
        wanted = [(a, 4), (b, 3)] if turn % 3 else [(b, 5)]
        found = model.draft(wanted)
        for s, k in wanted:
            assert found.get(s.seq_id, []) == continued(s.tokens, k)
    assert not model.broken


def test_accepted_drafts_are_not_computed_again() -> None:
    engine = Counting(2, 4096)
    model, s = DraftModel(engine), sequence([97] * 200)
    for _ in range(10):
        s.tokens += [*model.draft([(s, 4)])[0], 98]
    computed = sum(len(c.token_ids) for step in engine.steps[4:] for c in step)
    assert computed <= 9 * 6


def test_a_draft_model_takes_a_long_prompt_in_chunks() -> None:
    engine = Counting(2, 4096)
    model, s = DraftModel(engine), sequence([97 + i % 20 for i in range(1000)])
    drafts = [model.draft([(s, 2)]) for _ in range(4)]
    assert drafts[:3] == [{}, {}, {}]
    assert drafts[3][0] == continued(s.tokens, 2)
    assert max(len(c.token_ids) for step in engine.steps for c in step) == 256


def test_a_draft_model_with_few_cells_forgets_those_it_has_not_seen_for_long() -> None:
    model = DraftModel(FakeEngine(4, 300, n_cells=300))
    sequences = [sequence([97 + i] * 120, i) for i in range(4)]
    for s in [*sequences, *sequences]:
        assert model.draft([(s, 4)])[s.seq_id] == continued(s.tokens, 4)
    assert model.draft([(s, 4) for s in sequences]) == {}  # together they do not fit
    assert model.draft([(sequence([97] * 299), 4)]) == {}  # nor does this one
    assert not model.broken


def test_turns_go_on_when_the_draft_model_fails(loop_on: MakeLoop) -> None:
    class Failing(FakeEngine):
        left = 30

        def step(self, chunks: Sequence[Chunk]) -> dict[int, Logits]:
            self.left -= 1
            if not self.left:
                raise EngineFault("gone")
            return super().step(chunks)

    expected = run(loop_on(FakeEngine(), "plain"), ASKED, n=150, ignore_eos=True)
    loop = loop_on(FakeEngine(), "drafted", draft=Failing())
    assert run(loop, ASKED, n=150, ignore_eos=True).ids == expected.ids
    assert loop.served["draft_tokens"] > 0


def test_no_index_of_a_turn_is_left_when_it_has_ended(loop_on: MakeLoop) -> None:
    loop = loop_on(FakeEngine(), kind="ngram")
    run(loop, ASKED, n=40, ignore_eos=True)
    assert loop.speculator.drafted
    start(loop, ASKED, session="b", n=300, ignore_eos=True, turn_id="b").take(1)
    loop.cancel("b")
    settle(loop)
    assert not [o for o in gc.get_objects() if type(o) is NGrams and o._indexed]


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    engine, other = FakeEngine(), FakeEngine(seed=1)
    check_draft(engine, FakeEngine())
    check_draft(engine, relabelled(FakeEngine(seed=1)))
    with pytest.raises(ModelUnavailable, match=r"tokenizer.*equivalent_digests"):
        check_draft(engine, other)
    other.vocab.size = 300
    with pytest.raises(ModelUnavailable, match="300 tokens, the model 261"):
        check_draft(engine, other)


# ---- settings


def test_what_speculation_asks_for() -> None:
    def kind(**options: Any) -> str:
        return speculation_of(ReplicaConfig(**options)).kind

    assert kind(speculation="auto") == "ngram"
    assert kind(speculation="auto", draft_model="x.gguf") == kind(
        speculation="draft", draft_model="x.gguf"
    )
    assert kind() == kind(speculation="off") == "off"
    for wrong, said in (
        ({"speculation": "mtp"}, "cannot test"),
        ({"speculation": "fast"}, "auto, off, ngram or draft"),
        ({"speculation": "draft"}, "draft_model"),
        ({"speculation": "off", "draft_model": "x"}, "not used"),
        ({"speculation": "ngram", "draft_model": "x"}, "not used"),
    ):
        with pytest.raises(ValueError, match=said):
            speculation_of(ReplicaConfig(**wrong))


def test_a_draft_model_is_opened_beside_the_model() -> None:
    config = ReplicaConfig(
        model="fake://", speculation="auto", draft_model="fake://?step_delay=0.001", slots=3
    )
    engine = open_engine(config)
    draft = open_draft(config, engine)
    assert draft is not None
    assert draft.n_seq_max == 3
    assert open_draft(replace(config, draft_model=""), engine) is None


# ---- off when it does not pay


class Timed(Counting):
    """On a clock of its own: a step takes `step_s`, and `token_s` for every token."""

    def __init__(self, step_s: float, token_s: float) -> None:
        super().__init__()
        self.now, self._step_s, self._token_s = 0.0, step_s, token_s

    def step(self, chunks: Sequence[Chunk]) -> dict[int, Logits]:
        self.now += self._step_s + self._token_s * sum(len(c.token_ids) for c in chunks)
        return super().step(chunks)

    @property
    def drafted(self) -> int:
        return sum(c.n_logits - 1 for step in self.steps for c in step if c.n_logits)


Costs = tuple[float, float]  # of a step, of a token


def decode_s(
    loop_on: MakeLoop,
    patch: pytest.MonkeyPatch,
    kind: Kind,
    costs: Costs,
    agents: int,
) -> tuple[float, int]:
    """(seconds of the engine's clock, tokens drafted) for replies that repeat themselves a lot."""
    engine = Timed(*costs)
    patch.setattr("actors.stepper.time", SimpleNamespace(perf_counter=lambda: engine.now))
    loop = loop_on(engine, f"{kind}{costs}{agents}", kind, fair=True, k=8)
    guide = Guide("regex", "([a-c]{2} la lo ){200}", "x")  # lookup is right more often than not
    streams = [
        start(loop, ASKED, session=f"s{i}", turn_id=f"t{i}", n=400, guide=guide, temperature=1.0,
              seed=i) for i in range(agents)
    ]  # fmt: skip
    for stream in streams:
        stream.result()
    loop.close()
    return engine.now, engine.drafted


@pytest.mark.slow  # not beside others: what it holds depends on how the agents arrive
@pytest.mark.parametrize("agents", [1, 4])
def test_it_switches_itself_off_where_verifying_costs_what_decoding_does(
    loop_on: MakeLoop, monkeypatch: pytest.MonkeyPatch, agents: int
) -> None:
    plain, _ = decode_s(loop_on, monkeypatch, "off", (0.0, 0.001), agents)
    seconds, drafted = decode_s(loop_on, monkeypatch, "ngram", (0.0, 0.001), agents)
    assert 0 < drafted < 120  # trials
    assert seconds < 1.05 * plain


@pytest.mark.slow  # not beside others: what it holds depends on how the agents arrive
@pytest.mark.parametrize("agents", [1, 4])
def test_it_switches_itself_on_where_verifying_costs_little(
    loop_on: MakeLoop, monkeypatch: pytest.MonkeyPatch, agents: int
) -> None:
    plain, _ = decode_s(loop_on, monkeypatch, "off", (0.01, 0.0001), agents)
    seconds, drafted = decode_s(loop_on, monkeypatch, "ngram", (0.01, 0.0001), agents)
    assert drafted > 200
    assert seconds < 0.75 * plain


# ---- models


def _noises(size: int) -> Iterator[np.ndarray]:
    """Small changes of logits: of each for itself, and of many together, which move a draw."""
    rng = np.random.default_rng(1)
    for _ in range(100):
        yield rng.uniform(-0.05, 0.05, size).astype(np.float32)
        walk = rng.standard_normal(size).cumsum()
        yield (0.05 * walk / np.abs(walk).max()).astype(np.float32)


def same(engine: Engine, params: SamplingParams, a: Answer, b: Answer) -> int:
    """Asserts equal replies, or that they part where a difference of the logits under 0.05, each
    up or down, parts them; how many parted (0 or 1)."""
    parted = next((i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y), None)
    if parted is None:
        assert a.ids == b.ids
        return 0
    ids, reply = [*a.prompt, *a.ids[:parted]], a.ids[:parted]
    for at in range(0, len(ids), 512):
        logits = engine.step([Chunk(0, ids[at : at + 512], at, 1)])[0][-1].copy()
    engine.truncate(0, 0)
    guide = params.guide
    grammar = GrammarCompiler(engine.vocab).compile(guide, reply) if guide else None
    sampler = Sampler(params, engine.vocab, a.prompt, reply, grammar)
    drawn = {sampler.draw(logits + noise, len(ids)) for noise in _noises(len(logits))}
    assert {a.ids[parted], b.ids[parted]} <= drawn, f"parted at {parted}, not near a tie"
    return 1


def opened(path: Path, n_threads: int = 1, n_ctx: int = 1024) -> Engine:
    from actors.engines.llama_engine import LlamaEngine

    return LlamaEngine(path, n_seq_max=3, n_ctx=n_ctx, n_cells=3 * n_ctx, n_threads=n_threads)


TALES = ["the boat, the net, the boat, the net, " * 8, "One two three. One two three. " * 9]
TINY_CASES = [
    {},
    {"temperature": 0.7, "seed": 2, "top_k": 8},
    {"guide": Guide("regex", "(a b c ){90}", "x")},
]


def replies(loop: ReplicaLoop, n: int) -> list[Answer]:
    streams = [
        start(loop, [user(text)], session=f"s{i}{j}", turn_id=f"t{i}{j}", n=n, **case)
        for (i, text), (j, case) in itertools.product(enumerate(TALES), enumerate(TINY_CASES))
    ]
    return [stream.result() for stream in streams]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "gemma3", "deepseek2"])
@pytest.mark.parametrize("kind", ["ngram", "draft"])
def test_tiny_models_reply_the_same(
    tiny_models: dict[str, Path], loop_on: MakeLoop, model: str, kind: str
) -> None:
    """gemma3: six of seven layers slide over 64 tokens."""
    expected = replies(loop_on(opened(tiny_models[model]), "plain"), 120)
    path = tiny_models[model]
    loop = loop_on(opened(path), "drafted", "ngram", opened(path) if kind == "draft" else None)
    found = replies(loop, 120)
    served = loop.served
    settle(loop)
    evict(loop)
    assert not any(loop.engine.n_rows(i) for i in range(3))
    assert loop.residency.cells_used == 0
    assert loop.cells.preemptions == 0
    loop.close()
    reference = opened(path)
    cases = [SamplingParams(**({"temperature": 0.0} | case)) for case in TINY_CASES * len(TALES)]
    parted = sum(map(same, itertools.repeat(reference), cases, expected, found))
    reference.close()
    drafted, accepted = served["draft_tokens"], served["draft_tokens_accepted"]
    print(f"{model}, {kind}: {parted} of {len(found)} parted; {accepted} of {drafted} accepted")
    assert accepted > 100
    assert kind == "ngram" or drafted > 2 * accepted  # sampled replies refuse many


def test_a_model_with_a_multi_token_prediction_head_runs_without_it(
    tiny_models: dict[str, Path], loop_on: MakeLoop, caplog: pytest.LogCaptureFixture
) -> None:
    engine, plain = opened(tiny_models["mtp"]), opened(tiny_models["deepseek2"])
    said = [r.getMessage() for r in caplog.records if r.name == "actors.engines.llama_spec"]
    path = tiny_models["mtp"]
    assert said == [f"{path}: its 1 multi-token-prediction layers are not used"]
    assert engine.key.spec == plain.key.spec  # the head has no rows in the cache
    ids = list(range(5, 60))
    engine.step([Chunk(0, ids, 0, 0)])
    rows = engine.export(0, 0, 55)
    engine.truncate(0, 0)
    engine.load(0, 0, rows)
    loop = loop_on(engine)
    assert len(run(loop, ASKED, n=12, ignore_eos=True).ids) == 12
    plain.close()


@pytest.mark.model
def test_smollm2_replies_the_same_in_fewer_steps(smollm2_gguf: Path, loop_on: MakeLoop) -> None:
    asked = (
        "Repeat this exactly: The boat left the harbour at noon, and the boat came back at night, "
        "and the nets were full of herring.",
        "Write a Python function that adds two numbers, and then the same function with comments.",
    )
    answers: list[list[Answer]] = []
    steps = []
    for kind in ("off", "ngram"):
        loop = loop_on(opened(smollm2_gguf, 2), kind, kind)
        answers.append([run(loop, [user(x)], session=f"s{i}", n=60) for i, x in enumerate(asked)])
        steps.append(loop.overhead.steps)
        served = loop.served
        loop.close()
    engine = opened(smollm2_gguf, 2)
    parted = [
        same(engine, SamplingParams(temperature=0.0), a, b) for a, b in zip(*answers, strict=True)
    ]
    engine.close()
    print(f"{sum(parted)} of 2 parted; {steps[0]} steps, {steps[1]} with drafts; {served}")
    assert steps[1] < 0.75 * steps[0]
