"""ModelCacheSpec, the compatibility key, and the errors that cross process boundaries."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace

import pytest

from storage.errors import (
    AgentExists,
    CorruptData,
    Fenced,
    Incompatible,
    StorageError,
    StoreUnavailable,
    Unsupported,
)
from storage.spec import (
    CompatibilityKey,
    LayerSpec,
    ModelCacheSpec,
    canonical_json,
    check_equivalent_digests,
)
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


def test_the_order_of_rope_parameters_does_not_matter():
    backwards = replace(KEY, rope=tuple(reversed(KEY.rope)))
    assert backwards == KEY
    assert backwards.digest == KEY.digest
    with pytest.raises(ValueError, match="named twice"):
        replace(KEY, rope=(("base", 1.0), ("base", 2.0)))


def test_every_nested_difference_is_listed():
    layers = (replace(SPEC.layers[0], key_dim=64), replace(SPEC.layers[1], window=9))
    other = replace(
        KEY, weights="aa", rope=(("scale", 2.0),), spec=replace(SPEC, layers=(*layers, *layers[:1]))
    )
    assert KEY.mismatches(other) == [
        "rope.base: absent != 10000.0",
        "rope.scale: 2.0 != absent",
        "rope.type: absent != neox",
        "spec.layers.0.key_dim: 64 != 32",
        "spec.layers.1.window: 9 != 8",
        "spec.layers.2.key_dim: 64 != 32",
        "spec.layers.3.key_dim: absent != 96",
        "spec.layers.3.kind: absent != latent",
        "spec.layers.3.n_kv_heads: absent != 1",
        "spec.layers.3.value_dim: absent != 0",
        "spec.layers.3.window: absent != 0",
        f"weights: aa != {'1f' * 32}",
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.update(weights=7),
        lambda key: key.update(tokenizer=None),
        lambda key: key["rope"].update(base=[1]),
        lambda key: key["rope"].update(base=True),
        lambda key: key["spec"].update(architecture=["a"]),
        lambda key: key["spec"].update(block_tokens=0),
        lambda key: key["spec"].update(block_tokens=True),
        lambda key: key["spec"].update(block_tokens=10**9),
        lambda key: key["spec"].update(layers=key["spec"]["layers"] * 2000),
        lambda key: key["spec"]["layers"][0].update(kind="other"),
        lambda key: key["spec"]["layers"][0].update(kind=[]),
        lambda key: key["spec"]["layers"][0].update(n_kv_heads=0),
        lambda key: key["spec"]["layers"][0].update(n_kv_heads=10**9),
        lambda key: key["spec"]["layers"][0].update(key_dim=-32),
        lambda key: key["spec"]["layers"][0].update(value_dim=1.0),
        lambda key: key["spec"]["layers"][0].update(window=-1),
    ],
)
def test_what_is_no_key_is_refused(change):
    data = json.loads(json.dumps(KEY.to_json()))
    change(data)
    with pytest.raises((KeyError, TypeError, ValueError)):
        CompatibilityKey.from_json(data)


# ---- declared-equivalent digests


def test_equivalent_models_have_one_key():
    mlx = replace(KEY, weights="aa" * 32, tokenizer="bb" * 32)
    table = {"aa" * 32: KEY.weights, "bb" * 32: KEY.tokenizer}
    check_equivalent_digests(table)
    assert mlx.canonical(table) == KEY.canonical(table) == KEY
    assert mlx.canonical(table).digest == KEY.digest
    assert mlx.canonical({}) == mlx
    other = replace(mlx, rope=())
    assert KEY.mismatches(other.canonical(table)) == [
        "rope.base: absent != 10000.0",
        "rope.type: absent != neox",
    ]


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ({"a": "b", "b": "c"}, "leads to b.*which itself leads to c"),
        ({"a": "b", "b": "a"}, "leads to b.*which itself leads to a"),
        ({"a": "a"}, "which itself leads to"),
    ],
)
def test_chains_and_cycles_are_refused(table, line):
    line = line.replace("to b", f"to {'b' * 64}").replace("to c", f"to {'c' * 64}")
    with pytest.raises(ValueError, match=line) as caught:
        check_equivalent_digests({k * 64: v * 64 for k, v in table.items()})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("digest", ["", "aa", "A" * 64, "g" * 64, "a" * 64 + "\n", 7])
def test_a_table_of_what_is_no_digest_is_refused(digest):
    for table in ({digest: "a" * 64}, {"b" * 64: digest}):
        with pytest.raises(ValueError, match="is no sha256"):
            check_equivalent_digests(table)


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
        (Unsupported("a", "card.v9", "card.v1"), "a: written as card.v9, this kvferry reads up to"),
        (AgentExists("s/planner", 7), "agent s/planner exists already, at epoch 7"),
        (StoreUnavailable("file:///x", "full"), "store file:///x: full"),
    ],
)
def test_errors_survive_pickling(error, text):
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, StorageError)
    assert type(again) is type(error)
    assert vars(again) == vars(error)
    assert text in str(again)
