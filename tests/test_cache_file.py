"""Ids, golden files, and what a reader makes of bytes that are not a sound safetensors file."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storage import cache_file
from storage.cache_file import (
    MAX_HEADER,
    PAGE,
    Chain,
    load,
    load_metadata,
    read_header,
    save,
    sha256,
    view,
)
from storage.card import BlockRef, PartRef
from storage.codec import encode_rows, get_codec, slice_rows
from storage.errors import CorruptData
from storage.spec import canonical_json
from storage.store import CacheStore
from storage.tiers import pack_block, unpack_block
from tests.store_contract import FIXED, KEY, SPEC, flip, sample_rows

GOLDEN = Path(__file__).parent / "golden"
CHAIN = Chain(KEY.digest, "q4", "acme", "pepper")
TENSORS = {"a": np.arange(6, dtype=np.uint32).reshape(2, 3), "b": np.ones(2, np.float16)}
SMALL = save(TENSORS, {"schema": "x", "n": 1})


def documented_id(domain: bytes, parent: str, tokens: list[int], start: bytes) -> str:
    """The docstring's layout, spelled out: every field behind its length as a u64."""
    fields = [
        domain,
        bytes.fromhex(parent),
        b"".join(struct.pack("<I", token) for token in tokens),
        bytes.fromhex(KEY.digest),
        b"q4",
        b"acme",
        b"pepper",
        start,
    ]
    return hashlib.sha256(b"".join(struct.pack("<Q", len(f)) + f for f in fields)).hexdigest()


# ---- ids


def test_block_id_is_the_documented_hash():
    first = CHAIN.block_id("", range(256))
    assert first == documented_id(b"kvferry.block.v1", "", list(range(256)), b"")
    assert first == "a86f0966295e2eb5e31057ba06600a134412c811c33b76842abc9465099def49"
    second = CHAIN.block_id(first, [7, 2**32 - 1])
    assert second == documented_id(b"kvferry.block.v1", first, [7, 2**32 - 1], b"")
    assert second == "ae60a703e231339a8f4ccdbac7437dda06bda1044752c2b3dc4d024e248510d8"


def test_segment_id_is_the_documented_hash():
    block = CHAIN.block_id("", range(256))
    found = CHAIN.segment_id(block, [5, 6, 7], 1)
    start = b"\x01\0\0\0\0\0\0\0"
    assert found == documented_id(b"kvferry.segment.v1", block, [5, 6, 7], start)
    assert found == "898a98d8c6f214718f6b7706a7a1c2103e847290573164b11381f405b3e1f884"


def test_every_field_of_an_id_counts():
    ids = [
        CHAIN.block_id("", [1, 2]),
        CHAIN.block_id("", [1, 2, 0]),
        CHAIN.block_id("00", [1, 2]),
        CHAIN.segment_id("", [1, 2], 0),
        CHAIN.segment_id("", [1, 2], 1),
        Chain("00", "q4", "acme", "pepper").block_id("", [1, 2]),
        Chain(KEY.digest, "f16", "acme", "pepper").block_id("", [1, 2]),
        Chain(KEY.digest, "q4", "acm", "epepper").block_id("", [1, 2]),
        Chain(KEY.digest, "q4", "acmepepper").block_id("", [1, 2]),
        Chain(KEY.digest, "q4a", "cme", "pepper").block_id("", [1, 2]),
    ]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_id_that_is_no_u32_is_refused(token):
    with pytest.raises(OverflowError):
        CHAIN.block_id("", [token])


# ---- golden files


def golden_block(codec_name: str) -> bytes:
    codec = get_codec(codec_name)
    return pack_block(
        codec, CHAIN.block_id("", range(16)), 16, encode_rows(SPEC, codec, sample_rows(16))
    )


