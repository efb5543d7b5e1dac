# Two commands do all set-up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: quickstart test lint mutants clean
quickstart: $(VENV)/.installed
	$(BIN)/longroll quickstart --output longroll-out

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2

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
