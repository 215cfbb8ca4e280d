"""q4 codes in ggml's Q4_1 blocks: ggml reads what the codec means, and a context computes on it."""

import ctypes
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engines import llama_state
from actors.engines.base import Engine
from actors.engines.llama_q4 import BLOCK_BYTES, codes_to_q4_1, q4_1_to_codes
from storage.codec import get_codec
from tests.engine_contract import _log_softmax, feed, forced

Q4_1 = 3  # ggml_type
Fields = tuple[np.ndarray, np.ndarray, np.ndarray]


def fields(shape: tuple[int, ...], dim: int, group: int = 64, seed: int = 0) -> Fields:
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 1 << 32, (*shape, dim // 8), np.uint32),
        rng.random((*shape, dim // group)).astype(np.float16),
        rng.standard_normal((*shape, dim // group)).astype(np.float16),
    )


def plain(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """The format's definition, before rotation: x = q * scale + bias."""
    dim = codes.shape[-1] * 8
    q = np.stack([codes >> np.uint32(4 * i) & 15 for i in range(8)], axis=-1)
    q = q.reshape(*codes.shape[:-1], dim).astype(np.float32)
    repeats = dim // scales.shape[-1]
    s, b = (np.repeat(x.astype(np.float32), repeats, axis=-1) for x in (scales, biases))
    return q * s + b


def test_golden_bytes() -> None:
    codes = np.array([0x76543210, 0xFEDCBA98, 0x11111111, 0x22222222] * 2, np.uint32)[None]
    raw = codes_to_q4_1(codes, np.array([[2.0]], "<f2"), np.array([[-1.0]], "<f2"))
    block = struct.pack("<2e", 2, -1) + bytes.fromhex("1011121314151617 28292a2b2c2d2e2f")
    assert raw.tobytes() == block * 2


@given(
    st.sampled_from([(64, 64, True), (64, 64, False), (128, 64, False), (192, 64, False)]),
    st.integers(1, 4),
)
def test_there_and_back(dims: tuple[int, int, bool], n: int) -> None:
    dim, group, interleaved = dims
    wanted = fields((2, n, 3), dim, group, seed=n)
    raw = codes_to_q4_1(*wanted, interleaved=interleaved)
    assert raw.shape == (2, n, 3, dim // 32 * BLOCK_BYTES)
    for a, b in zip(q4_1_to_codes(raw, group, interleaved=interleaved), wanted, strict=True):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize(
    ("dim", "group", "interleaved"), [(96, 32, False), (32, 32, False), (128, 64, True)]
)
def test_head_dims_that_would_lose_are_refused(dim: int, group: int, interleaved: bool) -> None:
    with pytest.raises(ValueError, match=f"head dim {dim}"):
        codes_to_q4_1(*fields((1,), dim, group), interleaved=interleaved)


def test_blocks_that_differ_inside_a_group_are_refused() -> None:
    raw = codes_to_q4_1(*fields((1,), 64))
    for offset in (0, 2):
        changed = raw.copy()
        changed[0, offset] ^= 1
        with pytest.raises(ValueError, match="differ"):
            q4_1_to_codes(changed, 64)


@pytest.fixture(scope="module")
def dequantize() -> Any:
    """ggml's own decoder of Q4_1 rows."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from llama_cpp._ctypes_extensions import load_shared_library

    library = load_shared_library("ggml-base", Path(llama_cpp.__file__).parent / "lib")
    function = library.dequantize_row_q4_1
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    function.restype = None
    return function


@pytest.mark.parametrize("interleaved", [False, True])
def test_ggml_reads_the_values_that_the_codec_means(dequantize: Any, interleaved: bool) -> None:
    wanted = fields((50, 3), 64)
    raw = np.ascontiguousarray(codes_to_q4_1(*wanted, interleaved=interleaved))
    got = np.empty((50, 3, 64), np.float32)
    dequantize(raw.ctypes.data, got.ctypes.data, got.size)
    if interleaved:
        got = np.concatenate([got[..., 0::2], got[..., 1::2]], axis=-1)
    np.testing.assert_allclose(got, plain(*wanted), rtol=1e-6, atol=1e-6)


@pytest.mark.model
def test_a_q4_1_context_goes_on_from_stored_codes(smollm2_gguf: Path) -> None:
    """Against f16 cells that hold the decoded codes. What differs is how new rows are kept."""
    from tests.test_llama_engine import open_engine

    codec, engine = get_codec("q4"), open_engine(smollm2_gguf, n_threads=2)
    ids = engine.vocab.tokenize(
        "The sea was calm that morning, and the fishermen went out early. They rowed past the old "
        "lighthouse, where the keeper used to wave to them with a white cloth, and set their nets "
    )
    reply = engine.vocab.tokenize(" in the deep water behind the island. Nobody spoke much.")
    n = len(ids)
    feed(engine, 0, ids)
    rows = engine.export(0, 0, n)[0]
    stored = [codec.encode(rows.k), codec.encode(rows.v)]
    engine.truncate(0, 0)
    decoded = type(rows)(codec.decode(stored[0], 64), codec.decode(stored[1], 64))
    engine.load(0, 0, (decoded,))
    reference = forced(engine, 0, reply[1:], feed(engine, 0, reply[:1]))
    engine.close()

    def distance(interleaved: bool) -> float:
        """Mean KL of the context on Q4_1 cells."""
        quantized = open_quantized(smollm2_gguf)
        k, v = (
            codes_to_q4_1(x["codes"], x["scales"], x["biases"], interleaved=order)
            for x, order in zip(stored, (interleaved, False), strict=True)
        )
        load_blocks(quantized, k.reshape(30, n, -1), v.reshape(30, n, -1))
        got = forced(quantized, 0, reply[1:], feed(quantized, 0, reply[:1]))
        quantized.close()
        p, q = _log_softmax(reference), _log_softmax(got)
        return float((np.exp(p) * (p - q)).sum(-1).mean())

    assert distance(interleaved=True) < 0.05  # new rows in 4 bits cost 0.02 to 0.04
    assert distance(interleaved=False) > 1  # codes at other places than llama.cpp's rotation


def open_quantized(path: Path) -> Engine:
    """The engine on a context whose cells are Q4_1; it can step, and nothing else here."""
    import llama_cpp

    from actors.engines.llama_engine import LlamaEngine

    class Quantized(LlamaEngine):
        def _check_state(self) -> None:
            pass

    whole = llama_cpp.llama_context_default_params

    def params() -> Any:
        made = whole()
        made.type_k = made.type_v = Q4_1
        return made

    llama_cpp.llama_context_default_params = params
    try:
        return Quantized(path, n_seq_max=3, n_ctx=1024, n_cells=1024, n_threads=2)
    finally:
        llama_cpp.llama_context_default_params = whole


def load_blocks(engine: Any, k: np.ndarray, v: np.ndarray) -> None:
    """Put (n_layers, T, bytes) of both sides into sequence 0, as llama_state's bytes of type 3."""
    n_layers, n = k.shape[:2]
    halves = [np.ascontiguousarray(x).view(np.float16) for x in (k, v)]
    stack = llama_state.Stack(tuple(range(n_layers)), halves[0].shape[2], halves[1].shape[2])
    raw = llama_state.build(0, [((stack,), llama_state.Cells(0, (tuple(halves),)))])
    offset = 16 + 12 * n + 8
    for side in (k, v):
        for _ in range(n_layers):
            raw[offset : offset + 4] = np.frombuffer(struct.pack("<i", Q4_1), np.uint8)
            offset += 12 + n * side.shape[2]
    assert offset == raw.size
    assert engine._set(raw, 0, 0) == raw.size
    engine._rows[0] = n
