"""ModelCacheSpec, the compatibility key, and the errors that cross process boundaries."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace

import pytest

from storage.errors import CorruptData, Fenced, Incompatible, StorageError, StoreUnavailable
from storage.spec import CompatibilityKey, LayerSpec, ModelCacheSpec, canonical_json
from tests.store_contract import KEY, SPEC


def test_layers_are_stacked_by_part_and_geometry():
    groups = [(g.name, g.part, g.layers, g.n_kv_heads, g.key_dim) for g in SPEC.groups]
    assert groups == [
        ("full.0", "full", (0, 2), 2, 32),
        ("sliding.0", "sliding", (1,), 1, 32),
        ("full.1", "full", (3,), 1, 96),
    ]


def test_row_bytes_count_every_layer():
    assert SPEC.f16_row_bytes == 2 * (2 * 2 * 64 + 64 + 96)
    smollm = ModelCacheSpec("llama", (LayerSpec("full", 3, 64, 64),) * 30)
    assert smollm.f16_row_bytes == 23040


def test_key_digest_is_the_documented_hash():
    layers = [
        {"key_dim": 32, "kind": "full", "n_kv_heads": 2, "value_dim": 32, "window": 0},
        {"key_dim": 32, "kind": "sliding", "n_kv_heads": 1, "value_dim": 32, "window": 8},
        {"key_dim": 32, "kind": "full", "n_kv_heads": 2, "value_dim": 32, "window": 0},
        {"key_dim": 96, "kind": "latent", "n_kv_heads": 1, "value_dim": 0, "window": 0},
    ]
    text = json.dumps(
        {
            "rope": {"base": 10000.0, "type": "neox"},
            "spec": {"architecture": "sample", "block_tokens": 16, "layers": layers},
            "tokenizer": "2e" * 32,
            "weights": "1f" * 32,
        },
        separators=(",", ":"),
    )
    assert KEY.digest == hashlib.sha256(b"kvferry.key.v1" + text.encode()).hexdigest()
    assert KEY.digest == "96bee0e630e6ef04d6542e00c1e752c7ac0c86c8a0fb0c33fec71962401ccb52"


def test_key_survives_json():
    assert CompatibilityKey.from_json(json.loads(json.dumps(KEY.to_json()))) == KEY


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (replace(KEY, weights="aa" * 32), f"weights: {'aa' * 32} != {'1f' * 32}"),
        (replace(KEY, tokenizer="bb"), f"tokenizer: bb != {'2e' * 32}"),
        (
            replace(KEY, rope=(("base", 500000.0), ("type", "neox"))),
            "rope.base: 500000.0 != 10000.0",
        ),
        (replace(KEY, rope=(("base", 10000.0),)), "rope.type: absent != neox"),
        (
            replace(KEY, spec=replace(SPEC, block_tokens=32)),
            "spec.block_tokens: 32 != 16",
        ),
        (
            replace(
                KEY, spec=replace(SPEC, layers=(LayerSpec("full", 4, 32, 32), *SPEC.layers[1:]))
            ),
            "spec.layers.0.n_kv_heads: 4 != 2",
        ),
    ],
)
def test_every_field_counts_and_is_named(changed, line):
    assert changed.digest != KEY.digest
    assert KEY.mismatches(changed) == [line]
    assert KEY.mismatches(KEY) == []


def test_canonical_json_has_one_form():
    assert canonical_json({"b": [1, 2.5], "a": "ü"}) == b'{"a":"\\u00fc","b":[1,2.5]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (CorruptData("a/b", "torn"), "a/b: torn"),
        (Incompatible("a", ["x: 1 != 2", "y: 3 != 4"]), "x: 1 != 2; y: 3 != 4"),
        (Fenced("s/planner", 7), "agent s/planner: epoch 7"),
        (StoreUnavailable("file:///x", "full"), "store file:///x: full"),
    ],
)
def test_errors_survive_pickling(error, text):
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, StorageError)
    assert type(again) is type(error)
    assert vars(again) == vars(error)
    assert text in str(again)
