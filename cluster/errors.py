"""The cluster package's exceptions.

ClusterError
├── ConfigError        a setting that is unknown or has a wrong value (exit code 2)
├── NoReplica          no replica can take the turn now; try again after `retry_after` s (503)
├── UnknownNode        a node id that is not in the cluster (404)
├── LastNode           no other node could take this node's agents (409)
├── UnknownAgent       an agent nobody has a memory of (404)
├── AgentBusy          the agent has a turn under way (409)
└── MigrationFailed    the agent stays, or is left, where it can be served (502)
"""

from __future__ import annotations


class ClusterError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(ClusterError):
    pass


class NoReplica(ClusterError):
    def __init__(self, message: str, retry_after: float = 2.0) -> None:
        super().__init__(message, retry_after)
        self.message = message
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.message


class UnknownNode(ClusterError):
    pass


class LastNode(ClusterError):
    pass


class UnknownAgent(ClusterError):
    pass


class AgentBusy(ClusterError):
    pass


class MigrationFailed(ClusterError):
    pass
