# Two commands do all set-up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# What changes most, for daily work; `make test` runs everything.
FAST   := tests/data tests/interventions tests/results tests/test_*.py tests/measure/test_compare.py \
          tests/cli/test_flags.py tests/cli/test_progress.py tests/cli/test_streams.py \
          tests/training/test_arguments.py tests/training/test_batch.py tests/training/test_loss.py

.PHONY: quickstart test test-fast lint mutants clean
quickstart: $(VENV)/.installed
	$(BIN)/longroll quickstart --output longroll-out

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2

test-fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 $(FAST)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check src tests benchmarks recipes examples dev
	$(BIN)/ruff format --check src tests benchmarks recipes examples dev
	$(BIN)/mypy

mutants: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[mutants]"
	$(BIN)/python dev/mutants.py --json dev/mutants.json

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) longroll-out mutants
