"""The C extension. All else is in pyproject.toml, whose own way to declare one is experimental."""

from setuptools import Extension, setup

# Speed only: without it (no compiler, an unknown platform) storage.quantizers uses numpy.
# No -march=native, so that a built tree can move between machines: the C code picks its variant
# when it is loaded.
# No FMA contraction: every machine gives the same bits.
codec = Extension(
    "storage._codec",
    ["storage/_codec.c"],
    extra_compile_args=["-O3", "-ffp-contract=off"],
    optional=True,
)

setup(ext_modules=[codec])
