"""Profile "auto": what is chosen, what is kept, and who measures."""

import asyncio
import errno
import json
import logging
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from actors import profiles, timing, tuned
from actors.config import ReplicaConfig
from actors.engines.fake_engine import FakeEngine
from actors.engines.options import EngineOptions
from actors.errors import EngineFault, ModelUnavailable
from actors.models import open_engine, open_profiled
from actors.rates import Rates
from actors.sequence import SamplingParams
from actors.timing import Workload
from actors.tuning import Choices, Figures, Profile, Trial, search, thread_choices
from actors.turn import Tokens, TurnRequest
from cluster.config import load_config
from cluster.errors import ConfigError
from cluster.local import divided
from tests.loops import agent_id, user

START = EngineOptions(8)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Machine:
    """Measures options: seconds of a turn by `cost`, each measurement taking `taken` seconds."""

    def __init__(self, cost: Callable[[EngineOptions], float], taken: float = 1.0) -> None:
        self.clock, self.cost, self.taken = Clock(), cost, taken
        self.measured: list[EngineOptions] = []

    def __call__(self, options: EngineOptions) -> Figures:
        self.measured.append(options)
        self.clock.now += self.taken
        return figures(self.cost(options))

    def search(self, choices: Choices, deadline_s: float = 100.0) -> Profile:
        return search(choices, self, deadline_s, self.clock)


def figures(turn_s: float) -> Figures:
    """A third of it prefill, a third decoding alone, a third together."""
    return Figures(256 / (turn_s / 3), turn_s / 3 / 64, turn_s / 3 / 64)


def cost(**best: Any) -> Callable[[EngineOptions], float]:
    """4 s, of which every option that has the best value takes a fifth away."""

    def of(options: EngineOptions) -> float:
        hits = sum(getattr(options, name) == value for name, value in best.items())
        return 4.0 * 0.8**hits

    return of


CHOICES = Choices((8, 4))


@pytest.mark.parametrize("flash_attention", [True, False])
@pytest.mark.parametrize("threads", [8, 4])
@pytest.mark.parametrize("ubatch", [512, 128])
def test_the_best_of_every_option_is_found(
    flash_attention: bool, threads: int, ubatch: int
) -> None:
    best = {"flash_attention": flash_attention, "threads": threads, "ubatch": ubatch}
    profile = Machine(cost(**best)).search(CHOICES)
    assert asdict(profile.options) == best | {"kv_type": "f16"}
    found = {trial.options: trial.figures for trial in profile.trials}
    assert profile.figures == found[profile.options]
    assert START in found
    if profile.options != START:
        assert "less than with the default" in profile.why


def test_quantized_cells_are_worth_their_loss_only_when_clearly_faster() -> None:
    for gain, kv_type in ((0.92, "f16"), (0.85, "q8_0")):
        machine = Machine(lambda o, gain=gain: 4.0 * (gain if o.kv_type == "q8_0" else 1.0))
        assert machine.search(CHOICES).options.kv_type == kv_type


def test_what_is_not_clearly_faster_leaves_the_default() -> None:
    profile = Machine(lambda o: 4.0 if o == START else 3.9).search(CHOICES)
    assert profile.options == START
    assert profile.why == "nothing tried was clearly faster than the default"


def test_a_lucky_measurement_does_not_win() -> None:
    """The best is measured once more, beside the default."""
    machine = Machine(lambda o: 4.0)
    machine.cost = lambda o: 4.5 if machine.measured == [START] else 4.0
    profile = machine.search(Choices((8, 4), (True,), ("f16",), (512,)))
    assert profile.options == START
    assert machine.measured == [START, EngineOptions(4), START, EngineOptions(4)]
    (other,) = (trial for trial in profile.trials if trial.options != START)
    assert other.note == "did not win again"


