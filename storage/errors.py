"""The storage package's exceptions.

    StorageError
    ├── CorruptData        bytes that fail a checksum, a shape or the format; names file and reason
    ├── Incompatible       a sound card or block, made for another model; names the fields
    ├── Unsupported        a sound card of a newer kvferry: not to be set aside or claimed past
    ├── Fenced             a newer claim exists: the caller no longer owns the agent
    ├── AgentExists        a fork or import would overwrite an agent that lives
    ├── Busy               another collector is at work on this store
    ├── WeightsUnavailable a model's files that could not be fetched; what was, is kept
    └── StoreUnavailable   the store cannot be reached, or refuses what kvferry needs of it
        └── Locked         a file that the keys at hand do not open; names the key

A miss (no such block, no such agent) is None, never one of these.
Every class passes all its arguments to Exception.__init__, so that it survives pickling by Ray.
"""

from __future__ import annotations


class StorageError(Exception):
    """Base of everything this package raises on purpose."""


class CorruptData(StorageError):
    """Bytes that cannot be trusted."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Incompatible(StorageError):
    """A cache made under another compatibility key. `fields` are `name: theirs != ours` lines."""

    def __init__(self, path: str, fields: list[str]) -> None:
        super().__init__(path, fields)
        self.path = path
        self.fields = fields

    def __str__(self) -> str:
        return f"{self.path}: made for another model ({'; '.join(self.fields)})"


class Unsupported(StorageError):
    """A file of a schema that is newer than this reader, which knows those up to `known`."""

    def __init__(self, path: str, schema: str, known: str) -> None:
        super().__init__(path, schema, known)
        self.path = path
        self.schema = schema
        self.known = known

    def __str__(self) -> str:
        return f"{self.path}: written as {self.schema}, this kvferry reads up to {self.known}"


class Fenced(StorageError):
    """Another owner holds `epoch` of this agent."""

    def __init__(self, agent: str, epoch: int) -> None:
        super().__init__(agent, epoch)
        self.agent = agent
        self.epoch = epoch

    def __str__(self) -> str:
        return f"agent {self.agent}: epoch {self.epoch} belongs to another owner"


class AgentExists(StorageError):
    """`epoch` is the newest of the agent that is there."""

    def __init__(self, agent: str, epoch: int) -> None:
        super().__init__(agent, epoch)
        self.agent = agent
        self.epoch = epoch

    def __str__(self) -> str:
        return f"agent {self.agent} exists already, at epoch {self.epoch}"


class StoreUnavailable(StorageError):
    """The store did not do what was asked; the cause is chained."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url = url
        self.reason = reason

    def __str__(self) -> str:
        return f"store {self.url}: {self.reason}"


class Locked(StoreUnavailable):
    """A file, or a tenant's part of a store, that the keys at hand do not open. It may be sound:
    it is never set aside, replaced, or passed over for an older one."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Busy(StorageError):
    """Another collector holds the lease of this store."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url = url
        self.reason = reason

    def __str__(self) -> str:
        return f"store {self.url}: {self.reason}"


class WeightsUnavailable(StorageError):
    """A model's files cannot be fetched, or are not what was promised; never loaded."""
