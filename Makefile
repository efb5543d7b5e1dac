# Each command makes the environment that it needs, from pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The tests of `make test-fast`, for daily work.
FAST   := tests/data tests/interventions tests/results tests/test_*.py tests/measure/test_compare.py \
          tests/cli/test_flags.py tests/cli/test_progress.py tests/cli/test_streams.py \
          tests/training/test_arguments.py tests/training/test_batch.py tests/training/test_loss.py

# What is tried with the lowest and the newest versions of the dependencies.
SHORT  := tests/cli tests/data tests/interventions tests/measure tests/results tests/report tests/test_*.py \
          tests/training/test_trainer.py tests/training/test_lora.py tests/conformance/test_laws.py

.PHONY: quickstart test test-fast test-lowest test-newest test-wheel lint docs mutants clean
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

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

test-wheel:
	$(PYTHON) dev/check_wheel.py

# Each makes its own environment: the lower bounds of pyproject.toml, and the newest releases. transformers' code of
# Qwen4-Exp and GLM-5-Next needs a newer PyTorch than the lowest (scatter with int32 indices).
test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(PYTHON) dev/lowest.py lora > $(VENV)-lowest/lowest.txt
	$(VENV)-lowest/bin/python -m pip install --quiet -c $(VENV)-lowest/lowest.txt -e ".[lora]" pytest pytest-xdist hypothesis
	$(VENV)-lowest/bin/python -m pytest -n 2 -k "not qwen4_exp and not glm5_next" $(SHORT)

test-newest:
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet -e ".[test]"
	$(VENV)-newest/bin/python -m pytest -n 2 $(SHORT)

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

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest longroll-out mutants site