@given(taken=st.floats(0.1, 5), deadline=st.floats(0.5, 20), best=st.sampled_from([True, False]))
def test_the_deadline_holds(taken: float, deadline: float, best: bool) -> None:
    machine = Machine(cost(flash_attention=best, threads=4, ubatch=128), taken)
    profile = machine.search(CHOICES, deadline)
    assert machine.clock.now - 100.0 <= max(deadline, taken) + 1e-6
    assert len({trial.options for trial in profile.trials}) == len(profile.trials)
    skipped = [trial for trial in profile.trials if trial.figures is None]
    assert {trial.note for trial in skipped} <= {"no time left"}
    if taken > deadline / 2:
        assert machine.measured == [START]
        assert skipped


def test_explicit_settings_are_not_tried_otherwise() -> None:
    config = ReplicaConfig(threads=3, ubatch=64, flash_attention="off")
    choices = tuned.choices_of(config, source(config))
    assert choices == Choices((3,), (False,), ("f16",), (64,))
    config = ReplicaConfig(cores=3, kv_type="q8_0")
    choices = tuned.choices_of(config, source(config))
    assert choices.kv_type == ("q8_0",)
    assert choices.flash_attention == (True,)
    assert choices.threads[0] == 3
    assert max(choices.threads) == 3


def test_what_cannot_be_opened_is_left_out_and_named() -> None:
    def refuse(options: EngineOptions) -> float:
        if not options.flash_attention:
            raise ModelUnavailable("no such attention")
        if options.kv_type == "q8_0":
            raise EngineFault("broken cells")
        return 4.0

    profile = Machine(refuse).search(CHOICES)
    notes = [trial.note for trial in profile.trials if trial.figures is None]
    assert notes == ["no such attention", "broken cells"]


def test_a_start_that_cannot_be_opened_is_no_profile() -> None:
    def refuse(options: EngineOptions) -> float:
        raise ModelUnavailable("no such model")

    with pytest.raises(ModelUnavailable, match="no such model"):
        Machine(refuse).search(CHOICES)


@given(share=st.integers(1, 256), physical=st.integers(1, 256))
def test_threads_stay_within_the_share(share: int, physical: int) -> None:
    choices = thread_choices(share, physical)
    assert choices[0] == share
    assert all(1 <= n <= share for n in choices)
    assert len(set(choices)) == len(choices)


# ---- measuring


class Counting(FakeEngine):
    """The numpy engine on the measurer's clock: seconds per token and per step."""

    def __init__(
        self, slots: int, n_ctx: int, token_s: float = 0.001, step_s: float = 0.01
    ) -> None:
        super().__init__(slots, n_ctx)
        self.clock, self.token_s, self.step_s = Clock(), token_s, step_s
        self.options: list[EngineOptions] = []
        self.budgeted = 1000

    def step(self, chunks: Any) -> Any:
        self.clock.now += self.step_s + self.token_s * sum(len(c.token_ids) for c in chunks)
        return super().step(chunks)

    def reopen(self, options: EngineOptions, n_cells: int) -> None:
        assert all(self.n_rows(i) == 0 for i in range(self.n_seq_max))
        self.options.append(options)

    def planned_bytes(self, options: EngineOptions, n_cells: int) -> int:
        return {"f16": 1000, "q8_0": 531, "q4_1": 312, "q4_0": 281}[options.kv_type]


def test_figures_are_what_the_engine_takes() -> None:
    engine = Counting(4, 2048)
    workload = Workload(depth=100, prefill=64, steps=3, batch=4)
    found = timing.measure(engine, workload, timing.noise(engine, 100), 9.0, engine.clock)
    assert found.prefill_tokens_per_s == pytest.approx(64 / 0.074)
    assert found.decode_s == pytest.approx(0.011)
    assert found.batch_s == pytest.approx(0.014)
    assert [engine.n_rows(i) for i in range(4)] == [0] * 4


