"""The quantizers: layout, numpy against C, error bounds, extreme values, and threads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from storage import quantizers
from storage.quantizers import F16, Affine, Fields, all_finite, decode_numpy, encode_numpy
from tests.require import require
from tests.store_contract import FIXED, sample_vectors

K4, V4, K8 = Affine(4, 1024), Affine(4, 64), Affine(8, 1024)
PLAIN8 = Affine(8, 1)  # not rotated
AFFINE = [K4, V4, K8, PLAIN8]
DIMS = list(range(32, 577, 32))
MAX_F16 = 65504.0


@pytest.fixture
def fast():
    require("codec", quantizers._fast is not None, "storage._codec is not compiled")
    return quantizers._fast


def names(quantizer: Affine) -> str:
    return f"{quantizer.bits}-bit-{quantizer.longest}"


each_affine = pytest.mark.parametrize("affine", AFFINE, ids=names)


def hadamard(block: int) -> np.ndarray:
    """Sylvester's matrix, orthonormal, in float64."""
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(block)


def largest_power_of_two(dim: int) -> int:
    return max(2**i for i in range(11) if dim % 2**i == 0)


def rotated(x: np.ndarray, block: int) -> np.ndarray:
    """(N, D), every run of `block` values rotated, in float64."""
    runs = x.astype(np.float64).reshape(len(x), -1, block)
    return (runs @ hadamard(block)).reshape(x.shape)


def unrotated_decode(fields: Fields, bits: int) -> np.ndarray:
    """`q * scale + bias` in float64, from the layout's description alone."""
    codes, scales, biases = (fields[name] for name in ("codes", "scales", "biases"))
    n, words = codes.shape
    per_word = 32 // bits
    q = np.empty((n, words * per_word))
    for w in range(words):
        for i in range(per_word):
            q[:, per_word * w + i] = (codes[:, w] >> (bits * i)) & (2**bits - 1)
    group = words * per_word // scales.shape[1]
    return q * np.repeat(scales.astype(float), group, 1) + np.repeat(biases.astype(float), group, 1)


def reference(affine: Affine, x: np.ndarray) -> Fields:
    dim = x.shape[-1]
    found = encode_numpy(x, affine.bits, affine.group(dim), affine.hadamard(dim))
    return dict(zip(("codes", "scales", "biases"), found, strict=True))


def reference_decode(affine: Affine, fields: Fields, dim: int) -> np.ndarray:
    return decode_numpy(
        *(fields[name] for name in ("codes", "scales", "biases")),
        affine.bits, affine.group(dim), affine.hadamard(dim),
    )  # fmt: skip


def same(ours: Fields, theirs: Fields) -> bool:
    return ours.keys() == theirs.keys() and all(
        x.dtype == theirs[name].dtype
        and x.shape == theirs[name].shape
        and x.tobytes() == theirs[name].tobytes()
        for name, x in ours.items()
    )


# ---- the layout


