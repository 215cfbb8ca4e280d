"""The packages have generic names: each is this repository's, and the pure core needs no Ray."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("storage", "actors", "actors.engines", "cluster", "api", "bench", "serve_app")
WITHOUT_RAY = (
    "cluster.bundle_cli",
    "cluster.cli",
    "cluster.config",
    "cluster.errors",
    "cluster.failover",
    "cluster.local",
    "cluster.placement",
    "cluster.registry",
)
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise AssertionError(f"{{name}} is imported")
sys.meta_path.insert(0, Blocker())
import importlib
for name in {names!r}:
    importlib.import_module(name)
assert "ray" not in sys.modules
"""


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_are_of_this_repository(name: str) -> None:
    module = importlib.import_module(name)
    assert Path(str(module.__file__)).resolve().is_relative_to(ROOT)


def pure_modules() -> list[str]:
    found = []
    for package in ("storage", "actors"):
        for path in sorted((ROOT / package).rglob("*.py")):
            module = path.relative_to(ROOT).with_suffix("")
            found.append(".".join(module.parts).removesuffix(".__init__"))
    need_extras = {f"actors.engines.{name}" for name in ("llama_engine", "hf_engine", "hf_models")}
    return [name for name in found if name not in need_extras]


@pytest.mark.slow
@pytest.mark.parametrize("package", ["storage", "actors", "cluster"])
def test_the_pure_core_imports_without_ray(package: str) -> None:
    names = [n for n in (*pure_modules(), *WITHOUT_RAY) if n.partition(".")[0] == package]
    assert names
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED.format(names=names)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_the_blocker_blocks() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(names=["cluster.remote"])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "is imported" in done.stderr


def imports(path: Path) -> set[str]:
    """Top-level packages of this repository that a file names in an import statement."""
    import ast

    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names & {"storage", "actors", "cluster", "api", "bench", "serve_app"}


@pytest.mark.parametrize(
    ("package", "below"),
    [
        ("storage", {"storage"}),
        ("actors", {"storage", "actors"}),
        ("cluster", {"storage", "actors", "cluster"}),
        ("api", {"storage", "actors", "cluster", "api"}),
    ],
)
def test_imports_point_down_only(package: str, below: set[str]) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        assert imports(path) <= below, path
