# Nothing but make, git and Python 3.10-3.12 (with venv) is needed; everything else is installed into .venv.

SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/.installed
UNFINISHED := .venv/.unfinished

# The environment's commands (and its ffmpeg, for ns-render) come first.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Idle threads sleep instead of spinning, which would slow down whatever else runs here.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# What is imported is compiled once: without that each start of a command takes twice as long.
export PYTHONDONTWRITEBYTECODE :=

# viser asks for this reader of Record3D's depth, which only recordings that were not exported need (docs/data.md), and
# which alone would need a C compiler.
SKIPPED := ^pyliblzfse==

CODE := $(wildcard nfldm_ns method_configs dataparsers tests benchmarks examples)

.PHONY: help setup demo test gpu-check results bench lint format constraints clean

help:
	@echo "make demo    set up, then train and sample the whole pipeline; ends in outputs/demo/index.html"
	@echo "make test    set up, then run the tests"
	@echo "make gpu-check  set up, then check in eight minutes what a GPU does, and how fast; skipped where there is none"
	@echo "make results NAME=...  repeat a measurement of docs/results.md, with ARGS as it says there"
	@echo "make bench   how fast this machine is, in outputs/bench/results.json"
	@echo "make lint    set up, then check style, formatting and types"
	@echo "make format  apply the formatting"
	@echo "make setup   only set up .venv"

setup: $(STAMP)

demo: $(STAMP)
	nfldm-demo $(ARGS)

# Files of tests are shared between processes of one thread each: 'make test WORKERS=0' runs all in one.
WORKERS ?= 2
test: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# All that wants a GPU, within eight minutes (docs/gpu.md): 'make gpu-check ARGS="--only rendering"' for some of it. Without
# a GPU it says that it is skipped.
gpu-check: $(STAMP)
	python benchmarks/gpu_check.py $(ARGS)

# What docs/results.md reports: 'make results NAME=sharpness ARGS="--data data/mazes ..."', as written there.
results: SCRIPT = benchmarks/$(subst -,_,$(NAME)).py
results: $(STAMP)
	@test -n "$(NAME)" && test -f $(SCRIPT) || \
	    { echo "error: name a script: make results NAME=..., one of $(basename $(notdir $(wildcard benchmarks/*.py)))." >&2; exit 2; }
	python $(SCRIPT) $(ARGS)

# How fast this machine is (docs/performance.md): 'make bench ARGS="--only startup"' for some of it.
bench: $(STAMP)
	PYTHONPATH=benchmarks python -m bench $(ARGS)

lint: $(STAMP) build/typecheck
	ruff check $(CODE)
	ruff format --check $(CODE)
	mypy build/typecheck/nfldm_ns

format: $(STAMP)
	ruff check --fix $(CODE)
	ruff format $(CODE)

# The environment: repeated when the packages it should hold change, begun anew when its making was interrupted.
$(STAMP): pyproject.toml constraints.txt
	@python=$$(for candidate in $(PYTHON) python3 python3.12 python3.11 python3.10; do \
	    $$candidate -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' >/dev/null 2>&1 \
	        && echo $$candidate && break; done); \
	if [ -e $(UNFINISHED) ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    if [ -z "$$python" ]; then \
	        echo "error: Python 3.10, 3.11 or 3.12 is needed: install one, or name it with 'make PYTHON=/path/to/python'." >&2; \
	        exit 2; \
	    fi; \
	    if ! $$python -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	        echo "error: $$python cannot make virtual environments: install its venv module" \
	            "(on Debian and Ubuntu: sudo apt install $$(basename $$python)-venv)." >&2; \
	        exit 2; \
	    fi; \
	    echo "Making .venv with $$($$python --version)"; \
	    mkdir -p .venv && touch $(UNFINISHED) && $$python -m venv --clear .venv && touch $(UNFINISHED) || exit 2; \
	fi
	@$(BIN)/python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || \
	    { echo "error: .venv holds another Python than 3.10-3.12: remove it and run make again." >&2; exit 2; }
	@echo "Installing packages into .venv (several GB; minutes the first time)"
	@grep -vE '^#|$(SKIPPED)' constraints.txt > .venv/requirements.txt
	@$(BIN)/python -m pip install --quiet --no-compile --no-deps -r .venv/requirements.txt
	@$(BIN)/python -m pip install --quiet --no-deps -e .
	@ln -sf "$$($(BIN)/python -c 'import imageio_ffmpeg; print(imageio_ffmpeg.get_ffmpeg_exe())')" $(BIN)/ffmpeg
	@rm -f $(UNFINISHED) && touch $@
	@echo "Ready: 'source $(BIN)/activate' puts the nfldm-* and ns-* commands on your PATH"

# The type checker sees the folders where they are installed.
build/typecheck:
	@rm -rf $@ && mkdir -p $@/nfldm_ns
	@ln -sfn $(CURDIR)/method_configs $(CURDIR)/dataparsers $(CURDIR)/nfldm_ns/* $@/nfldm_ns/
.PHONY: build/typecheck

# Needs uv. Keeps the versions there are; 'make constraints ARGS="--upgrade-package diffusers"' moves one.
constraints:
	uv pip compile --quiet --universal --python-version 3.10 --extra dev --no-header --no-annotate $(ARGS) \
	    pyproject.toml --output-file constraints.txt
	sed -i -E "s/(python_full_version < '3\.13'|platform_machine == 'x86_64'|sys_platform == 'linux')( and )?//g; \
	    s/ and *$$//; s/ *; *$$//" constraints.txt
	sed -i '1i # Every package of a reproducible set-up (Linux x86_64, Python 3.10-3.12), as "make setup" installs it.\
	# Made by "make constraints", which keeps these versions unless pyproject.toml asks for others.\
	# fpsample stays at its last release with wheels, so that no compiler is needed.' constraints.txt

clean:
	rm -rf build .pytest_cache .ruff_cache .mypy_cache