def golden_segment() -> bytes:
    codec = get_codec("q4")
    parent = CHAIN.block_id("", range(16))
    rows = slice_rows(encode_rows(SPEC, codec, sample_rows(16)), 4, 9)
    return pack_block(codec, CHAIN.segment_id(parent, range(9), 4), 5, rows)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("block.q4", lambda: golden_block("q4")),
        ("block.q8", lambda: golden_block("q8")),
        ("block.k8v4", lambda: golden_block("k8v4")),
        ("block.f16", lambda: golden_block("f16")),
        ("segment.q4", golden_segment),
    ],
)
def test_golden_block_files(name, make):
    raw = (GOLDEN / f"{name}.safetensors").read_bytes()
    assert make() == raw
    (header,) = struct.unpack_from("<Q", raw)
    assert (8 + header) % PAGE == 0
    tensors = safetensors.numpy.load(raw)
    ours, metadata = load(raw, name)
    assert tensors.keys() == ours.keys()
    assert all(x.tobytes() == ours[key].tobytes() for key, x in tensors.items())
    kind, codec = name.split(".")
    assert metadata == {
        "schema": "kvferry.block.v1",
        "id": CHAIN.block_id("", range(16))
        if kind == "block"
        else CHAIN.segment_id(CHAIN.block_id("", range(16)), range(9), 4),
        "part": "full",
        "rows": 16 if kind == "block" else 5,
        "codec": codec,
    }
    spec_codec = get_codec(codec)
    unpack_block(raw, name, SPEC, spec_codec, metadata["id"], metadata["rows"])


def test_golden_block_file_name():
    """With the prefix of the folder that spreads blocks, as it lies in a store."""
    raw = (GOLDEN / "block.q4.safetensors").read_bytes()
    block = CHAIN.block_id("", range(16))
    ref = BlockRef(block, 16, {"full": PartRef(hashlib.sha256(raw).hexdigest(), len(raw))})
    path = CacheStore("memory://golden").block_path("acme", ref, "full")
    assert path == (
        "/golden/blocks/acme/8b0/"
        "8b05d8bbed640f84c732b332860c507499548ae3f4e86ce0d2abe16fb3376bdc.full."
        "fc936135c434f371ac71dd0c2252ced0c8205b435e54ea0609622950c4edda8e.safetensors"
    )


# ---- the container


@pytest.mark.parametrize("align", [8, 64, PAGE])
def test_the_data_section_is_aligned_and_any_reader_opens_it(align, tmp_path):
    raw = save(TENSORS, {"schema": "x"}, align=align)
    (header,) = struct.unpack_from("<Q", raw)
    assert (8 + header) % align == 0
    (tmp_path / "f").write_bytes(raw)
    found = safetensors.numpy.load_file(tmp_path / "f")
    assert {k: x.tolist() for k, x in found.items()} == {k: x.tolist() for k, x in TENSORS.items()}
    with safetensors.safe_open(tmp_path / "f", "numpy") as file:
        assert json.loads(file.metadata()["kvferry"]) == {"schema": "x"}
    assert load_metadata(raw[: 8 + header], "f") == {"schema": "x"}


def test_the_same_content_is_the_same_bytes():
    backwards = dict(reversed(TENSORS.items()))
    strided = {"a": np.asfortranarray(TENSORS["a"]), "b": np.ones(4, np.float16)[::2]}
    for tensors in (backwards, strided):
        assert save(tensors, {"n": 1, "schema": "x"}) == SMALL


@settings(FIXED, max_examples=60)
@given(
    st.dictionaries(
        st.text("abc.01", min_size=1),
        st.tuples(
            st.sampled_from(["<u4", "<f2"]), st.lists(st.integers(0, 3), min_size=1, max_size=4)
        ),
        max_size=5,
    ),
    st.dictionaries(st.text(), st.none() | st.integers() | st.floats(allow_nan=False) | st.text()),
)
def test_what_was_saved_is_loaded(shapes, metadata):
    tensors = {name: np.ones(shape, dtype) for name, (dtype, shape) in shapes.items()}
    if not all(x == x and abs(x) != float("inf") for x in metadata.values() if type(x) is float):
        with pytest.raises(ValueError, match="not JSON compliant"):
            save(tensors, metadata)
        return
    found, found_metadata = load(save(tensors, metadata, align=64), "p")
    assert found_metadata == metadata
    assert {k: (x.dtype, x.shape) for k, x in found.items()} == {
        k: (x.dtype, x.shape) for k, x in tensors.items()
    }


def test_a_header_above_the_limit_is_not_written(monkeypatch):
    monkeypatch.setattr(cache_file, "MAX_HEADER", 100)
    with pytest.raises(ValueError, match="above the limit of 100"):
        save(TENSORS, {"schema": "x" * 100})


