"""A cluster without Ray, for tests of the HTTP surface: handles with Ray's call shapes, a router
that only knows owners, real replicas on the fake engine, and replicas that fail on cue.
"""

import asyncio
import pickle
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any

from ray.exceptions import ActorDiedError, RayError, RayTaskError

from actors.carrier import Carried, Carriers
from actors.config import ReplicaConfig
from actors.errors import AgentMoved
from actors.replica import ModelReplica
from actors.turn import StreamItem, Tokens, TurnFinished, TurnRequest
from cluster.decisions import Decision, Outcome
from cluster.dispatch import Ask
from cluster.errors import AgentBusy, UnknownAgent, UnknownNode
from cluster.migration import Migration
from cluster.moves import Moves
from cluster.placement import Placement
from cluster.remote import ReplicaLost
from storage.card import AgentId

N_CTX = 512


class Handle:
    """What Ray gives for an actor: handle.method.remote(...)."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> "_Method":
        return _Method(getattr(self._target, name))


class _Method:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def options(self, *, num_returns: str) -> "_Stream":
        assert num_returns == "streaming"
        return _Stream(self._function)

    def remote(self, *args: Any, **kwargs: Any) -> "asyncio.Future[Any]":
        async def run() -> Any:
            try:
                result = self._function(*args, **kwargs)
                return await result if asyncio.iscoroutine(result) else result
            except Exception as error:
                raise _as_ray_says(error) from None

        task = asyncio.ensure_future(run())
        task.add_done_callback(lambda t: t.cancelled() or t.exception())  # nobody need await it
        return task


class _Stream:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    async def remote(self, *args: Any) -> AsyncIterator["asyncio.Future[Any]"]:
        def reference() -> "asyncio.Future[Any]":
            return asyncio.get_running_loop().create_future()

        async with aclosing(self._function(*args)) as items:
            try:
                async for item in items:
                    done = reference()
                    done.set_result(item)
                    yield done
            except Exception as error:
                failed = reference()
                failed.set_exception(_as_ray_says(error))
                yield failed


def _as_ray_says(error: Exception) -> Exception:
    """A task's own exception crosses the wire as the cause of a RayTaskError."""
    if isinstance(error, RayError):
        return error
    cause = pickle.loads(pickle.dumps(error))
    told: Exception = RayTaskError("method", "Traceback ...", cause).as_instanceof_cause()
    return told


class FakeReplica:
    """A real replica on the fake engine, which sends its items one by one, or all `at_once`. With
    `faults` (one per turn, then none), it goes wrong after `after` token ids, or the item they
    came in: an exception to raise, or a function from the request and the next index to the items
    to send; None ends the stream."""

    def __init__(self, config: ReplicaConfig, node: str) -> None:
        self.node = node
        self.real = ModelReplica(config, node)
        self.requests: list[TurnRequest] = []
        self.cancelled: list[str] = []
        self.faults: Iterator[Any] = iter(())
        self.after = 0
        self.at_once = False
        self._carriers = Carriers(self._run_turn)
        self._died: Exception | None = None

    def fails(self, *faults: Any, after: int = 3) -> None:
        self.faults, self.after = iter(faults), after

    async def carry(self, name: str, request: TurnRequest) -> AsyncIterator[list[Carried]]:
        async with aclosing(self._carriers.carry(name, request)) as lists:
            async for carried in lists:
                for entry in carried:
                    if isinstance(entry[1], Exception) and self._died is not None:
                        died, self._died = self._died, None
                        raise died
                    yield [entry]

    async def board(self, name: str, request: TurnRequest) -> bool:
        return self._carriers.board(name, request)

    async def _run_turn(self, request: TurnRequest) -> AsyncGenerator[list[StreamItem], None]:
        try:
            async with aclosing(self.run_turn(request)) as lists:
                async for items in lists:
                    yield items
        except (RayError, ReplicaLost) as error:
            self._died = error
            raise

    async def run_turn(self, request: TurnRequest) -> AsyncGenerator[list[StreamItem], None]:
        self.requests.append(request)
        fault = next(self.faults, self)
        n_ids = len(request.resume.emitted) if request.resume else 0
        wrong_at = n_ids + self.after
        if self.after == 0 and fault is not self:
            async for batch in _misbehave(fault, request, n_ids):
                yield batch
            return
        async with aclosing(self.real.run_turn(request)) as batches:
            if self.at_once:
                yield [item async for batch in batches for item in batch]
                return
            async for batch in batches:
                for item in batch:
                    yield [item]
                    if not isinstance(item, Tokens):
                        continue
                    n_ids += len(item.ids)
                    if n_ids >= wrong_at > n_ids - len(item.ids) and fault is not self:
                        async for extra in _misbehave(fault, request, n_ids):
                            yield extra
                        if not getattr(fault, "goes_on", False):
                            return

    async def cancel(self, turn_id: str, attempt: int | None = None) -> None:
        self.cancelled.append(turn_id)
        await self.real.cancel(turn_id, attempt)

    def close(self) -> None:
        self.real._loop.close()


async def _misbehave(
    fault: Any, request: TurnRequest, n_ids: int
) -> AsyncIterator[list[StreamItem]]:
    if isinstance(fault, Exception):
        raise fault
    if fault is None:
        return
    result = fault(request, n_ids)
    if hasattr(result, "__aiter__"):
        async for batch in result:
            yield batch
    else:
        yield result


