"""The manifests of k8s/base against KubeRay's own schemas, as strictly as an API server reads them.

The schemas are KubeRay's custom resource definitions, `ray.io_<plural>.yaml` in KVFERRY_DATA.
"""

import copy
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError, validators
from ray.serve.schema import ServeDeploySchema

from tests.require import require

BASE = Path(__file__).parent.parent / "k8s" / "base"
CRD_FILES = {"RayService": "ray.io_rayservices.yaml", "RayCluster": "ray.io_rayclusters.yaml"}
DATA = Path(os.environ.get("KVFERRY_DATA") or "/nonexistent")

# The definitions are 1 MB each: seconds without libyaml.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Json = dict[str, Any]


def load_manifests() -> list[Json]:
    files = sorted(BASE.glob("*.yaml"))
    documents = [d for file in files for d in yaml.load_all(file.read_text(), Loader=LOADER)]
    return [d for d in documents if d["kind"] != "Kustomization"]


def find_ray_manifests() -> list[Json]:
    return [m for m in load_manifests() if m["apiVersion"].startswith("ray.io/")]


def close(schema: Json) -> Json:
    """The schema as a strict JSON Schema: a property it does not name is refused, not pruned."""
    closed = {k: v for k, v in schema.items() if k not in ("properties", "items", "default")}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if "properties" in schema:
        closed["properties"] = {name: close(s) for name, s in schema["properties"].items()}
    if "items" in schema:
        closed["items"] = close(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        closed["additionalProperties"] = close(schema["additionalProperties"])
    elif schema.get("type") == "object" and not open_ended:
        closed.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        closed["type"] = ["integer", "string"]
    if schema.get("nullable") and "type" in closed:
        types = closed["type"]
        closed["type"] = [*(types if isinstance(types, list) else [types]), "null"]
    # The keys of a list map may have defaults, which count when duplicates are looked for.
    if "x-kubernetes-list-map-keys" in schema:
        properties = schema["items"].get("properties", {})
        closed["x-kubernetes-list-map-keys"] = {
            key: properties.get(key, {}).get("default")
            for key in schema["x-kubernetes-list-map-keys"]
        }
    return closed


def check_list_map_keys(
    validator: Any, defaults: Json, items: Any, schema: Json
) -> Iterator[ValidationError]:
    keys = [tuple(item.get(k, default) for k, default in defaults.items()) for item in items]
    for key in {k for k in keys if keys.count(k) > 1}:
        yield ValidationError(f"duplicate entry {key} in a list keyed by {', '.join(defaults)}")


KubernetesValidator = validators.extend(
    Draft202012Validator, {"x-kubernetes-list-map-keys": check_list_map_keys}
)


@cache
def load_validator(kind: str, version: str) -> Any:
    definition = yaml.load((DATA / CRD_FILES[kind]).read_text(), Loader=LOADER)
    (schema,) = [
        v["schema"]["openAPIV3Schema"]
        for v in definition["spec"]["versions"]
        if v["name"] == version
    ]
    closed = close(schema)
    # `type: object` and no more: at the root, metadata is the API server's own ObjectMeta.
    del closed["properties"]["metadata"]["additionalProperties"]
    return KubernetesValidator(closed)


def validate(manifest: Json) -> list[str]:
    """What an API server would object to, as `path: message`; empty when it would accept."""
    file = DATA / CRD_FILES[manifest["kind"]]
    require("data", file.is_file(), f"KVFERRY_DATA is unset or has no {file.name}")
    version = manifest["apiVersion"].removeprefix("ray.io/")
    errors = load_validator(manifest["kind"], version).iter_errors(manifest)
    return [f"{e.json_path}: {e.message}" for e in errors]


@pytest.fixture
def service() -> Json:
    (manifest,) = [m for m in find_ray_manifests() if m["kind"] == "RayService"]
    return copy.deepcopy(manifest)


def worker_container(service: Json) -> Json:
    group: Json = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    container: Json = group["template"]["spec"]["containers"][0]
    return container


@pytest.mark.data
@pytest.mark.parametrize("manifest", find_ray_manifests(), ids=lambda m: m["kind"])
def test_manifest_satisfies_the_crd(manifest: Json) -> None:
    assert validate(manifest) == []


@pytest.mark.data
class TestBrokenManifestsAreRefused:
    """The check above means something only if it refuses these."""

    def test_misspelled_field(self, service: Json) -> None:
        head = service["spec"]["rayClusterConfig"]["headGroupSpec"]
        head["rayStartParam"] = head.pop("rayStartParams")
        assert any("rayStartParam" in error for error in validate(service))

    def test_misspelled_field_deep_inside_a_pod(self, service: Json) -> None:
        worker_container(service)["readinessProbe"]["periodSecond"] = 5
        assert any("periodSecond" in error for error in validate(service))

    def test_wrong_type(self, service: Json) -> None:
        head = service["spec"]["rayClusterConfig"]["headGroupSpec"]
        head["rayStartParams"]["num-cpus"] = 0  # Kubernetes wants the string "0"
        assert any("num-cpus" in error for error in validate(service))

    def test_missing_required_field(self, service: Json) -> None:
        del service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["groupName"]
        assert any("groupName" in error for error in validate(service))

    def test_duplicate_list_entry(self, service: Json) -> None:
        worker_container(service)["env"] = [{"name": "A", "value": "1"}, {"name": "A"}]
        assert any("duplicate" in error for error in validate(service))

    def test_int_or_string_is_neither_list_nor_null(self, service: Json) -> None:
        probe = worker_container(service)["readinessProbe"]["httpGet"]
        probe["port"] = "agent"
        assert validate(service) == []
        for wrong in ([52365], None):
            probe["port"] = wrong
            assert any("port" in error for error in validate(service))


def test_serve_config_names_the_app(service: Json) -> None:
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    assert [app["import_path"] for app in config["applications"]] == ["serve_app:app"]
    assert config["proxy_location"] == "HeadOnly"


def test_one_replica_per_device_and_none_on_the_head(service: Json) -> None:
    cluster = service["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]["rayStartParams"]
    assert head["num-cpus"] == "0"
    assert "resources" not in head
    (group,) = cluster["workerGroupSpecs"]
    # Two layers of quotes: the inner JSON passes through the shell that runs `ray start`.
    assert yaml.safe_load(yaml.safe_load(group["rayStartParams"]["resources"])) == {
        "kvferry_device": 1
    }


def test_clients_reach_the_head_only(service: Json) -> None:
    (entry,) = [m for m in load_manifests() if m["kind"] == "Service"]
    selector = entry["spec"]["selector"]
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
    assert selector["ray.io/node-type"] == "head"
    assert head["metadata"]["labels"].items() <= selector.items()
    ports = {p["name"] for p in head["spec"]["containers"][0]["ports"]}
    assert {p["targetPort"] for p in entry["spec"]["ports"]} <= ports


def test_kustomization_lists_every_file() -> None:
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    files = {file.name for file in BASE.iterdir()} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files


# ---- k8s/redis


def with_redis(service: Json) -> Json:
    """The base's RayService as the overlay's patch leaves it: it only adds what is not there."""
    patch = yaml.safe_load((BASE.parent / "redis" / "rayservice.yaml").read_text())
    assert (patch["kind"], patch["metadata"]) == (service["kind"], service["metadata"])
    ((where, added),) = patch["spec"].items()
    assert service["spec"][where].keys().isdisjoint(added)
    service["spec"][where] |= added
    return service


@pytest.mark.data
def test_the_overlay_satisfies_the_crd(service: Json) -> None:
    assert validate(with_redis(service)) == []
    options = service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    options["redisAdress"] = options.pop("redisAddress")
    assert any("redisAdress" in error for error in validate(service))


def test_ray_finds_the_redis_of_the_overlay(service: Json) -> None:
    folder = BASE.parent / "redis"
    documents = list(yaml.safe_load_all((folder / "redis.yaml").read_text()))
    (entry,) = [d for d in documents if d["kind"] == "Service"]
    (workload,) = [d for d in documents if d["kind"] == "StatefulSet"]
    options = with_redis(service)["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    name, port = entry["metadata"]["name"], entry["spec"]["ports"][0]["port"]
    assert options["redisAddress"] == f"redis://{name}:{port}"
    assert entry["spec"]["selector"] == workload["spec"]["selector"]["matchLabels"]
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    secret = container["env"][0]["valueFrom"]["secretKeyRef"]
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == secret
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert kustomization["resources"] == ["../base", "redis.yaml"]
    assert kustomization["patches"] == [{"path": "rayservice.yaml"}]
