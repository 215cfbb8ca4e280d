"""The models of a cluster: an actor on the head that says what they are and hands out their bytes,
and the other end of it, which a replica takes along to its node.

Bytes cross in Ray's object transfer, one read of at most a piece (storage.digests.PIECE) at a time
for each node. Started by the router; see storage.fetch for what a node does with them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.config import ReplicaConfig
from actors.errors import ModelUnavailable
from actors.models import resolve
from actors.weights import references
from storage.digests import PIECE, WeightsFile, cache_root
from storage.errors import StoreUnavailable
from storage.fetch import Fetch, Progress
from storage.files import Files
from storage.weights import Manifest, PieceSource, SourceFailed, StoreSource, manifest_of, publish

logger = logging.getLogger(__name__)
SERVER_NAME = "weights"
_READERS = 4  # reads at a time: the most memory this takes is so many pieces
_READ_TIMEOUT_S = 20.0
_ANSWER_S, _SILENT_S = 10.0, 120.0  # of one call; of all of them, until a node goes without
_READY_S = 3600.0  # until the head knows what its model is: it may have to fetch it from a hub
_POLL_S, _REPORT_S = 0.5, 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 300.0  # between attempts to publish


@dataclass(frozen=True)
class Answer:
    """What the head knows of a setting: nothing yet, a manifest, or that it has no such file."""

    manifest: Manifest | None = None
    error: str = ""


class WeightsServer:
    """Hosted by Ray on the head as a detached, threaded actor."""

    def __init__(self, config: ReplicaConfig) -> None:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        self._config = config
        self._answers: dict[str, Answer] = {}
        self._paths: dict[str, Path] = {}  # sha256 -> where
        threading.Thread(target=self._prepare, name="weights", daemon=True).start()

    def manifest(self, setting: str) -> Answer:
        """At once; an empty answer while the files are still being read."""
        return self._answers.get(setting, Answer())

    def read(self, sha256: str, start: int, stop: int) -> bytes:
        """Raises FileNotFoundError for what is not served, OSError."""
        if sha256 not in self._paths:
            raise FileNotFoundError(sha256)
        with self._paths[sha256].open("rb") as file:
            file.seek(start)
            return file.read(min(stop - start, PIECE))

    def _prepare(self) -> None:
        found: list[tuple[Path, Manifest]] = []
        for setting, reference in references(self._config).items():
            try:
                path = resolve(reference)
                manifest = manifest_of(path)
            except (ModelUnavailable, OSError) as error:
                logger.warning("nodes have to have %s themselves: %s", setting, error)
                self._answers[setting] = Answer(error=str(error))
                continue
            for index, file in enumerate(manifest.files):
                main = index == 0 and not manifest.is_directory
                folder = path if manifest.is_directory else path.parent
                self._paths[file.sha256] = path if main else folder / file.name
            found.append((path, manifest))
            self._answers[setting] = Answer(manifest)
        if self._config.share_model == "store":
            for path, manifest in found:
                self._publish(path, manifest)

    def _publish(self, path: Path, manifest: Manifest) -> None:
        """Until it is there: nodes read from the head meanwhile."""
        pause = _FIRST_PAUSE_S
        while True:
            try:
                sent = publish(Files(self._config.store), path, manifest)
                logger.info("%s is in the store; %d bytes of it are new", manifest.name, sent)
                return
            except (StoreUnavailable, OSError) as error:
                logger.warning("%s is not in the store yet: %s", manifest.name, error)
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE_S, 2 * pause)


@dataclass(frozen=True)
class NodeWeights:
    """Goes with a replica to its node: actors.weights.WeightsProvider over Ray."""

    server: Any  # a WeightsServer's handle
    router: Any  # told of the progress
    store: str

    def manifest(self, setting: str, node: str) -> Manifest | None:
        tell, asked = _Teller(self.router, node), time.monotonic()
        heard = asked
        try:
            while time.monotonic() - asked < _READY_S and time.monotonic() - heard < _SILENT_S:
                with contextlib.suppress(GetTimeoutError):  # it may be starting
                    pending = self.server.manifest.remote(setting)
                    answer: Answer = ray.get(pending, timeout=_ANSWER_S)
                    if answer.manifest is not None or answer.error:
                        return answer.manifest
                    heard = time.monotonic()
                tell(Progress(setting, 0, 0, waiting="the head, which reads it"))
                time.sleep(_POLL_S)
            logger.warning("the head does not say what its %s is", setting)
        except RayError as error:
            logger.warning("what the head has is unknown: %s", error)
        finally:
            tell(None)
        return None

    def fetch(self, manifest: Manifest, folder: str, node: str) -> Path:
        target = Path(folder) if folder else cache_root() / "models"
        tell = _Teller(self.router, node)
        sources: list[PieceSource] = [StoreSource(Files(self.store)), HeadSource(self.server)]
        try:
            return Fetch(manifest, target, sources, tell).run()
        finally:
            tell(None)


class HeadSource:
    name = "the head"

    def __init__(self, server: Any) -> None:
        self._server = server

    def read(self, file: WeightsFile, start: int, stop: int) -> bytes:
        try:
            pending = self._server.read.remote(file.sha256, start, stop)
            raw: bytes = ray.get(pending, timeout=_READ_TIMEOUT_S)
        except (RayError, OSError) as error:
            raise SourceFailed(str(error).strip().splitlines()[-1]) from error
        return raw


class _Teller:
    """Tells the router how far a node is, twice a second, and never more than one message ahead."""

    def __init__(self, router: Any, node: str) -> None:
        self._tell: Callable[[Progress | None], Any] = lambda p: router.fetching.remote(node, p)
        self._pending: Any = None
        self._next = 0.0

    def __call__(self, progress: Progress | None) -> None:
        """None: it is over."""
        if progress is not None and time.monotonic() < self._next:
            return
        if self._pending is not None:
            done, _ = ray.wait([self._pending], timeout=0 if progress is not None else _REPORT_S)
            if progress is not None and not done:
                return
        elif progress is None:
            return
        self._next = time.monotonic() + _REPORT_S
        self._pending = self._tell(progress)


def share(config: ReplicaConfig) -> NodeWeights | None:
    """For the router, in whose process this runs: start the head's actor if there is none. None
    where nothing is shared."""
    if config.share_model == "off" or not references(config):
        return None
    actor = ray.remote(WeightsServer)
    server = actor.options(
        name=SERVER_NAME,
        namespace="kvferry",
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        resources={"node:__internal_head__": 0.001},
        max_restarts=-1,
        max_concurrency=_READERS,
    ).remote(config)
    return NodeWeights(server, ray.get_runtime_context().current_actor, config.store)
