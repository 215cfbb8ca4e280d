"""The actors package's exceptions; api/ maps them to HTTP.

ActorError
├── InvalidRequest     the request can never succeed; `param` names the field (400)
├── Overloaded         a queue is full or slow; try again after `retry_after` seconds (429)
├── AgentMoved         this replica does not, or no longer, own the agent; place it again
├── TurnTimeout        the turn took longer than it may (504)
├── EngineFault        the engine refused or broke; the replica cannot go on with this turn
└── ModelUnavailable   a model reference that cannot be resolved or loaded
"""

from __future__ import annotations


class ActorError(Exception):
    """Base of everything this package raises on purpose."""


class InvalidRequest(ActorError):
    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        self.code = code

    def __str__(self) -> str:
        return self.message


class Overloaded(ActorError):
    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, retry_after)
        self.message = message
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.message


class AgentMoved(ActorError):
    pass


class TurnTimeout(ActorError):
    pass


class EngineFault(ActorError):
    pass


class ModelUnavailable(ActorError):
    pass
