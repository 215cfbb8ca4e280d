"""llama.cpp's state bytes: what is written is read back, and what is not ours is refused."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engines.llama_state import MAGIC, build, parse, to_half_split, to_interleaved
from actors.errors import EngineFault

CELLS = 16  # offset of the cells
KV = tuple[np.ndarray, np.ndarray]


def rows(n_layers: int, n: int, k_row: int = 8, v_row: int = 6) -> KV:
    rng = np.random.default_rng(n_layers * 100 + n)
    shape = (n_layers, n)
    return (
        rng.standard_normal((*shape, k_row)).astype(np.float16),
        rng.standard_normal((*shape, v_row)).astype(np.float16),
    )


def assert_rows(found: KV, wanted: KV) -> None:
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 1000), st.integers(0, 7))
def test_what_is_built_is_parsed(n_layers: int, n: int, start: int, seq_id: int) -> None:
    k, v = rows(n_layers, n)
    raw = build(k, v, start, seq_id)
    assert_rows(parse(raw.tobytes(), start, start + n), (k, v))


def test_golden_bytes() -> None:
    k = np.array([[[1.0, 2.0], [3.0, 4.0]]], np.float16)
    v = np.array([[[5.0, 6.0], [7.0, 8.0]]], np.float16)
    wanted = struct.pack("<IiII", 0xAF143CD8, 3, 1, 2)
    wanted += struct.pack("<iIi", 10, 1, 3) + struct.pack("<iIi", 11, 1, 3)
    wanted += struct.pack("<II", 0, 1)
    wanted += struct.pack("<iQ", 1, 4) + struct.pack("<4e", 1, 2, 3, 4)
    wanted += struct.pack("<iQ", 1, 4) + struct.pack("<4e", 5, 6, 7, 8)
    assert build(k, v, 10, 3).tobytes() == wanted


@given(st.permutations(range(7)))
def test_cells_in_any_place_come_out_in_order(order: list[int]) -> None:
    k, v = rows(2, 7)
    raw = build(k[:, order], v[:, order], 0, 0)
    cells = raw[CELLS : CELLS + 12 * 7].view("<i4").reshape(7, 3)
    cells[:, 0] = 40 + np.array(order)
    assert_rows(parse(raw.tobytes(), 40, 47), (k, v))


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [
        (0, "<I", MAGIC ^ 1),
        (8, "<I", 2),  # streams
        (12, "<I", 4),  # cells
        (12, "<I", 2**31),
        (CELLS, "<i", 11),  # a position twice
        (CELLS, "<i", 9),  # a position before the range
        (CELLS + 24, "<i", 13),  # a gap
        (CELLS + 36, "<I", 1),  # transposed V
        (CELLS + 40, "<I", 3),  # layers
        (CELLS + 40, "<I", 2**31),
        (CELLS + 44, "<i", 8),  # K in q8_0
        (CELLS + 48, "<Q", 2**60),  # row size
        (CELLS + 44 + 2 * (12 + 48), "<i", 0),  # V in f32
    ],
)
def test_other_content_is_refused(offset: int, form: str, value: int) -> None:
    raw = bytearray(build(*rows(2, 3), 10, 0).tobytes())
    struct.pack_into(form, raw, offset, value)
    with pytest.raises(EngineFault):
        parse(bytes(raw), 10, 13)


def test_other_positions_are_refused() -> None:
    raw = build(*rows(2, 3), 10, 0).tobytes()
    for start, stop in ((9, 12), (11, 14), (10, 12), (10, 14)):
        with pytest.raises(EngineFault):
            parse(raw, start, stop)


def test_every_truncation_and_every_addition_is_refused() -> None:
    raw = build(*rows(2, 3), 10, 0).tobytes()
    for size in range(len(raw)):
        with pytest.raises(EngineFault):
            parse(raw[:size], 10, 13)
    with pytest.raises(EngineFault):
        parse(raw + b"\0", 10, 13)


def test_half_split_by_hand() -> None:
    k = np.array([[[[0, 1, 2, 3, 4, 5, 6, 7]]]], np.float16)
    assert to_half_split(k, 8).ravel().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert to_half_split(k, 4).ravel().tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert to_interleaved(k, 8).ravel().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert to_interleaved(k, 4).ravel().tolist() == [0, 2, 1, 3, 4, 5, 6, 7]


@given(st.sampled_from([(64, 64), (32, 32), (80, 32), (64, 16), (6, 2)]), st.integers(0, 5))
def test_the_two_orders_are_inverse_and_lose_no_bit(dims: tuple[int, int], n: int) -> None:
    head, rope = dims
    bits = np.random.default_rng(head).integers(0, 1 << 16, (3, n, 2, head), np.uint16)
    k = bits.view(np.float16)  # NaN payloads and all
    before = bits.copy()
    split = to_half_split(k, rope)
    np.testing.assert_array_equal(to_interleaved(split, rope).view(np.uint16), bits)
    pairs = bits[..., :rope].reshape(*bits.shape[:-1], rope // 2, 2).swapaxes(-1, -2)
    np.testing.assert_array_equal(
        split.view(np.uint16)[..., :rope], pairs.reshape(*bits.shape[:-1], rope)
    )
    np.testing.assert_array_equal(split.view(np.uint16)[..., rope:], bits[..., rope:])
    np.testing.assert_array_equal(bits, before)


def test_keys_that_lie_apart_in_memory() -> None:
    padded = np.random.default_rng(1).standard_normal((2, 5, 24)).astype(np.float16)
    k = padded[:, :, :16].reshape(2, 5, 2, 8)
    strided = np.ndarray((2, 5, 2, 8), "<f2", padded, 0, (5 * 48, 48, 16, 2))
    np.testing.assert_array_equal(to_half_split(strided, 8), to_half_split(k, 8))
    np.testing.assert_array_equal(to_interleaved(strided, 8), to_interleaved(k, 8))
