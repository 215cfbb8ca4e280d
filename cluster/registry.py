"""Who owns which agent, as far as the router knows: a cache of the cards' claims.

Filled from the replicas' reports, from the router's own decisions and, after a start, from the
store. It grants nothing: it can be lost and rebuilt, and where it is wrong a claim fails. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from actors.report import AgentReport
from actors.turn import Affinity
from cluster.placement import Location
from storage.card import AgentId
from storage.store import LoadedCard

_CHARS_PER_TOKEN = 4.0  # at first: nothing is tokenized before placement
_CHARS_SMOOTHING = 0.05
_LEAST_CHARS = 400  # of a shorter prompt the template is too large a part
_MAX_OVER = 256
_MIN_NEW_TOKENS = 16  # the template's own, around a new message


@dataclass(frozen=True)
class AgentRecord:
    """`node` None: nobody runs it; the store has its card."""

    agent: AgentId
    node: str | None
    epoch: int = 0
    generation: int = 0
    branches: int = 0
    tokens: int = 0
    rows: int = 0
    in_ram: bool = False
    durable_rows: int = 0
    ram_bytes: int = 0
    stored_bytes: int = 0
    last_used: float = 0.0

    @property
    def state(self) -> str:
        """hot, warm or cold, by DESIGN's table: RAM, storage, nowhere."""
        if self.in_ram:
            return "hot"
        return "warm" if self.rows else "cold"