class Stray:
    """Items that are no part of this attempt's stream, which goes on after them."""

    goes_on = True

    def __init__(self, attempt: int, index: int, end: bool = False) -> None:
        self._attempt, self._index, self._end = attempt, index, end

    def __call__(self, request: TurnRequest, n_ids: int) -> list[StreamItem]:
        attempt, index = request.attempt + self._attempt, n_ids + self._index
        if self._end:
            return [TurnFinished(attempt, index, "WRONG", "stop")]
        return [Tokens(attempt, index, (87,), "WRONG")]


class FakeRouter:
    """Owners by agent, the first replica that need not be avoided for the others."""

    def __init__(self, replicas: list[FakeReplica]) -> None:
        self.replicas = {replica.node: replica for replica in replicas}
        self.owners: dict[AgentId, str] = {}
        self.placed: list[dict[str, Any]] = []
        self.hints: list[tuple[str, str]] = []  # prefix digest and affinity of each of them
        self.limit: int | None = None  # restore_tokens of the decisions
        self.outcomes: list[Outcome | None] = []
        self.explained: list[Ask] = []
        self.suspected: list[str] = []
        self.said: list[tuple[AgentId, int]] = []
        self.over: list[str] = []  # ids of turns that ended, answered or not
        self.fail: dict[str, list[Exception]] = {}  # method -> what its next calls raise
        self.state: dict[str, Any] = {"ready": True, "replicas": 2, "errors": {}}
        self.moves = Moves()

    def _may_fail(self, method: str) -> None:
        if self.fail.get(method):
            raise self.fail[method].pop(0)

    def place(
        self,
        agent: AgentId,
        n_chars: int,
        reply_tokens: int,
        *,
        turn_id: str = "",
        persist: bool = True,
        avoid: frozenset[str] = frozenset(),
        prefix: str = "",
        affinity: str = "soft",
    ) -> Decision:
        self.hints.append((prefix, affinity))
        self.placed.append(
            {
                "agent": agent,
                "n_chars": n_chars,
                "reply_tokens": reply_tokens,
                "persist": persist,
                "avoid": avoid,
            }
        )
        self._may_fail("place")
        nodes = list(self.replicas)
        fresh = [node for node in nodes if f"life-{node}" not in avoid] or nodes
        owner = self.owners.get(agent)
        node = owner if owner in fresh else fresh[0]
        if persist:
            self.owners[agent] = node
        handle = Handle(self.replicas[node])
        placement = Placement(node, "stay", ())
        return Decision(node, f"life-{node}", handle, placement, self.limit)

    def explain(self, ask: Ask) -> dict[str, Any]:
        self._may_fail("explain")
        self.explained.append(ask)
        return {"agent": str(ask.agent), "node": "a"}

    def decisions(self, tenant: str, limit: int) -> list[dict[str, Any]]:
        return [{"agent": tenant}] * min(limit, 3)

    def ended(
        self, agent: AgentId, turn_id: str, n_chars: int | None, outcome: Outcome | None
    ) -> None:
        self.outcomes.append(outcome)
        self.over.append(turn_id)
        if n_chars is not None:
            self.said.append((agent, n_chars))

    def suspect(self, incarnation: str) -> None:
        self._may_fail("suspect")
        self.suspected.append(incarnation)

    def _known(self, agent: AgentId) -> str:
        if agent not in self.owners:
            raise UnknownAgent(f"no agent {str(agent)!r}")
        return self.owners[agent]

    def agent(self, agent: AgentId) -> dict[str, Any]:
        self._may_fail("agent")
        return {"id": str(agent), "node": self._known(agent)}

    def agents(self, tenant: str) -> list[dict[str, Any]]:
        return [self.agent(agent) for agent in self.owners if agent.tenant == tenant]

    async def delete(self, agent: AgentId) -> None:
        replica = self.replicas[self._known(agent)]
        try:
            await replica.real.delete(agent)
        except AgentMoved as error:
            raise AgentBusy(str(error)) from error
        del self.owners[agent]

    def migrate(self, agent: AgentId, target: str | None) -> Migration:
        self._may_fail("migrate")
        source = self._known(agent)
        target = target or next(node for node in self.replicas if node != source)
        if target not in self.replicas:
            raise UnknownNode(f"no node {target!r} with a replica")
        self.owners[agent] = target
        done = Migration(source, target, 2, 0.0123456, 0.5, 2, 900, 800, 7000, 600)
        self.moves.done("operator", done)
        return done

    def ready(self) -> dict[str, Any]:
        self._may_fail("ready")
        return self.state

    def cluster(self) -> dict[str, Any]:
        self._may_fail("cluster")
        nodes = [
            {
                "id": node,
                "pid": 1,
                "replica": "ready",
                "bytes": {"engine": 1000, "pool": 20, "local": 30},
                "local": {"written_bytes": 40},
                "lagging": {"agents": 6, "bytes": 7},
                "store_answers": node == "a",
                "waiting": 3,
                "running": 2,
                "faults": {"corrupt": 5, "incompatible": 1},
                "served": {"draft_tokens": 50, "draft_tokens_accepted": 20},
            }
            for node in self.replicas
        ]
        nodes.append({"id": "head", "pid": None, "replica": "none"})
        moves = self.moves.to_json()
        return {"agents": 7, "migrations": 4, "moves": moves, "replica_losses": 2, "nodes": nodes}


def lost() -> Exception:
    """As Ray reports a dead actor."""
    return ActorDiedError()
