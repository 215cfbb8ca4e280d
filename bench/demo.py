"""kvferry demo: four agents take turns on a running cluster, one moves, one loses its node.

    two rounds     each agent returns after others took its place; its history is not prefilled
    a migration    one agent moves to another node and goes on there
    a loss         SIGKILL of the node that is streaming an answer; the stream must go on

Drives the endpoint over HTTP only. To see agents pushed out, start the cluster with fewer slots
than agents: `kvferry up --slots 1`. The last two parts need two device nodes, and the loss needs
them on this machine. Exit code 0: all of it was shown and every check held; 1 otherwise, with a
line for each check that did not. Without a session id a turn is cold: that is the last column.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from bench.client import Endpoint, EndpointError, Message, Reply
from bench.kill import KillRefused, check_node, kill_node
from bench.report import seconds
from bench.texts import TRADES, context

_REPLY_TOKENS = 24
_LONG_REPLY_TOKENS = 160  # the node must die long before the answer is over
_DELTAS_BEFORE_KILL = 8
_READY_TIMEOUT_S = 90.0
_QUESTIONS = (
    "Sum up these notes in one sentence.",
    "Which thing is mentioned most often?",
    "And who looked after it?",
)
_LONG_QUESTION = "Write a story of ten chapters about these people."
_LAST_QUESTION = "Thank you. Who was it about?"


_CAPTION = """\
TTFT: from the POST to the first text. cold: TTFT of the same messages, sent once more after the
turn, without a session id and with another beginning, so that everything is prefilled."""

_ALL_FIT = "all fit, nobody is pushed out (kvferry up --slots 1 shows it)"


class CheckFailed(Exception):
    """The demo cannot go on; one line for the user."""


@dataclass
class Agent:
    """One conversation; `held` are the tokens that the cluster should remember of it."""

    name: str
    session: str
    messages: list[Message]
    held: int = 0


@dataclass
class Demo:
    """The conversation with one endpoint: rows for the table, and what did not hold."""

    endpoint: Endpoint
    agents: list[Agent]
    table: Table
    show: Callable[[], None]
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def turn(
        self,
        title: str,
        agent: Agent,
        question: str,
        *,
        max_tokens: int = _REPLY_TOKENS,
        on_delta: Callable[[Reply], None] | None = None,
        settle: Callable[[], object] = lambda: None,
    ) -> Reply:
        """A turn, then the same messages cold, then its row. `settle` runs between the two."""
        agent.messages.append({"role": "user", "content": question})
        reply = self.endpoint.chat(
            agent.messages, session=agent.session, max_tokens=max_tokens, on_delta=on_delta
        )
        settle()
        if agent.held:
            # With a beginning of its own: prompts that begin alike share that.
            first, *others = agent.messages
            alone = {**first, "content": f"{secrets.token_hex(8)}: {first['content']}"}
            cold = self.endpoint.chat([alone, *others], session=None, max_tokens=1)
            cost = seconds(cold.ttft_s)
            if cold.cached_tokens:
                self.failures.append(f"{title}: the comparison was not cold")
            if reply.cached_tokens < agent.held - 1:  # the last token of a reply is never computed
                self.failures.append(
                    f"{title}: {agent.name} returned with {agent.held} tokens, "
                    f"but only {reply.cached_tokens} were cached"
                )
        else:
            cost = "this was cold"
        agent.messages.append({"role": "assistant", "content": reply.text})
        agent.held = reply.prompt_tokens + reply.completion_tokens
        self.table.add_row(
            title, agent.name, self._nodes_of(agent, reply), reply.cache, str(reply.cached_tokens),
            str(reply.prefilled_tokens), seconds(reply.ttft_s), cost,
        )  # fmt: skip
        self.show()
        if not reply.reason or not reply.text:
            self.failures.append(f"{title}: the answer of {agent.name} is not whole")
        return reply

    def _nodes_of(self, agent: Agent, reply: Reply) -> str:
        """Where the turn began and, if that is not where the agent is now, where it ended."""
        now = self.endpoint.request("GET", f"/v1/agents/{agent.session}")["node"]
        return reply.node if now == reply.node else f"{reply.node} → {now or 'nowhere'}"

    def nodes(self) -> list[Any]:
        """Device nodes whose replica is ready."""
        nodes = self.endpoint.request("GET", "/v1/cluster")["nodes"]
        return [node for node in nodes if node["replica"] == "ready"]

    def await_nodes(self, n: int) -> bool:
        """Until n nodes are ready again; False after a deadline."""
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if len(self.nodes()) >= n:
                return True
            time.sleep(0.5)
        return False

    # ---- the parts

    def rounds(self) -> None:
        for number in (1, 2):
            for agent in self.agents:
                self.turn(f"round {number}", agent, _QUESTIONS[number - 1])

    def migration(self, agent: Agent) -> None:
        path = f"/v1/agents/{agent.session}"
        source = self.endpoint.request("GET", path)["node"]
        target = next((node["id"] for node in self.nodes() if node["id"] != source), None)
        if target is None:
            raise CheckFailed("migration: there is no second node that is ready")
        done = self.endpoint.request("POST", f"{path}/migrate", {"target": target})
        self.notes.append(
            f"migration: {agent.name} moved from {source} to {target}, "
            f"frozen for {1000 * done['freeze_s']:.0f} ms"
        )
        reply = self.turn("after migration", agent, _QUESTIONS[2])
        if reply.node != target:
            self.failures.append(f"migration: the turn ran on {reply.node}, not on {target}")

    def loss(self, agent: Agent) -> None:
        nodes = {node["id"]: node for node in self.nodes()}
        owner = self.endpoint.request("GET", f"/v1/agents/{agent.session}")["node"]
        _refuse_early(nodes.get(owner))
        refused: list[str] = []
        killed: list[tuple[str, int, float]] = []

        def kill(reply: Reply) -> None:
            if len(reply.deltas) == _DELTAS_BEFORE_KILL and not killed and not refused:
                try:
                    kill_node(nodes[reply.node])
                    killed.append((reply.node, len(reply.deltas), time.perf_counter()))
                except (KillRefused, KeyError) as error:
                    refused.append(f"node loss: nothing was killed: {error}")

        reply = self.turn(
            "node killed", agent, _LONG_QUESTION, max_tokens=_LONG_REPLY_TOKENS,
            on_delta=kill, settle=lambda: self.await_nodes(len(nodes)),
        )  # fmt: skip
        self.failures += refused
        if not killed:
            if not refused:
                self.failures.append("node loss: the answer was over before the node was killed")
            return
        self._explain(reply, killed[0][0])
        after = self.turn("after the loss", agent, _LAST_QUESTION)
        if after.prefilled_tokens > after.prompt_tokens // 2:
            self.failures.append("node loss: the agent's memory was lost with the node")

    def _explain(self, reply: Reply, node: str) -> None:
        """The sentence around the longest pause, and whether all of the answer is there."""
        at, pause = reply.longest_pause
        before, after = "".join(reply.deltas[:at]), "".join(reply.deltas[at:])
        whole = reply.reason in ("stop", "length") and bool(after)
        self.notes.append(
            f"node loss: {node} was killed after {_DELTAS_BEFORE_KILL} pieces of the answer; the "
            f"longest pause was {pause:.2f} s; {reply.completion_tokens} tokens came in all, "
            f"finish_reason {reply.reason or 'none'}: the answer is "
            f"{'whole' if whole else 'NOT whole'}"
        )
        around = " ".join(before[-60:].split()), " ".join(after[:60].split())
        self.notes.append(f"  …{around[0]} ‖ {pause:.2f} s ‖ {around[1]}…")
        if not whole:
            self.failures.append("node loss: the stream did not survive")


def run(url: str, api_key: str, tokens: int) -> int:
    """Returns the exit code; see the module docstring."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=120)
    agents = _agents(tokens)
    try:
        with Endpoint(url, api_key) as endpoint:
            try:
                failures = _run(endpoint, agents, tokens, console)
            finally:
                _delete(endpoint, agents)
    except (EndpointError, CheckFailed) as error:
        failures = [str(error)]
    for failure in failures:
        print(f"kvferry demo: did not hold: {failure}", file=sys.stderr)
    if not failures:
        console.print("Every check held.")
    return 1 if failures else 0


