#!/bin/sh
# Builds llama-server, the peer of `kvferry bench serve`, from the llama.cpp sources inside the source
# distribution of the llama-cpp-python that is installed, as released: without patches/llama.cpp.
# usage: scripts/build-llama-server.sh [UNPACKED_SDIST]     (without: pip fetches it from its index)
# The result is build/llama-server, beside the libraries it loads. PYTHON, JOBS and CMAKE_ARGS may be
# set.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out=$root/build/llama-server.d
mkdir -p "$out"

version=$("$python" -c 'from importlib.metadata import version; print(version("llama-cpp-python"))')
version=${version%+*}
sdist=${1:-$out/llama_cpp_python-$version}
if [ ! -d "$sdist" ]; then
    "$python" -m pip download --no-binary :all: --no-deps --dest "$out" \
        "llama-cpp-python==$version"
    tar -xzf "$out/llama_cpp_python-$version.tar.gz" -C "$out"
fi

# What the wheel's build sets (Release, this machine's instructions, OpenMP, shared libraries), and
# nothing that reaches for the network: no TLS, no web page, neither built nor fetched.
cmake -S "$sdist/vendor/llama.cpp" -B "$out/cmake" \
    -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON \
    -DLLAMA_BUILD_COMMON=ON -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
    -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
    -DCMAKE_C_FLAGS="${CFLAGS:-}" -DCMAKE_CXX_FLAGS="${CXXFLAGS:-}" ${CMAKE_ARGS:-}
cmake --build "$out/cmake" --target llama-server --parallel "${JOBS:-2}"
ln -sf llama-server.d/cmake/bin/llama-server "$root/build/llama-server"
"$root/build/llama-server" --version
