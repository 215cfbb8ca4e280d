"""Which sequences step, with how many tokens: chunks, budgets, pauses, a bounded queue."""

import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engines.fake_engine import FakeVocab
from actors.errors import Overloaded
from actors.rates import Pace, Rates
from actors.scheduler import Scheduler, SchedulerConfig, Waiting
from actors.sequence import Sequence, TextStream
from actors.turn import SamplingParams


def sequence(missing: int, rows: int = 0, *, paused: bool = False) -> Sequence:
    text = TextStream(FakeVocab(), ())
    tokens = [65] * (rows + missing)
    return Sequence("t", tokens, len(tokens), SamplingParams(), 9, text, 0, rows, paused)


@dataclass(eq=False)
class Asker:
    """A turn in the queue."""

    asks_for: str
    priority: int = 0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def scheduler(*running: Sequence, **config: int) -> Scheduler[Asker]:
    made: Scheduler[Asker] = Scheduler(SchedulerConfig(**config))
    made.running.extend(running)
    return made


def tokens_of(made: Scheduler[Asker]) -> list[tuple[int, int]]:
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


def test_the_oldest_prefill_has_half_the_budget_and_short_ones_the_rest() -> None:
    made = scheduler(sequence(900), sequence(400), sequence(50), prefill_chunk=512)
    assert tokens_of(made) == [(0, 256), (1, 206), (2, 50)]


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    made = scheduler(sequence(100_000), sequence(1, 5), sequence(60), prefill_chunk_busy=128)
    assert (2, 60) in tokens_of(made)


def test_equal_prompts_come_one_after_another() -> None:
    made = scheduler(sequence(1000), sequence(1000), prefill_chunk=512)
    assert tokens_of(made) == [(0, 512)]


def test_what_one_prefill_leaves_goes_to_the_next() -> None:
    assert tokens_of(scheduler(sequence(300), sequence(400), prefill_chunk=512)) == [
        (0, 300),
        (1, 212),
    ]


def test_those_without_cells_sit_out() -> None:
    decode, prefill = sequence(1, 7), sequence(100)
    made = scheduler(decode, prefill)
    assert [s.sequence for s in made.schedule(without=[decode])] == [prefill]
    assert [s.sequence for s in made.schedule(without=[prefill])] == [decode]


def test_prefill_goes_by_priority() -> None:
    made = scheduler(prefill_chunk=100)
    low, high = sequence(200), sequence(300)
    high.priority = 1
    made.start(low)
    made.start(high)
    assert [(s.sequence, s.n_tokens) for s in made.schedule()] == [(high, 100)]


def test_a_paused_decode_does_not_shrink_the_chunk() -> None:
    made = scheduler(sequence(600), sequence(1, 7, paused=True))
    assert tokens_of(made) == [(0, 512)]


def test_the_last_prompt_token_alone_is_a_decode() -> None:
    assert tokens_of(scheduler(sequence(1, 0))) == [(0, 1)]


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    made = scheduler(max_waiting=2)
    made.check_room()
    made.waiting.append(Asker("a"))
    made.check_room()
    with pytest.raises(Overloaded):
        made.check_room(arriving=1)
    made.waiting.append(Asker("a"))
    with pytest.raises(Overloaded) as caught:
        made.check_room()
    assert caught.value.retry_after == 2.0  # no turn was measured yet


@pytest.mark.parametrize(("turn_s", "expected"), [(0.01, 1.0), (7.5, 7.5), (900.0, 60.0)])
def test_a_full_queue_says_to_come_back_after_what_a_turn_takes(
    turn_s: float, expected: float
) -> None:
    rates = Rates()
    made: Scheduler[Asker] = Scheduler(SchedulerConfig(max_waiting=0), rates)
    rates.turn(turn_s)
    with pytest.raises(Overloaded) as caught:
        made.check_room()
    assert caught.value.retry_after == expected


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


# ---- the queue


def queue_of(*askers: Asker, clock: Clock | None = None) -> Waiting[Asker]:
    made: Waiting[Asker] = Waiting(clock or Clock())
    for asker in askers:
        made.append(asker)
    return made


def served(queue: Waiting[Asker], n: int) -> list[Asker]:
    """Who is placed, one after another."""
    placed = []
    for _ in range(n):
        turn = queue.order()[0]
        queue.place(turn)
        placed.append(turn)
    return placed


def test_an_agent_with_many_turns_lets_the_others_go_between() -> None:
    crowd = [Asker("crowd") for _ in range(50)]
    others = [Asker("b"), Asker("c")]
    queue = queue_of(*crowd, *others)
    assert served(queue, 5) == [crowd[0], *others, crowd[1], crowd[2]]
    queue = queue_of(*crowd, *(Asker(x) for x in "bcbcbc"))
    assert Counter(t.asks_for for t in served(queue, 9)) == {"crowd": 3, "b": 3, "c": 3}


def test_turns_of_one_agent_keep_their_order() -> None:
    askers = [Asker("a", priority) for priority in (0, 5, 1)]
    assert served(queue_of(*askers), 3) == askers


def test_higher_priorities_go_first() -> None:
    askers = [Asker("a", 0), Asker("b", 2), Asker("c", 1), Asker("d", 2)]
    assert [t.asks_for for t in queue_of(*askers).order()] == ["b", "d", "c", "a"]


