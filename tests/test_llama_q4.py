"""q4 codes in ggml's Q4_1 blocks: nothing is lost, and ggml reads what the codec means."""

import ctypes
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engines import llama_q4
from actors.engines.llama_q4 import BLOCK_BYTES, codes_to_q4_1, q4_1_to_codes, q4_1_to_f16
from tests.require import require

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


@given(
    st.sampled_from([(64, 64, True), (64, 64, False), (128, 64, False), (192, 64, False)]),
    st.integers(0, 5),
)
def test_compiled_and_reference_give_the_same_bits(dims: tuple[int, int, bool], n: int) -> None:
    require("codec", llama_q4._fast is not None, "storage._codec is not compiled")
    dim, group, interleaved = dims
    wanted = fields((2, n, 3), dim, group, seed=n)
    raw = codes_to_q4_1(*wanted, interleaved=interleaved)
    np.testing.assert_array_equal(raw, llama_q4.to_q4_1_numpy(*wanted, interleaved))
    raw = np.random.default_rng(n).integers(0, 256, raw.shape, np.uint8)
    found, reference = (
        llama_q4._unpack(raw, interleaved),
        llama_q4.from_q4_1_numpy(raw, interleaved),
    )
    for a, b in zip(found, reference, strict=True):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def test_compiled_code_refuses_arrays_that_do_not_fit() -> None:
    require("codec", llama_q4._fast is not None, "storage._codec is not compiled")
    codes, scales, biases = fields((5,), 64)
    raw = np.empty((5, 40), np.uint8)
    whole = (raw, codes, scales, biases)
    wrong = [(0, raw[:4]), (1, codes.view(np.uint16)), (1, codes[:4]), (2, scales[:4])]
    for at, array in wrong:
        for call in (llama_q4._fast.to_q4_1, llama_q4._fast.from_q4_1):
            with pytest.raises(ValueError, match="do not fit"):
                call(*(array if i == at else x for i, x in enumerate(whole)), False)
    with pytest.raises(ValueError, match="do not fit"):  # a range per 64 is not what blocks have
        llama_q4._fast.from_q4_1(*whole, False)


@pytest.mark.parametrize("rotation", [1, 64])
def test_rows_are_what_ggml_reads_turned_back(dequantize: Any, rotation: int) -> None:
    rng = np.random.default_rng(1)
    blocks = np.empty((50, 3, 2), llama_q4._Q4_1)  # of ranges of their own, as ggml makes them
    blocks["d"], blocks["m"] = rng.random((2, 50, 3, 2))
    blocks["qs"] = rng.integers(0, 256, (50, 3, 2, 16), np.uint8)
    raw = blocks.view(np.uint8).reshape(50, 3, 40)
    wanted = np.empty((50, 3, 64), np.float32)
    dequantize(raw.ctypes.data, wanted.ctypes.data, wanted.size)
    hadamard = np.ones((1, 1))
    while len(hadamard) < rotation:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    turned = wanted.reshape(50, 3, -1, rotation) @ hadamard / rotation**0.5
    np.testing.assert_allclose(q4_1_to_f16(raw, rotation), turned.reshape(50, 3, 64), atol=0.02)
