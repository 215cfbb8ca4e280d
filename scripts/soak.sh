#!/usr/bin/env bash
# Run what takes long with the interpreter $1: every cell of the chaos matrix, ten minutes of faults
# under load, the crowd of 200 agents on the real model. Log what they print, under the commit, the
# date and the seed. LOG: the file; TURNS: of the crowd; KVFERRY_SEED: of everything that is drawn.
# Arguments after the first go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$1
shift
log=${LOG:-docs/soak.log}
commit=$(git rev-parse HEAD 2>/dev/null || echo "no git")
if [[ -n $(git status --porcelain 2>/dev/null) ]]; then
    commit+=" and changes"
fi
seed=${KVFERRY_SEED:-$("$python" -c 'import datetime; print(datetime.date.today().toordinal())')}
mkdir -p "$(dirname "$log")"
{
    echo "commit   $commit"
    echo "date     $(date -u +%Y-%m-%dT%H:%M:%SZ)"
    echo "machine  $(uname -sm), $(getconf _NPROCESSORS_ONLN) cores"
    echo "python   $("$python" -VV | head -n 1)"
    echo "engine   llama-cpp-python $("$python" -c 'from importlib.metadata import version as v; print(v("llama-cpp-python"))')"
    echo "seed     KVFERRY_SEED=$seed"
    echo
    KVFERRY_REQUIRE=model,llama,netns,redis,s3 KVFERRY_CHAOS=all KVFERRY_SEED=$seed \
        KVFERRY_SOAK_TURNS=${TURNS:-1000} \
        "$python" -m pytest -m "soak or chaos" -s -v --durations=0 --no-header "$@" 2>&1
} | tee "$log"
