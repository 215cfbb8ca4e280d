"""Long texts that no two agents share: what the demo and the benchmarks fill contexts with.

Made of simple English sentences by a seeded generator, so that a run can be repeated and nothing is
downloaded. Knows no tokenizer: a length in tokens is an estimate from the number of words.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_TOKENS_PER_WORD = 1.13  # measured with SmolLM2's tokenizer, punctuation included


@dataclass(frozen=True)
class Trade:
    """Whose notes these are, and what they are about."""

    name: str
    people: tuple[str, ...]
    things: tuple[str, ...]
    places: tuple[str, ...]


TRADES = (
    Trade(
        "keeper",
        ("the keeper", "the pilot", "a fisherman", "the harbour master", "my sister", "a diver"),
        ("the lamp", "the log book", "a coil of rope", "the fog bell", "an oil can", "a chart"),
        ("on the gallery", "below the stairs", "at the landing", "on the reef", "in the boat"),
    ),
    Trade(
        "botanist",
        ("the botanist", "our guide", "a student", "the gardener", "a shepherd", "the painter"),
        ("a white orchid", "the old cedar", "a bed of moss", "a seed box", "the press", "a rose"),
        ("by the stream", "in the glass house", "on the north slope", "under the oaks", "at camp"),
    ),
    Trade(
        "clerk",
        ("the clerk", "the mayor", "a widow", "the miller", "a teacher", "a surveyor"),
        ("the bridge toll", "a boundary stone", "the old well", "a letter", "the mill", "a deed"),
        ("in the council room", "at the market", "on the east road", "in the cellar"),
    ),
    Trade(
        "engineer",
        ("the engineer", "a fitter", "the foreman", "the night shift", "a porter", "the driver"),
        ("the main valve", "a pressure gauge", "the spare boiler", "a cracked gear", "a belt"),
        ("in the engine shed", "on the test track", "at the furnace", "in the pit", "at the depot"),
    ),
)  # fmt: skip
_DAYS = ("On Monday", "In the morning", "After the storm", "Before supper", "That night",
         "A week later", "On the first of May", "At noon", "Late in the autumn")  # fmt: skip
_DEEDS = ("found", "repaired", "argued about", "measured", "carried", "forgot", "painted", "sold",
          "described", "looked for", "cleaned", "asked about")  # fmt: skip
_ENDS = ("because nobody else would", "and wrote it down with care", "which surprised us all",
         "although the light was poor", "as it had been agreed", "and did not say why",
         "while the others waited", "for the second time this year")  # fmt: skip


def context(seed: int, n_tokens: int) -> str:
    """Notes of about n_tokens tokens; another seed gives another text of another person."""
    trade, draw = TRADES[seed % len(TRADES)], random.Random(seed)
    sentences: list[str] = []
    n_words = 0
    while n_words * _TOKENS_PER_WORD < n_tokens:
        sentence = (
            f"{draw.choice(_DAYS)} {draw.choice(trade.people)} {draw.choice(_DEEDS)} "
            f"{draw.choice(trade.things)} {draw.choice(trade.places)}, {draw.choice(_ENDS)}."
        )
        sentences.append(sentence)
        n_words += len(sentence.split())
    return " ".join(sentences)
