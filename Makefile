# make demo | test | lint | clean. PYTHON chooses the interpreter (3.11 or newer), JOBS how many tests run at once.
PYTHON ?= python3
JOBS ?= auto
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint clean

# Threads that wait do so without computing: they would take the processors from each other, and from other jobs.
demo: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/mlviews demo

# One thread a worker: workers that share the processors by threads wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal --durations 10

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A second make does not install again, unless the dependencies have changed.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .pytest_cache .ruff_cache
