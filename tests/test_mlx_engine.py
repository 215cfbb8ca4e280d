"""The MLX engine: the contract in float16 cells and in a codec's, and its edges."""

import importlib.util
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.config import ReplicaConfig
from actors.engines.base import Chunk, Engine
from actors.errors import EngineFault, ModelUnavailable
from actors.models import open_engine as open_configured
from cluster.config import load_config
from storage.codec import Tensors, concat_rows, encode_rows, get_codec, slice_rows
from storage.spec import CompatibilityKey, LayerSpec, ModelCacheSpec
from tests.engine_contract import EngineContract, SlidingContract, assert_equal, feed, greedy
from tests.loops import assistant, make_loop, memory_of, run, settle, user
from tests.require import require

pytestmark = pytest.mark.slow

Q4 = get_codec("q4")


def open_engine(path: Path, cells: str = "f16", **options: Any) -> Any:
    for package in ("mlx", "mlx_lm"):
        found = importlib.util.find_spec(package) is not None
        require("mlx", found, f"{package} is not installed")
    from actors.engines.mlx_engine import MlxEngine

    sizes = {"n_seq_max": 3, "n_ctx": 1024, "n_cells": 1024} | options
    return MlxEngine(path, cells=cells, **sizes)


def opened(name: str, cells: str) -> Callable[[dict[str, Path]], Iterator[Engine]]:
    @pytest.fixture(scope="module")
    def engine(tiny_models: dict[str, Path]) -> Iterator[Engine]:
        engine = open_engine(tiny_models[name], cells)
        yield engine
        engine.close()

    return engine


llama, qwen3 = opened("no_template", "f16"), opened("qwen3", "f16")
gemma3, deepseek2 = opened("gemma3", "f16"), opened("deepseek2", "f16")
llama_q4, gemma3_q4 = opened("no_template", "q4"), opened("gemma3", "q4")
deepseek2_q4, qwen3_k8v4 = opened("deepseek2", "q4"), opened("qwen3", "k8v4")


def emptied(engine: Engine) -> Engine:
    for seq_id in range(engine.n_seq_max):
        engine.truncate(seq_id, 0)
    return engine


def assert_same_codes(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name].view(np.uint8), b[name].view(np.uint8), name)


class TestLlama(EngineContract):
    @pytest.fixture
    def engine(self, llama: Engine) -> Engine:
        return emptied(llama)


class TestDeepSeek2(EngineContract):
    @pytest.fixture
    def engine(self, deepseek2: Engine) -> Engine:
        return emptied(deepseek2)


class TestGemma3(SlidingContract):
    kl = EngineContract.kl  # no cell moves

    @pytest.fixture
    def engine(self, gemma3: Engine) -> Engine:
        return emptied(gemma3)


class CodesContract(EngineContract):
    """Of engines whose cells are a codec's codes."""

    def test_rows_loaded_block_by_block_give_the_same_logits_bit_for_bit(self, engine: Any) -> None:
        """Codes that were computed here, not only codes that were loaded."""
        ids, spec = self.ids(engine, 300), engine.key.spec
        feed(engine, 0, ids)
        whole = engine.export_encoded(0, 0, 300)
        window = encode_rows(spec, get_codec("f16"), engine.export_window(0, 0, 300), "sliding")
        computed, seen = feed(engine, 0, [7]), []
        for blocks in ([(0, 256), (256, 300)], [(0, 100), (100, 256), (256, 300)]):
            engine.truncate(0, 0)
            for start, stop in blocks:
                engine.load_encoded(0, start, slice_rows(whole, start, stop))
                assert engine.n_rows(0) == stop
            assert_same_codes(engine.export_encoded(0, 0, 300), whole)
            if not window:
                seen.append(feed(engine, 0, [7]))
        if not window:
            assert_equal(seen[0][None], seen[1][None], exact=True)
            # the last rows were floats before, and are codes now
            assert_equal(computed[None], seen[0][None], exact=False, limit=self.kl)


class TestLlamaInCodes(CodesContract):
    @pytest.fixture
    def engine(self, llama_q4: Engine) -> Engine:
        return emptied(llama_q4)


