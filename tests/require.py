"""Skips that CI can turn into failures.

A test that needs something a machine may lack (the real model, a data file) asks for it here. On a
developer's machine the test is skipped, with the reason. CI lists in KVFERRY_REQUIRE, separated by
commas, the parts it has set up: a test that would be skipped for one of those fails instead, so
nothing goes unrun unnoticed.
"""

import os

import pytest


def require(part: str, present: bool, reason: str) -> None:
    """Skip the running test unless `present`; fail it when KVFERRY_REQUIRE lists `part`."""
    if present:
        return
    required = os.environ.get("KVFERRY_REQUIRE", "").split(",")
    if part in (name.strip() for name in required):
        pytest.fail(f"KVFERRY_REQUIRE lists {part!r}: {reason}")
    pytest.skip(reason)