def test_a_low_priority_is_served_although_higher_ones_never_end() -> None:
    clock = Clock()
    queue = queue_of(low := Asker("low"), clock=clock)
    for number in range(200):
        queue.append(Asker(f"high{number}", 3))
        clock.now += 1.0
        if served(queue, 1) == [low]:
            break
    assert number < 40


def test_aging_does_not_turn_a_backlog_into_a_priority() -> None:
    clock = Clock()
    crowd = [Asker("crowd") for _ in range(20)]
    queue = queue_of(*crowd, clock=clock)
    clock.now = 100.0
    served(queue, 1)
    queue.append(other := Asker("other"))
    assert served(queue, 2) == [crowd[1], other]


def test_one_that_had_to_leave_is_the_first_of_its_priority() -> None:
    queue = queue_of(a := Asker("a"), Asker("b"), high := Asker("c", 1))
    queue.place(a)
    queue.append(Asker("a"))
    queue.put_back(a)
    assert queue.order()[:2] == [high, a]


def test_one_that_does_not_fit_is_overtaken_a_few_times_only() -> None:
    queue = queue_of(big := Asker("big"))
    for number in range(100):
        if queue.holds_back(big):
            break
        queue.append(small := Asker(f"s{number}"))
        queue.place(small, [big])
    assert 1 < number < 20
    assert queue.order() == [big]


def test_nobody_starves_in_a_random_queue() -> None:
    rng, clock = random.Random(3), Clock()
    queue: Waiting[Asker] = Waiting(clock)
    arrived: dict[Asker, float] = {}
    longest = 0.0
    for _ in range(3000):
        clock.now += 1.0
        if len(queue) < 12:
            turn = Asker(rng.choice("aaaaabcd"), rng.choice([0, 0, 3]))
            queue.append(turn)
            arrived[turn] = clock.now
        turn = served(queue, 1)[0] if rng.random() < 0.97 else queue.order()[-1]
        if turn in queue:
            queue.remove(turn)
        longest = max(longest, clock.now - arrived.pop(turn))
    assert not set(arrived) - set(queue)
    assert longest < 100


# ---- how much prefill beside decodes


def settled(token_s: float, decode_s: float, **options: float) -> tuple[Pace, int]:
    """A pace that has seen steps of an engine with these speeds, and the largest step after the
    first."""
    pace = Pace(options.get("bound", 0.1), 128, 512)
    pace.measure(0, 4, decode_s)
    largest = 0
    for number in range(100):
        chunk = pace.chunk()
        pace.measure(chunk, 4, decode_s + token_s * chunk)
        largest = max(largest, chunk if number else 0)
    return pace, largest


@pytest.mark.parametrize(("token_s", "expected"), [(1e-3, 80), (1e-4, 512), (4e-4, 200)])
def test_the_chunk_fills_the_bound(token_s: float, expected: int) -> None:
    pace, largest = settled(token_s, 0.02)
    assert expected - 2 <= pace.chunk() <= largest <= expected


def test_the_chunk_starts_as_configured_and_stays_so_without_a_bound() -> None:
    assert Pace(0.1, 128, 512).chunk() == 128
    pace, _ = settled(1e-3, 0.02, bound=0.0)
    assert pace.chunk() == 128


def test_a_prefill_goes_on_where_decoding_alone_takes_the_bound() -> None:
    pace, _ = settled(1e-3, 0.5)
    assert pace.chunk() == 16


def test_a_slower_engine_is_believed_at_once_a_faster_one_slowly() -> None:
    pace, _ = settled(1e-3, 0.02)
    before = pace.chunk()
    pace.measure(before, 4, 0.02 + 4e-3 * before)
    slower = pace.chunk()
    assert slower < before / 2
    pace.measure(slower, 4, 0.02 + 1e-3 * slower)
    assert pace.chunk() < before * 0.6


def tiling(short_s: float, tiled_s: float, steps: int = 400) -> list[int]:
    """The chunks beside four decodes, of an engine that computes 64 tokens and more in another
    way."""
    pace, chunks = Pace(0.25, 128, 512, tile=64), []
    pace.measure(0, 4, 0.02)
    for _ in range(steps):
        chunks.append(pace.chunk(4))
        cost = tiled_s if chunks[-1] + 4 >= 64 else short_s
        pace.measure(chunks[-1], 4, 0.02 + cost * chunks[-1])
    return chunks


def test_a_chunk_stays_short_of_the_tile_where_that_is_faster() -> None:
    """Eight agents of 128 tokens: their neighbours' cells cost a tile, and are passed over else."""
    chunks = tiling(short_s=3.2e-3, tiled_s=3.4e-3)
    assert sum(chunk == 59 for chunk in chunks) > len(chunks) * 0.8
    assert max(chunks[1:]) <= 0.23 / 3.4e-3 / 0.75  # a trial


def test_a_chunk_fills_the_tile_where_that_is_faster() -> None:
    """A deep prompt."""
    chunks = tiling(short_s=7e-3, tiled_s=3.3e-3)
    assert sum(chunk == int(0.23 / 3.3e-3) for chunk in chunks) > len(chunks) * 0.8


def test_a_tile_that_does_not_fit_into_the_bound_is_not_tried() -> None:
    assert set(tiling(short_s=7e-3, tiled_s=7e-3)[2:]) == {32}


def test_many_decodes_leave_a_prefill_its_least() -> None:
    pace = Pace(0.25, 128, 512, tile=64)
    pace.measure(0, 60, 0.2)
    pace.measure(16, 60, 0.3)
    assert pace.chunk(60) == 16
