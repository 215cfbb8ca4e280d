"""Which sequences step, with how many tokens: chunks, budgets, pauses, a bounded queue."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engines.fake_engine import FakeVocab
from actors.errors import Overloaded
from actors.scheduler import Scheduler, SchedulerConfig
from actors.sequence import Sequence, TextStream
from actors.turn import SamplingParams


def sequence(missing: int, rows: int = 0, *, paused: bool = False) -> Sequence:
    text = TextStream(FakeVocab(), ())
    tokens = [65] * (rows + missing)
    return Sequence("t", tokens, len(tokens), SamplingParams(), 9, text, 0, rows, paused)


def scheduler(*running: Sequence, **config: int) -> Scheduler[str]:
    made: Scheduler[str] = Scheduler(SchedulerConfig(**config))
    made.running.extend(running)
    return made


def tokens_of(made: Scheduler[str]) -> list[tuple[int, int]]:
    """(index in running, tokens) of the next step."""
    steps = made.schedule()
    return [(next(i for i, s in enumerate(made.running) if s is x.sequence), x.n_tokens)
            for x in steps]  # fmt: skip


def test_nothing_runs_nothing_is_scheduled() -> None:
    assert scheduler().schedule() == []
    assert scheduler(sequence(5, paused=True), sequence(1, 8, paused=True)).schedule() == []


def test_a_lone_prefill_gets_the_whole_chunk() -> None:
    assert tokens_of(scheduler(sequence(1000), prefill_chunk=512)) == [(0, 512)]
    assert tokens_of(scheduler(sequence(300), prefill_chunk=512)) == [(0, 300)]


def test_prefill_beside_decodes_gets_the_small_chunk_and_every_decode_runs() -> None:
    made = scheduler(sequence(1000), sequence(1, 7), sequence(1, 90), prefill_chunk_busy=128)
    assert sorted(tokens_of(made)) == [(0, 128), (1, 1), (2, 1)]


def test_the_oldest_prefill_comes_first_and_the_rest_of_the_budget_goes_on() -> None:
    made = scheduler(sequence(300), sequence(400), sequence(50), prefill_chunk=512)
    assert tokens_of(made) == [(0, 300), (1, 212)]


def test_a_paused_decode_does_not_shrink_the_chunk() -> None:
    made = scheduler(sequence(600), sequence(1, 7, paused=True))
    assert tokens_of(made) == [(0, 512)]


def test_the_last_prompt_token_alone_is_a_decode() -> None:
    assert tokens_of(scheduler(sequence(1, 0))) == [(0, 1)]


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    made = scheduler(max_waiting=2)
    made.check_room()
    made.waiting.append("one")
    made.check_room()
    with pytest.raises(Overloaded):
        made.check_room(arriving=1)
    made.waiting.append("two")
    with pytest.raises(Overloaded) as caught:
        made.check_room()
    assert caught.value.retry_after > 0


@given(
    st.lists(st.tuples(st.integers(1, 900), st.integers(0, 50), st.booleans()), max_size=8),
    st.integers(1, 512),
    st.integers(1, 512),
)
def test_every_step_keeps_the_budget_and_moves_everybody_forward(
    drawn: list[tuple[int, int, bool]], chunk: int, busy: int
) -> None:
    running = [sequence(missing, rows, paused=paused) for missing, rows, paused in drawn]
    made = scheduler(*running, prefill_chunk=chunk, prefill_chunk_busy=busy)
    steps = made.schedule()
    assert len({id(s.sequence) for s in steps}) == len(steps)
    assert all(not s.sequence.paused for s in steps)
    assert all(1 <= s.n_tokens <= len(s.sequence.tokens) - s.sequence.n_rows for s in steps)
    active = [s for s in running if not s.paused]
    decodes = [s for s in active if not s.is_prefill]
    scheduled = {id(s.sequence): s.n_tokens for s in steps}
    assert all(scheduled[id(s)] == 1 for s in decodes)
    prefilled = sum(s.n_tokens for s in steps if s.sequence.is_prefill)
    wanted = sum(len(s.tokens) - s.n_rows for s in active if s.is_prefill)
    assert prefilled == min(wanted, busy if decodes else chunk)
