# `make demo` and `make test` need nothing but Python 3.11+ with pip: they create .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What is installed beside the CPU: "", "cuda" or "tpu". The stamp remembers it, so that a changed
# requirement never takes the accelerator away.
ACCELERATOR := $(shell cat $(STAMP) 2>/dev/null)
REQUIREMENTS := requirements.txt requirements-dev.txt $(ACCELERATOR:%=requirements-%.txt)

# More for pytest or the build, e.g. make test ARGS='tests/unit/config/test_build.py -x'
ARGS ?=
# Processes that run tests. Each takes whole files, the long ones of tests/integration first.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# What most changes break first: layers, settings, losses, files, the bridge's messages. Of these
# folders some files take as long as all the rest.
QUICK_FOLDERS := $(addprefix tests/unit/,config configs docs algos files telemetry bridge)
QUICK_WITHOUT := $(addprefix tests/unit/,algos/test_update.py config/test_reference.py docs/test_checkpoints.py \
	docs/test_docs_commands.py docs/test_memory.py docs/test_metrics.py telemetry/test_writers.py)
QUICK := $(wildcard tests/unit/test_*.py) $(QUICK_FOLDERS) $(QUICK_WITHOUT:%=--ignore=%) \
	--deselect=tests/unit/test_house.py::test_nothing_foreign_is_loaded_when_modules_are_imported
# Folders of golden vectors for `make parity`, each with a manifest.json.
GOLDENS ?= $(patsubst %/manifest.json,%,$(wildcard tests/goldens/*/manifest.json))

.DEFAULT_GOAL := help
.PHONY: help install-cuda install-tpu demo test test-quick test-slow lint format type docs parity bench miniature \
	libero libero-check aot clean

help:  ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' \
		| awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

# One pip command for everything, so that no later one can replace the pinned torch or jax.
# The stamp is younger than all lists when the environment is complete and up to date.
$(STAMP): $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, $(PYTHON) is: $$($(PYTHON) --version 2>&1)." \
			"Name another one with: make PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(addprefix -r ,$(REQUIREMENTS))
	@echo $(ACCELERATOR) > $@

install-cuda:  ## Install into .venv with CUDA builds of JAX and torch: docs/install.md.
	$(MAKE) --always-make $(STAMP) ACCELERATOR=cuda

install-tpu:  ## Install into .venv with JAX for TPUs: docs/install.md.
	$(MAKE) --always-make $(STAMP) ACCELERATOR=tpu

demo: $(STAMP)  ## Train in the miniature world model on this CPU: videos, curves, a summary.
	$(BIN)/python launch.py --config=configs/grpo.py

test: $(STAMP)  ## Run the tests, except those marked slow. ARGS='tests/unit -x' narrows them down.
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(STAMP)  ## Run the tests that are marked slow: more runs that are stopped, stuck and resumed.
	$(PYTEST) -m slow $(ARGS)

test-quick: $(STAMP)  ## Run a selection of quick tests; what it covers: CONTRIBUTING.md.
	$(PYTEST) -m "not slow" $(QUICK) $(ARGS)

lint: $(STAMP)  ## Check style and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## Mend style and formatting where that can be done by a program.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(STAMP)  ## Check types.
	$(BIN)/pyright

# The generator of the site has an environment of its own, so that it never decides on versions here.
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed

$(DOCS_STAMP): requirements-docs.txt
	test -x $(DOCS_VENV)/bin/pip || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install -r requirements-docs.txt
	@touch $@

docs: $(DOCS_STAMP)  ## Build the pages as a site, site/index.html; any warning is an error.
	$(DOCS_VENV)/bin/sphinx-build --quiet --fresh-env --nitpicky --fail-on-warning --conf-dir docs . site

parity: $(STAMP)  ## Compare with golden vectors; GOLDENS='DIR ...' names other folders.
	$(BIN)/python -m tests.parity $(GOLDENS)

bench: $(STAMP)  ## Measure the frame exchange; names the benchmarks that take hours.
	@echo "What learning in imagination gains (hours): $(BIN)/python -m benchmarks.learning"
	$(BIN)/python -m benchmarks.bridge

miniature: $(STAMP)  ## Make every shipped weight from nothing (hours). ARGS='--ship' installs them.
	$(BIN)/python -m evac_jax.tools.recipes.miniature $(ARGS)

# LIBERO's simulator has an environment of its own: docs/libero.md.
LIBERO_VENV := .venv-libero
LIBERO_STAMP := $(LIBERO_VENV)/.installed
# The packages of the system that LIBERO's renderer needs.
LIBERO_APT := apt-get install libegl1 libegl-mesa0 libgl1
SUITE ?= libero_spatial
EPISODES ?= 500
ENVS ?= 10
TEMPERATURE ?= 0

# The trial opens the libraries as LIBERO does; the stamp comes only after it.
$(LIBERO_STAMP): requirements-libero.txt
	test -x $(LIBERO_VENV)/bin/pip || $(PYTHON) -m venv $(LIBERO_VENV)
	$(LIBERO_VENV)/bin/pip install -r requirements-libero.txt
	@MUJOCO_GL=egl $(LIBERO_VENV)/bin/python -c 'import cv2, mujoco; mujoco.GLContext(64, 64).make_current()' || { \
		echo "LIBERO's renderer needs OpenGL and EGL; install them and call make again: $(LIBERO_APT)" >&2; \
		exit 1; }
	@touch $@

libero: $(LIBERO_STAMP)  ## Install LIBERO, its assets and initial states into .venv-libero.

# Frames, pace and length of episodes as the policy's card tells them, else the official ones.
libero-check: $(STAMP) $(LIBERO_STAMP)  ## Success of a policy in LIBERO: POLICY=FOLDER [SUITE=].
	told=$$($(BIN)/python -m evac_jax.tools.policy.libero_flags $(POLICY) --suite $(SUITE)) && \
		$(BIN)/python launch.py --mode=eval --config=configs/grpo.py:libero_spatial \
		--config.policy.checkpoint=$(POLICY) --config.policy.unnorm_key=$(SUITE) \
		--config.policy.eval_temperature=$(TEMPERATURE) \
		--config.env.simulator=ground_truth --config.eval.episodes=0 \
		--config.eval.ground_truth=libero --config.eval.ground_truth_episodes=$(EPISODES) \
		--config.eval.ground_truth_envs=$(ENVS) --config.libero.suite=$(SUITE) \
		--config.libero.python=$(LIBERO_VENV)/bin/python $$told \
		--config.log.run=libero-check-$$(date +%Y%m%d-%H%M%S) $(ARGS)

# XLA's compilers for chips that are not here have an environment of their own: docs/memory.md.
AOT_VENV := .venv-aot
AOT_STAMP := $(AOT_VENV)/.installed

$(AOT_STAMP): requirements-aot.txt
	test -x $(AOT_VENV)/bin/pip || $(PYTHON) -m venv $(AOT_VENV)
	$(AOT_VENV)/bin/pip install -r requirements-aot.txt
	@touch $@

aot: $(AOT_STAMP)  ## Install XLA's compilers for GPUs and TPUs into .venv-aot: docs/memory.md.

clean:  ## Remove environments, caches and the site, but no runs.
	rm -rf $(VENV) $(LIBERO_VENV) $(AOT_VENV) $(DOCS_VENV) site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
