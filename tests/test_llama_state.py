"""llama.cpp's state bytes: what is written is read back, and what is not ours is refused."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engines.llama_state import (
    MAGIC,
    Q4_1,
    Cache,
    Cells,
    Stack,
    build,
    parse,
    to_half_split,
    to_interleaved,
)
from actors.errors import EngineFault

CELLS = 16  # offset of the cells
KV = tuple[np.ndarray, np.ndarray]
ONE = (Stack((0, 1), 8, 6),)  # a cache of two equal layers
# Layers of three geometries that take turns; two of them at equal distances, one without V.
MIXED = (Stack((0, 2, 5), 8, 6), Stack((1, 4), 4, 4), Stack((3,), 10, 0))
LATENT = (Stack((0, 1, 2), 12, 0),)
# The same of quantized blocks.
BLOCKS = (Stack((0, 1), 64, 96, Q4_1),)
MIXED_BLOCKS = (Stack((0, 2, 5), 64, 96, Q4_1), Stack((1, 4), 32, 32, Q4_1))


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


def cells(cache: Cache, n: int, start: int) -> Cells:
    rng = np.random.default_rng(n)
    kv = []
    for x in cache:
        if x.type is Q4_1:
            shapes = [(len(x.places), n, row // 32) for row in (x.k_row, x.v_row)]
            raws = (rng.bytes(20 * int(np.prod(shape))) for shape in shapes)
            k, v = (np.frombuffer(r, "V20").reshape(s) for r, s in zip(raws, shapes, strict=True))
            kv.append((k, v))
            continue
        k, v = (rng.standard_normal((len(x.places), n, row)) for row in (x.k_row, x.v_row))
        kv.append((k.astype(np.float16), v.astype(np.float16)))
    return Cells(start if n else 0, tuple(kv))


def assert_cells(found: list[Cells], wanted: list[Cells]) -> None:
    assert [(x.start, x.n_rows) for x in found] == [(x.start, x.n_rows) for x in wanted]
    for x, y in zip(found, wanted, strict=True):
        for a, b in zip(x.kv, y.kv, strict=True):
            assert_rows(a, b)


def one(k: np.ndarray, v: np.ndarray, start: int, seq_id: int) -> np.ndarray:
    """The bytes of a single cache whose layers are all alike."""
    stack = Stack(tuple(range(len(k))), k.shape[2], v.shape[2])
    return build(seq_id, [((stack,), Cells(start, ((k, v),)))])


def parse_one(raw: bytes, start: int, stop: int) -> KV:
    (found,) = parse(raw, [ONE])
    assert (found.start, found.n_rows) == (start, stop - start)
    return found.kv[0]


@given(
    st.sampled_from([ONE, MIXED, LATENT, BLOCKS, MIXED_BLOCKS]),
    st.integers(1, 9),
    st.integers(0, 1000),
)
def test_what_is_built_is_parsed(cache: Cache, n: int, start: int) -> None:
    wanted = cells(cache, n, start)
    raw = build(5, [(cache, wanted)])
    assert_cells(parse(raw.tobytes(), [cache]), [wanted])


@given(st.sampled_from([ONE, MIXED]), st.integers(0, 9), st.integers(0, 9), st.integers(0, 1000))
def test_two_caches_of_their_own_lengths(cache: Cache, n: int, m: int, start: int) -> None:
    wanted = [cells(cache, n, start), cells(ONE, m, start + 100)]
    raw = build(5, list(zip([cache, ONE], wanted, strict=True)))
    assert_cells(parse(raw.tobytes(), [cache, ONE]), wanted)


def test_golden_bytes() -> None:
    k = np.array([[[1.0, 2.0], [3.0, 4.0]]], np.float16)
    v = np.array([[[5.0, 6.0], [7.0, 8.0]]], np.float16)
    wanted = struct.pack("<IiII", 0xAF143CD8, 3, 1, 2)
    wanted += struct.pack("<iIi", 10, 1, 3) + struct.pack("<iIi", 11, 1, 3)
    wanted += struct.pack("<II", 0, 1)
    wanted += struct.pack("<iQ", 1, 4) + struct.pack("<4e", 1, 2, 3, 4)
    wanted += struct.pack("<iQ", 1, 4) + struct.pack("<4e", 5, 6, 7, 8)
    assert one(k, v, 10, 3).tobytes() == wanted


def test_golden_bytes_of_two_caches_one_latent() -> None:
    k = np.array([[[1.0, 2.0]], [[3.0, 4.0]]], np.float16)
    none = np.empty((2, 1, 0), np.float16)
    stack = Stack((0, 1), 2, 0)
    full, sliding = Cells(9, ((k, none),)), Cells(10, ((k[:, :0], none[:, :0]),))
    wanted = struct.pack("<IiII", 0xAF143CD8, 3, 1, 1) + struct.pack("<iIi", 9, 1, 3)
    wanted += struct.pack("<II", 0, 2)
    wanted += struct.pack("<iQ", 1, 4) + struct.pack("<2e", 1, 2)
    wanted += struct.pack("<iQ", 1, 4) + struct.pack("<2e", 3, 4)
    wanted += struct.pack("<II", 1, 0)  # no cells: neither v_trans nor layers
    assert build(3, [((stack,), full), ((stack,), sliding)]).tobytes() == wanted


def test_golden_bytes_of_quantized_blocks() -> None:
    k, v = np.frombuffer(bytes(range(40)), "V20"), np.frombuffer(bytes(range(40, 60)), "V20")
    cache = (Stack((0,), 64, 32, Q4_1),)
    raw = build(3, [(cache, Cells(10, ((k.reshape(1, 1, 2), v.reshape(1, 1, 1)),)))])
    wanted = struct.pack("<IiII", 0xAF143CD8, 3, 1, 1) + struct.pack("<iIi", 10, 1, 3)
    wanted += struct.pack("<II", 0, 1)
    wanted += struct.pack("<iQ", 3, 40) + bytes(range(40))
    wanted += struct.pack("<iQ", 3, 20) + bytes(range(40, 60))
    assert raw.tobytes() == wanted


def test_rows_of_another_type_are_refused() -> None:
    f16 = (Stack((0, 1), 10, 10),)  # rows of 20 bytes, as one block
    q4_1 = (Stack((0, 1), 32, 32, Q4_1),)
    for written, read in ((f16, q4_1), (q4_1, f16)):
        raw = build(0, [(written, cells(written, 4, 0))]).tobytes()
        with pytest.raises(EngineFault, match=f"than {read[0].type.name} rows of"):
            parse(raw, [read])


def test_layers_are_written_in_the_order_of_the_cache() -> None:
    wanted = cells(MIXED, 3, 0)
    raw = build(0, [(MIXED, wanted)]).tobytes()
    sizes = [struct.unpack_from("<iQ", raw, CELLS + 36 + 8)]
    offset = CELLS + 36 + 8
    for _ in range(5):
        offset += 12 + 3 * sizes[-1][1]
        sizes.append(struct.unpack_from("<iQ", raw, offset))
    assert sizes == [(1, 16), (1, 8), (1, 16), (1, 20), (1, 8), (1, 16)]


@given(st.permutations(range(7)))
def test_cells_in_any_place_come_out_in_order(order: list[int]) -> None:
    k, v = rows(2, 7)
    raw = one(k[:, order], v[:, order], 0, 0)
    cells = raw[CELLS : CELLS + 12 * 7].view("<i4").reshape(7, 3)
    cells[:, 0] = 40 + np.array(order)
    assert_rows(parse_one(raw.tobytes(), 40, 47), (k, v))


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
    raw = bytearray(one(*rows(2, 3), 10, 0).tobytes())
    struct.pack_into(form, raw, offset, value)
    with pytest.raises(EngineFault):
        parse(bytes(raw), [ONE])


@pytest.mark.parametrize("cache", [ONE, MIXED, LATENT])
def test_layers_that_differ_in_one_place_only_are_refused(cache: Cache) -> None:
    raw = build(0, [(cache, cells(cache, 3, 10))]).tobytes()
    at = [i for i in range(len(raw) - 12) if raw[i : i + 4] == b"\1\0\0\0" and not raw[i + 6]]
    heads = [i for i in at if i > CELLS + 40 and raw[i + 4] and not any(raw[i + 5 : i + 12])]
    assert len(heads) >= sum(len(x.places) * (2 if x.v_row else 1) for x in cache)
    for i in heads:
        changed = bytearray(raw)
        changed[i] = 8  # q8_0
        with pytest.raises(EngineFault):
            parse(bytes(changed), [cache])


def test_a_cache_of_another_geometry_is_refused() -> None:
    raw = build(0, [(ONE, cells(ONE, 3, 10))]).tobytes()
    for other in ((Stack((0, 1), 6, 8),), (Stack((0, 1), 8, 0),), (Stack((0,), 8, 6),), LATENT):
        with pytest.raises(EngineFault):
            parse(raw, [other])


def test_more_or_fewer_caches_are_refused() -> None:
    raw = build(0, [(ONE, cells(ONE, 3, 10)), (ONE, cells(ONE, 2, 11))]).tobytes()
    for caches in ([ONE], [ONE, ONE, ONE], []):
        with pytest.raises(EngineFault):
            parse(raw, caches)


def test_every_truncation_and_every_addition_is_refused() -> None:
    raw = build(0, [(ONE, cells(ONE, 3, 10)), (MIXED, cells(MIXED, 2, 11))]).tobytes()
    for size in range(len(raw)):
        with pytest.raises(EngineFault):
            parse(raw[:size], [ONE, MIXED])
    with pytest.raises(EngineFault):
        parse(raw + b"\0", [ONE, MIXED])


def test_half_split_by_hand() -> None:
    k = np.array([[[[0, 1, 2, 3, 4, 5, 6, 7]]]], np.float16)
    assert to_half_split(k, 8).ravel().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert to_half_split(k, 4).ravel().tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert to_interleaved(k, 8).ravel().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert to_interleaved(k, 4).ravel().tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert to_half_split(k, 4, 4).ravel().tolist() == [0, 1, 2, 3, 4, 6, 5, 7]
    assert to_half_split(k, 4, 2).ravel().tolist() == [0, 1, 2, 4, 3, 5, 6, 7]
    assert to_interleaved(k, 4, 4).ravel().tolist() == [0, 1, 2, 3, 4, 6, 5, 7]


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
