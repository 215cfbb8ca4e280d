"""How llama.cpp's threads come to wait for each other as they should: told before it is loaded, and
with no team of threads but the one that computes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from actors.engines.options import WAITING
from actors.futures import fulfil

T = TypeVar("T")


def wait_actively() -> None:
    """Before llama.cpp is loaded, when OpenMP reads its environment. One that says how to wait
    already stays as it is."""
    if not WAITING.keys() & os.environ.keys():
        os.environ.update(WAITING)


def apart(function: Callable[[], T]) -> T:
    """Run what computes on a thread that ends. OpenMP keeps a team of threads for every thread that
    has ever computed, and once it counts more of them than cores, none waits actively any more."""
    future: Future[T] = Future()
    thread = threading.Thread(target=fulfil, args=(future, function), name="apart", daemon=True)
    thread.start()
    result = future.result()
    thread.join()
    return result