def test_the_limit_leaves_room_for_long_cards():
    """Four branches of a million tokens: 16,000 blocks of two parts, as JSON inside JSON."""
    ref = {
        "id": "0" * 64,
        "rows": 256,
        "parts": {part: {"sha256": "0" * 64, "size": 10**7} for part in ("full", "sliding")},
    }
    assert 16_000 * len(json.dumps(json.dumps(ref))) < MAX_HEADER


def test_a_header_that_is_too_dense_is_neither_written_nor_read():
    """Long cards are far below: eight lists and mappings in a block of two parts."""
    metadata = {"x": [[]] * 1000}
    with pytest.raises(ValueError, match="too many lists"):
        save(TENSORS, metadata)
    table = {"__metadata__": {"kvferry": canonical_json(metadata).decode()}}
    with pytest.raises(CorruptData, match="too many lists"):
        load(with_header(json.dumps(table, separators=(",", ":")).encode()), "p")


# ---- damage


@pytest.mark.parametrize("raw", [SMALL, save({}, {"schema": "x"})])
def test_every_truncation_is_refused(raw):
    for length in range(len(raw)):
        with pytest.raises(CorruptData) as caught:
            load(raw[:length], "the/path")
        assert caught.value.path == "the/path"
    with pytest.raises(CorruptData):
        load(raw + b"\0", "p")


def test_a_truncated_block_is_refused_at_every_seam():
    raw = (GOLDEN / "block.q4.safetensors").read_bytes()
    ends = [x["data_offsets"][1] for x in header_of(raw).values() if "data_offsets" in x]
    for seam in (0, 1, 7, 8, 9, 100, PAGE - 1, PAGE, PAGE + 1, *(PAGE + end for end in ends)):
        for length in {max(0, seam - 1), seam, seam + 1} - {len(raw), len(raw) + 1}:
            with pytest.raises(CorruptData):
                load(raw[:length], "p")


def header_of(raw: bytes) -> dict:
    (size,) = struct.unpack_from("<Q", raw)
    return json.loads(raw[8 : 8 + size])


@settings(FIXED, max_examples=400)
@given(st.integers(0, len(SMALL) - 1), st.integers(1, 255), st.integers(0, len(SMALL)))
def test_a_flipped_byte_is_corrupt_or_changes_only_what_it_says(position, mask, cut):
    """load has no checksum of its own (the store verifies files, the seal cards); it must refuse
    or read, and the tensors' bytes are then the file's."""
    damaged = flip(SMALL, position, mask)
    for raw in (damaged, damaged[:cut], damaged + SMALL[:cut]):
        try:
            tensors, metadata = load(raw, "p")
        except CorruptData:
            continue
        assert isinstance(metadata, dict)
        assert sum(x.nbytes for x in tensors.values()) == sum(x.nbytes for x in TENSORS.values())


@settings(FIXED, max_examples=200)
@given(st.binary(max_size=200))
@example(struct.pack("<Q", 2) + b"{}")
@example(struct.pack("<Q", 4) + b"null")
@example(struct.pack("<Q", 2) + b"[]")
def test_other_bytes_are_refused(raw):
    with pytest.raises(CorruptData):
        load(raw, "p")


def with_header(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, MAX_HEADER + 1, 10**6])
def test_a_huge_header_length_is_refused(size):
    with pytest.raises(CorruptData, match=f"header of {size} bytes does not fit"):
        load(struct.pack("<Q", size) + SMALL[8:], "p")


@pytest.mark.parametrize("depth", [50, 127, 129, 500, 900, 990, 1000, 10_000, 500_000])
def test_deep_nesting_is_refused_or_read(depth):
    nested = '{"x":' + "[" * depth + "]" * depth + "}"
    inner = {"__metadata__": {"kvferry": nested}}
    inner = with_header(json.dumps(inner, separators=(",", ":")).encode())
    outer = with_header(b'{"__metadata__":{"kvferry":"{}"},"x":' + nested.encode() + b"}")
    try:
        assert load(inner, "p")[1].keys() == {"x"}
    except CorruptData:
        assert depth > 129
    with pytest.raises(CorruptData):
        load(outer, "p")