class TestQwen3InCodesOfTwoWidths(CodesContract):
    @pytest.fixture
    def engine(self, qwen3_k8v4: Engine) -> Engine:
        return emptied(qwen3_k8v4)


class TestDeepSeek2InCodes(CodesContract):
    @pytest.fixture
    def engine(self, deepseek2_q4: Engine) -> Engine:
        return emptied(deepseek2_q4)


class TestGemma3InCodes(CodesContract, SlidingContract):
    @pytest.fixture
    def engine(self, gemma3_q4: Engine) -> Engine:
        return emptied(gemma3_q4)


# ---- batches


@pytest.mark.parametrize("name", ["llama", "llama_q4", "gemma3_q4", "deepseek2_q4"])
def test_sequences_that_join_and_leave_at_every_step_go_on_as_alone(
    name: str, request: pytest.FixtureRequest
) -> None:
    engine = emptied(request.getfixturevalue(name))
    contract, rng = EngineContract(), np.random.default_rng(4)
    ids = [contract.ids(engine, 20 + 45 * i, i) for i in range(3)]
    alone = []
    for prompt in ids:
        alone.append(greedy(engine, 0, prompt, 14))
        engine.truncate(0, 0)
    seen: list[list[np.ndarray]] = [[], [], []]
    batches = set()
    while any(len(x) < 14 for x in seen):
        chunks = []
        for i in range(3):
            at, done = engine.n_rows(i), len(seen[i])
            if done == 14 or rng.random() < 0.35:
                continue
            n = int(rng.integers(1, 30))
            rest = ids[i][at : at + n] or [alone[i][0][done - 1]]
            chunks.append(Chunk(i, rest, at, int(at + len(rest) >= len(ids[i]))))
        if not chunks:
            continue
        for i, logits in engine.step(chunks).items():
            seen[i].append(logits[-1].copy())
        batches.add(tuple(sorted(len(b.members) for b in set(engine._batches._of))))
    for (_, reference), x in zip(alone, seen, strict=True):
        assert_equal(reference, np.stack(x), exact=False, limit=contract.kl)
    assert len(batches) > 1, batches  # they were together, and apart


def test_unlike_lengths_stay_apart(llama: Any) -> None:
    """Padding would multiply the memory: 900 rows for each of three sequences."""
    emptied(llama)
    for seq_id, n in enumerate((900, 20, 30)):
        feed(llama, seq_id, EngineContract().ids(llama, n)[:512])
        if n > 512:
            feed(llama, seq_id, EngineContract().ids(llama, n - 512))
    llama.step([Chunk(i, [5], llama.n_rows(i), 1) for i in range(3)])
    found = sorted(tuple(b.members) for b in set(llama._batches._of))
    assert sorted(len(x) for x in found) == [1, 2]
    row = llama.key.spec.f16_row_bytes
    assert llama.kv_bytes <= row * (2 * 953 + 3 * 256)
    assert llama.kv_bytes == llama._batches.nbytes


def test_an_engine_works_in_a_thread_that_did_not_make_it(tiny_models: dict[str, Path]) -> None:
    """An MLX array that was not evaluated belongs to the thread that made it."""
    engine, found = open_engine(tiny_models["gemma3"], "q4"), []

    def work() -> None:
        ids = EngineContract().ids(engine, 100)
        feed(engine, 0, ids)
        engine.fork(0, 1, 100)
        found.append(feed(engine, 1, [7]))
        engine.load_encoded(2, 0, engine.export_encoded(0, 0, 100))
        engine.step([Chunk(0, [5], 100, 0)])  # whose results nobody has looked at

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    feed(engine, 0, [7])  # and back
    assert len(found) == 1
    assert [engine.n_rows(i) for i in range(3)] == [102, 101, 100]
    engine.close()


