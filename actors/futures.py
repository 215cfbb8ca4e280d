"""Work that one thread asks another for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def fulfil(future: Future[T], function: Callable[[], T]) -> None:
    """Call the function; the future gets what it returns or raises."""
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)


def done(result: T) -> Future[T]:
    """Of work that needs no other thread."""
    future: Future[T] = Future()
    future.set_result(result)
    return future
