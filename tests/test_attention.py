"""patches/llama.cpp/attention.h: flash attention on the CPU, against float64.

ggml's own loop sums up in float16, so that the tolerance here also tells whether it ran.
"""

import ctypes
import runpy
from ctypes import POINTER, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.require import require

llama_cpp = pytest.importorskip("llama_cpp", reason="no llama-cpp-python")

Array = npt.NDArray[Any]
F32, F16 = 0, 1  # enum ggml_type
TOLERANCE = 2e-5  # of values in [-1, 1]; float16 sums are off by 1e-3


@dataclass(frozen=True)
class Case:
    """Sizes of one attention, as ggml names them."""

    heads: int = 9
    kv_heads: int = 3
    dk: int = 64
    dv: int = 64
    tokens: int = 1
    cells: int = 512
    streams: int = 1
    softcap: float = 0.0
    max_bias: float = 0.0
    sinks: bool = False
    seen: str = "some"  # of the cells: all (no mask), some, few, one, none
    threads: int = 2
    seed: int = 0


class Params(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


@pytest.fixture(scope="module")
def ggml() -> Any:
    require("llama", "+kvferry" in llama_cpp.__version__, "llama.cpp is not built by make")
    library = llama_cpp.llama_cpp._lib  # brings libggml-base and libggml-cpu with it
    for name, result, arguments in (
        ("ggml_init", c_void_p, [Params]),
        ("ggml_free", None, [c_void_p]),
        ("ggml_new_tensor_4d", c_void_p, [c_void_p, c_int, *[c_int64] * 4]),
        ("ggml_permute", c_void_p, [c_void_p, c_void_p, *[c_int] * 4]),
        ("ggml_get_data", c_void_p, [c_void_p]),
        ("ggml_flash_attn_ext", c_void_p, [c_void_p] * 5 + [c_float] * 3),
        ("ggml_flash_attn_ext_add_sinks", None, [c_void_p, c_void_p]),
        ("ggml_new_graph", c_void_p, [c_void_p]),
        ("ggml_build_forward_expand", None, [c_void_p, c_void_p]),
        ("ggml_graph_compute_with_ctx", c_int, [c_void_p, c_void_p, c_int]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def masked(case: Case, rng: np.random.Generator) -> Array | None:
    """0 where a token sees a cell, -inf where not; [stream, 1, token, cell]."""
    share = {"some": 0.5, "few": 0.03, "one": 0.0, "none": 0.0}
    if case.seen == "all":
        return None
    shape = (case.streams, 1, case.tokens, case.cells)
    seen = rng.random(shape) < share[case.seen]
    if case.seen != "none":
        seen[..., rng.integers(case.cells)] = True
    bias = -rng.integers(0, 4, shape) if case.max_bias else 0.0
    return np.where(seen, bias, -np.inf).astype(np.float16)


def slopes(case: Case) -> Array:
    """ALiBi's, of each head (Press et al. 2022)."""
    if not case.max_bias:
        return np.ones(case.heads)
    half = 1 << int(np.log2(case.heads))
    head = np.arange(case.heads)
    first = 2.0 ** (-case.max_bias / half * (head + 1))
    rest = 2.0 ** (-case.max_bias / 2 / half * (2 * (head - half) + 1))
    return np.where(head < half, first, rest)


def expected(case: Case, q: Array, k: Array, v: Array, mask: Array | None, sinks: Array) -> Array:
    """[stream, token, head, dv] in float64."""
    group = case.heads // case.kv_heads
    wide_k, wide_v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.einsum("shtd,shcd->shtc", q.astype(np.float64), wide_k) / case.dk**0.5
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    if mask is not None:
        scores = scores + slopes(case)[:, None, None] * mask.astype(np.float64)
    floor = sinks[None, :, None, None] if case.sinks else np.full((1, case.heads, 1, 1), -np.inf)
    top = np.maximum(scores.max(axis=-1, keepdims=True), floor)
    top = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(scores - top)
    whole = weights.sum(axis=-1, keepdims=True) + np.exp(floor - top)
    found = np.einsum("shtc,shcd->sthd", weights / np.where(whole == 0, 1, whole), wide_v)
    return np.asarray(found)


def computed(ggml: Any, case: Case, q: Array, k: Array, v: Array, mask: Any, sinks: Array) -> Array:
    """The same by ggml; K and V lie in the cache cell by cell, as llama.cpp's do."""
    context = ggml.ggml_init(Params(256 << 20, None, False))
    try:

        def tensor(values: Array, type_: int) -> Any:
            made = ggml.ggml_new_tensor_4d(context, type_, *reversed(values.shape))
            values = np.ascontiguousarray(values)
            ctypes.memmove(ggml.ggml_get_data(made), values.ctypes.data, values.nbytes)
            return made

        def cache(values: Array) -> Any:
            rows = tensor(values.transpose(0, 2, 1, 3), F16)  # [stream, cell, head, dim]
            return ggml.ggml_permute(context, rows, 0, 2, 1, 3)

        of_mask = None if mask is None else tensor(mask, F16)
        scale = c_float(case.dk**-0.5)
        arguments = (tensor(q, F32), cache(k), cache(v), of_mask)
        out = ggml.ggml_flash_attn_ext(context, *arguments, scale, case.max_bias, case.softcap)
        if case.sinks:
            ggml.ggml_flash_attn_ext_add_sinks(out, tensor(sinks[None, None, None], F32))
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, out)
        assert ggml.ggml_graph_compute_with_ctx(context, graph, case.threads) == 0
        shape = (case.streams, case.tokens, case.heads, case.dv)
        data = ctypes.cast(ggml.ggml_get_data(out), POINTER(c_float))
        return np.ctypeslib.as_array(data, shape).copy()
    finally:
        ggml.ggml_free(context)


def made_up(case: Case) -> tuple[Array, Array, Array, Array | None, Array]:
    """q, K, V, mask and sinks."""
    rng = np.random.default_rng(case.seed)
    q = (2 * rng.standard_normal((case.streams, case.heads, case.tokens, case.dk))).astype(
        np.float32
    )
    shape = (case.streams, case.kv_heads, case.cells)
    k = rng.standard_normal((*shape, case.dk)).astype(np.float16)
    v = rng.uniform(-1, 1, (*shape, case.dv)).astype(np.float16)
    sinks = rng.standard_normal(case.heads).astype(np.float32)
    return q, k, v, masked(case, rng), sinks


def worst(ggml: Any, case: Case) -> float:
    """The largest difference."""
    given = made_up(case)
    return float(np.abs(computed(ggml, case, *given) - expected(case, *given)).max())


BASE = Case()
MANY = replace(BASE, tokens=8)
CASES = {
    "one token": BASE,
    "eight agents": MANY,
    "one head of K for all": replace(MANY, heads=7, kv_heads=1),
    "no groups": replace(MANY, heads=4, kv_heads=4),
    "groups of two": replace(BASE, heads=4, kv_heads=2),
    "groups of five": replace(BASE, heads=10, kv_heads=2),
    "heads of 80": replace(MANY, dk=80, dv=80),
    "heads of 96": replace(BASE, dk=96, dv=96),
    "heads of 256": replace(MANY, heads=4, kv_heads=1, dk=256, dv=256),
    "latents": replace(MANY, heads=4, kv_heads=1, dk=576, dv=512),
    "one thread": replace(BASE, threads=1),
    "five threads": replace(MANY, threads=5),
    "more threads than are seen": replace(BASE, seen="one", threads=7),
    "few seen": replace(MANY, seen="few", cells=1024),
    "few seen by one": replace(BASE, seen="few", cells=1024),
    "none seen": replace(BASE, seen="none"),
    "none seen by many": replace(MANY, seen="none"),
    "no mask": replace(BASE, seen="all"),
    "soft cap": replace(MANY, softcap=3.0),
    "ALiBi": replace(MANY, max_bias=8.0, heads=12),
    "ALiBi, one token": replace(BASE, max_bias=8.0, heads=12),
    "sinks": replace(MANY, sinks=True),
    "sinks, one token": replace(BASE, sinks=True, threads=3),
    "sinks, none seen": replace(BASE, sinks=True, seen="none"),
    "streams": replace(BASE, streams=3),
    "streams of many": replace(MANY, streams=2),
    "short of a prompt": replace(BASE, tokens=63),
    "a prompt": replace(BASE, tokens=64),
    "a prompt, few seen": replace(BASE, tokens=100, seen="few"),
    "a prompt over odd cells": replace(BASE, tokens=70, cells=301),
    "odd cells": replace(MANY, cells=301),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention(ggml: Any, case: Case) -> None:
    assert worst(ggml, case) < TOLERANCE


def test_attention_of_any_shape(ggml: Any) -> None:
    rng = np.random.default_rng(20)
    for seed in range(60):
        kv_heads = int(rng.integers(1, 5))
        case = Case(
            heads=kv_heads * int(rng.integers(1, 9)),
            kv_heads=kv_heads,
            dk=16 * int(rng.integers(1, 13)),
            dv=16 * int(rng.integers(1, 13)),
            tokens=int(rng.choice([1, 1, 2, 5, 33, 80])),
            cells=int(rng.integers(8, 700)),
            streams=int(rng.integers(1, 3)),
            softcap=float(rng.choice([0.0, 5.0])),
            sinks=bool(rng.random() < 0.3),
            seen=str(rng.choice(["all", "some", "few", "one"])),
            threads=int(rng.integers(1, 5)),
            seed=seed,
        )
        assert worst(ggml, case) < TOLERANCE, case


@pytest.mark.parametrize("seen", ["all", "some", "few"])
@pytest.mark.parametrize("cells", [100, 1000, 9000])
def test_a_token_alone_gets_the_bits_it_gets_in_a_batch(ggml: Any, cells: int, seen: str) -> None:
    """And on any number of threads: batches and drafts change no reply by way of attention."""
    case = replace(BASE, tokens=5, cells=cells, seen=seen)
    q, k, v, mask, sinks = made_up(case)
    batch = computed(ggml, case, q, k, v, mask, sinks)
    for i in range(5):
        own = None if mask is None else mask[:, :, i : i + 1]
        one = replace(case, tokens=1, threads=i + 1)
        alone = computed(ggml, one, q[:, :, i : i + 1], k, v, own, sinks)
        np.testing.assert_array_equal(alone[:, 0], batch[:, i])


def test_what_is_installed_has_these_patches(ggml: Any) -> None:
    script = Path(__file__).parent.parent / "scripts" / "build_llama.py"
    assert llama_cpp.__version__ == runpy.run_path(str(script))["patched"]()
