"""One block, one tail segment or one whole card, as safetensors bytes.

Any safetensors reader opens these files. Ours are deterministic: one metadata entry, `kvferry`,
holds canonical JSON, and a block's header is padded with spaces so that the data section starts on
a page. Knows bytes and tensors; what they mean is in `card` and `codec`.

Ids name the content that was asked for, digests the bytes that answered:

    block_id   = sha256(domain, parent id, token ids, key digest, codec, tenant, cache_salt)
    segment_id = the same over the rows since the last block boundary, with the segment's start

Every field is length-prefixed (u64, little endian); token ids are u32, little endian.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as _save

from storage.codec import Tensors
from storage.errors import CorruptData
from storage.spec import canonical_json

PAGE = 4096
MAX_HEADER = 16 << 20  # bytes; a card takes about 250 per block of a branch
_METADATA_KEY = "kvferry"
_MAX_NUMBER = 1 << 48  # of a shape or an offset
_MAX_DIMENSIONS = 8
# The format has more; these are what numpy can view.
DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"), "I8": np.dtype("i1"), "U16": np.dtype("<u2"), "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"), "I32": np.dtype("<i4"), "U64": np.dtype("<u8"), "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"),
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header declares it: its bytes are file[start:stop]."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a file says about itself before its data; `size` is the whole file's."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: int  # where the data section starts
    size: int


def sha256(raw: bytes | memoryview) -> str:
    return hashlib.sha256(raw).hexdigest()


@dataclass(frozen=True)
class Chain:
    """What every id of one agent's chain has in common. Tenants and salts never share an id."""

    key_digest: str
    codec: str
    tenant: str
    cache_salt: str = ""

    def block_id(self, parent: str, token_ids: Sequence[int]) -> str:
        """Id of a whole block; `parent` is the id before it, "" for the first."""
        return self._id(b"kvferry.block.v1", parent, token_ids, b"")

    def segment_id(self, parent: str, token_ids: Sequence[int], start: int) -> str:
        """Id of a row segment: `token_ids` since the last block, of which it holds those from
        index `start` on."""
        return self._id(b"kvferry.segment.v1", parent, token_ids, struct.pack("<Q", start))

    def _id(self, domain: bytes, parent: str, token_ids: Sequence[int], start: bytes) -> str:
        digest = hashlib.sha256()
        for field in (
            domain,
            bytes.fromhex(parent),
            np.asarray(token_ids, dtype="<u4").tobytes(),
            bytes.fromhex(self.key_digest),
            self.codec.encode(),
            self.tenant.encode(),
            self.cache_salt.encode(),
            start,
        ):
            digest.update(struct.pack("<Q", len(field)))
            digest.update(field)
        return digest.hexdigest()


def save(tensors: Tensors, metadata: dict[str, Any], *, align: int = 8) -> bytes:
    """Serialize; the data section starts at a multiple of `align` bytes. Raises ValueError for a
    header that load would refuse."""
    raw = _save(
        {name: np.ascontiguousarray(x) for name, x in tensors.items()},
        {_METADATA_KEY: canonical_json(metadata).decode("ascii")},
    )
    (header,) = struct.unpack_from("<Q", raw)
    pad = -(8 + header) % align
    body = 8 + header
    _check_header(raw[8:body], header + pad)
    return b"".join((struct.pack("<Q", header + pad), raw[8:body], b" " * pad, raw[body:]))