@pytest.mark.parametrize("metadata", [
    None, {}, {"kvferry": "{"}, {"kvferry": "[]"}, {"kvferry": "7"}, {"kvferry": "null"},
    {"kvferry": '{"a": 1}'}, {"kvferry": '{"b":1,"a":1}'}, {"kvferry": '{"a":1,"a":1}'},
    {"kvferry": '{"a":NaN}'}, {"kvferry": '{"a":1e999}'}, {"kvferry": '{"a":1e0}'},
    {"kvferry": '{"a":"ü"}'}, {"kvferry": ' {"a":1}'}, {"other": "{}"},
    {"kvferry": '{"a":' + "9" * 5000 + "}"},
])  # fmt: skip
def test_metadata_that_is_not_ours_is_refused(metadata):
    raw = safetensors.numpy.save(TENSORS, metadata)
    with pytest.raises(CorruptData) as caught:
        load(raw, "the/path")
    assert caught.value.path == "the/path"


META = b'{"__metadata__":{"kvferry":"{}"}'


def table(*entries: tuple[str, str, list[int], list[int]], metadata: bytes = META) -> bytes:
    """A header in the library's form with these tensors: name, dtype, shape, offsets."""
    text = b"".join(
        b"," + json.dumps({n: {"dtype": d, "shape": s, "data_offsets": o}}, separators=(",", ":"))
        .encode()[1:-1] for n, d, s, o in entries
    )  # fmt: skip
    return metadata + text + b"}"


SOUND = [
    [("a", "U32", [2], [0, 8]), ("b", "F16", [1, 2], [8, 12])],
    [("b", "F16", [1, 2], [8, 12]), ("a", "U32", [2], [0, 8])],  # the table's order is free
    [("a", "U8", [3], [0, 3]), ("b", "U32", [1], [3, 7]), ("c", "U8", [5], [7, 12])],  # unaligned
    [("a", "U32", [0, 9], [0, 0]), ("b", "F32", [3], [0, 12]), ("c", "I8", [0], [12, 12])],
]


@pytest.mark.parametrize("entries", SOUND)
def test_the_library_and_we_read_the_same(entries):
    raw = with_header(table(*entries), bytes(range(12)))
    theirs, (ours, _) = safetensors.numpy.load(raw), load(raw, "p")
    assert {k: (x.dtype, x.tolist()) for k, x in theirs.items()} == {
        k: (x.dtype, x.tolist()) for k, x in ours.items()
    }
    assert all(x.flags.aligned and not x.flags.writeable for x in ours.values())


@pytest.mark.parametrize(
    "entries",
    [
        [("a", "U32", [2], [0, 8]), ("b", "U32", [2], [4, 12])],  # overlap
        [("a", "U32", [1], [0, 4]), ("b", "U32", [1], [8, 12])],  # a hole
        [("a", "U32", [2], [4, 12])],  # a hole at the start
        [("a", "U32", [2], [0, 8])],  # bytes that belong to nothing
        [("a", "U32", [4], [0, 16])],  # past the end
        [("a", "U32", [2], [0, 12])],  # more bytes than the shape
        [("a", "U32", [4], [0, 12])],  # fewer
        [("a", "U32", [3], [12, 0])],
        [("a", "U32", [3], [0, 12]), ("b", "U32", [3], [0, 12])],  # the same twice
        [("a", "U32", [3], [0, 12, 12])],
        [("a", "U32", [True, 3], [0, 12])],
        [("a", "U32", [3], [False, 12])],
        [("a", "U32", [-1, -3], [0, 12])],
        [("a", "U32", "3", [0, 12])],
        [("a", "U32", [3.0], [0, 12])],
        [("a", "BOOL", [12], [0, 12])],
        [("a", "BF16", [6], [0, 12])],
        [("a", ["U32"], [3], [0, 12])],
        [("a", "U32", [3], [0, 12]), ("b", "U8", [0, 2**48, 2**48], [12, 12])],
        [("a", "U32", [3], [0, 12]), ("b", "U8", [0, 2**80], [12, 12])],
        [("a", "U32", [3] + [1] * 70, [0, 12])],
        [("a", "U32", [3], [0, 12]), ("a", "U32", [3], [0, 12])],  # one name twice
    ],
)
def test_a_table_that_breaks_the_formats_rules_is_refused(entries):
    with pytest.raises(CorruptData) as caught:
        load(with_header(table(*entries), bytes(12)), "the/path")
    assert caught.value.path == "the/path"


