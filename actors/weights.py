"""Which of a replica's models this machine lacks, and the configuration once they are here.

Says what is needed; how it comes (cluster.weights) is the caller's. A model of this machine's own
is used where its bytes are the cluster's, or are declared equivalent to them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from actors.config import ReplicaConfig
from actors.engine_settings import is_fake, parse_lora, speculation_of
from actors.errors import ModelUnavailable
from actors.models import resolve
from storage.weights import Manifest, holds, manifest_of

logger = logging.getLogger(__name__)


class WeightsProvider(Protocol):
    """Both may take long; how far they are, they tell `node`'s pool themselves."""

    def manifest(self, setting: str, node: str) -> Manifest | None:
        """What the cluster uses for a setting; None where that is unknown."""

    def fetch(self, manifest: Manifest, folder: str, node: str) -> Path:
        """Bring it to this machine. Raises WeightsUnavailable."""


def references(config: ReplicaConfig) -> dict[str, str]:
    """Setting -> the model reference in it, of those that stand for files."""
    if is_fake(config.model):
        return {}
    found = {"model": config.model}
    if speculation_of(config).kind == "draft":
        found["draft_model"] = config.draft_model
    if config.lora:
        found["lora"] = parse_lora(config.lora)[0]
    return found


def provide(config: ReplicaConfig, weights: WeightsProvider, node: str) -> ReplicaConfig:
    """The configuration with every model on this machine, fetched if need be. Raises
    ModelUnavailable, WeightsUnavailable."""
    for setting, reference in references(config).items():
        wanted = weights.manifest(setting, node)
        if wanted is None or _has(reference, wanted, config.equivalent_digests):
            continue
        path = str(weights.fetch(wanted, config.model_dir, node))
        if setting == "lora":
            path = f"{path}:{parse_lora(config.lora)[1]}"
        named: Any = {setting: path}
        config = replace(config, **named)
    return config


def _has(reference: str, wanted: Manifest, equivalent: Mapping[str, str]) -> bool:
    try:
        path = resolve(reference, offline=True)
    except ModelUnavailable as error:
        logger.info("fetching %s: %s", wanted.name, error)
        return False
    if holds(path, wanted):
        return True
    try:
        own = manifest_of(path).weights
    except OSError as error:
        raise ModelUnavailable(f"{reference}: cannot read it ({error.strerror})") from error
    if equivalent.get(own, own) == equivalent.get(wanted.weights, wanted.weights):
        return True
    logger.warning("%s has other bytes than the head's: fetching those", path)
    return False