@pytest.mark.parametrize(("slots", "n_ctx"), [(1, 16), (3, 64), (4, 8192), (40, 4096)])
@pytest.mark.parametrize("token_s", [1e-5, 1e-3, 1.0])
def test_a_workload_fits_the_engine_and_the_time(slots: int, n_ctx: int, token_s: float) -> None:
    engine = Counting(slots, n_ctx, token_s, 0.001)
    workload = timing.plan(engine, slots, n_ctx, 0.5, engine.clock)
    if token_s == 1.0:
        assert workload is None
        return
    assert workload is not None
    assert workload.cells <= timing.largest(slots, n_ctx).cells
    assert workload.depth + workload.prefill + 2 * workload.steps <= n_ctx
    assert workload.prefill >= min(32, n_ctx // 4)
    assert workload.steps >= 1
    began = engine.clock.now
    timing.measure(engine, workload, timing.noise(engine, workload.depth), 0.5, engine.clock)
    if workload.prefill > 32:
        assert engine.clock.now - began < 1.0


def test_what_is_slower_than_planned_is_not_repeated() -> None:
    engine = Counting(4, 2048, step_s=1.0)
    workload = Workload(depth=100, prefill=64, steps=8, batch=4)
    began = engine.clock.now
    timing.measure(engine, workload, timing.noise(engine, 100), 0.5, engine.clock)
    assert engine.clock.now - began < 3.2  # a prefill, a step, a step of all


def test_an_engine_too_slow_to_measure_starts_with_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = ReplicaConfig(profile_dir=str(tmp_path), profile="auto", threads=8, n_ctx=256)
    engine = Counting(4, 2048)
    monkeypatch.setattr(tuned, "plan", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        opened, found = tuned.open_tuned(config, source(config, engine))
    assert (opened, found, engine.options) == (engine, None, [])
    assert "not measured" in caplog.text
    assert not list(tmp_path.glob("*.json"))


# ---- what is kept


def source(config: ReplicaConfig, engine: Any = None) -> tuned.Source:
    from actors.models import default_options

    identity = {"model": "a" * 64, "engine": "some"}
    return tuned.Source(lambda *_: engine, default_options(config), 4096, identity, 10**8)


@pytest.fixture
def profile() -> Profile:
    found = figures(2.0)
    trials = (Trial(START, found), Trial(replace(START, threads=4), None, "no time left"))
    return Profile(START, found, trials, "why")


KEY = {"model": "a" * 64, "cpu": "some", "cores": 8, "share": 8}


def test_a_profile_is_found_under_its_key_only(tmp_path: Path, profile: Profile) -> None:
    assert profiles.load(tmp_path, KEY) is None
    profiles.save(tmp_path, KEY, profile)
    assert profiles.load(tmp_path, KEY) == profile
    for name, other in (("cpu", "another"), ("model", "b" * 64), ("share", 4), ("cores", 9)):
        assert profiles.load(tmp_path, KEY | {name: other}) is None
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw | {"version": 99},
        lambda raw: raw | {"key": raw["key"] | {"cpu": "another"}},  # renamed by hand
        lambda raw: {},
        lambda raw: [],
        lambda raw: None,
        lambda raw: changed(raw, "options", threads=0),
        lambda raw: changed(raw, "options", threads="8"),
        lambda raw: changed(raw, "options", kv_type="q9"),
        lambda raw: changed(raw, "options", more=1),
        lambda raw: changed(raw, "options", flash_attention=False, kv_type="q8_0"),
        lambda raw: changed(raw, "figures", decode_s=0),
        lambda raw: changed(raw, "figures", decode_s=float("nan")),
        lambda raw: changed(raw, "figures", prefill_tokens_per_s="fast"),
    ],
)
def test_a_file_that_is_no_profile_of_this_machine_is_ignored(
    tmp_path: Path, profile: Profile, change: Callable[[Any], Any]
) -> None:
    profiles.save(tmp_path, KEY, profile)
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert profiles.load(tmp_path, KEY) is None
    profiles.save(tmp_path, KEY, profile)
    assert profiles.load(tmp_path, KEY) == profile


def changed(raw: Any, part: str, **values: Any) -> Any:
    return raw | {"profile": raw["profile"] | {part: raw["profile"][part] | values}}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 60_000, b" " * (1 << 17)])
def test_a_broken_file_is_ignored(tmp_path: Path, profile: Profile, content: bytes) -> None:
    profiles.save(tmp_path, KEY, profile)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    assert profiles.load(tmp_path, KEY) is None


