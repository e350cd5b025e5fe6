# `make demo` and `make test` need git, make and Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
export PYTHONUNBUFFERED = 1
# Debian splits venv from Python; root (a container, say) gets it without being asked.
INSTALL_VENV = test "$$(id -u)" = 0 && rm -rf $(VENV) && \
  apt-get update -qq && apt-get install -qq -y python3-venv && $(PYTHON) -m venv $(VENV)

.PHONY: setup demo test lint bench kill clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than 3.11; name another with PYTHON=..." >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || sh -c '$(INSTALL_VENV)' || \
	  { echo "make: $(PYTHON) has no venv module; on Debian or Ubuntu: apt install python3-venv" >&2; \
	    rm -rf $(VENV); exit 2; }
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The main job twice: plain fine-tuning, then context-free synthetic data, side by side.
demo: setup
	@rm -rf $(DEMO)
	$(BIN)/python train.py --method ft --out $(DEMO)/ft
	$(BIN)/python train.py --method cfs --out $(DEMO)/cfs
	$(BIN)/python -m cfs.eval.report $(DEMO)/ft $(DEMO)/cfs --out $(DEMO)

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: setup
	$(BIN)/python bench/speed.py
	$(BIN)/python bench/sampler.py
	$(BIN)/python bench/train.py
	$(BIN)/python bench/plan.py
	$(BIN)/python bench/methods.py

# Generations and training runs killed at random moments and resumed, against uninterrupted ones.
kill: setup
	$(BIN)/python bench/kill.py --kills 100
	$(BIN)/python bench/kill_train.py --kills 60

clean:
	rm -rf runs
