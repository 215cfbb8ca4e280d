"""Installs llama-cpp-python as kvferry runs it: the source distribution that constraints.txt names,
with patches/llama.cpp (new files, and changes to others), compiled for this machine's processor.

usage: python scripts/build_llama.py      (of the environment to install into)

The version gets a local part, +kvferry.p and the patches' digest. Wheels are kept under
$XDG_CACHE_HOME/kvferry/wheels (~/.cache) by version, SETTINGS, compiler and processor, as other
checkouts and a new .venv want the same; where that cannot be written, under build/. What is
installed already stays when only a setting changes: `make clean`. V=1 shows the compilation.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
PATCHES = ROOT / "patches" / "llama.cpp"
NAME = "llama-cpp-python"
SETTINGS = ("CMAKE_ARGS", "CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "MACOSX_DEPLOYMENT_TARGET")


def pip(*arguments: str | Path) -> None:
    """Runs this environment's pip; what it has to say is shown where it fails."""
    quiet = () if os.environ.get("V") else ("--quiet",)
    command = [sys.executable, "-m", "pip", *quiet, "--disable-pip-version-check"]
    subprocess.run([*command, *map(str, arguments)], check=True)


def released() -> str:
    """The version that constraints.txt names."""
    found = re.search(rf"^{NAME}==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    if not found:
        raise SystemExit(f"{CONSTRAINTS}: no {NAME}==VERSION")
    return found[1]


def patched() -> str:
    """The version with its local part."""
    digest = hashlib.sha256()
    for file in sorted(path for path in PATCHES.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(PATCHES)).encode() + b"\0" + file.read_bytes())
    return f"{released()}+kvferry.p{digest.hexdigest()[:8]}"


def _processor() -> str:
    """What the compiler's -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = ("flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


def _compiler() -> str:
    """Its version; "": cmake looks for one by itself."""
    command = [*shlex.split(os.environ.get("CXX") or "c++"), "--version"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def shelves() -> Iterator[Path]:
    """Where the wheel may be kept, best first."""
    machine = (
        platform.system(),
        platform.machine(),
        *platform.libc_ver(),
        _compiler(),
        _processor(),
    )
    parts = (patched(), *(os.environ.get(name, "") for name in SETTINGS), *machine)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache):  # ~ of nobody stays ~
        yield Path(cache) / "kvferry" / "wheels" / key
    yield ROOT / "build" / "wheels" / key


def kept(shelf: Path) -> Path | None:
    """The wheel on it."""
    try:
        return next(shelf.glob("*.whl"), None)
    except PermissionError:
        return None


def apply(source: Path) -> None:
    """Patches the unpacked sources, and names them so."""
    vendor = source / "vendor" / "llama.cpp"
    shutil.copytree(PATCHES, vendor, dirs_exist_ok=True)
    for change in sorted(PATCHES.glob("*.patch")):
        command = ["patch", "--strip=1", "--quiet", f"--directory={vendor}", f"--input={change}"]
        subprocess.run(command, check=True)
    module = source / "llama_cpp" / "__init__.py"
    named = f'__version__ = "{patched()}"'
    text, n = re.subn('^__version__ = ".*"$', named, module.read_text(), flags=re.MULTILINE)
    if n != 1:
        raise SystemExit(f"{module}: no __version__")
    module.write_text(text)


def build(shelf: Path) -> None:
    """Compiles the wheel and puts it on the shelf; nothing half done is ever seen there."""
    with tempfile.TemporaryDirectory(dir=shelf.parent) as folder:
        work = Path(folder)
        options: list[str | Path] = ["--no-deps", "--build-constraint", CONSTRAINTS]
        pip("download", *options, "--no-binary", NAME, "--dest", work, f"{NAME}=={released()}")
        subprocess.run(["tar", "-xzf", next(work.glob("*.tar.gz")), "-C", work], check=True)
        source = next(path for path in work.iterdir() if path.is_dir())
        apply(source)
        pip("wheel", *options, "--no-cache-dir", "--wheel-dir", work / "made", source)
        try:
            (work / "made").rename(shelf)
        except OSError:
            if not kept(shelf):  # nobody else was faster
                raise


def wheel() -> Path:
    """The wheel, compiled unless it has been before."""
    for shelf in shelves():
        if found := kept(shelf):
            return found
    print("llama.cpp is compiled, which takes about 5 minutes on 2 cores once", flush=True)
    for shelf in shelves():
        try:
            shelf.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=shelf.parent).close()
        except OSError:
            continue
        build(shelf)
        if found := kept(shelf):
            return found
    raise SystemExit("neither the user's cache nor build/ can be written")


def main() -> None:
    """Installs, unless the same is installed."""
    try:
        installed = importlib.metadata.version(NAME)
    except importlib.metadata.PackageNotFoundError:
        installed = ""
    if installed != patched():
        pip("install", "-c", CONSTRAINTS, "--force-reinstall", "--no-deps", wheel())


if __name__ == "__main__":
    main()