def test_a_place_that_cannot_be_written_costs_only_time(
    tmp_path: Path, profile: Profile, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "file" / "below"
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        profiles.save(folder, KEY, profile)
        with profiles.alone(folder, 1.0) as granted:
            assert granted
    assert "cannot keep the profile" in caplog.text
    assert profiles.load(folder, KEY) is None


def test_the_machine_has_a_name_and_cores() -> None:
    found = profiles.machine()
    assert found["cpu"]
    assert 1 <= profiles.physical_cores() <= found["cores"]


# ---- who measures


def _hold(folder: Path, held: Any, release: Any) -> None:
    with profiles.alone(folder, 5.0) as granted:
        assert granted
        held.set()
        release.wait(30)


def test_one_process_measures_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, held, release))
    other.start()
    try:
        assert held.wait(60)
        began = time.monotonic()
        with profiles.alone(tmp_path, 0.2) as granted:
            assert not granted
        assert 0.2 <= time.monotonic() - began < 5
        other.kill()  # a lock does not outlive its holder
        other.join(30)
        with profiles.alone(tmp_path, 5.0) as granted:
            assert granted
    finally:
        other.kill()
        other.join(30)


def test_the_second_replica_finds_what_the_first_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: Profile
) -> None:
    """It looks before it waits for the lock, and again when it has it."""
    config = ReplicaConfig(profile_dir=str(tmp_path), profile="auto", threads=8, n_ctx=256)
    engine = Counting(4, 256)
    looked: list[Profile | None] = []
    load = profiles.load

    def late(folder: Path, key: Any) -> Profile | None:
        looked.append(load(folder, key))
        if len(looked) == 1:
            profiles.save(folder, key, profile)  # the other one is done
        return looked[-1]

    monkeypatch.setattr(profiles, "load", late)
    opened, found = tuned.open_tuned(config, source(config, engine))
    assert looked == [None, profile]
    assert (opened, found, engine.options) == (engine, profile, [])


def test_a_measured_engine_is_kept_and_found_again(tmp_path: Path) -> None:
    config = ReplicaConfig(profile_dir=str(tmp_path), profile="auto", threads=8, n_ctx=256)
    engine = Counting(4, 2048)
    _, first = tuned.open_tuned(config, source(config, engine), seconds=3.0)
    assert first is not None
    assert engine.options[-1] == first.options  # the last one opened is the one chosen
    assert {o.threads for o in engine.options} == {8}
    n = len(engine.options)
    assert tuned.open_tuned(config, source(config, engine))[1] == first
    assert len(engine.options) == n
    for other in (replace(config, slots=2), replace(config, ubatch=64), replace(config, n_ctx=128)):
        assert tuned.key_of(other, source(other)) != tuned.key_of(config, source(config))
    tuned.open_tuned(config, source(config, engine), again=True, seconds=3.0)
    assert len(engine.options) > n


def test_while_another_measures_the_defaults_have_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "_locked", lambda *_: False)
    config = ReplicaConfig(profile_dir=str(tmp_path), profile="auto", threads=8, n_ctx=256)
    engine = Counting(4, 2048)
    opened, found = tuned.open_tuned(config, source(config, engine))
    assert (opened, found, engine.options) == (engine, None, [])
    budgeted = replace(config, kv_budget=1)
    with pytest.raises(ModelUnavailable, match="kv_budget"):
        tuned.open_tuned(budgeted, source(budgeted, engine))


# ---- the budget


@pytest.mark.parametrize(
    ("budget", "tried"), [(1000, {"f16", "q8_0"}), (999, {"q8_0"}), (530, {"q4_1"})]
)
def test_cells_over_the_budget_are_not_tried(tmp_path: Path, budget: int, tried: set[str]) -> None:
    config = ReplicaConfig(
        profile_dir=str(tmp_path), profile="auto", threads=8, n_ctx=256, kv_budget=budget,
        flash_attention="on",
    )  # fmt: skip
    engine = Counting(4, 2048)
    _, found = tuned.open_tuned(config, source(config, engine), seconds=20.0)
    assert found is not None
    assert {options.kv_type for options in engine.options} == tried
    over = [trial.note for trial in found.trials if "kv_budget" in trial.note]
    assert len(over) == sum(x > budget for x in (1000, 531, 312))


