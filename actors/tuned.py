"""Profile "auto": an engine on the options that were measured to be the fastest on this machine.

The result is kept (actors.profiles) and measured once per model, machine and settings. What the
user has set is not tried otherwise. Cells of a type that loses more than q8_0 are chosen only where
nothing better fits into `kv_budget`. Called by actors.models.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from actors import profiles
from actors.config import ReplicaConfig
from actors.engines.base import Engine
from actors.engines.llama_threads import Threads
from actors.engines.options import EngineOptions
from actors.errors import EngineFault, ModelUnavailable
from actors.timing import largest, measure, noise, plan
from actors.tuning import Choices, Figures, Profile, Trial, search, thread_choices

logger = logging.getLogger(__name__)
_DEADLINE_S, _MAX_DEADLINE_S = 8.0, 60.0  # of a search, by the size of the weights
_WEIGHTS_BYTES = 500e6  # what the first is enough for
_TRIALS = 12  # that should fit before the deadline
_AUTO_KV = ("f16", "q8_0", "q4_1")


class Tunable(Engine, Protocol):
    """An engine that can compute in another way with the same weights."""

    threads: Threads  # others after every reopen

    def reopen(self, options: EngineOptions, n_cells: int) -> None: ...

    def planned_bytes(self, options: EngineOptions, n_cells: int) -> int: ...


@dataclass(frozen=True)
class Source:
    """How to open the engine, and what its speed depends on beside the machine."""

    open: Callable[[EngineOptions, int], Tunable]  # options, cells
    defaults: EngineOptions  # with the settings that are made
    n_cells: int
    identity: Mapping[str, Any]  # of weights and engine
    weights_bytes: int


def deadline_s(weights_bytes: float) -> float:
    """Seconds a search may take."""
    return min(_MAX_DEADLINE_S, _DEADLINE_S * max(1.0, weights_bytes / _WEIGHTS_BYTES))


def open_tuned(
    config: ReplicaConfig, source: Source, *, again: bool = False, seconds: float = 0.0
) -> tuple[Tunable, Profile | None]:
    """The engine and its profile: None where the defaults have to do, because another replica was
    still measuring at the deadline, or a few tokens took too long to measure anything. `again`:
    measure, whatever is kept; `seconds`: that a search may take, 0: by the size of the weights.
    Raises ModelUnavailable."""
    folder = Path(config.profile_dir) if config.profile_dir else profiles.default_folder()
    key = key_of(config, source)
    profile = None if again else profiles.load(folder, key)
    if profile is None:
        limit = seconds or deadline_s(source.weights_bytes)
        with profiles.alone(folder, 2 * limit) as granted:
            profile = None if again else profiles.load(folder, key)
            if profile is None and granted:
                return _measured(config, source, folder, limit)
    if profile is None:
        logger.warning("another replica is still measuring: starting with the defaults")
        return _on_defaults(config, source), None
    return source.open(profile.options, source.n_cells), profile


def _on_defaults(config: ReplicaConfig, source: Source) -> Tunable:
    engine = source.open(source.defaults, source.n_cells)
    if config.kv_budget and engine.kv_bytes > config.kv_budget:
        taken = engine.kv_bytes
        engine.close()
        raise ModelUnavailable(f"kv_budget: the cells take {taken} bytes")
    return engine


def key_of(config: ReplicaConfig, source: Source) -> dict[str, Any]:
    return {
        **source.identity,
        **profiles.machine(),
        "share": _share(config, source),
        "slots": config.slots,
        "n_ctx": config.n_ctx,
        "set": [config.threads, config.flash_attention, config.kv_type, config.ubatch],
        "budget": [config.kv_budget, source.n_cells] if config.kv_budget else [],
        "codec": config.codec,
    }


def _share(config: ReplicaConfig, source: Source) -> int:
    return config.cores or source.defaults.threads


def choices_of(config: ReplicaConfig, source: Source) -> Choices:
    """Of what is not set; the defaults first."""
    start, share = source.defaults, _share(config, source)
    threads = thread_choices(share, profiles.physical_cores())
    choices = Choices((start.threads,) if config.threads else threads)
    if config.flash_attention != "auto":
        choices = replace(choices, flash_attention=(start.flash_attention,))
    if config.kv_type != "auto" or not start.flash_attention:
        choices = replace(choices, kv_type=(start.kv_type,))
        if start.kv_type != "f16":
            choices = replace(choices, flash_attention=(True,))
    if config.ubatch:
        choices = replace(choices, ubatch=(config.ubatch,))
    return choices


def _measured(
    config: ReplicaConfig, source: Source, folder: Path, limit: float
) -> tuple[Tunable, Profile | None]:
    most = largest(config.slots, config.n_ctx)
    engine = source.open(source.defaults, most.cells)
    try:
        profile = tune(config, source, engine, limit)
        if profile is None:
            engine.close()
            logger.warning("a few tokens took too long: starting with the defaults, not measured")
            return _on_defaults(config, source), None
        logger.info("%s: measured in %.1f s", profile.options, profile.seconds)
        engine.reopen(profile.options, source.n_cells)
        profiles.save(folder, key_of(config, source), profile)  # not what cannot be opened
    except EngineFault as error:
        engine.close()
        raise ModelUnavailable(f"cannot measure this engine: {error}") from error
    except BaseException:
        engine.close()
        raise
    return engine, profile


def tune(config: ReplicaConfig, source: Source, engine: Tunable, limit: float) -> Profile | None:
    """Search on the open engine, whose options are the defaults; None where a few tokens take too
    long. Raises ModelUnavailable when no cells fit the budget, EngineFault."""
    began = time.monotonic()
    choices, refused = _affordable(config, source, engine)
    share = limit / _TRIALS
    workload = plan(engine, config.slots, config.n_ctx, share)
    if workload is None:
        return None
    # A micro-batch is seen only where it is smaller than what is computed at once.
    smaller = [n for n in choices.ubatch[1:] if n < workload.prefill]
    choices = replace(choices, ubatch=(choices.ubatch[0], *smaller))
    rows = noise(engine, workload.depth)

    def measured(options: EngineOptions) -> Figures:
        engine.reopen(options, workload.cells)
        return measure(engine, workload, rows, share)

    left = limit - (time.monotonic() - began)
    profile = search(choices, measured, left, time.monotonic)
    seconds = time.monotonic() - began
    return replace(profile, trials=(*profile.trials, *refused), seconds=seconds)


def _affordable(
    config: ReplicaConfig, source: Source, engine: Tunable
) -> tuple[Choices, list[Trial]]:
    """The choices whose cells fit the budget, and trials of those that do not."""
    choices = choices_of(config, source)
    if not config.kv_budget:
        return choices, []
    fitting, refused = [], []
    kinds = _AUTO_KV if config.kv_type == "auto" and choices.flash_attention[0] else choices.kv_type
    for kv_type in kinds:
        options = replace(choices.start, kv_type=kv_type)
        try:
            if kv_type == "q4_1" and config.codec != "q4":
                raise ModelUnavailable("kv_type = q4_1: wants codec = 'q4'")
            taken = engine.planned_bytes(options, source.n_cells)
        except ModelUnavailable as error:
            refused.append(Trial(options, None, str(error)))
            continue
        if taken <= config.kv_budget:
            fitting.append(kv_type)
        else:
            refused.append(Trial(options, None, f"cells of {taken} bytes are over kv_budget"))
    if not fitting:
        notes = "; ".join(trial.note for trial in refused)
        raise ModelUnavailable(f"kv_budget = {config.kv_budget}: {notes}")
    better = tuple(x for x in fitting if x != "q4_1") or tuple(fitting)
    return replace(choices, kv_type=better), refused
