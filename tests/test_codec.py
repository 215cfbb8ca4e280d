"""The codecs: golden bits, numpy against C, error bounds, and rows cut and joined as codes."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from storage import codec
from storage.cache_file import load
from storage.codec import (
    F16,
    Q4,
    check_tensors,
    concat_rows,
    count_rows,
    decode_q4_numpy,
    decode_rows,
    encode_q4_numpy,
    encode_rows,
    get_codec,
    slice_rows,
    tensor_bytes,
)
from storage.errors import CorruptData
from storage.spec import LayerSpec, ModelCacheSpec
from storage.tiers import pack_block
from tests.require import require
from tests.store_contract import FIXED, SPEC, sample_rows, sample_vectors

GOLDEN = Path(__file__).parent / "golden"
Q4_CODEC, F16_CODEC = Q4(), F16()
DIMS = [32, 64, 96, 128, 256]
MAX_F16 = 65504.0


@pytest.fixture
def fast():
    require("codec", codec._fast is not None, "storage._codec is not compiled")
    return codec._fast


def hadamard(block: int) -> np.ndarray:
    """Sylvester's matrix, orthonormal, in float64."""
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(block)


def rotated(x: np.ndarray) -> np.ndarray:
    """(N, D), every run of the largest power of two that divides D rotated, in float64."""
    n, dim = x.shape
    block = {32: 32, 64: 64, 96: 32, 128: 128, 256: 256}[dim]
    runs = x.astype(np.float64).reshape(n, dim // block, block)
    return (runs @ hadamard(block)).reshape(n, dim)


def unrotated_decode(fields: dict[str, np.ndarray]) -> np.ndarray:
    """`q * scale + bias` in float64, from the layout's description alone."""
    codes, scales, biases = (fields[name] for name in ("codes", "scales", "biases"))
    n, words = codes.shape
    q = np.empty((n, words * 8))
    for w in range(words):
        for i in range(8):
            q[:, 8 * w + i] = (codes[:, w] >> (4 * i)) & 15
    group = words * 8 // scales.shape[1]
    return q * np.repeat(scales.astype(float), group, 1) + np.repeat(biases.astype(float), group, 1)


# ---- the layout


def test_word_layout_is_least_significant_nibble_first(monkeypatch):
    """Hand-made: scale 2, bias -1, no rotation to speak of (its inverse is applied by hand)."""
    nibbles = [(3 * i + 1) % 16 for i in range(32)]
    words = [sum(nibbles[8 * w + i] << (4 * i) for i in range(8)) for w in range(4)]
    assert words[0] == 0x630DA741
    fields = {
        "codes": np.array([words], np.uint32),
        "scales": np.array([[2]], np.float16),
        "biases": np.array([[-1]], np.float16),
    }
    values = np.array([[2.0 * q - 1 for q in nibbles]])
    expected = (values @ hadamard(32)).astype(np.float16)
    for use in (codec._fast, None):
        monkeypatch.setattr(codec, "_fast", use)
        np.testing.assert_allclose(Q4_CODEC.decode(fields, 32), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("dim", "group", "block"), [
    (32, 32, 32), (64, 64, 64), (96, 32, 32), (128, 64, 128), (192, 64, 64), (256, 64, 256),
    (576, 64, 64),
])  # fmt: skip
def test_group_and_rotation_follow_from_the_head_dim(dim, group, block):
    assert Q4_CODEC.describe(dim) == {"bits": 4, "group": group, "hadamard": block}
    assert Q4_CODEC.fields(dim) == {
        "codes": (np.dtype("<u4"), dim // 8),
        "scales": (np.dtype("<f2"), dim // group),
        "biases": (np.dtype("<f2"), dim // group),
    }


@pytest.mark.parametrize("dim", [80, 72, 8, 1])
def test_a_head_dim_that_cannot_be_grouped_is_refused(dim):
    with pytest.raises(ValueError, match=f"head dim of {dim}.*multiple of 32"):
        Q4_CODEC.encode(np.zeros((1, dim), np.float16))
    with pytest.raises(ValueError, match=f"head dim of {dim}"):
        Q4_CODEC.fields(dim)


def test_an_unknown_codec_is_refused_with_the_known_ones():
    assert (get_codec("q4").name, get_codec("f16").name) == ("q4", "f16")
    with pytest.raises(ValueError, match="unknown codec 'q5'; known: f16, q4"):
        get_codec("q5")


def test_layout_is_what_mlx_reads():
    require("mlx", importlib.util.find_spec("mlx") is not None, "mlx is not installed")
    mx = importlib.import_module("mlx.core")
    fields = Q4_CODEC.encode(sample_vectors(5, 128))
    theirs = mx.dequantize(
        mx.array(fields["codes"]),
        mx.array(fields["scales"]),
        mx.array(fields["biases"]),
        group_size=64,
        bits=4,
    )
    ours = unrotated_decode(fields)
    np.testing.assert_allclose(np.array(theirs.astype(mx.float32)), ours, atol=4e-3)


# ---- golden bits


@pytest.mark.parametrize("implementation", ["numpy", "c"])
def test_golden_codes_decode_to_the_same_bits(implementation, monkeypatch, request):
    if implementation == "numpy":
        monkeypatch.setattr(codec, "_fast", None)
    else:
        request.getfixturevalue("fast")
    raw = (GOLDEN / "block.q4.safetensors").read_bytes()
    rows = decode_rows(SPEC, Q4_CODEC, load(raw, "golden")[0])
    found = b"".join(side.tobytes() for g in rows for side in (g.k, g.v))
    assert found == (GOLDEN / "block.q4.decoded").read_bytes()
    assert (
        hashlib.sha256(found).hexdigest()
        == "a8a538b1daf26487e56e19465cf93c164da7f5ce09ed09ebe83cd0b3158ef7a9"
    )


def test_golden_codes_are_near_what_was_encoded():
    raw = (GOLDEN / "block.q4.safetensors").read_bytes()
    found = decode_rows(SPEC, Q4_CODEC, load(raw, "golden")[0])
    for group, ours, theirs in zip(SPEC.groups, found, sample_rows(16), strict=True):
        if group.part == "full":
            for x, y in ((ours.k, theirs.k), (ours.v, theirs.v)):
                assert np.sqrt(((x.astype(np.float32) - y) ** 2).sum() / max(x.size, 1)) < 0.4


# ---- numpy and C


@pytest.mark.parametrize("dim", [*DIMS, 192, 576])
@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 33])
def test_c_and_numpy_give_the_same_bytes(fast, dim, n):
    group, block = Q4_CODEC.group(dim), Q4_CODEC.hadamard(dim)
    x = np.random.default_rng(dim + n).standard_normal((n, dim)).astype(np.float16)
    encoded = encode_q4_numpy(x, group, block)
    assert fast.encode_q4(x, group, block) == encoded
    codes, scales, biases = arrays(encoded, dim, group)
    decoded = decode_q4_numpy(codes, scales, biases, group, block)
    assert fast.decode_q4(codes, scales, biases, group, block) == decoded


def arrays(encoded: tuple[bytes, bytes, bytes], dim: int, group: int) -> tuple[np.ndarray, ...]:
    codes, scales, biases = encoded
    return (
        np.frombuffer(codes, "<u4").reshape(-1, dim // 8),
        np.frombuffer(scales, "<f2").reshape(-1, dim // group),
        np.frombuffer(biases, "<f2").reshape(-1, dim // group),
    )


def float16s(limit: float) -> st.SearchStrategy[float]:
    return st.floats(-limit, limit, width=16) | st.sampled_from([0.0, -0.0, 6e-8, -6e-8, limit])


@st.composite
def vectors(draw: st.DrawFn, limit: float = MAX_F16) -> np.ndarray:
    """(N, D) float16: every bit pattern that is a number, zeros of both signs, subnormals."""
    shape = (draw(st.integers(1, 18)), draw(st.sampled_from(DIMS)))
    return draw(hnp.arrays(np.float16, shape, elements=float16s(limit)))


@settings(FIXED, max_examples=150)
@given(vectors())
def test_c_and_numpy_agree_on_any_numbers(x):
    require("codec", codec._fast is not None, "storage._codec is not compiled")
    dim = x.shape[1]
    group, block = Q4_CODEC.group(dim), Q4_CODEC.hadamard(dim)
    encoded = encode_q4_numpy(x, group, block)
    assert codec._fast.encode_q4(x, group, block) == encoded
    _, scales, biases = arrays(encoded, dim, group)
    assert np.isfinite(scales).all()
    assert np.isfinite(biases).all()


@settings(FIXED, max_examples=150)
@given(
    st.sampled_from(DIMS),
    st.integers(1, 18),
    st.integers(0, 2**32 - 1),
    hnp.arrays(np.float16, 8, elements=st.floats(-100, 100, width=16)),
)
def test_c_and_numpy_decode_any_codes_alike(dim, n, seed, scales_and_biases):
    require("codec", codec._fast is not None, "storage._codec is not compiled")
    group, block = Q4_CODEC.group(dim), Q4_CODEC.hadamard(dim)
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**32, (n, dim // 8), dtype=np.uint32)
    scales, biases = rng.choice(scales_and_biases, (2, n, dim // group))
    expected = decode_q4_numpy(codes, scales, biases, group, block)
    assert codec._fast.decode_q4(codes, scales, biases, group, block) == expected


def test_c_converts_every_float16_as_numpy_does(fast):
    """With scale 0 a vector of one bias decodes to (bias * 4 * sqrt 2, 0, ...) at dim 32."""
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    biases = every[np.abs(every.astype(np.float32)) < 8192].reshape(-1, 1)
    codes, scales = np.zeros((len(biases), 4), np.uint32), np.zeros_like(biases)
    expected = decode_q4_numpy(codes, scales, biases, 32, 32)
    assert fast.decode_q4(codes, scales, biases, 32, 32) == expected
    assert np.frombuffer(expected, "<f2").reshape(-1, 32)[:, 1:].any() == np.False_


def test_c_refuses_what_does_not_fit(fast):
    x, codes = np.zeros((2, 64), np.float16), np.zeros((2, 8), np.uint32)
    one = np.zeros((2, 1), np.float16)
    for bad in (
        lambda: fast.encode_q4(x.astype(np.float32), 64, 64),
        lambda: fast.encode_q4(x[0], 64, 64),
        lambda: fast.encode_q4(x, 48, 64),
        lambda: fast.encode_q4(x, 64, 128),
        lambda: fast.encode_q4(x, 64, 3),
        lambda: fast.encode_q4(np.zeros((1, 2048), np.float16), 64, 64),
        lambda: fast.decode_q4(codes.astype(np.uint64), one, one, 64, 64),
        lambda: fast.decode_q4(codes, one[:1], one, 64, 64),
        lambda: fast.decode_q4(codes, one, one[:1], 64, 64),
        lambda: fast.decode_q4(codes, one, one, 0, 64),
    ):
        with pytest.raises(ValueError, match="q4"):
            bad()
    with pytest.raises(ValueError, match="contiguous"):
        fast.encode_q4(x.T, 64, 64)


# ---- quality


@settings(FIXED, max_examples=150)
@given(vectors(limit=2000.0))
def test_error_is_at_most_half_a_step(x):
    """In the rotated domain, plus what rounding scale and bias to float16 costs."""
    fields = Q4_CODEC.encode(x)
    group = Q4_CODEC.group(x.shape[1])
    step = np.repeat(fields["scales"].astype(float), group, 1)
    bias = np.repeat(np.abs(fields["biases"].astype(float)), group, 1)
    f16, tiny, f32 = 2.0**-11, 2.0**-25, 2.0**-20
    exact = rotated(x)
    bound = step / 2 + 15 * step * f16 + bias * f16 + 16 * tiny + np.abs(exact).max() * f32
    assert (np.abs(unrotated_decode(fields) - exact) <= bound).all()


@settings(FIXED, max_examples=60)
@given(vectors(limit=2000.0))
def test_decode_is_the_rotated_affine_map(x):
    fields = Q4_CODEC.encode(x)
    expected = rotated(unrotated_decode(fields))
    tolerance = np.abs(expected).max() * 1e-3 + 1e-6
    found = Q4_CODEC.decode(fields, x.shape[1])
    np.testing.assert_allclose(found.astype(float), expected, atol=tolerance)


def test_normal_vectors_lose_less_than_a_tenth():
    x = np.random.default_rng(1).standard_normal((512, 128)).astype(np.float16)
    error = Q4_CODEC.decode(Q4_CODEC.encode(x), 128).astype(np.float32) - x
    assert np.sqrt((error**2).mean()) < 0.1


@pytest.mark.parametrize("implementation", ["numpy", "c"])
@pytest.mark.parametrize("dim", DIMS)
def test_zero_constant_and_single_values(implementation, dim, monkeypatch, request):
    if implementation == "numpy":
        monkeypatch.setattr(codec, "_fast", None)
    else:
        request.getfixturevalue("fast")
    for zero in (0.0, -0.0):
        fields = Q4_CODEC.encode(np.full((3, dim), zero, np.float16))
        assert not any(x.tobytes().strip(b"\0") for x in fields.values())
        assert not Q4_CODEC.decode(fields, dim).any()
    for value in (1.0, -7.25, 300.0, 6e-8):
        constant = np.full((1, dim), value, np.float16)
        found = Q4_CODEC.decode(Q4_CODEC.encode(constant), dim)
        np.testing.assert_allclose(found.astype(float), constant, rtol=0.05, atol=1e-6)
    spike = np.zeros((1, dim), np.float16)
    spike[0, 3] = 1000
    found = Q4_CODEC.decode(Q4_CODEC.encode(spike), dim).astype(float)
    np.testing.assert_allclose(found, spike, atol=2)


def test_values_beyond_float16_after_rotation_saturate():
    fields = Q4_CODEC.encode(np.full((1, 64), -MAX_F16, np.float16))
    assert fields["biases"][0, 0] == -MAX_F16
    assert np.isfinite(fields["scales"]).all()


# ---- rows


@settings(FIXED, max_examples=40)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.sampled_from(["q4", "f16"]))
def test_cutting_and_joining_codes_is_encoding_cut_and_joined_rows(lengths, name):
    rows = sample_rows(sum(lengths))
    which = get_codec(name)
    for part in ("full", "sliding"):
        whole = encode_rows(SPEC, which, rows, part)
        pieces, start = [], 0
        for length in lengths:
            stop = start + length
            piece = tuple(type(g)(g.k[:, start:stop], g.v[:, start:stop]) for g in rows)
            pieces.append(encode_rows(SPEC, which, piece, part))
            assert same(slice_rows(whole, start, stop), pieces[-1])
            assert count_rows(pieces[-1]) == length
            start = stop
        assert same(concat_rows(pieces), whole)


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(
        x.dtype == theirs[name].dtype
        and x.shape == theirs[name].shape
        and x.tobytes() == theirs[name].tobytes()
        for name, x in ours.items()
    )


def test_f16_rows_come_back_exactly_part_by_part():
    rows = sample_rows(5)
    full = decode_rows(SPEC, F16_CODEC, encode_rows(SPEC, F16_CODEC, rows))
    sliding = decode_rows(SPEC, F16_CODEC, encode_rows(SPEC, F16_CODEC, rows, "sliding"), "sliding")
    for group, original, f, s in zip(SPEC.groups, rows, full, sliding, strict=True):
        mine, other = (f, s) if group.part == "full" else (s, f)
        assert mine.k.tobytes() == original.k.tobytes()
        assert mine.v.tobytes() == original.v.tobytes()
        assert other.k.shape == (len(group.layers), 0, group.n_kv_heads, group.key_dim)


def test_tensor_names_and_shapes():
    tensors = encode_rows(SPEC, Q4_CODEC, sample_rows(5))
    assert {name: (str(x.dtype), x.shape) for name, x in tensors.items()} == {
        "full.0.k.codes": ("uint32", (2, 5, 2, 4)),
        "full.0.k.scales": ("float16", (2, 5, 2, 1)),
        "full.0.k.biases": ("float16", (2, 5, 2, 1)),
        "full.0.v.codes": ("uint32", (2, 5, 2, 4)),
        "full.0.v.scales": ("float16", (2, 5, 2, 1)),
        "full.0.v.biases": ("float16", (2, 5, 2, 1)),
        "full.1.k.codes": ("uint32", (1, 5, 1, 12)),
        "full.1.k.scales": ("float16", (1, 5, 1, 3)),
        "full.1.k.biases": ("float16", (1, 5, 1, 3)),
    }
    assert tensor_bytes(tensors) == 5 * (8 * 16 + 8 * 4 + 12 * 4 + 3 * 4)


def test_tensors_that_do_not_fit_the_spec_are_refused():
    good = encode_rows(SPEC, Q4_CODEC, sample_rows(5))
    check_tensors(SPEC, Q4_CODEC, good, 5, "p", "full")
    name = "full.1.k.scales"
    for bad, reason in (
        ({k: v for k, v in good.items() if k != name}, name),
        ({**good, "extra": good[name]}, "extra"),
        ({**good, name: good[name].astype(np.float32)}, name),
        ({**good, name: good[name][:, :4]}, name),
        ({**good, name: good[name].reshape(1, 5, 3, 1)}, name),
    ):
        with pytest.raises(CorruptData, match=reason) as caught:
            check_tensors(SPEC, Q4_CODEC, bad, 5, "p", "full")
        assert caught.value.path == "p"
    for arguments in ((6, "p", "full"), (5, "p", "sliding")):
        with pytest.raises(CorruptData):
            check_tensors(SPEC, Q4_CODEC, good, *arguments)
    with pytest.raises(CorruptData):
        check_tensors(SPEC, F16_CODEC, good, 5, "p", "full")


def test_a_q4_block_of_smollm2_takes_at_most_0_285_of_float16():
    spec = ModelCacheSpec("llama", (LayerSpec("full", 3, 64, 64),) * 30)
    raw = pack_block(Q4_CODEC, "0" * 64, 256, encode_rows(spec, Q4_CODEC, sample_rows(256, spec)))
    assert len(raw) <= 0.285 * 256 * spec.f16_row_bytes