def test_no_cells_in_the_budget_are_no_engine(tmp_path: Path) -> None:
    config = ReplicaConfig(profile_dir=str(tmp_path), profile="auto", n_ctx=256, kv_budget=300)
    with pytest.raises(ModelUnavailable, match=r"^kv_budget = 300: cells of 1000 bytes"):
        tuned.open_tuned(config, source(config, Counting(4, 2048)))
    config = replace(config, kv_budget=400, codec="q8")
    with pytest.raises(ModelUnavailable, match="wants codec = 'q4'"):
        tuned.open_tuned(config, source(config, Counting(4, 2048)))


# ---- settings and rates


def test_the_share_of_a_replica_bounds_its_threads() -> None:
    config = load_config(None, {}, {"profile": "auto", "nodes": 1})
    assert divided(config).replica.cores >= 1
    assert divided(config).replica.threads == 0
    plain = load_config(None, {}, {"nodes": 1})
    assert divided(plain).replica.threads >= 1
    assert divided(load_config(None, {}, {"cores": 2})).replica.threads == 0


def test_a_folder_for_profiles_is_the_callers() -> None:
    config = load_config(None, {}, {"profile_dir": "somewhere"})
    assert Path(config.replica.profile_dir).is_absolute()
    with pytest.raises(ConfigError, match="kv_budget"):
        load_config(None, {}, {"kv_budget": "1GB"})
    assert (
        load_config(None, {}, {"kv_budget": "1GB", "profile": "auto"}).replica.kv_budget == 1 << 30
    )


def test_a_profiles_rates_hold_until_the_first_measurement() -> None:
    rates = Rates()
    rates.expect(300.0, 0.02)
    known = rates.filled([Rates(prefill_tokens_per_s=1.0, decode_step_s=9.0)])
    assert (known.prefill_tokens_per_s, known.decode_step_s) == (300.0, 0.02)
    rates.prefill(100, 1.0)
    assert rates.prefill_tokens_per_s == 100.0  # replaced, not averaged
    assert rates.decode_step_s == 0.02
    rates.prefill(200, 1.0)
    assert 100.0 < rates.prefill_tokens_per_s < 200.0
    rates.decode(0.05)
    assert rates.decode_step_s == 0.05


# ---- real engines


def tiny_config(path: Path, tmp_path: Path, **more: Any) -> ReplicaConfig:
    return ReplicaConfig(
        model=str(path), store=f"file://{tmp_path / 'store'}", slots=2, n_ctx=512, cores=1,
        profile="auto", profile_dir=str(tmp_path / "profiles"), **more,
    )  # fmt: skip


@pytest.mark.parametrize("model", ["llama64", "gemma3", "deepseek2"])
def test_a_real_engine_is_measured_and_opened(
    tiny_models: dict[str, Path], tmp_path: Path, model: str
) -> None:
    config = tiny_config(tiny_models[model], tmp_path)
    engine, profile = open_profiled(config, seconds=60.0)
    assert profile is not None
    assert (engine.n_seq_max, engine.n_ctx, engine.n_cells) == (2, 512, 1024)
    tried = {trial.options for trial in profile.trials if trial.figures}
    assert {o.flash_attention for o in tried} == {True, False}
    assert profile.seconds > 0
    assert {o.threads for o in tried} == {1}
    plain = open_engine(replace(config, profile="default"))
    assert engine.key == plain.key
    if (profile.options.kv_type, profile.options.ubatch) == ("f16", 512):
        assert engine.kv_bytes == plain.kv_bytes
    plain.close()
    engine.close()
    again, found = open_profiled(config)
    again.close()
    assert found == profile


