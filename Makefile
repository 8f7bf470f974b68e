# Everything below works on a fresh machine: each target first makes .venv and installs what it needs there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# What meets transformers: the contract, its families, caches, attention interface and targets, what is refused, the
# releases that a draft's code knows, and drafts loaded as remote code.
MEETS_TRANSFORMERS := $(addprefix tests/test_, $(addsuffix .py, contract families interface_longspec target_longspec \
	cache_longspec cache_rows refusals positions_longspec stock_assistants configuration_longspec loading))
WORKERS ?= -n logical --maxprocesses 4 --dist worksteal

.PHONY: demo test test-all test-transformers test-newest upgrade-transformers round-trip mutants style quality clean

demo: $(VENV)/demo.installed
	$(BIN)/hf-longspec demo $(ARGS)

# A core a worker: tiny tensors do not pay for more, and waiting threads would spin.
test test-all test-transformers: export OMP_NUM_THREADS ?= 1

# In ten minutes on two cores: everything that is not marked `slow`, as plain `pytest` does.
test: $(VENV)/test.installed
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

# All that there is, in about an hour.
test-all: $(VENV)/test.installed
	$(BIN)/python -m pytest $(WORKERS) -m "" $(ARGS)

# What meets transformers, with the transformers that is installed.
test-transformers: $(VENV)/test.installed
	$(BIN)/python -m pytest $(WORKERS) $(MEETS_TRANSFORMERS) $(ARGS)

# The same in an environment of its own with the newest transformers, whatever pyproject.toml allows: for a schedule.
test-newest:
	$(MAKE) --no-print-directory VENV=$(VENV)-newest upgrade-transformers test-transformers

upgrade-transformers: $(VENV)/test.installed
	$(BIN)/python -m pip install --quiet --upgrade transformers
	$(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'

# An exported draft in fresh environments of torch, transformers and safetensors, one for each release.
RELEASES ?= 5.17 5.23 5.24
round-trip: $(VENV)/test.installed
	$(BIN)/python tests/round_trip.py $(RELEASES)

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
	rm -rf $(VENV) $(VENV)-newest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
