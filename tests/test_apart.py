"""Where the engine is opened, and how its threads are told to wait."""

import os
import threading

import pytest

from actors.apart import apart, wait_actively
from actors.engines.options import WAITING


def test_what_computes_runs_on_a_thread_that_has_ended() -> None:
    thread = apart(threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_what_it_raises_comes_here() -> None:
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 // 0)


def test_threads_wait_actively_unless_the_environment_says_how(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    wait_actively()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(os, "environ", {})
    wait_actively()
    assert os.environ == WAITING