def test_a_failed_step_leaves_nothing(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied(llama)
    feed(llama, 0, [3, 4, 5])
    feed(llama, 1, [6, 7])

    def fail(hidden: Any) -> Any:
        raise RuntimeError("[metal::malloc] Attempting to allocate")

    monkeypatch.setattr(llama._network, "logits", fail)
    with pytest.raises(EngineFault, match="Attempting to allocate"):
        llama.step([Chunk(0, [9], 3, 1)])
    assert [llama.n_rows(0), llama.n_rows(1)] == [0, 2]
    monkeypatch.undo()
    feed(llama, 0, [3, 4, 5])
    feed(llama, 1, [8])


# ---- codes


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek2"])
def test_cells_hold_what_the_codec_stores_for_the_same_floats(
    name: str, request: pytest.FixtureRequest
) -> None:
    """In the first full layer that no quantized one precedes, both engines compute the same."""
    floats: Any = emptied(request.getfixturevalue(name))
    codes: Any = emptied(request.getfixturevalue(f"{name}_q4"))
    ids = EngineContract().ids(floats, 90)
    for engine in (floats, codes):
        feed(engine, 0, ids)
    wanted = encode_rows(floats.key.spec, Q4, floats.export(0, 0, 90))
    found = codes.export_encoded(0, 0, 90)
    assert found.keys() == wanted.keys()
    for key in found:
        assert found[key][0].tobytes() == wanted[key][0].tobytes(), key


def held(loop: Any) -> tuple[Tensors, int]:
    """The stored tensors of the agent's branch, and the engine's sequence of it."""
    memory = memory_of(loop)
    (branch,) = memory.branches
    pieces = [loop.memory.rows.runs.tensors(memory, r, "full") for r in branch.runs]
    assert None not in pieces
    return concat_rows(pieces), loop.residency.find(branch)


@pytest.mark.parametrize("model", ["llama64", "gemma3", "deepseek2"])
def test_codes_go_from_cells_to_store_and_back_as_they_are(
    tiny_models: dict[str, Path], tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(tiny_models[model], "q4")
    monkeypatch.setattr(engine, "export", None)  # nothing is decoded to be stored
    monkeypatch.setattr(engine, "load", None)  # nor to be loaded
    first_loop = make_loop(engine, tmp_path, codec="q4")
    messages = [user("What did the fishermen see? " * 12)]
    first = run(first_loop, messages, n=20)
    messages += [assistant(first.text), user("Why?")]
    settle(first_loop)
    stored, seq_id = held(first_loop)
    n = next(iter(stored.values())).shape[1]
    resident = first_loop.call(lambda: engine.export_encoded(seq_id, 0, n)).result(30)
    assert_same_codes(resident, stored)
    first_loop.close()

    engine = open_engine(tiny_models[model], "q4")
    monkeypatch.setattr(engine, "export", None)
    monkeypatch.setattr(engine, "load", None)
    loop = make_loop(engine, tmp_path, codec="q4")
    second = run(loop, messages, n=20)
    assert (second.cache, second.cached) == ("warm", n)
    settle(loop)
    after, seq_id = held(loop)
    assert_same_codes(slice_rows(after, 0, n), stored)
    resident = loop.call(lambda: engine.export_encoded(seq_id, 0, n)).result(30)
    assert_same_codes(resident, stored)
    messages += [assistant(second.text), user("And then?")]
    assert run(loop, messages, n=5).cache == "hot"
    assert not loop.memory.faults
    loop.close()


def test_float_cells_give_and_take_no_codes(llama: Any) -> None:
    emptied(llama)
    feed(llama, 0, [3, 4, 5])
    with pytest.raises(EngineFault, match="no encoded rows"):
        llama.export_encoded(0, 0, 3)
    assert llama.exports_encoded == llama.loads_encoded == ""


# ---- models


def test_layers_that_the_codec_cannot_group_are_named() -> None:
    require("mlx", importlib.util.find_spec("mlx") is not None, "mlx is not installed")
    from actors.engines.mlx_cells import Cells

    whole, odd = LayerSpec("full", 2, 64, 64), LayerSpec("full", 2, 80, 80)
    cut = LayerSpec("latent", 1, 256, 0)

    def key(*layers: LayerSpec) -> CompatibilityKey:
        rope = (("dims", 8.0),)
        return CompatibilityKey("0" * 64, "0" * 64, rope, ModelCacheSpec("some", layers))

    Cells(key(whole, odd, LayerSpec("sliding", 2, 80, 80, 64)), get_codec("f16"))
    with pytest.raises(ModelUnavailable, match=r"cells of q4: layers \[1, 3\]: .*head dim of 80"):
        Cells(key(whole, odd, whole, odd), Q4)
    with pytest.raises(
        ModelUnavailable, match=r"layers \[0\]: a latent of 248 dims in keys of 256"
    ):
        Cells(key(cut), Q4)
    Cells(key(LayerSpec("sliding", 2, 80, 80, 64), whole), Q4)  # sliding layers are float


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("pattern", r"sliding layers \[1, 2\]"),
        ("uneven", "architecture deci"),
        ("mamba", "recurrent"),
        ("truncated", "llama.cpp cannot load this file"),
    ],
)
def test_a_gguf_that_mlx_cannot_say_is_refused(
    tiny_models: dict[str, Path], model: str, reason: str
) -> None:
    with pytest.raises(ModelUnavailable, match=reason) as caught:
        open_engine(tiny_models[model])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_quantized_weights_are_taken_over_without_loss(kind: str) -> None:
    require("mlx", importlib.util.find_spec("mlx") is not None, "mlx is not installed")
    gguf = pytest.importorskip("gguf")
    import mlx.core as mx

    from actors.engines import mlx_gguf, mlx_gguf_file

    x = np.random.default_rng(1).standard_normal((24, 96)).astype(np.float32)
    x[0], x[1, :32] = 0, 5
    number = gguf.GGMLQuantizationType[kind]
    tensor = mlx_gguf_file.Tensor(x.shape, number, gguf.quants.quantize(x, number))
    fields = dict(mlx_gguf._weights(tensor, mx.float32, packed=True))
    found = mx.dequantize(
        fields["weight"],
        fields["scales"].astype(mx.float32),
        fields["biases"].astype(mx.float32),
        group_size=32,
        bits=int(kind[1]),
    )
    np.testing.assert_array_equal(np.array(found), tensor.floats())


