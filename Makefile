# Everything below works on a fresh machine: each target first makes .venv and installs what it needs there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= -n logical --maxprocesses 4 --dist worksteal

.PHONY: demo test test-all mutants style quality clean

demo: $(VENV)/demo.installed
	$(BIN)/hf-longspec demo $(ARGS)

# A core a worker: tiny tensors do not pay for more, and waiting threads would spin.
test test-all: export OMP_NUM_THREADS ?= 1

# In ten minutes on two cores: everything that is not marked `slow`, as plain `pytest` does.
test: $(VENV)/test.installed
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

# All that there is, in about an hour.
test-all: $(VENV)/test.installed
	$(BIN)/python -m pytest $(WORKERS) -m "" $(ARGS)

# Faults seeded into a copy of the code, each against the quick tests that should notice it; in half an hour.
mutants: $(VENV)/test.installed
	$(BIN)/python tests/mutants.py $(ARGS)

style: $(VENV)/dev.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m hf_longspec.hub.releases

quality: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One environment; the stamp of an extra (demo, test, dev) says that it is installed there.
$(VENV)/%.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
