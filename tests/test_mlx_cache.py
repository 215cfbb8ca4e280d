"""Batched caches of MLX: against one row at a time, against float attention, and moved about."""

import importlib.util
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.codec import get_codec
from storage.quantizers import Affine
from tests.require import require

Q4, K8V4 = get_codec("q4"), get_codec("k8v4")
TOLERANCE = 1e-5  # of float32 sums in another order
# name -> (codec, n_heads, n_kv_heads, key dim, value dim, latent)
GEOMETRIES = {
    "heads alike": (Q4, 4, 4, 64, 64, 0),
    "grouped": (Q4, 6, 2, 64, 64, 0),
    "dims that differ": (Q4, 4, 1, 128, 64, 0),
    "groups of 32": (Q4, 4, 2, 96, 32, 0),
    "two widths": (K8V4, 4, 2, 64, 128, 0),
    "latent": (Q4, 4, 1, 192, 128, 128),
}
each_geometry = pytest.mark.parametrize("name", GEOMETRIES)
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def mlx() -> Any:
    require("mlx", importlib.util.find_spec("mlx") is not None, "mlx is not installed")
    from actors.engines import mlx_cache

    return mlx_cache


def new(mlx: Any, name: str, *, quantized: bool = True, window: int = 0) -> Any:
    codec, _, _, _, _, latent = GEOMETRIES[name]
    if not quantized:
        return mlx.BatchKVCache(window=window, latent=latent)
    return mlx.BatchQuantizedKVCache(codec.keys, codec.values, latent=latent)


def noise(seed: int, name: str, n: int) -> tuple[Any, Any, Any]:
    """Queries, keys and values of n tokens, the same for the first of them whatever n is; no values
    where latents are."""
    import mlx.core as mx

    _, heads, kv_heads, key_dim, value_dim, latent = GEOMETRIES[name]

    def normal(stream: int, heads: int, dim: int) -> Any:
        x = np.random.default_rng([seed, stream]).standard_normal((n, heads, dim))
        return mx.array(x.swapaxes(0, 1)[None].astype(np.float32))

    v = None if latent else normal(2, kv_heads, value_dim)
    return normal(0, heads, key_dim), normal(1, kv_heads, key_dim), v


def fed(cache: Any, seed: int, name: str, n: int) -> Any:
    if n:
        _, k, v = noise(seed, name, n)
        cache.update_and_fetch(k, v)
    return cache


def attend(cache: Any, q: Any, k: Any, v: Any) -> np.ndarray:
    mask = cache.make_mask(q.shape[2])
    return np.array(cache.attend(q, k, v, q.shape[-1] ** -0.5, mask))


def stack(parts: list[tuple[Any, Any, Any]]) -> list[Any]:
    import mlx.core as mx

    return [
        mx.concatenate(x) if x[0] is not None else None for x in map(list, zip(*parts, strict=True))
    ]


def contents(cache: Any) -> list[list[bytes]]:
    """Every sequence's held rows, bit for bit."""
    return [
        [
            np.array(x).tobytes()
            for x in cache.read(i, cache.n_rows(i) - cache.n_held(i), cache.n_rows(i))
        ]
        for i in range(cache.n_sequences)
    ]


@each_geometry
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("n", [1, 5])
def test_a_padded_batch_attends_as_its_rows_do(mlx: Any, name: str, quantized: bool, n: int):
    held = [37, 1, 20, 64]
    rows = [fed(new(mlx, name, quantized=quantized), i, name, h) for i, h in enumerate(held)]
    more = [noise(100 + i, name, n) for i in range(4)]
    batch = mlx.BatchKVCache.merge(rows)
    assert batch.left_padding.tolist() == [27, 63, 44, 0]
    found = attend(batch, *stack(more))
    for i, (row, x) in enumerate(zip(rows, more, strict=True)):
        np.testing.assert_allclose(found[i : i + 1], attend(row, *x), atol=TOLERANCE)
    assert batch.offset.tolist() == [h + n for h in held]
    assert contents(batch) == [contents(row)[0] for row in rows]


