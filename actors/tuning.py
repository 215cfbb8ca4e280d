"""Which engine options are fastest here: a search, one option after another. Pure.

`search` knows neither engine nor clock: it is given a function that measures options (actors.timing
measures an engine). Options are compared by one figure, the seconds of a typical turn: so many
prompt tokens behind a context, half of the reply alone, half beside the other slots' replies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from actors.engines.options import EngineOptions
from actors.errors import EngineFault, ModelUnavailable

PROMPT, REPLY = 256, 128  # tokens of a typical turn
# How much faster another value must be: more than noise, and for cells that lose, worth the loss.
_MARGIN, _KV_MARGIN = 0.03, 0.10

Measure = Callable[[EngineOptions], "Figures"]


@dataclass(frozen=True)
class Figures:
    """Measured behind a context of moderate length."""

    prefill_tokens_per_s: float
    decode_s: float  # a step of one sequence
    batch_s: float  # a step of all slots

    @property
    def turn_s(self) -> float:
        """Of a typical turn; smaller is better."""
        return PROMPT / self.prefill_tokens_per_s + REPLY / 2 * (self.decode_s + self.batch_s)

    def better(self, other: Figures) -> Figures:
        """The better of every figure: what else the machine does only makes them worse."""
        return Figures(
            max(self.prefill_tokens_per_s, other.prefill_tokens_per_s),
            min(self.decode_s, other.decode_s),
            min(self.batch_s, other.batch_s),
        )


@dataclass(frozen=True)
class Trial:
    options: EngineOptions
    figures: Figures | None  # None: not measured, and `note` says why
    note: str = ""


@dataclass(frozen=True)
class Profile:
    options: EngineOptions
    figures: Figures
    trials: tuple[Trial, ...]
    why: str
    seconds: float = 0.0  # that measuring took


@dataclass(frozen=True)
class Choices:
    """Values to try, the ones to start from first; a setting that the user has made has one."""

    threads: tuple[int, ...]
    flash_attention: tuple[bool, ...] = (True, False)
    kv_type: tuple[str, ...] = ("f16", "q8_0")
    ubatch: tuple[int, ...] = (512, 128)

    @property
    def start(self) -> EngineOptions:
        return EngineOptions(**{f.name: getattr(self, f.name)[0] for f in fields(EngineOptions)})


def thread_choices(share: int, physical: int) -> tuple[int, ...]:
    """The share of the machine, its physical cores, and half of the share."""
    return tuple(dict.fromkeys((share, min(share, physical), max(1, share // 2))))


def search(
    choices: Choices, measure: Measure, deadline_s: float, clock: Callable[[], float]
) -> Profile:
    """The best options found, and all that was tried. Starts from the first values and changes one
    option at a time; begins no measurement that would end after the deadline, but for the first.
    What `measure` refuses is left out. Raises what it raises for the start.
    """
    trials = _Trials(measure, clock, clock() + deadline_s)
    start = best = choices.start
    found = {start: trials.run(start)}
    for name in ("flash_attention", "threads", "kv_type", "ubatch"):
        base, margin = best, _KV_MARGIN if name == "kv_type" else _MARGIN
        for value in getattr(choices, name):
            options = base.changed(name, value)
            if options in found or not _allowed(options):
                continue
            figures = trials.attempt(options)
            if figures is None:
                continue
            found[options] = figures
            if figures.turn_s < (1 - margin) * found[best].turn_s:
                best = options
    if best != start and not _confirmed(best, start, found, trials):
        trials.note(best, "did not win again")
        best = start
    return Profile(best, found[best], tuple(trials.done), _why(best, start, found))


def _allowed(options: EngineOptions) -> bool:
    try:
        options.check()
    except ValueError:
        return False
    return True


def _confirmed(
    best: EngineOptions,
    start: EngineOptions,
    found: dict[EngineOptions, Figures],
    trials: _Trials,
) -> bool:
    """Measure both once more, if there is time: many tries find lucky ones."""
    for options in (start, best):
        again = trials.again(options)
        if again is not None:
            found[options] = found[options].better(again)
    return found[best].turn_s < (1 - _MARGIN) * found[start].turn_s


def _why(best: EngineOptions, start: EngineOptions, found: dict[EngineOptions, Figures]) -> str:
    if best == start:
        return "nothing tried was clearly faster than the default"
    gain = 1 - found[best].turn_s / found[start].turn_s
    return f"a typical turn takes {100 * gain:.0f} % less than with the default ({start})"


class _Trials:
    def __init__(self, measure: Measure, clock: Callable[[], float], until: float) -> None:
        self._measure, self._clock, self._until = measure, clock, until
        self._longest = 0.0  # seconds of a measurement
        self.done: list[Trial] = []

    def run(self, options: EngineOptions) -> Figures:
        began = self._clock()
        figures = self._measure(options)
        self._longest = max(self._longest, self._clock() - began)
        self.done.append(Trial(options, figures))
        return figures

    def attempt(self, options: EngineOptions) -> Figures | None:
        if self._late():
            self.done.append(Trial(options, None, "no time left"))
            return None
        try:
            return self.run(options)
        except (ModelUnavailable, EngineFault) as error:
            self.done.append(Trial(options, None, str(error)))
            return None

    def again(self, options: EngineOptions) -> Figures | None:
        """Replaces the figures of a trial by the better ones of both runs."""
        if self._late():
            return None
        at = self._index(options)
        before = self.done[at].figures
        try:
            figures = self.run(options)
        except (ModelUnavailable, EngineFault) as error:
            self.note(options, str(error))
            return None
        self.done.pop()
        self.done[at] = Trial(options, figures.better(before) if before else figures)
        return figures

    def note(self, options: EngineOptions, note: str) -> None:
        at = self._index(options)
        self.done[at] = replace(self.done[at], note=note)

    def _index(self, options: EngineOptions) -> int:
        return next(i for i, trial in enumerate(self.done) if trial.options == options)

    def _late(self) -> bool:
        return self._clock() + self._longest > self._until


def from_json(raw: Any) -> Profile:
    """Inverse of dataclasses.asdict. Raises ValueError, TypeError, KeyError for anything else."""
    trials = tuple(
        Trial(_options(t["options"]), _figures(t["figures"]) if t["figures"] else None, t["note"])
        for t in raw["trials"]
    )
    figures, seconds = _figures(raw["figures"]), float(raw["seconds"])
    return Profile(_options(raw["options"]), figures, trials, str(raw["why"]), seconds)


def _options(raw: Any) -> EngineOptions:
    options = EngineOptions(**raw)
    kinds = {"threads": int, "flash_attention": bool, "kv_type": str, "ubatch": int}
    if any(type(getattr(options, name)) is not kind for name, kind in kinds.items()):
        raise ValueError(f"options {raw}")
    options.check()
    return options


def _figures(raw: Any) -> Figures:
    figures = Figures(**{name: float(value) for name, value in raw.items()})
    if not all(0 < getattr(figures, f.name) < 1e9 for f in fields(Figures)):
        raise ValueError(f"figures {raw}")
    return figures