def write_directory(folder: Path, gguf: Path, tokenizer_from: Path, **changes: Any) -> Path:
    """The tiny GGUF's model as an MLX directory; `changes` to its config.json."""
    import mlx.core as mx
    from gguf import GGUFReader
    from mlx.utils import tree_flatten
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from actors.engines import mlx_gguf, mlx_gguf_file, mlx_gguf_spec

    described = mlx_gguf_spec.describe(gguf)
    spec, rope, file = described.key.spec, dict(described.key.rope), mlx_gguf_file.read(gguf)
    net = mlx_gguf.build(file, spec, rope, mx.float32, packed=False)
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(net.parameters())))
    config = mlx_gguf._config(file, spec, rope) | {"eos_token_id": 2} | changes
    (folder / "config.json").write_text(json.dumps(config))
    fields = GGUFReader(tokenizer_from).fields
    tokens, merges, types = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")
    )
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    extra = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": "{{ 1 }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(extra))
    described.close()
    return folder


@pytest.mark.parametrize("model", ["qwen2", "gemma3", "deepseek2"])
def test_a_directory_serves_as_its_gguf_does(
    tiny_models: dict[str, Path], tmp_path: Path, model: str
) -> None:
    """Keys differ in the digests only: an operator may declare them equivalent."""
    folder = write_directory(tmp_path / "mlx", tiny_models[model], tiny_models[model])
    engines: list[Any] = [
        open_configured(ReplicaConfig(model=str(folder), slots=2, n_ctx=256, kv_type="q4")),
        open_engine(tiny_models[model], "q4"),
    ]
    key, wanted = (engine.key for engine in engines)
    assert (key.spec, key.rope) == (wanted.spec, wanted.rope)
    assert key.weights != wanted.weights
    table = {key.weights: wanted.weights, key.tokenizer: wanted.tokenizer}
    assert key.canonical(table).digest == wanted.digest
    texts = [*EngineContract.prompts, "Grüße, 世界! 🙂\tx = 1234<|im_end|>\n"]
    for text in texts:
        ids = [engine.vocab.tokenize(text) for engine in engines]
        assert ids[0] == ids[1]
        assert [engines[0].vocab.token_bytes(i) for i in ids[0]] == [
            engines[1].vocab.token_bytes(i) for i in ids[0]
        ]
    assert engines[0].vocab.eog & engines[1].vocab.eog
    assert engines[0].vocab.size == engines[1].vocab.size
    assert engines[0].vocab.eos_text == "<|im_end|>"
    assert engines[0].vocab.chat_template == "{{ 1 }}"
    (tokens, reference), (_, logits) = (
        greedy(engine, 0, EngineContract().ids(engine, 100), 3) for engine in engines
    )
    assert_equal(reference, logits, exact=False, limit=1e-3)
    assert len(tokens) == 3
    for engine in engines:
        engine.close()