def test_a_budget_halves_the_cells(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(tiny_models["llama64"], tmp_path)
    plain = open_engine(replace(config, profile="default"))
    plain.close()
    engine, profile = open_profiled(replace(config, kv_budget=plain.kv_bytes - 1))
    engine.close()
    assert profile is not None
    assert profile.options.kv_type == "q8_0"
    assert engine.kv_bytes == plain.kv_bytes * 34 // 64


def test_the_command_shows_and_keeps_the_choice(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.cli import app

    monkeypatch.setenv("KVFERRY_PROFILE_DIR", str(tmp_path / "profiles"))
    monkeypatch.setenv("KVFERRY_N_CTX", "512")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    arguments = ["tune", "--model", str(tiny_models["llama64"]), "--slots", "2"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "Chosen: " in shown.output
    (line,) = (x for x in shown.output.splitlines() if x[1:3] in (" >", "> "))
    done = CliRunner().invoke(app, [*arguments, "--json"])
    report = json.loads(done.stdout)["tune"]
    assert f"Chosen: {EngineOptions(**report['options'])}" in shown.output
    assert f"{report['figures']['prefill_tokens_per_s']:.0f}" in line  # the kept one, not another
    settings = load_config(None, {"KVFERRY_PROFILE_DIR": str(tmp_path / "profiles")}, {
        "model": str(tiny_models["llama64"]), "slots": 2, "n_ctx": 512, "profile": "auto",
    })  # fmt: skip
    _, found = kept(divided(settings).replica)
    assert found is not None
    assert asdict(found.options) == report["options"]
    missing = CliRunner().invoke(app, ["tune", "--model", str(tmp_path / "none.gguf")])
    assert missing.exit_code == 2
    assert missing.stderr.count("\n") == 1


def kept(config: ReplicaConfig) -> tuple[None, Profile | None]:
    """What a replica of these settings would find; fails where it would measure."""
    engine, profile = open_profiled(config, seconds=1e-6)
    engine.close()
    return None, profile


@pytest.mark.model
def test_a_replica_starts_by_itself_and_serves(smollm2_gguf: Path, tmp_path: Path) -> None:
    from actors.replica import ModelReplica

    config = replace(tiny_config(smollm2_gguf, tmp_path), n_ctx=2048)
    assert tuned.deadline_s(smollm2_gguf.stat().st_size) == 8.0
    engine, profile = open_profiled(config)
    engine.close()
    assert profile is not None
    assert profile.seconds < 8.0 + 4.0  # a measurement may be slower than the ones before it
    replica = ModelReplica(config, "node-1")
    try:
        rates, reply = asyncio.run(first_turn(replica))
        assert rates.prefill_tokens_per_s == profile.figures.prefill_tokens_per_s
        assert rates.decode_step_s == profile.figures.decode_s
        assert len(reply) == 8
    finally:
        replica.close()


async def first_turn(replica: Any) -> tuple[Rates, list[int]]:
    """The rates before it, and the ids of a short reply."""
    rates = replace((await replica.status()).rates)
    request = TurnRequest(
        "turn-1",
        agent_id(),
        (user("Why is the sea salty?"),),
        SamplingParams(temperature=0, max_tokens=8),
    )
    ids: list[int] = []
    async with asyncio.timeout(120):
        async for items in replica.run_turn(request):
            ids += [i for item in items if isinstance(item, Tokens) for i in item.ids]
    return rates, ids


def test_a_file_system_without_locks_is_measured_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(profiles.fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), profiles.alone(tmp_path, 1.0) as granted:
        assert granted
    assert "without a lock" in caplog.text


def test_options_that_cannot_be_opened_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: Profile
) -> None:
    """They would be opened at every start from then on."""
    config = ReplicaConfig(profile_dir=str(tmp_path), profile="auto", threads=8, n_ctx=256)
    engine = Counting(4, 2048)
    monkeypatch.setattr(tuned, "tune", lambda *_: profile)

    def refuse(options: EngineOptions, n_cells: int) -> None:
        raise ModelUnavailable("no room for so many cells")

    monkeypatch.setattr(engine, "reopen", refuse)
    with pytest.raises(ModelUnavailable, match="no room"):
        tuned.open_tuned(config, source(config, engine))
    assert not list(tmp_path.glob("*.json"))