@each_geometry
@pytest.mark.parametrize("n", [1, 17])
def test_attention_on_codes_is_that_on_the_decoded_rows(mlx: Any, name: str, n: int):
    """Nothing but the codec's error lies between float attention and this. What was loaded is in
    codes, what was computed just now is not."""
    import mlx.core as mx

    codec, _, _, key_dim, value_dim, latent = GEOMETRIES[name]
    cache = new(mlx, name)
    cache.write([x[None] for x in fed(new(mlx, name), 1, name, 50).read(0, 0, 50)], 50)
    found = attend(cache, *(x := noise(2, name, n)))
    in_floats = attend(fed(new(mlx, name, quantized=False), 1, name, 50), *x)
    fields = [np.array(y) for y in cache.read(0, 0, 50)]
    names = ("codes", "scales", "biases")
    k = codec.decode("k", dict(zip(names, fields[:3], strict=True)), key_dim)
    v = k[..., :latent]
    if not latent:
        v = codec.decode("v", dict(zip(names, fields[3:], strict=True)), value_dim)
    last = [np.array(y[0]).astype(np.float16) for y in x[1:] if y is not None]
    k = np.concatenate([k, last[0]], axis=1)
    v = np.concatenate([v, last[0][..., :latent] if latent else last[1]], axis=1)
    columns = mx.arange(50 + n)
    wanted = mx.fast.scaled_dot_product_attention(
        x[0],
        mx.array(k[None].astype(np.float32)),
        mx.array(v[None].astype(np.float32)),
        scale=key_dim**-0.5,
        mask=columns <= columns[-n:, None],
    )
    np.testing.assert_allclose(found, np.array(wanted), atol=4e-3)  # decode rounds to float16
    error = np.abs(found - in_floats).mean() / np.abs(in_floats).mean()
    assert 0.005 < error < 0.3, error


@each_geometry
def test_however_a_prompt_is_cut_its_tokens_see_the_same(mlx: Any, name: str):
    """Which rows a token sees in float16 depends on its position alone."""
    prompt, results = noise(7, name, 150), []
    for sizes in ([150], [1] * 150, [100, 1, 49], [7] * 21 + [3], [33, 32, 31, 54]):
        cache, at, seen = new(mlx, name), 0, []
        for n in sizes:
            part = [x[:, :, at : at + n] if x is not None else None for x in prompt]
            seen.append(attend(cache, *part))
            at += n
        results.append(np.concatenate(seen, axis=2))
        assert contents(cache)[0] == [x.tobytes() for x in codes(7, name, 150)]
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=TOLERANCE)
    cache = fed(new(mlx, name), 7, name, 150)
    loaded = new(mlx, name)
    loaded.write([x[None] for x in cache.read(0, 0, 150)], 150)
    x = noise(8, name, 1)
    near, far = attend(cache, *x), attend(loaded, *x)
    assert np.abs(near - far).max() > 1e-3  # the last rows, in floats and in codes


@each_geometry
def test_a_prompts_keys_are_decoded_where_that_is_faster(
    mlx: Any, name: str, monkeypatch: pytest.MonkeyPatch
):
    """Either way gives the same: what differs is the order of sums."""
    results, calls, decoded = [], [], mlx._decoded
    monkeypatch.setattr(mlx, "_decoded", lambda *x: calls.append(1) or decoded(*x))
    for first in (1, 1 << 30):
        monkeypatch.setattr(mlx.BatchQuantizedKVCache, "decode_from", first)
        cache = fed(new(mlx, name), 1, name, 90)
        results.append(attend(cache, *noise(2, name, 40)))
        assert len(calls) == 1
    np.testing.assert_allclose(*results, atol=TOLERANCE)


@each_geometry
def test_codes_are_those_of_the_codecs_encoder(mlx: Any, name: str):
    cache = fed(new(mlx, name), 3, name, 30)
    for x, y in zip(cache.read(0, 0, 30), codes(3, name, 30), strict=True):
        assert np.array(x).tobytes() == y.tobytes()


@settings(max_examples=25)
@given(held=lengths, order=st.randoms(use_true_random=False), more=st.integers(1, 300))
@pytest.mark.parametrize("name", ["grouped", "latent"])
def test_merge_extract_merge_changes_no_bit(mlx: Any, name: str, held: list[int], order, more: int):
    rows = [fed(new(mlx, name), i, name, h) for i, h in enumerate(held)]
    before = [contents(row)[0] for row in rows]
    batch = mlx.BatchKVCache.merge(rows)
    assert contents(batch) == before
    again = [batch.extract(i) for i in range(len(held))]
    assert [contents(x)[0] for x in again] == before
    assert all(x.left_padding.tolist() == [0] for x in again)
    places = list(range(len(held)))
    order.shuffle(places)
    batch = mlx.BatchKVCache.merge([again[i] for i in places])
    _, k, v = stack([noise(9, name, more)] * len(held))
    batch.update_and_fetch(k, v)
    back = [batch.extract(places.index(i)) for i in range(len(held))]
    for x in back:
        assert x.trim(more) == more
    assert [contents(x)[0] for x in back] == before
    assert [contents(x)[0] for x in again] == before  # shared arrays are not written through


