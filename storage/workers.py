"""A deadline for calls that may never return: each runs on a thread that can be left behind.

A read from a network mount whose server is gone sleeps in the kernel and cannot be interrupted.
The threads are daemons, so that such a call delays neither its caller nor the end of the process;
there are never more than `limit` of them. Knows nothing of files. Called by storage.files.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class DeadlinePassed(Exception):
    """The call did not return in time; it may still be running, and may still take effect."""


class _Job:
    """One call. `left` is set when its caller has gone; both sides look at it under the lock."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.reply: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self.done = False
        self.left = False


class _Shared:
    """What the threads hold on to; not the Workers, whose end is theirs."""

    def __init__(self, limit: int) -> None:
        self.free = threading.Semaphore(limit)
        self.idle: list[SimpleQueue[_Job | None]] = []
        self.lock = threading.Lock()
        self.hanging = 0  # calls that outlived their deadline and still run
        self.closed = False

    def close(self) -> None:
        self.closed = True
        for inbox in list(self.idle):
            inbox.put(None)


class Workers:
    """At most `limit` calls at a time. Threads start when needed and end with this object."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._shared = _Shared(limit)
        weakref.finalize(self, self._shared.close)

    def call(self, function: Callable[[], T], seconds: float) -> T:
        """function(), or its exception. Raises DeadlinePassed `seconds` after the call; at once
        while every thread is held by a call that has outlived its own deadline."""
        deadline = time.monotonic() + seconds
        shared = self._shared
        if shared.hanging >= self.limit:
            raise DeadlinePassed(f"all {self.limit} workers hang")
        if not shared.free.acquire(timeout=max(0.0, seconds)):
            raise DeadlinePassed(f"all {self.limit} workers are busy")
        job = _Job(function)
        try:
            inbox = shared.idle.pop()
        except IndexError:
            inbox = self._start()
        inbox.put(job)
        try:
            result, error = job.reply.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            with shared.lock:
                job.left = not job.done
                shared.hanging += job.left
            if job.left:
                raise DeadlinePassed(f"no answer within {seconds:.3g} s") from None
            result, error = job.reply.get()
        if error is not None:
            try:
                raise error
            finally:
                del error  # it holds this frame: no cycle for the collector
        return result  # type: ignore[no-any-return]

    def _start(self) -> SimpleQueue[_Job | None]:
        inbox: SimpleQueue[_Job | None] = SimpleQueue()
        try:
            threading.Thread(
                target=_work, args=(self._shared, inbox), name="store-io", daemon=True
            ).start()
        except RuntimeError:  # the system has no thread left
            self._shared.free.release()
            raise
        return inbox


def _work(shared: _Shared, inbox: SimpleQueue[_Job | None]) -> None:
    while (job := inbox.get()) is not None:
        try:
            outcome: tuple[Any, BaseException | None] = (job.function(), None)
        except BaseException as error:  # whatever it is, it is the caller's
            outcome = (None, error)
        with shared.lock:
            job.done = True
            shared.hanging -= job.left
        shared.idle.append(inbox)
        job.reply.put(outcome)
        del job, outcome  # not kept while waiting for the next one
        shared.free.release()
        if shared.closed:
            return