class Registry:
    def __init__(self, on_count: Callable[[str, int], None] = lambda node, n: None) -> None:
        """`on_count` is told how many agents a node owns whenever that changes."""
        self._on_count = on_count
        self._records: dict[AgentId, AgentRecord] = {}
        self.chars_per_token = _CHARS_PER_TOKEN
        self._per_node: dict[str, dict[AgentId, None]] = {}  # in the order in which they came
        self._chars: dict[AgentId, int] = {}  # of the messages and the reply of its last turn
        # Until when, by the caller's clock: an operator's migrations, and turns that run.
        self._settled: dict[AgentId, float] = {}
        self._turns: dict[AgentId, dict[str, float]] = {}
        self._soft: set[AgentId] = set()  # those whose last turn had that affinity
        self._over: deque[str] = deque(maxlen=_MAX_OVER)  # turns that ended before they began

    def __len__(self) -> int:
        return len(self._records)

    def get(self, agent: AgentId) -> AgentRecord | None:
        return self._records.get(agent)

    def all(self, tenant: str) -> list[AgentRecord]:
        """A tenant's agents, the latest used first."""
        found = [r for r in self._records.values() if r.agent.tenant == tenant]
        return sorted(found, key=lambda record: -record.last_used)

    def on(self, node: str) -> list[AgentRecord]:
        """The agents that a node owns, of all tenants."""
        return [self._records[agent] for agent in self._per_node.get(node, ())]

    def count(self, node: str) -> int:
        """Agents that a node owns."""
        return len(self._per_node.get(node, ()))

    def spoken(self, agent: AgentId, n_chars: int) -> None:
        """A turn was answered: so long are its messages and its reply."""
        if agent in self._records:
            self._chars[agent] = n_chars

    def tokenized(self, n_chars: int, n_tokens: int) -> None:
        """A prompt was so long, before and after."""
        if n_chars >= _LEAST_CHARS and n_tokens > 0:
            measured = min(16.0, max(0.5, n_chars / n_tokens))
            self.chars_per_token += _CHARS_SMOOTHING * (measured - self.chars_per_token)

    def new_tokens(self, agent: AgentId, n_chars: int) -> int:
        """Roughly how much of a prompt the agent has not seen. Where its last turn does not say,
        because the prompt does not go on where that ended, its rows do."""
        known = self._chars.get(agent, 0)
        if not 0 < known <= n_chars:
            known = int(self.location(agent).tokens * self.chars_per_token)
        return max(_MIN_NEW_TOKENS, int((n_chars - known) / self.chars_per_token))

    def settled(self, agent: AgentId, until: float) -> None:
        """An operator said where it lives."""
        self._settled[agent] = until

    def turn_began(self, agent: AgentId, turn_id: str, until: float) -> None:
        """Each attempt says so again; `until` bounds a turn whose end nobody tells."""
        if turn_id in self._over:  # its client went away while it was being placed
            self._over.remove(turn_id)
            return
        self._turns.setdefault(agent, {})[turn_id] = until

    def turn_ended(self, agent: AgentId, turn_id: str) -> None:
        turns = self._turns.get(agent, {})
        if turns.pop(turn_id, None) is None and turn_id:
            self._over.append(turn_id)
        if not turns:
            self._turns.pop(agent, None)

    def stays(self, agent: AgentId, now: float) -> bool:
        """While a turn of it runs, and at first after an operator moved it, an agent is not moved
        for another turn's sake."""
        untils = [self._settled.get(agent, 0.0), *self._turns.get(agent, {}).values()]
        return now < max(untils)

    def asked(self, agent: AgentId, affinity: Affinity) -> None:
        """A turn of the agent came with that affinity."""
        if affinity == "soft":
            self._soft.add(agent)
        else:
            self._soft.discard(agent)

    def may_move(self, agent: AgentId, now: float) -> bool:
        """Whether an agent may be moved for others' sake, even while it speaks: its last turn said
        so, and no operator has just put it there."""
        return agent in self._soft and now >= self._settled.get(agent, 0.0)

    def turns(self, agent: AgentId, now: float) -> list[float]:
        """Until when its turns run, at most; one that began later, until later. Those that must be
        over are forgotten."""
        turns = self._turns.get(agent, {})
        for turn_id in [turn_id for turn_id, until in turns.items() if until <= now]:
            self.turn_ended(agent, turn_id)
        return list(turns.values())

    def location(self, agent: AgentId) -> Location:
        record = self._records.get(agent)
        if record is None:
            return Location()
        lag = max(0, record.rows - record.durable_rows)
        return Location(record.node, record.rows, record.in_ram, lag)

    def assign(self, agent: AgentId, node: str) -> None:
        """The router sent the agent to a node."""
        record = self._records.get(agent) or AgentRecord(agent, None)
        if record.node != node:
            self._put(replace(record, node=node, in_ram=False, ram_bytes=0))

    def _put(self, record: AgentRecord) -> None:
        old = self._records.get(record.agent)
        self._records[record.agent] = record
        if old is None or old.node != record.node:
            if old is not None:
                self._leaves(old)
            if record.node is not None:
                self._per_node.setdefault(record.node, {})[record.agent] = None
                self._on_count(record.node, self.count(record.node))

    def _leaves(self, record: AgentRecord) -> None:
        if record.node is not None:
            del self._per_node[record.node][record.agent]
            self._on_count(record.node, self.count(record.node))

    def reported(self, node: str, reports: Iterable[AgentReport]) -> None:
        """A replica's own word, unless a newer epoch is known."""
        for report in reports:
            known = self._records.get(report.agent)
            if known is not None and known.epoch > report.epoch:
                continue
            self._put(AgentRecord(node=node, **vars(report)))

    def found_in_store(self, loaded: LoadedCard) -> None:
        """A card, at start; what a replica has reported meanwhile is newer."""
        card = loaded.card
        if card.agent in self._records:
            return
        latest = max(card.branches, key=lambda b: b.last_used, default=None)
        self._put(
            AgentRecord(
                agent=card.agent,
                node=None,
                epoch=card.epoch,
                generation=card.generation,
                branches=len(card.branches),
                tokens=len(latest.tokens) if latest else 0,
                rows=latest.rows if latest else 0,
                durable_rows=latest.rows if latest else 0,
                stored_bytes=card.bytes_stored,
                last_used=card.updated,
            )
        )

    def node_lost(self, node: str) -> None:
        """Its agents are owned by nobody now; their memory is in the store."""
        for record in self.on(node):
            rows = min(record.rows, record.durable_rows)
            self._put(replace(record, node=None, rows=rows, in_ram=False, ram_bytes=0))
        self._per_node.pop(node, None)

    def forget(self, agent: AgentId) -> None:
        self._chars.pop(agent, None)
        self._soft.discard(agent)
        self._settled.pop(agent, None)
        self._turns.pop(agent, None)
        self._remove(agent)

    def _remove(self, agent: AgentId) -> None:
        record = self._records.pop(agent, None)
        if record is not None:
            self._leaves(record)
