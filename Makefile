# make install | test | test-quick | test-full | lint | format | demo | demo-ablation | lock | clean
# PYTHON=/path/to/python3.11 chooses the interpreter of .venv; ARGS="..." goes to pytest or to the demo.
# demo and tests run on the CPU, on any machine; DEVICE=cuda lets them use the GPUs of an environment with GPU packages.
PYTHON ?=
ARGS ?=
DEVICE ?= cpu
export PYTHON DEVICE

.PHONY: help install test test-quick test-full lint format demo demo-ablation lock clean

help:
	@sed -n '1,2s/^# //p' Makefile

install:
	@bash tools/install.sh

# with ARGS a part of the tests, one after the other
test: install
	$(if $(ARGS),.venv/bin/python -m pytest $(ARGS),bash tests/two_lanes.sh "not full" tests/end_to_end tests/tools)

# no servers, no trainer ranks
test-quick: install
	bash tests/two_lanes.sh "not slow and not full" tests/config tests/data tests/engine tests/launch

# every variant, one after the other
test-full: install
	COLLAB_MEGATRON_FULL=1 .venv/bin/python -m pytest $(ARGS)

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/vulture
	.venv/bin/mypy

format: install
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

demo: install
	.venv/bin/python tools/demo.py --device $(DEVICE) $(ARGS)

demo-ablation: install
	.venv/bin/python tools/demo.py --device $(DEVICE) --ablation $(ARGS)

lock:
	bash tools/lock.sh

# the environment and caches; what runs wrote (runs/) stays
clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info tools/cpu_support/build
	find collab_megatron tests tools -depth -name '__pycache__' -exec rm -rf {} +
	find tools/cpu_support/src -depth -name '*.egg-info' -exec rm -rf {} +