@pytest.mark.parametrize(
    ("bits", "first_word"), [(4, 0x630DA741), (8, 0x0A070401)], ids=["4 bits", "8 bits"]
)
def test_words_hold_the_least_significant_code_first(bits, first_word, monkeypatch):
    """Hand-made: scale 2, bias -1."""
    per_word, levels = 32 // bits, 2**bits
    q = [(3 * i + 1) % levels for i in range(32)]
    words = [
        sum(code << (bits * i) for i, code in enumerate(q[start : start + per_word]))
        for start in range(0, 32, per_word)
    ]
    assert words[0] == first_word
    fields = {
        "codes": np.array([words], np.uint32),
        "scales": np.array([[2]], np.float16),
        "biases": np.array([[-1]], np.float16),
    }
    values = np.array([[2.0 * code - 1 for code in q]])
    for use in (quantizers._fast, None):
        monkeypatch.setattr(quantizers, "_fast", use)
        assert (Affine(bits, 1).decode(fields, 32) == values).all()
        found = Affine(bits, 32).decode(fields, 32)
        np.testing.assert_allclose(found, values @ hadamard(32), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("dim", "group", "keys", "values"), [
    (32, 32, 32, 32), (64, 64, 64, 64), (96, 32, 32, 32), (128, 64, 128, 64), (192, 64, 64, 64),
    (256, 64, 256, 64), (576, 64, 64, 64), (1024, 64, 1024, 64),
])  # fmt: skip
def test_group_and_rotation_follow_from_the_head_dim(dim, group, keys, values):
    assert K4.describe(dim) == {"bits": 4, "group": group, "hadamard": keys}
    assert V4.describe(dim) == {"bits": 4, "group": group, "hadamard": values}
    assert PLAIN8.describe(dim) == {"bits": 8, "group": group, "hadamard": 1}
    for affine in AFFINE:
        assert affine.fields(dim) == {
            "codes": (np.dtype("<u4"), dim * affine.bits // 32),
            "scales": (np.dtype("<f2"), dim // group),
            "biases": (np.dtype("<f2"), dim // group),
        }


@each_affine
@pytest.mark.parametrize(
    ("dim", "reason"), [(80, "32"), (72, "32"), (8, "32"), (1, "32"), (1056, "over 1024")]
)
def test_a_head_dim_that_cannot_be_grouped_is_refused(affine, dim, reason):
    for call in (
        lambda: affine.encode(np.zeros((1, dim), np.float16)),
        lambda: affine.fields(dim),
        lambda: affine.describe(dim),
    ):
        with pytest.raises(ValueError, match=f"head dim of {dim}.*{reason}"):
            call()


def test_f16_keeps_every_bit():
    x = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(8, 2, 4096)
    fields = F16().encode(x)
    assert fields["data"].tobytes() == F16().decode(fields, 4096).tobytes() == x.tobytes()
    assert (F16().fields(80), F16().describe(80)) == ({"data": (np.dtype("<f2"), 80)}, {})


# ---- golden bits


@pytest.mark.parametrize("implementation", ["numpy", "c"])
@pytest.mark.parametrize(
    ("affine", "digest"),
    [
        (K4, "cca4b60de2c3faebcfbeef0c3c9b28809fb440fc9850fdcfef4e95c88bdc2234"),
        (V4, "c6f0e3dfad8a4cafb0112975d1f4f4755bc5bfdc3b8a4b8712ff2d8d11f3a25a"),
        (PLAIN8, "1c0a8c362982f639f179fbf5bd06e2974ebda889ade9b3545b9557161869898c"),
        (K8, "0f9ba19a4a7cb52e50c48039f4d9c783a5839e65f99c0273cefa70cff3f7c0e9"),
    ],
    ids=["keys in 4 bits", "values in 4 bits", "8 bits not rotated", "keys in 8 bits"],
)
def test_golden_decoding_of_every_head_dim(affine, digest, implementation, monkeypatch, request):
    """From codes, scales and biases that are made by integer arithmetic."""
    if implementation == "numpy":
        monkeypatch.setattr(quantizers, "_fast", None)
    else:
        request.getfixturevalue("fast")
    found = hashlib.sha256()
    for dim in (32, 64, 96, 128, 192, 256, 512, 576):
        widths = {name: width for name, (_, width) in affine.fields(dim).items()}
        words = np.arange(7 * widths["codes"], dtype=np.uint64).reshape(7, -1)
        fields = {
            "codes": ((words + 1) * 2654435761 % 2**32).astype(np.uint32),
            "scales": sample_vectors(7, widths["scales"]) / np.float16(64),
            "biases": -sample_vectors(7, widths["biases"]),
        }
        found.update(affine.decode(fields, dim).tobytes())
    assert found.hexdigest() == digest


# ---- numpy and C


@each_affine
@pytest.mark.parametrize("dim", DIMS)
def test_c_and_numpy_give_the_same_bytes(fast, affine, dim):
    for n in (0, 1, 2, 15, 16, 17, 33):
        x = np.random.default_rng(dim + n).standard_normal((n, dim)).astype(np.float16)
        fields = affine.encode(x)
        assert same(fields, reference(affine, x))
        expected = reference_decode(affine, fields, dim)
        assert affine.decode(fields, dim).tobytes() == expected.tobytes()


def float16s(limit: float) -> st.SearchStrategy[float]:
    return st.floats(-limit, limit, width=16) | st.sampled_from([0.0, -0.0, 6e-8, -6e-8, limit])


@st.composite
def vectors(draw: st.DrawFn, limit: float = MAX_F16) -> np.ndarray:
    """(N, D) float16: every bit pattern that is a number, zeros of both signs, subnormals."""
    shape = (draw(st.integers(1, 18)), draw(st.sampled_from(DIMS)))
    return draw(hnp.arrays(np.float16, shape, elements=float16s(limit)))


affines = st.sampled_from(AFFINE)


@settings(FIXED, max_examples=200)
@given(affines, vectors())
def test_c_and_numpy_agree_on_any_numbers(affine, x):
    require("codec", quantizers._fast is not None, "storage._codec is not compiled")
    fields = affine.encode(x)
    assert same(fields, reference(affine, x))
    expected = reference_decode(affine, fields, x.shape[1])
    assert affine.decode(fields, x.shape[1]).tobytes() == expected.tobytes()


@settings(FIXED, max_examples=200)
@given(
    affines,
    st.sampled_from(DIMS),
    st.integers(1, 18),
    st.integers(0, 2**32 - 1),
    hnp.arrays(np.float16, 8, elements=st.floats(-MAX_F16, MAX_F16, width=16)),
)
def test_c_and_numpy_decode_any_codes_alike_and_finitely(affine, dim, n, seed, numbers):
    require("codec", quantizers._fast is not None, "storage._codec is not compiled")
    rng = np.random.default_rng(seed)
    groups = dim // affine.group(dim)
    fields = {
        "codes": rng.integers(0, 2**32, (n, dim * affine.bits // 32), dtype=np.uint32),
        "scales": rng.choice(numbers, (n, groups)),
        "biases": rng.choice(numbers, (n, groups)),
    }
    found = affine.decode(fields, dim)
    assert found.tobytes() == reference_decode(affine, fields, dim).tobytes()
    assert np.isfinite(found).all()


def test_c_converts_every_float16_as_numpy_does(fast):
    """With scale 0 a vector of one bias decodes to that bias times the root of 32, and zeros; or,
    not rotated, to that bias 32 times."""
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    biases = every[np.isfinite(every)].reshape(-1, 1)
    fields = {"codes": np.zeros((len(biases), 4), np.uint32), "biases": biases}
    found = V4.decode({**fields, "scales": np.zeros_like(biases)}, 32)
    expected = (biases.astype(float) * np.sqrt(32)).clip(-MAX_F16, MAX_F16)
    np.testing.assert_allclose(found[:, 0], expected[:, 0], rtol=2**-10, atol=2**-24)
    assert not found[:, 1:].any()
    assert (Affine(4, 1).decode({**fields, "scales": np.zeros_like(biases)}, 32) == biases).all()


def test_c_refuses_what_does_not_fit(fast):
    good = {
        "vectors": np.zeros((2, 64), np.float16), "codes": np.zeros((2, 8), np.uint32),
        "scales": np.zeros((2, 1), np.float16), "biases": np.zeros((2, 1), np.float16),
        "bits": 4, "group": 64, "block": 64,
    }  # fmt: skip
    frozen = np.zeros((2, 64), np.float16)
    frozen.flags.writeable = False
    for function, bad in (
        (function, bad)
        for function in (fast.encode, fast.decode)
        for bad in (
            {"vectors": np.zeros((2, 64), np.float32)},
            {"vectors": np.zeros((3, 64), np.float16)},
            {"vectors": np.zeros((1, 2048), np.float16)},
            {"vectors": np.zeros((64, 2), np.float16).T},
            {"codes": good["codes"].astype(np.uint64)},
            {"codes": np.zeros((2, 9), np.uint32)},
            {"scales": np.zeros((1, 1), np.float16)},
            {"biases": np.zeros((3, 1), np.float16)},
            {"bits": 8}, {"bits": 5}, {"bits": 0},
            {"group": 48}, {"group": 0}, {"group": 4},
            {"block": 128}, {"block": 3}, {"block": 0},
        )
    ):  # fmt: skip
        function(*good.values())
        with pytest.raises(ValueError, match=r"do not fit|float16|contiguous"):
            function(*{**good, **bad}.values())
    with pytest.raises(ValueError, match="read-only"):
        fast.decode(*{**good, "vectors": frozen}.values())
    with pytest.raises(ValueError, match="do not fit"):
        fast.encode(*{**good, "vectors": np.float16(0)}.values())
    with pytest.raises(TypeError):
        fast.encode(*[*good.values()][:6])


# ---- quality


@settings(FIXED, max_examples=200)
@given(affines, vectors(limit=2000.0))
def test_error_is_at_most_half_a_step(affine, x):
    """In the rotated domain, plus what rounding scale and bias to float16 costs."""
    fields = affine.encode(x)
    dim = x.shape[1]
    group = affine.group(dim)
    block = min(affine.longest, largest_power_of_two(dim))
    step = np.repeat(fields["scales"].astype(float), group, 1)
    bias = np.repeat(np.abs(fields["biases"].astype(float)), group, 1)
    f16, tiny, f32 = 2.0**-11, 2.0**-25, 2.0**-20
    exact = rotated(x, block)
    levels = 2**affine.bits - 1
    bound = step / 2 + levels * step * f16 + bias * f16 + (levels + 1) * tiny
    bound += np.abs(exact).max() * f32
    assert (np.abs(unrotated_decode(fields, affine.bits) - exact) <= bound).all()


@settings(FIXED, max_examples=100)
@given(affines, vectors(limit=2000.0))
def test_decode_is_the_rotated_affine_map(affine, x):
    fields, dim = affine.encode(x), x.shape[1]
    block = min(affine.longest, largest_power_of_two(dim))
    expected = rotated(unrotated_decode(fields, affine.bits), block)
    tolerance = np.abs(expected).max() * 1e-3 + 1e-6
    np.testing.assert_allclose(affine.decode(fields, dim).astype(float), expected, atol=tolerance)


@pytest.mark.parametrize(
    ("affine", "limit"), [(K4, 0.1), (V4, 0.1), (K8, 0.006), (PLAIN8, 0.006)], ids=str
)
def test_normal_vectors_lose_little(affine, limit):
    x = np.random.default_rng(1).standard_normal((512, 128)).astype(np.float16)
    error = affine.decode(affine.encode(x), 128).astype(np.float32) - x
    assert limit / 2 < np.sqrt((error**2).mean()) < limit


def either_implementation(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("implementation", ["numpy", "c"])(test)


@dataclass
class Use:
    monkeypatch: pytest.MonkeyPatch
    request: pytest.FixtureRequest

    def __call__(self, implementation: str) -> None:
        if implementation == "numpy":
            self.monkeypatch.setattr(quantizers, "_fast", None)
        else:
            self.request.getfixturevalue("fast")


@pytest.fixture
def use(monkeypatch, request):
    return Use(monkeypatch, request)


@each_affine
@either_implementation
def test_zero_constant_and_single_values(use, implementation, affine):
    use(implementation)
    for dim in DIMS:
        for zero in (0.0, -0.0):
            fields = affine.encode(np.full((3, dim), zero, np.float16))
            assert not any(x.tobytes().strip(b"\0") for x in fields.values())
            assert not affine.decode(fields, dim).any()
        for value in (1.0, -7.25, 300.0, 6e-8, -6e-8):
            constant = np.full((1, dim), value, np.float16)
            found = affine.decode(affine.encode(constant), dim)
            # Half a unit of the last place of float16 in the scale, times the codes.
            tiny = 2**affine.bits * 2.0**-25 * np.sqrt(dim)
            np.testing.assert_allclose(found.astype(float), constant, rtol=0.05, atol=tiny)
        spike = np.zeros((1, dim), np.float16)
        spike[0, 3] = 1000
        found = affine.decode(affine.encode(spike), dim).astype(float)
        np.testing.assert_allclose(found, spike, atol=2)


@each_affine
@either_implementation
def test_the_largest_float16_come_back_finite(use, implementation, affine):
    """A lone 65504 rotates to values whose scale rounds up: their sum passes 65520, which would
    round to infinity."""
    use(implementation)
    for dim in DIMS:
        x = np.zeros((4, dim), np.float16)
        x[0, 3], x[1], x[2], x[3, ::2], x[3, 1::2] = MAX_F16, MAX_F16, -MAX_F16, MAX_F16, -MAX_F16
        fields = affine.encode(x)
        assert all_finite(fields["scales"])
        assert all_finite(fields["biases"])
        found = affine.decode(fields, dim).astype(float)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found[0, 3], MAX_F16, rtol=0.01)
        assert (np.sign(found[2]) <= 0).all()


def test_values_beyond_float16_after_rotation_saturate():
    fields = K4.encode(np.full((1, 64), -MAX_F16, np.float16))
    assert fields["biases"][0, 0] == -MAX_F16


# ---- pieces


@settings(FIXED, max_examples=60)
@given(affines, st.sampled_from(DIMS), st.lists(st.integers(0, 20), min_size=1, max_size=4))
def test_a_vector_is_encoded_alike_in_any_company(affine, dim, lengths):
    x = np.random.default_rng(dim).standard_normal((sum(lengths), dim)).astype(np.float16)
    whole, start = affine.encode(x), 0
    for length in lengths:
        piece = {name: array[start : start + length] for name, array in whole.items()}
        assert same(affine.encode(x[start : start + length]), piece)
        start += length


@each_affine
@either_implementation
def test_an_executor_changes_nothing(use, implementation, affine, monkeypatch):
    use(implementation)
    monkeypatch.setattr(quantizers, "PIECE_BYTES", 4096)
    x = sample_vectors(7, 11, 3, 128)
    strided = x.swapaxes(1, 2)
    with ThreadPoolExecutor(3) as executor:
        for rows in (x, strided, x[:1], x[:0]):
            alone = affine.encode(rows)
            assert same(alone, affine.encode(rows, executor))
            expected = affine.decode(alone, 128).tobytes()
            assert affine.decode(alone, 128, executor).tobytes() == expected


@pytest.mark.parametrize(("layers", "pieces"), [(1, 1), (2, 2), (3, 3), (7, 4)])
def test_layers_are_spread_over_the_executor_in_pieces_worth_it(layers, pieces, monkeypatch):
    calls: list[slice] = []

    class Recorder(ThreadPoolExecutor):
        def map(self, function, parts):  # type: ignore[no-untyped-def, override]
            return super().map(function, [calls.append(part) or part for part in parts])

    x = sample_vectors(layers, 64, 64)
    monkeypatch.setattr(quantizers, "PIECE_BYTES", x.nbytes // pieces)
    with Recorder(2) as executor:
        PLAIN8.encode(x, executor)
    assert len(calls) == (pieces if pieces > 1 else 0)
    if calls:
        assert [i for part in calls for i in range(part.start, part.stop)] == list(range(layers))


def test_an_error_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(quantizers, "PIECE_BYTES", 1)
    fields = PLAIN8.encode(sample_vectors(4, 2, 64))
    with ThreadPoolExecutor(2) as executor, pytest.raises(ValueError, match=r"fit|reshape"):
        PLAIN8.decode({**fields, "scales": fields["scales"][:, :1]}, 64, executor)


# ---- finite


@settings(FIXED, max_examples=100)
@given(hnp.arrays(np.uint16, hnp.array_shapes(max_dims=3, min_side=0, max_side=9)))
def test_all_finite_is_what_numpy_says(bits):
    assert all_finite(bits.view(np.float16)) == np.isfinite(bits.view(np.float16)).all()


def test_every_float16_is_judged_rightly():
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    wrong = [i for i, x in enumerate(every) if all_finite(every[i : i + 1]) != np.isfinite(x)]
    assert not wrong
