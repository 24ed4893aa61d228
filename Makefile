# make install | install-gpu | test | test-quick | test-full | lint | format | docs | lock | audit | clean
# make demo | demo-ablation | demo-algorithms
# PYTHON=/path/to/python chooses the interpreter of .venv (3.11, 3.12; GPU: 3.12); ARGS="..." goes to pytest or to the demo.
# demo and tests run on the CPU, on any machine; DEVICE=cuda lets them use the GPUs of an environment with GPU packages.
PYTHON ?=
ARGS ?=
DEVICE ?= cpu
export PYTHON DEVICE
# of the tests; one takes the long files first, the others the short ones (tests/scheduling.py)
WORKERS ?= 2
PYTEST = .venv/bin/python -m pytest -n $(WORKERS)

.PHONY: help install install-gpu test test-quick test-full lint format docs demo demo-ablation demo-algorithms lock audit clean

help:
	@sed -n '1,4s/^# //p' Makefile

# keeps the kind of .venv that is there; on GPU nodes: make install-gpu, once (docs/install.md)
install:
	@bash tools/install.sh

install-gpu:
	@bash tools/install.sh gpu

# the light tests in two workers, then what starts servers and runs, one test at a time
test: install
ifeq ($(strip $(ARGS)),)
	@failed=0; \
	$(PYTEST) -m "not slow and not full" || failed=$$?; \
	.venv/bin/python -m pytest -m "slow and not full" || failed=$$?; \
	exit $$failed
else
	.venv/bin/python -m pytest -m "not full" $(ARGS)
endif

# no servers, no trainer ranks
test-quick: install
	$(PYTEST) -m "not slow and not full"

# every variant
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

# the site in site/, of docs/ and the pages next to this file; a link that leads nowhere fails
docs: install
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

demo: install
	.venv/bin/python tools/demo.py --device $(DEVICE) $(ARGS)

demo-ablation: install
	.venv/bin/python tools/demo.py --device $(DEVICE) --ablation $(ARGS)

# hours on two cores; a finished run is not run again
demo-algorithms: install
	.venv/bin/python tools/demo_algorithms.py --device $(DEVICE) $(ARGS)

lock:
	bash tools/lock.sh

# releases that must not run, and PyPI's advisories where its database can be reached (else exit code 3 of the tool)
audit: install
	.venv/bin/python tools/audit.py $(ARGS)

# the environment and caches; what runs wrote (runs/) stays
clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info tools/cpu_support/build
	find collab_megatron tests tools -depth -name '__pycache__' -exec rm -rf {} +
	find tools/cpu_support/src -depth -name '*.egg-info' -exec rm -rf {} +
