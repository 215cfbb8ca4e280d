"""The codecs in MLX's operations against the reference: each decodes what the other encoded."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.codec import CODECS
from storage.quantizers import Affine, Fields, Quantizer, all_finite
from tests.require import require
from tests.store_contract import sample_vectors

ROOT = Path(__file__).resolve().parent.parent
QUANTIZERS = sorted(
    {q for c in CODECS.values() for q in (c.keys, c.values)} | {Affine(8, 1)}, key=str
)
DIMS = [32, 64, 96, 128, 256, 576]
MAX_F16 = 65504.0

each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)


@pytest.fixture
def mlx() -> Any:
    require("mlx", importlib.util.find_spec("mlx") is not None, "mlx is not installed")
    from actors.engines import mlx_codec

    return mlx_codec


def to_mlx(fields: Fields) -> dict[str, Any]:
    import mlx.core as mx

    return {name: mx.array(x) for name, x in fields.items()}


def to_numpy(fields: dict[str, Any]) -> Fields:
    return {name: np.array(x) for name, x in fields.items()}


def vectors(kind: str, *shape: int) -> np.ndarray:
    """Normal, or as keys of real models are: some channels ten times as large, some off zero."""
    rng = np.random.default_rng(shape[-1])
    x = rng.standard_normal(shape)
    if kind == "outliers":
        x *= np.exp(0.5 * rng.standard_normal(shape[-1]))
        x[..., rng.integers(0, shape[-1], 3)] *= 12
        x[..., 5] += 20
    return x.astype(np.float16)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt((x.astype(np.float64) ** 2).mean()))


@each_quantizer
@pytest.mark.parametrize("dim", DIMS)
def test_mlx_decodes_our_codes_to_the_values_of_the_reference(mlx, quantizer: Quantizer, dim: int):
    fields = quantizer.encode(vectors("outliers", 3, 7, 2, dim))
    expected = quantizer.decode(fields, dim).astype(np.float64)
    found = np.array(mlx.decode(quantizer, to_mlx(fields), dim))
    assert (found.dtype, found.shape) == (np.float16, (3, 7, 2, dim))
    # One unit of the last place of float16: the sums of the rotation run in another order.
    bound = np.spacing(np.abs(expected).astype(np.float16)).astype(float)
    bound += np.abs(expected).max() * 2.0**-22
    assert (np.abs(found - expected) <= bound).all()


@each_quantizer
@pytest.mark.parametrize("kind", ["normal", "outliers"])
@pytest.mark.parametrize("dim", DIMS)
def test_our_decoder_reads_what_mlx_encodes_as_well_as_our_own(
    mlx, quantizer: Quantizer, dim: int, kind: str
):
    import mlx.core as mx

    x = vectors(kind, 3, 64, 2, dim)
    fields = to_numpy(mlx.encode(quantizer, mx.array(x)))
    ours = quantizer.encode(x)
    assert {n: (y.dtype, y.shape) for n, y in fields.items()} == {
        n: (y.dtype, y.shape) for n, y in ours.items()
    }
    error = rms(quantizer.decode(fields, dim).astype(float) - x)
    assert error <= 1.05 * rms(quantizer.decode(ours, dim).astype(float) - x)


@each_quantizer
@pytest.mark.parametrize("kind", ["normal", "outliers"])
@pytest.mark.parametrize("dim", DIMS)
def test_mlx_encodes_bit_for_bit_as_the_reference(mlx, quantizer: Quantizer, dim: int, kind: str):
    import mlx.core as mx

    x = vectors(kind, 64, 3, dim)
    x[0], x[1], x[2] = 0, x[1].round(), np.float16(6e-8)
    ours, theirs = quantizer.encode(x), to_numpy(mlx.encode(quantizer, mx.array(x)))
    assert ours.keys() == theirs.keys()
    for name, y in ours.items():
        assert y.tobytes() == theirs[name].tobytes(), name
    rounded = mlx.encode(quantizer, mx.array(x.astype(np.float32)))
    for name, y in to_numpy(rounded).items():  # float32 goes in as float16
        assert y.tobytes() == theirs[name].tobytes(), name


@each_quantizer
def test_mlx_keeps_codes_that_it_decoded(mlx, quantizer: Quantizer):
    """Cutting in MLX and cutting here are the same: fields go from one to the other as they are."""
    fields = quantizer.encode(sample_vectors(2, 9, 3, 64))
    whole = np.array(mlx.decode(quantizer, to_mlx(fields), 64))
    piece = {name: y[:, 2:5] for name, y in to_mlx(fields).items()}
    assert np.array(mlx.decode(quantizer, piece, 64)).tobytes() == whole[:, 2:5].tobytes()


@each_quantizer
def test_extreme_values_stay_finite(mlx, quantizer: Quantizer):
    import mlx.core as mx

    for dim in (32, 96, 256):
        x = np.zeros((7, dim), np.float16)
        x[1, 3], x[2], x[3], x[4, ::2], x[4, 1::2] = (
            MAX_F16, MAX_F16, -MAX_F16, MAX_F16, -MAX_F16,
        )  # fmt: skip
        x[5], x[6] = 6e-8, 1.0
        fields = to_numpy(mlx.encode(quantizer, mx.array(x)))
        assert all(all_finite(y) for y in fields.values() if y.dtype == np.float16)
        found = np.array(mlx.decode(quantizer, to_mlx(fields), dim))
        assert all_finite(found)
        expected = quantizer.decode(quantizer.encode(x), dim).astype(float)
        np.testing.assert_allclose(found.astype(float), expected, rtol=0.01, atol=1e-3)
        assert not found[0].any()


def test_a_quantizer_without_a_form_in_mlx_is_refused(mlx):
    import mlx.core as mx

    class Other:
        pass

    for call in (
        lambda: mlx.encode(Other(), mx.zeros((1, 64))),
        lambda: mlx.decode(Other(), {}, 64),
    ):
        with pytest.raises(TypeError, match="no form in MLX"):
            call()
    with pytest.raises(ValueError, match="head dim of 80"):
        mlx.encode(Affine(4, 64), mx.zeros((1, 80)))


def test_importing_the_module_does_not_import_mlx():
    code = "import sys, actors.engines.mlx_codec, storage.codec; assert 'mlx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