@pytest.mark.parametrize("shape", [[2**30, 2**10], [2**40], [1, 2**48]])
def test_a_declared_shape_allocates_nothing(shape):
    """The offsets agree with the shape; only the file is shorter."""
    size = 2**40 if len(shape) == 2 and shape[0] > 1 else shape[-1]
    raw = with_header(table(("a", "U8", shape, [0, size])), bytes(12))
    tracemalloc.start()
    with pytest.raises(CorruptData, match="the header says"):
        load(raw, "p")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_loading_copies_nothing():
    raw = save({"a": np.zeros(1 << 22, np.uint8)}, {"schema": "x"}, align=PAGE)
    tracemalloc.start()
    tensors, _ = load(raw, "p")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 16
    start = np.frombuffer(raw, np.uint8).ctypes.data
    assert tensors["a"].ctypes.data == start + len(raw) - (1 << 22)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_tensors_cannot_be_written_to(kind):
    tensors, _ = load(kind(SMALL), "p")
    with pytest.raises(ValueError, match="read-only"):
        tensors["a"][0, 0] = 1


def ranges(raw: bytes) -> tuple[list[tuple[int, int]], Callable[[int, int], bytes]]:
    asked: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return raw[start:stop]

    return asked, read


def test_a_blocks_header_is_one_read_and_no_data():
    raw = (GOLDEN / "block.q4.safetensors").read_bytes()
    asked, read = ranges(raw)
    header = read_header(read, "p")
    assert asked == [(0, PAGE)]
    assert (header.data, header.size) == (PAGE, len(raw))
    assert header.metadata["rows"] == 16
    tensors, _ = load(raw, "p")
    assert {k: (x.dtype, x.shape) for k, x in header.tensors.items()} == {
        k: (x.dtype, x.shape) for k, x in tensors.items()
    }
    for name, info in header.tensors.items():  # and one tensor of it is a range of the file
        part = view(raw[info.start : info.stop], info, info.start)
        assert part.tobytes() == tensors[name].tobytes() == raw[info.start : info.stop]


def test_a_long_header_is_two_reads():
    raw = save(TENSORS, {"schema": "x" * 3 * PAGE})
    asked, read = ranges(raw)
    header = read_header(read, "p")
    assert asked == [(0, PAGE), (PAGE, header.data)]
    assert (header.metadata, header.size) == ({"schema": "x" * 3 * PAGE}, len(raw))
    with pytest.raises(CorruptData, match="does not fit"):
        read_header(ranges(raw[: PAGE + 5])[1], "p")


def test_a_huge_header_is_not_read():
    asked, read = ranges(struct.pack("<Q", MAX_HEADER + 1) + SMALL)
    with pytest.raises(CorruptData, match="does not fit"):
        read_header(read, "p")
    assert asked == [(0, PAGE)]


@pytest.mark.parametrize("header", [
    b'{"__metadata__":{"kvferry":{}}}', b'{"__metadata__":{"kvferry":7}}',
    b'{"__metadata__":["kvferry"]}', b'{"__metadata__":"kvferry"}', b'{"__metadata__":null}',
    b'{"__metadata__":{"kvferry":"{}"}}\t', b'{"__metadata__":{"kvferry":"{}"}}\n',
    b'{"__metadata__":{"kvferry":"{}"},"x":[]}', b'{"__metadata__":{"kvferry":"{}"},"x":7}',
    b'{"__metadata__":{"kvferry":"{}"},"x":{"dtype":"U8","shape":{},"data_offsets":"ab"}}',
    b'{"__metadata__":{"kvferry":"{}"},"x":{"dtype":{},"shape":[],"data_offsets":{}}}', b"[]",
    b"\xff\xfe{\0}\0", b"{\xc3\x28}",
    b'{"__metadata__":{"kvferry":"{}"},"x":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}',
    b'{"__metadata__":{"kvferry":"{}"},"x":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}}',
    b'{"__metadata__":{"kvferry":"{}"},"x":{"dtype":"U8","shape":[-1],"data_offsets":[0,0]}}',
    b'{"__metadata__":{"kvferry":"{}"},"x":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}',
])  # fmt: skip
def test_a_header_that_is_not_ours_is_refused(header):
    with pytest.raises(CorruptData):
        load(with_header(header), "p")


def test_sha256_takes_views():
    assert sha256(b"abc") == sha256(memoryview(b"abc")) == hashlib.sha256(b"abc").hexdigest()
