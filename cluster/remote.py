"""Calls between actors: a deadline on each, Ray's errors translated where they enter.

The only module that knows how Ray says that somebody died. A replica's own exceptions come back as
themselves (RayTaskError.cause); a lost replica is ReplicaLost.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from ray.exceptions import ActorDiedError, GetTimeoutError, RayError, RayTaskError

from cluster.errors import ClusterError


class ReplicaLost(ClusterError):
    """The actor is dead (`dead`), or unreachable or silent beyond its deadline."""

    def __init__(self, message: str, dead: bool = False) -> None:
        super().__init__(message, dead)
        self.message = message
        self.dead = dead

    def __str__(self) -> str:
        return self.message


async def call(reference: Awaitable[Any], timeout: float) -> Any:
    """Await an actor call. Raises ReplicaLost, or what the actor raised."""
    try:
        async with asyncio.timeout(timeout):  # wait_for would lose a cancellation in Python 3.11
            return await reference
    except TimeoutError as error:
        raise ReplicaLost(f"no answer in {timeout:g} s") from error
    except RayTaskError as error:
        raise _own(error) from error
    except (RayError, GetTimeoutError) as error:
        raise _lost(error) from error


async def stream(generator: Any, item_timeout: float) -> AsyncIterator[Any]:
    """Items of a streaming call; the deadline runs from item to item. Raises as `call`."""
    items = aiter(generator)
    while True:
        try:
            async with asyncio.timeout(item_timeout):
                reference = await anext(items)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise ReplicaLost(f"no sign of life in {item_timeout:g} s") from error
        except RayError as error:
            raise _lost(error) from error
        yield await call(reference, item_timeout)


def _own(error: RayTaskError) -> BaseException:
    cause: BaseException | None = error.cause
    return cause if cause is not None else error


def _lost(error: Exception) -> ReplicaLost:
    """A constructor's own exception is the last line of what Ray says."""
    lines = str(error).strip().splitlines() or [""]
    died_young = isinstance(error, ActorDiedError) and "creation task" in lines[0]
    line = lines[-1] if died_young else lines[0]
    return ReplicaLost(f"{type(error).__name__}: {line.strip()}", isinstance(error, ActorDiedError))