def test_directories_that_cannot_be_served(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = write_directory(tmp_path / "mlx", tiny_models["qwen2"], tiny_models["qwen2"])

    def refused(says: str, **changes: Any) -> None:
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(folder, other)
        config = json.loads((other / "config.json").read_text()) | changes
        (other / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelUnavailable, match=says):
            open_engine(other)

    refused("mlx-lm cannot load it", model_type="no_such_model")
    refused("mlx-lm cannot load it", num_hidden_layers=5)
    refused("interleaved rope in layer 0", rope_traditional=True)
    (folder / "tokenizer.json").unlink()
    refused("no tokenizer.json")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelUnavailable, match="mlx-lm cannot load it"):
        open_engine(folder)


def test_attention_sinks_are_refused_by_layer(tmp_path: Path) -> None:
    for package in ("mlx", "mlx_lm"):
        found = importlib.util.find_spec(package) is not None
        require("mlx", found, f"{package} is not installed")
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import gpt_oss

    config = {
        "model_type": "gpt_oss", "num_hidden_layers": 2, "num_local_experts": 2,
        "num_experts_per_tok": 1, "vocab_size": 64, "rms_norm_eps": 1e-5, "hidden_size": 64,
        "intermediate_size": 64, "head_dim": 32, "num_attention_heads": 2,
        "num_key_value_heads": 2, "sliding_window": 16, "rope_theta": 10000,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    net = gpt_oss.Model(gpt_oss.ModelArgs.from_dict(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(net.parameters())))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelUnavailable, match=r"attention sinks in layers \[0, 1\]"):
        open_engine(tmp_path)


def test_the_engine_is_chosen_by_configuration(tiny_models: dict[str, Path]) -> None:
    config = ReplicaConfig(model=str(tiny_models["qwen2"]), slots=2, n_ctx=256)
    names = {}
    for choice in ("auto", "llama.cpp", "mlx"):
        engine = open_configured(replace(config, engine=choice))
        names[choice] = (engine.name, engine.key.digest)
        engine.close()
    assert {name for name, _ in names.values()} == {"llama.cpp", "mlx"}
    assert names["auto"][0] == "llama.cpp"
    assert len({digest for _, digest in names.values()}) == 1


def test_the_benchmark_says_what_it_did_not_measure(
    tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("mlx", "mlx_lm"):
        found = importlib.util.find_spec(package) is not None
        require("mlx", found, f"{package} is not installed")
    from bench import mlx as bench

    config = load_config(None, {}, {"model": str(tiny_models["llama64"])})
    assert bench.run(config, 2) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)["mlx"]
    assert found["restore_speedup"] == pytest.approx(found["prefill_s"] / found["restore_s"])
    assert found["restore_speedup"] > 2
    assert found["batch_speedup"] == pytest.approx(found["one_by_one_s"] / found["batch_s"])
    ratio = found["attention_codes_s"] / found["attention_decoded_s"]
    assert found["attention_speedup"] == pytest.approx(ratio)
    text = "\n".join(printed)
    for reference in bench.MAC_MODELS.values():
        assert f"kvferry bench mlx --model {reference}" in text
    assert text.count("measured") >= 3
