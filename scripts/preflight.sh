#!/bin/sh
# Checks that a fresh machine has what the first `make serve` or `make test` needs.
# Prints the chosen Python's path; or, on stderr and in one line, everything that is missing.
# PYTHON=... takes that interpreter and no other.
set -u

runs() { command -v "$1" >/dev/null 2>&1 && "$1" --version >/dev/null 2>&1; }

# Running it is the test: a version manager's shim may exist and fail, Debian splits off ensurepip.
suitable() {
    "$1" -c 'import sys; assert sys.version_info >= (3, 11)' >/dev/null 2>&1
}
has_venv() {
    "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

python= without_venv=
for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
    if suitable "$candidate"; then
        if has_venv "$candidate"; then
            python=$candidate
            break
        fi
        without_venv=${without_venv:-$candidate}
    fi
done

missing=
miss() { missing="${missing:+$missing, }$1"; }

if [ -z "$python" ]; then
    if [ -n "$without_venv" ]; then
        miss "$without_venv's venv module"
    elif [ -n "${PYTHON:-}" ]; then
        miss "Python 3.11 or newer (PYTHON=$PYTHON is not)"
    else
        miss "Python 3.11 or newer"
    fi
fi
runs "${CXX:-c++}" || runs g++ || runs clang++ || miss "a C++ compiler"
runs cmake || miss "cmake"
runs patch || miss "patch"
runs "${MAKE:-make}" || miss "make"

if [ -n "$missing" ]; then
    echo "kvferry needs: $missing (Debian, Ubuntu: apt-get install build-essential cmake python3-venv)" >&2
    exit 1
fi
command -v "$python"
