"""The codecs: which quantizer for which side, golden bits, and rows cut and joined as codes."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import quantizers
from storage.cache_file import load
from storage.codec import (
    CODECS,
    check_tensors,
    codec_parameters,
    concat_rows,
    count_rows,
    decode_rows,
    encode_rows,
    get_codec,
    slice_rows,
    tensor_bytes,
)
from storage.errors import CorruptData
from storage.spec import LayerSpec, ModelCacheSpec
from storage.tiers import pack_block, unpack_block
from tests.require import require
from tests.store_contract import FIXED, SPEC, sample_rows, sample_vectors

GOLDEN = Path(__file__).parent / "golden"
Q4_CODEC, F16_CODEC = get_codec("q4"), get_codec("f16")
MLA = ModelCacheSpec("deepseek2", (LayerSpec("latent", 1, 576, 0),) * 3)


# ---- the codecs


def test_an_unknown_codec_is_refused_with_the_known_ones():
    for name in ("q4", "k8v4", "q8", "f16"):
        assert get_codec(name).name == name
    with pytest.raises(ValueError, match="unknown codec 'q5'; known: f16, k8v4, q4, q8"):
        get_codec("q5")


@pytest.mark.parametrize(
    ("name", "keys", "values"),
    [
        ("q4", (4, 128), (4, 64)),
        ("k8v4", (8, 128), (4, 64)),
        ("q8", (8, 128), (8, 64)),
    ],
)
def test_sides_have_quantizers_of_their_own(name, keys, values):
    codec, x = get_codec(name), sample_vectors(2, 3, 128)
    for side, (bits, hadamard) in (("k", keys), ("v", values)):
        assert codec.describe(side, 128) == {"bits": bits, "group": 64, "hadamard": hadamard}
        assert codec.fields(side, 128)["codes"] == (np.dtype("<u4"), 4 * bits)
        expected = quantizers.Affine(bits, hadamard).encode(x)
        assert same(codec.encode(side, x), expected)
        found = codec.decode(side, expected, 128)
        assert found.tobytes() == quantizers.Affine(bits, hadamard).decode(expected, 128).tobytes()


def test_the_card_says_how_every_tensor_is_stored():
    q4 = {"bits": 4, "group": 32, "hadamard": 32}
    assert codec_parameters(SPEC, Q4_CODEC) == dict.fromkeys(
        ("full.0.k", "full.0.v", "full.1.k", "sliding.0.k", "sliding.0.v"), q4
    )
    assert codec_parameters(SPEC, get_codec("k8v4"))["full.0.k"] == {**q4, "bits": 8}
    assert codec_parameters(MLA, get_codec("q8")) == {
        "full.0.k": {"bits": 8, "group": 64, "hadamard": 64}
    }
    assert codec_parameters(MLA, F16_CODEC) == {"full.0.k": {}}


@pytest.mark.parametrize("name", ["q4", "k8v4", "q8"])
def test_a_codec_refuses_a_head_dim_it_cannot_group(name):
    for side in ("k", "v"):
        with pytest.raises(ValueError, match="head dim of 80"):
            get_codec(name).fields(side, 80)


@pytest.mark.parametrize(("name", "limit"), [("q4", 0.285), ("k8v4", 0.41), ("q8", 0.535)])
def test_what_a_block_of_smollm2_takes_of_float16(name, limit):
    spec = ModelCacheSpec("llama", (LayerSpec("full", 3, 64, 64),) * 30)
    which = get_codec(name)
    raw = pack_block(which, "0" * 64, 256, encode_rows(spec, which, sample_rows(256, spec)))
    assert len(raw) <= limit * 256 * spec.f16_row_bytes


# ---- golden bits


@pytest.mark.parametrize("implementation", ["numpy", "c"])
@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("q4", "a8a538b1daf26487e56e19465cf93c164da7f5ce09ed09ebe83cd0b3158ef7a9"),
        ("k8v4", "298b0267f2c707879e8fdc8f817ae966a547b65f2e50400f52f4be967625c670"),
        ("q8", "e8b501475f991d75811eea8f9fd4bedd1824cdacf0efea5002cd365998b34d89"),
    ],
)
def test_golden_codes_decode_to_the_same_bits(name, digest, implementation, monkeypatch):
    if implementation == "numpy":
        monkeypatch.setattr(quantizers, "_fast", None)
    else:
        require("codec", quantizers._fast is not None, "storage._codec is not compiled")
    raw = (GOLDEN / f"block.{name}.safetensors").read_bytes()
    rows = decode_rows(SPEC, get_codec(name), load(raw, "golden")[0])
    found = b"".join(side.tobytes() for g in rows for side in (g.k, g.v))
    if name == "q4":
        assert found == (GOLDEN / "block.q4.decoded").read_bytes()
    assert hashlib.sha256(found).hexdigest() == digest


@pytest.mark.parametrize(
    ("name", "keys", "values"), [("q4", 0.4, 0.4), ("k8v4", 0.03, 0.4), ("q8", 0.03, 0.03)]
)
def test_golden_codes_are_near_what_was_encoded(name, keys, values):
    raw = (GOLDEN / f"block.{name}.safetensors").read_bytes()
    found = decode_rows(SPEC, get_codec(name), load(raw, "golden")[0])
    for group, ours, theirs in zip(SPEC.groups, found, sample_rows(16), strict=True):
        if group.part == "full":
            for x, y, limit in ((ours.k, theirs.k, keys), (ours.v, theirs.v, values)):
                assert np.sqrt(((x.astype(np.float32) - y) ** 2).sum() / max(x.size, 1)) < limit


# ---- rows


@settings(FIXED, max_examples=40)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.sampled_from([*CODECS]))
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


@pytest.mark.parametrize("name", [*CODECS])
def test_latent_rows_of_576_have_no_values(name):
    which, rows = get_codec(name), sample_rows(9, MLA)
    tensors = encode_rows(MLA, which, rows)
    assert all(tensor.startswith("full.0.k.") for tensor in tensors)
    check_tensors(MLA, which, tensors, 9, "p", "full")
    (found,) = decode_rows(MLA, which, tensors)
    assert found.v.shape == (3, 9, 1, 0)
    assert np.abs(found.k.astype(float) - rows[0].k).mean() < (0.5 if name == "q4" else 0.05)
    assert (found.k == rows[0].k).all() == (name == "f16")


@pytest.mark.parametrize("name", [*CODECS])
def test_an_executor_changes_no_row(name, monkeypatch):
    monkeypatch.setattr(quantizers, "PIECE_BYTES", 1)
    which, rows = get_codec(name), sample_rows(21)
    with ThreadPoolExecutor(3) as executor:
        for part in ("full", "sliding"):
            tensors = encode_rows(SPEC, which, rows, part)
            assert same(encode_rows(SPEC, which, rows, part, executor), tensors)
            found = decode_rows(SPEC, which, tensors, part, executor)
            for ours, theirs in zip(found, decode_rows(SPEC, which, tensors, part), strict=True):
                assert ours.k.tobytes() == theirs.k.tobytes()
                assert ours.v.tobytes() == theirs.v.tobytes()


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", [*CODECS])
def test_what_is_not_finite_is_refused_wherever_it_is(name, wrong):
    """As a whole file with a sound checksum would bring it: no decoder ever sees it."""
    which = get_codec(name)
    good = encode_rows(SPEC, which, sample_rows(5))
    halves = [tensor for tensor, x in good.items() if x.dtype == np.float16]
    assert len(halves) == (3 if name == "f16" else 6)
    for tensor in halves:
        bad = good[tensor].copy()
        bad.flat[-1] = wrong
        raw = pack_block(which, "0" * 64, 5, {**good, tensor: bad})
        with pytest.raises(CorruptData, match=f"{tensor} holds an infinity or a NaN") as caught:
            unpack_block(raw, "p", SPEC, which, "0" * 64, 5)
        assert caught.value.path == "p"
    unpack_block(pack_block(which, "0" * 64, 5, good), "p", SPEC, which, "0" * 64, 5)


def test_empty_rows_are_fine():
    for which in CODECS.values():
        tensors = encode_rows(SPEC, which, sample_rows(0))
        check_tensors(SPEC, which, tensors, 0, "p", "full")
        assert count_rows(tensors) == 0
        assert decode_rows(SPEC, which, tensors)[0].k.shape == (2, 0, 2, 32)