def _run(endpoint: Endpoint, agents: list[Agent], tokens: int, console: Console) -> list[str]:
    """What did not hold; empty when everything did."""
    table = _table()
    live = Live(table, console=console, auto_refresh=False, transient=True)
    demo = Demo(endpoint, agents, table, live.refresh if console.is_terminal else lambda: None)
    n_nodes = _introduce(demo, tokens, console)
    with live if console.is_terminal else nullcontext():
        try:
            _show(demo, n_nodes)
        except (EndpointError, CheckFailed) as error:
            demo.failures.append(str(error))
    console.print(table, soft_wrap=False)
    console.print(_CAPTION, *demo.notes, sep="\n")
    return demo.failures


def _show(demo: Demo, n_nodes: int) -> None:
    demo.rounds()
    if n_nodes < 2:
        raise CheckFailed("migration and node loss need two device nodes (kvferry up --nodes 2)")
    demo.migration(demo.agents[0])
    demo.loss(demo.agents[1])


def _introduce(demo: Demo, tokens: int, console: Console) -> int:
    """Say who plays and how many agents fit; returns the number of nodes."""
    nodes = demo.nodes()
    if not nodes:
        raise CheckFailed("no replica is ready")
    slots = sum(node["slots"] for node in nodes)
    n_agents = len(demo.agents)
    console.print(
        f"{n_agents} agents with about {tokens} tokens of context each; "
        f"{len(nodes)} device nodes with {slots} slots in all: "
        + ("not all fit, so they push each other out" if slots < n_agents else _ALL_FIT)
    )
    return len(nodes)


def _agents(tokens: int) -> list[Agent]:
    run_id, seed = secrets.token_hex(4), secrets.randbits(32)
    agents = []
    for index, trade in enumerate(TRADES):
        notes = context(seed - seed % len(TRADES) + index, tokens)
        system = f"You answer questions about the notes of a {trade.name}. The notes:\n{notes}"
        messages = [{"role": "system", "content": system}]
        agents.append(Agent(trade.name, f"demo-{run_id}-{trade.name}", messages))
    return agents


def _delete(endpoint: Endpoint, agents: list[Agent]) -> None:
    """Leave nothing in the store; an agent that never got its first turn is not known."""
    for agent in agents:
        with suppress(EndpointError):
            endpoint.request("DELETE", f"/v1/agents/{agent.session}")


def _refuse_early(node: Any) -> None:
    """Say why the node cannot be killed before an answer is asked for."""
    if node is None:
        raise CheckFailed("node loss: the agent's node is not ready")
    try:
        check_node(node)
    except KillRefused as error:
        raise CheckFailed(f"node loss: not shown: {error}") from error


def _table() -> Table:
    table = Table()
    for name in ("turn", "agent", "node", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("cached", "prefilled", "TTFT", "cold"):
        table.add_column(name, justify="right", no_wrap=True)
    return table
