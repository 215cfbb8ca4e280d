"""Quota and idle time to live: what a tenant's agents may keep, and for how long.

Blocks go first: the agent is claimed with the same tokens and no rows, so its next turn prefills.
Tokens go last, as a deleted agent. An agent is touched only if its newest card is still the one
that was looked at, and never within MIN_IDLE_S of its last card: it may be in a turn. The bytes are
free once the collector has been there. Called by the command line.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from storage.card import CacheCard, Owner
from storage.claims import new_card
from storage.errors import Fenced, StorageError
from storage.store import CacheStore
from storage.survey import tenants
from storage.usage import AgentUsage, TenantUsage, tenant_usage

logger = logging.getLogger(__name__)
MIN_IDLE_S = 600.0


@dataclass(frozen=True)
class RetentionPolicy:
    """0 switches a rule off. Times count from an agent's last card, by the store's clock."""

    quota_bytes: int = 0  # of blocks, per tenant; the least recently updated agents lose theirs
    idle_ttl_s: float = 0.0  # then an agent's blocks go
    token_ttl_s: float = 0.0  # then the tokens of an agent without blocks go


@dataclass
class RetentionReport:
    """What was done; with `dry_run`, what would have been. Agents as `tenant/agent`."""

    stripped: list[str] = field(default_factory=list)  # lost their blocks
    deleted: list[str] = field(default_factory=list)
    bytes: int = 0  # that nobody names any more
    over: dict[str, int] = field(default_factory=dict)  # tenant -> bytes still above its quota
    skipped: dict[str, str] = field(default_factory=dict)  # tenant or agent -> why


def apply_retention(
    store: CacheStore, policy: RetentionPolicy, *, dry_run: bool = False
) -> RetentionReport:
    """Go once over every tenant. Raises StoreUnavailable."""
    report = RetentionReport()
    owner = Owner("retention", secrets.token_hex(8))
    if policy == RetentionPolicy():
        return report
    for tenant in tenants(store):
        usage = tenant_usage(store, tenant)
        if usage.unreadable:
            logger.warning("tenant %s: not all of it can be read: %s", tenant, usage.unreadable[0])
            report.skipped[tenant] = str(usage.unreadable[0])
        _Tenant(store, policy, report, owner, usage, dry_run).apply()
    return report


class _Tenant:
    def __init__(
        self,
        store: CacheStore,
        policy: RetentionPolicy,
        report: RetentionReport,
        owner: Owner,
        usage: TenantUsage,
        dry_run: bool,
    ) -> None:
        self._store, self._policy, self._report = store, policy, report
        self._owner, self._usage, self._dry_run = owner, usage, dry_run
        self._sharers = Counter(usage.sharers)
        self._bytes = usage.bytes

    def apply(self) -> None:
        now = self._store.files.now()
        policy = self._policy
        for agent in sorted(self._usage.agents, key=lambda agent: agent.modified):
            idle = now - agent.modified
            if idle < MIN_IDLE_S:
                break
            over = 0 < policy.quota_bytes < self._bytes
            if agent.bytes and (over or 0 < policy.idle_ttl_s < idle):
                self._strip(agent)
            elif not agent.bytes and 0 < policy.token_ttl_s < idle:
                self._delete(agent)
        if 0 < policy.quota_bytes < self._bytes:
            self._report.over[self._usage.tenant] = self._bytes - policy.quota_bytes

    def _strip(self, agent: AgentUsage) -> None:
        def strip() -> None:
            claim = self._store.claim(
                self._template(agent.card), after=agent.card.epoch, rows=False, expect=agent.ref
            )
            self._store.remove_older(claim.card)

        if self._done(agent, strip):
            self._report.stripped.append(_name(agent))
            self._sharers.subtract(agent.names)
            gone = sum(self._usage.sizes[name] for name in agent.names if not self._sharers[name])
            self._bytes -= gone
            self._report.bytes += gone

    def _delete(self, agent: AgentUsage) -> None:
        template = self._template(agent.card)
        if self._done(
            agent,
            lambda: self._store.delete(template, after=agent.card.epoch, expect=agent.ref),
        ):
            self._report.deleted.append(_name(agent))

    def _done(self, agent: AgentUsage, action: Callable[[], None]) -> bool:
        """Whether it was, or with dry_run would be, done."""
        if self._dry_run:
            return True
        try:
            action()
        except Fenced:  # in use again
            return False
        except StorageError as error:
            logger.warning("agent %s: %s", _name(agent), error)
            self._report.skipped[_name(agent)] = str(error)
            return False
        return True

    def _template(self, card: CacheCard) -> CacheCard:
        """Of a claim that keeps what the agent is, but for its owner."""
        return new_card(
            card.agent,
            card.key,
            card.codec,
            self._owner,
            codec_parameters={name: dict(of) for name, of in card.codec_parameters.items()},
            provenance=dict(card.provenance),
        )


def _name(agent: AgentUsage) -> str:
    return f"{agent.card.agent.tenant}/{agent.card.agent}"
