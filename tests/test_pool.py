"""The pool of encoded rows: its budget and its pins."""

from __future__ import annotations

import pytest

from storage.codec import encode_rows, get_codec, tensor_bytes
from storage.pool import Key, Pool
from tests.store_contract import SPEC, sample_rows

Q4 = get_codec("q4")
ROWS = encode_rows(SPEC, Q4, sample_rows(16))
SIZE = tensor_bytes(ROWS)
KEYS: list[Key] = [(f"{n:064x}", "full") for n in range(8)]


@pytest.fixture
def pool():
    return Pool(3 * SIZE)


def in_ram(pool: Pool) -> list[int]:
    return [n for n, key in enumerate(KEYS) if key in pool._entries]


def test_the_least_recently_used_leave_first(pool):
    for n in range(3):
        pool.put(KEYS[n], ROWS, pinned=False)
    assert pool.used_bytes == 3 * SIZE == pool.budget_bytes
    assert pool.get(KEYS[0]) is ROWS
    pool.put(KEYS[3], ROWS, pinned=False)
    assert in_ram(pool) == [0, 2, 3]
    pool.put(KEYS[2], ROWS, pinned=False)
    pool.put(KEYS[4], ROWS, pinned=False)
    assert in_ram(pool) == [2, 3, 4]
    assert pool.used_bytes == 3 * SIZE
    assert pool.get(KEYS[0]) is None


def test_bytes_count_not_entries(pool):
    small = encode_rows(SPEC, Q4, sample_rows(1))
    for n in range(2):
        pool.put(KEYS[n], ROWS, pinned=False)
    for n in range(2, 8):
        pool.put(KEYS[n], small, pinned=False)
    assert in_ram(pool) == list(range(8))
    assert pool.used_bytes == 2 * SIZE + 6 * SIZE // 16
    assert (pool.size_of(KEYS[0]), pool.size_of(("none", "full"))) == (SIZE, 0)


def test_pins_hold_even_above_the_budget(pool):
    for n in range(5):
        pool.put(KEYS[n], ROWS, pinned=True)
    assert pool.used_bytes == 5 * SIZE
    pool.put(KEYS[5], ROWS, pinned=False)
    pool.evict_all()
    assert in_ram(pool) == [0, 1, 2, 3, 4]
    pool.unpin(KEYS[3])
    assert in_ram(pool) == [0, 1, 2, 4]
    pool.unpin(KEYS[0])
    pool.unpin(KEYS[1])
    assert in_ram(pool) == [1, 2, 4]
    pool.evict_all()
    assert in_ram(pool) == [2, 4]
    assert pool.used_bytes == 2 * SIZE


def test_every_pin_needs_its_unpin(pool):
    pool.put(KEYS[0], ROWS, pinned=True)
    pool.put(KEYS[0], ROWS, pinned=True)
    pool.put(KEYS[0], ROWS, pinned=False)
    assert pool.used_bytes == SIZE
    pool.unpin(KEYS[0])
    pool.evict_all()
    assert in_ram(pool) == [0]
    pool.unpin(KEYS[0])
    pool.unpin(KEYS[0])
    pool.unpin(("unknown", "full"))
    pool.put(KEYS[0], ROWS, pinned=True)
    pool.evict_all()
    assert in_ram(pool) == [0]
    pool.unpin(KEYS[0])
    pool.evict_all()
    assert (in_ram(pool), pool.used_bytes) == ([], 0)


def test_rows_that_nobody_wants_leave_unless_they_are_pinned(pool):
    pool.put(KEYS[0], ROWS, pinned=True)
    pool.put(KEYS[1], ROWS, pinned=False)
    pool.drop(KEYS[0])
    pool.drop(KEYS[1])
    pool.drop(KEYS[2])
    assert (in_ram(pool), pool.used_bytes) == ([0], SIZE)
