#!/usr/bin/env bash
# Run the tests marked `soak` with the interpreter $1 and log what they print, under the commit and
# the date. LOG: the file; TURNS: of the crowd. Arguments after the first go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$1
shift
log=${LOG:-docs/soak.log}
commit=$(git rev-parse HEAD 2>/dev/null || echo "no git")
if [[ -n $(git status --porcelain 2>/dev/null) ]]; then
    commit+=" and changes"
fi
mkdir -p "$(dirname "$log")"
{
    echo "commit   $commit"
    echo "date     $(date -u +%Y-%m-%dT%H:%M:%SZ)"
    echo "machine  $(uname -sm), $(getconf _NPROCESSORS_ONLN) cores"
    echo "python   $("$python" -VV | head -n 1)"
    echo "engine   llama-cpp-python $("$python" -c 'from importlib.metadata import version as v; print(v("llama-cpp-python"))')"
    echo
    KVFERRY_REQUIRE=model,llama KVFERRY_SOAK_TURNS=${TURNS:-1000} \
        "$python" -m pytest -m soak -s -v --durations=0 --no-header "$@" 2>&1
} | tee "$log"
