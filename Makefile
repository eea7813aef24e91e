# Two commands: `make search` and `make test`. Both set up .venv first, once.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SAMPLES ?= samples/text
CONFIG ?= $(SAMPLES)/search.yaml
READY := $(VENV)/.ready

.PHONY: search test lint setup reference clean

search: setup
ifeq ($(CONFIG),$(SAMPLES)/search.yaml)
	$(BIN)/meiosis samples text $(SAMPLES)
endif
	$(BIN)/meiosis search $(CONFIG)

# Side by side what is quick, a core for each process; then, one by one, what kills processes or starts clusters.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not ray and not slow"
	$(BIN)/python -m pytest -m "ray or slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The committed table of three seeds, with all arms of the certificate; about half an hour on two cores.
reference: setup
	$(BIN)/meiosis samples text $(SAMPLES)
	$(BIN)/python benchmarks/three_seeds.py

setup: $(READY)

# torch comes first and by its exact pin, so that nothing else chooses its version. Which build that is (CPU or
# CUDA) is up to pip's index: for the small CPU build, set PIP_EXTRA_INDEX_URL to PyTorch's CPU index.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Meiosis needs Python 3.11 or later; call make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
