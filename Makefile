# Two commands: make demo (set-up, then the main job on this machine) and make test (set-up, then all tests).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-long lint types format accuracy bench docs clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "outlay needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Set PYTHON=..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[run,dev]"
	@touch $(READY)

demo: $(READY)
	$(BIN)/outlay demo

test: $(READY) lint types
	$(BIN)/python -m pytest -m "not long"

test-long: $(READY)
	HYPOTHESIS_PROFILE=search $(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Published measurements: errors by source, fitted and leave-one-source-out (writes docs/accuracy.md).
accuracy: $(READY)
	$(BIN)/python -m benchmarks.accuracy

# The demo's whole strategy space, each really run, against the prediction (about an hour on two cores).
bench: $(READY)
	$(BIN)/python -m benchmarks.grid

docs: $(READY)
	$(BIN)/python -m docs.generate

clean:
	rm -rf $(VENV) outlay-demo .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