@settings(max_examples=40)
@given(data=st.data())
def test_joining_and_leaving_at_random(mlx: Any, data: st.DataObject):
    """Against a model: of each sequence the seeds and lengths of what it was fed, in order."""
    name = "grouped"
    batch, model, seed = fed(new(mlx, name), 0, name, 3), [[(0, 3)]], 0
    for _ in range(data.draw(st.integers(1, 8))):
        seed += 10
        action = data.draw(st.sampled_from(["extend", "filter", "feed", "trim"]))
        if action == "extend":
            n = data.draw(st.integers(0, 30))
            batch.extend(fed(new(mlx, name), seed, name, n))
            model.append([(seed, n)] if n else [])
        elif action == "filter":
            keep = data.draw(st.permutations(range(len(model))))
            keep = keep[: data.draw(st.integers(1, len(model)))]
            batch.filter(keep)
            model = [model[i] for i in keep]
        elif action == "feed":
            n = data.draw(st.integers(1, 5))
            _, k, v = stack([noise(seed + i, name, n) for i in range(len(model))])
            batch.update_and_fetch(k, v)
            model = [[*fed, (seed + i, n)] for i, fed in enumerate(model)]
        elif all(fed and fed[-1][1] > 1 for fed in model):
            assert batch.trim(1) == 1
            model = [[*fed[:-1], (fed[-1][0], fed[-1][1] - 1)] for fed in model]
    assert batch.size() == max(sum(n for _, n in fed) for fed in model)
    for i, fed_with in enumerate(model):
        assert batch.n_held(i) == batch.n_rows(i) == sum(n for _, n in fed_with)
        start = 0
        for seed, n in fed_with:
            found = [np.array(x) for x in batch.read(i, start, start + n)]
            for x, y in zip(found, codes(seed, name, n), strict=True):
                assert x.tobytes() == y.tobytes()
            start += n


def codes(seed: int, name: str, n: int) -> list[np.ndarray]:
    """What the codec's own encoder stores for that noise."""
    codec = GEOMETRIES[name][0]
    _, *sides = noise(seed, name, n)
    pairs = [(s, x) for s, x in zip(("k", "v"), sides, strict=True) if x is not None]
    return [
        y for s, x in pairs for y in codec.encode(s, np.array(x[0]).astype(np.float16)).values()
    ]


def test_prompts_padded_on_the_right_end_together(mlx: Any):
    """mlx-lm's way to feed prompts of several lengths: prepare, feed, finalize."""
    name, held = "grouped", [9, 2]
    rows = [fed(new(mlx, name), i, name, h) for i, h in enumerate(held)]
    batch = mlx.BatchKVCache.merge(rows)
    more, real = [noise(10 + i, name, 6) for i in range(2)], [6, 4]
    batch.prepare(lengths=real, right_padding=[0, 2])
    batch.update_and_fetch(*stack(more)[1:])
    batch.finalize()
    for row, x, n in zip(rows, more, real, strict=True):
        row.update_and_fetch(x[1][:, :, :n], x[2][:, :, :n])
    assert contents(batch) == [contents(row)[0] for row in rows]
    assert batch.offset.tolist() == [15, 6]
    next_one = [noise(20 + i, name, 1) for i in range(2)]
    found = attend(batch, *stack(next_one))
    for i, (row, x) in enumerate(zip(rows, next_one, strict=True)):
        np.testing.assert_allclose(found[i : i + 1], attend(row, *x), atol=TOLERANCE)


def test_prompts_padded_on_the_left(mlx: Any):
    name = "grouped"
    batch = mlx.BatchQuantizedKVCache(Q4.keys, Q4.values, [0, 3])
    x = [noise(i, name, 5) for i in range(2)]
    assert batch.offset.tolist() == [0, -3]
    found = attend(batch, *stack(x))
    short = new(mlx, name)
    wanted = attend(short, *(y[:, :, 3:] for y in x[1]))
    np.testing.assert_allclose(found[1:, :, 3:], wanted, atol=TOLERANCE)
    with pytest.raises(ValueError, match="left padding"):
        batch.prepare(left_padding=[1, 1])


def test_a_batch_is_filtered_before_its_padding_is_fed(mlx: Any):
    """Columns that are not there yet are not cut off."""
    name = "grouped"
    batch = mlx.BatchQuantizedKVCache(Q4.keys, Q4.values, [1, 4, 3])
    x = [noise(i, name, 6) for i in range(3)]
    batch.filter([1, 2])
    _, k, v = stack([(q[:, :, :2], k[:, :, :2], v[:, :, :2]) for q, k, v in x[1:]])
    batch.update_and_fetch(k, v)
    batch.filter([1])
    assert (batch.size(), batch.offset.tolist(), batch.left_padding.tolist()) == (0, [-1], [1])
    found = attend(batch, *(y[:, :, 2:] for y in x[2]))
    short = new(mlx, name)
    wanted = attend(short, *(y[:, :, 3:] for y in x[2]))
    np.testing.assert_allclose(found[:, :, 1:], wanted, atol=TOLERANCE)
    assert batch.n_rows(0) == 3