def header_bytes(
    tensors: Sequence[tuple[str, np.dtype[Any], tuple[int, ...]]],
    metadata: dict[str, Any],
    *,
    align: int = 8,
) -> bytes:
    """The header of a file whose tensors follow in this order, for files that are written piece by
    piece. Raises ValueError for one that load would refuse."""
    table: dict[str, Any] = {"__metadata__": {_METADATA_KEY: canonical_json(metadata).decode()}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {
            "dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = _compact_json(table)
    text += b" " * (-(8 + len(text)) % align)
    _check_header(text, len(text))
    return struct.pack("<Q", len(text)) + text


def _check_header(text: bytes, size: int) -> None:
    """Raises ValueError for a header that is too long, or so dense with lists and mappings as no
    honest one is: Python's would take many times its size."""
    if size > MAX_HEADER:
        raise ValueError(f"header of {size} bytes is above the limit of {MAX_HEADER}")
    if text.count(b"[") + text.count(b"{") > 256 + len(text) // 12:
        raise ValueError(f"header of {size} bytes with too many lists and mappings")


def load(raw: Buffer, path: str) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and metadata of a whole file. Raises CorruptData, naming `path`.

    The tensors are read-only views into `raw`; one whose bytes another writer did not align is
    copied. Nothing is allocated for what a header only declares.
    """
    header = parse_header(raw, path)
    if header.size != len(raw):
        raise CorruptData(path, f"{len(raw)} bytes, the header says {header.size}")
    return {name: view(raw, info) for name, info in header.tensors.items()}, header.metadata


def view(raw: Buffer, info: TensorInfo, base: int = 0) -> NDArray[Any]:
    """One tensor of a file, of which `raw` holds the bytes from `base` on."""
    flat = np.frombuffer(raw, info.dtype, math.prod(info.shape), info.start - base)
    array = flat.reshape(info.shape)
    if not array.flags.aligned:
        array = array.copy()
    array.flags.writeable = False
    return array


def load_metadata(head: Buffer, path: str) -> dict[str, Any]:
    """The metadata from the first bytes of a file, which must hold the whole header. Raises
    CorruptData, naming `path`."""
    return parse_header(head, path).metadata


def read_header(read: Callable[[int, int], bytes], path: str) -> Header:
    """The header of a file of which `read(start, stop)` gives ranges, cut off at the file's end.

    A block's header fits into the first read. Raises CorruptData, naming `path`, and what `read`
    raises.
    """
    head = read(0, PAGE)
    end = 8 + _header_size(head, path)
    if end > len(head):
        head += read(len(head), end)
    return parse_header(head, path)


def parse_header(head: Buffer, path: str) -> Header:
    """The header from the first bytes of a file, which must hold all of it.

    Only the one way in which `save` writes it is accepted. Raises CorruptData, naming `path`.
    """
    end = 8 + _header_size(head, path)
    if end > len(head):
        raise CorruptData(path, f"header of {end - 8} bytes does not fit")
    try:
        text = bytes(head[8:end]).rstrip(b" ")
        _check_header(text, end - 8)
        header = json.loads(text)
        canonical = _compact_json(header) == text
        inner = header.pop("__metadata__")[_METADATA_KEY]
        metadata = json.loads(inner)
        canonical = canonical and canonical_json(metadata) == inner.encode("ascii")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptData(path, f"header is not kvferry's ({error!r})") from error
    if not isinstance(metadata, dict):
        raise CorruptData(path, "metadata is no mapping")
    if not canonical:
        raise CorruptData(path, "header is not in canonical form")
    try:
        tensors = {name: _tensor_info(entry, end) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptData(path, f"tensor table is malformed ({error!r})") from error
    return Header(metadata, tensors, end, _check_layout(tensors, end, path))


def _header_size(head: Buffer, path: str) -> int:
    if len(head) < 8:
        raise CorruptData(path, f"{len(head)} bytes are no safetensors file")
    (size,) = struct.unpack_from("<Q", head)
    if size > MAX_HEADER:
        raise CorruptData(path, f"header of {size} bytes does not fit")
    return int(size)


def _compact_json(value: Any) -> bytes:
    """JSON as the safetensors library writes it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _tensor_info(entry: Mapping[str, Any], data: int) -> TensorInfo:
    """Raises ValueError, KeyError or TypeError for an entry that is not of the format."""
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"unknown fields {sorted(entry)}")
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    start, stop = entry["data_offsets"]
    for number in (*shape, start, stop):
        if type(number) is not int or not 0 <= number <= _MAX_NUMBER:
            raise ValueError(f"{number!r} is no size")
    if len(shape) > _MAX_DIMENSIONS or math.prod(max(n, 1) for n in shape) > _MAX_NUMBER:
        raise ValueError(f"no array has the shape {shape}")  # even an empty one
    if math.prod(shape) * dtype.itemsize != stop - start:
        raise ValueError(f"{entry['dtype']}{shape} does not take {stop - start} bytes")
    return TensorInfo(dtype, tuple(shape), data + start, data + stop)


def _check_layout(tensors: Mapping[str, TensorInfo], data: int, path: str) -> int:
    """Tensors follow one another without holes from `data` on; where the last ends."""
    end = data
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start != end:
            raise CorruptData(path, f"a tensor starts at byte {info.start}, not at {end}")
        end = info.stop
    return end
