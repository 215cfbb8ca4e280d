"""TurnLog: one stream over several attempts, in which nothing is doubled and nothing is missing."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from actors.turn import Resume, SamplingParams, Tokens, TurnFinished, TurnRequest, TurnStarted
from cluster.failover import TurnLog
from storage.card import AgentId

REQUEST = TurnRequest(
    "turn", AgentId("t", "s"), ({"role": "user", "content": "x"},), SamplingParams()
)
PROMPT = (5, 6, 7)


def started(attempt: int, prompt: tuple[int, ...] = PROMPT) -> TurnStarted:
    return TurnStarted(attempt, prompt, 0, "cold", "n1")


def running() -> TurnLog:
    """A first attempt that has emitted 1, 2, 3."""
    log = TurnLog(REQUEST)
    log.next_request()
    assert log.accept_start(started(1))
    assert log.accept(Tokens(1, 0, (1, 2), "ab"))
    assert log.accept(Tokens(1, 2, (3,), "c"))
    return log


def test_the_first_attempt_resumes_nothing() -> None:
    request = TurnLog(REQUEST).next_request()
    assert (request.attempt, request.resume) == (1, None)
    assert (request.id, request.messages) == (REQUEST.id, REQUEST.messages)


def test_ids_are_logged_in_order() -> None:
    assert running().ids == [1, 2, 3]


def test_what_a_later_attempt_prefills_is_counted() -> None:
    log = running()
    assert log.again_tokens == 0, "the first one prefills nothing again"
    log.next_request()
    assert not log.accept_start(replace(started(2), rows=2))
    assert log.again_tokens == len(PROMPT) + 3 - 2
    assert not log.accept_start(replace(started(1), rows=0)), "given up: it counts for nothing"
    assert log.again_tokens == 4
    log.next_request()
    assert not log.accept_start(replace(started(3), rows=6))
    assert log.again_tokens == 4


def test_a_gap_is_refused() -> None:
    log = running()
    assert not log.accept(Tokens(1, 4, (5,), "e"))
    assert log.ids == [1, 2, 3]


def test_a_duplicate_is_refused_even_where_it_overlaps() -> None:
    log = running()
    assert not log.accept(Tokens(1, 2, (3,), "c"))
    assert not log.accept(Tokens(1, 2, (3, 4), "cd"))
    assert log.ids == [1, 2, 3]


def test_another_attempt_is_refused() -> None:
    log = running()
    log.next_request()
    assert not log.accept(Tokens(1, 3, (4,), "d"))  # given up too early
    assert not log.accept(TurnFinished(1, 3, "", "stop"))
    assert not log.accept(Tokens(3, 3, (4,), "d"))
    assert log.ids == [1, 2, 3]
    assert log.accept(Tokens(2, 3, (4,), "d"))


def test_an_end_is_accepted_where_the_ids_end() -> None:
    log = running()
    assert not log.accept(TurnFinished(1, 2, "", "stop"))
    assert not log.accept(TurnFinished(1, 4, "", "stop"))
    assert log.accept(TurnFinished(1, 3, "", "stop"))
    assert log.ids == [1, 2, 3]


def test_a_new_attempt_carries_prompt_and_emitted_ids() -> None:
    log = running()
    request = log.next_request()
    assert (request.attempt, request.resume) == (2, Resume(PROMPT, (1, 2, 3)))
    log.accept(Tokens(2, 3, (4,), "d"))
    assert request.resume == Resume(PROMPT, (1, 2, 3))  # what was sent stays as it was sent
    assert log.next_request().resume == Resume(PROMPT, (1, 2, 3, 4))


def test_an_attempt_lost_before_its_start_leaves_nothing_to_resume() -> None:
    log = TurnLog(REQUEST)
    log.next_request()
    request = log.next_request()
    assert (request.attempt, request.resume) == (2, None)
    assert not log.accept_start(started(1))  # of the attempt given up
    assert log.started is None
    assert log.accept_start(started(2))


def test_a_turn_starts_once() -> None:
    log = running()
    log.next_request()
    assert not log.accept_start(started(2, (9,)))
    assert not log.accept_start(started(1, (9,)))
    assert log.started == started(1)
    assert log.next_request().resume == Resume(PROMPT, (1, 2, 3))


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 12), st.integers(0, 4)), max_size=60))
def test_whatever_arrives_the_log_is_a_prefix_of_the_reply(
    items: list[tuple[int, int, int]],
) -> None:
    """Every attempt emits the same reply; items are lost, doubled, late and out of order."""
    reply = tuple(range(100, 116))
    log = TurnLog(REQUEST)
    log.next_request()
    log.accept_start(started(1))
    for attempt, index, n in items:
        if attempt > log.attempt:
            assert log.next_request().resume == Resume(PROMPT, tuple(log.ids))
        before = list(log.ids)
        taken = log.accept(Tokens(attempt, index, reply[index : index + n], ""))
        assert taken == (attempt == log.attempt and index == len(before))
        assert tuple(log.ids) == reply[: len(log.ids)]
        assert len(log.ids) == len(before) + (len(reply[index : index + n]) if taken else 0)