@pytest.mark.parametrize("n", [1, 7])
def test_a_window_sees_the_last_rows_only(mlx: Any, n: int):
    """However many rows are still held, and beside sequences of other lengths."""
    name, window = "grouped", 16
    for held in ([400, 390], [600, 3], [5, 12]):
        rows = [new(mlx, name, quantized=False, window=window) for _ in held]
        plain = [new(mlx, name, quantized=False) for _ in held]
        for i, h in enumerate(held):
            for cache in (rows[i], plain[i]):
                for start in range(0, h, 64):
                    _, k, v = (y[:, :, start : start + 64] for y in noise(i, name, h))
                    cache.update_and_fetch(k, v)
        assert rows[0].size() <= 16 + 64 + 256 + 64
        batch = mlx.BatchKVCache.merge(rows)
        x = [noise(50 + i, name, n) for i in range(2)]
        found = attend(batch, *stack(x))
        for i, cache in enumerate(plain):
            mask = cache.make_mask(n, return_array=True, window_size=window)
            wanted = np.array(cache.attend(*x[i], 8**-1, mask))
            np.testing.assert_allclose(found[i : i + 1], wanted, atol=TOLERANCE)
            assert batch.n_rows(i) == held[i] + n
            assert batch.n_held(i) >= min(held[i] + n, window - 1)


def test_a_window_is_held_after_a_long_step(mlx: Any):
    cache = fed(new(mlx, "grouped", quantized=False, window=16), 1, "grouped", 700)
    assert (cache.n_rows(0), cache.size()) == (700, 16 + 64)
    assert cache.trim(60) == 60
    assert (cache.n_rows(0), cache.n_held(0)) == (640, 20)
    _, k, _ = noise(1, "grouped", 700)
    last = np.array(k[0, :, 620:640]).astype(np.float16)
    assert np.array(cache.read(0, 620, 640)[0]).tobytes() == last.tobytes()


def test_rows_written_behind_a_gap_replace_those_before_it(mlx: Any):
    cache = fed(new(mlx, "grouped", quantized=False, window=16), 1, "grouped", 20)
    other = fed(new(mlx, "grouped", quantized=False), 2, "grouped", 10)
    fields = [x[None] for x in other.read(0, 0, 10)]
    cache.write(fields, 10)
    assert (cache.n_rows(0), cache.n_held(0)) == (30, 30)
    cache.write(fields, 12)
    assert (cache.n_rows(0), cache.n_held(0)) == (42, 10)
    assert contents(cache) == contents(other)
    cache.write([], 5)
    assert (cache.n_rows(0), cache.n_held(0)) == (47, 0)


def test_sizes_and_state(mlx: Any):
    import mlx.core as mx

    cache = new(mlx, "grouped")
    assert (cache.empty(), cache.size(), cache.nbytes, cache.trim(3)) == (True, 0, 0, 0)
    fed(cache, 1, "grouped", 10)
    assert (cache.empty(), cache.size(), cache.is_trimmable()) == (False, 10, True)
    # columns x heads x sides x 64 values: in 4.5 bits, and the last ones in float16 as well
    assert cache.nbytes == 256 * 2 * 2 * (32 + 4) + 64 * 2 * 2 * 128
    for seed in range(20):
        fed(cache, seed, "grouped", 25)
    assert cache.nbytes <= 768 * 2 * 2 * (32 + 4) + 192 * 2 * 2 * 128
    cache.trim(500)
    mx.eval(cache.state)
    again = type(cache).__new__(type(cache))
    again.state = cache.state
    assert contents(again) == contents(cache)
    assert again.quantizers == cache.quantizers


def test_mlx_lms_own_attention_refuses_rotated_codes(mlx: Any):
    """It would not rotate the queries: better no result than a wrong one."""
    require("mlx", importlib.util.find_spec("mlx_lm") is not None, "mlx_lm is not installed")
    from mlx_lm.models.base import scaled_dot_product_attention

    cache = new(mlx, "grouped")
    q, k, v = noise(1, "grouped", 4)
    k, v = cache.update_and_fetch(k, v)
    with pytest.raises(TypeError):
        scaled_dot_product_attention(q, k, v, cache, scale=1.0, mask=None)


@pytest.mark.parametrize(("key_dim", "latent"), [(576, 512), (96, 64), (192, 128)])
def test_latents_that_end_with_a_group_are_cut_out_of_keys(mlx: Any, key_dim: int, latent: int):
    mlx.check_latent(Affine(4, 1024), key_dim, latent)
    with pytest.raises(ValueError, match="is cut by"):
        mlx.check_latent(Affine(4, 1024), key_dim, latent - 8)
