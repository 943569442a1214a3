# Each target is enough on a fresh machine: it makes .venv, installs into it, and does its job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: lesson test quick check format clean

lesson: $(INSTALLED)  ## train lesson 1
	$(BIN)/python 01_resnet_beginner.py

test: $(INSTALLED)  ## all tests, one process per core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

quick: $(INSTALLED)  ## shapes and parameter counts of every model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m quick tests/test_models.py

check: $(INSTALLED) $(VENV)/.ruff  ## what CI runs: style, then the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) test

format: $(VENV)/.ruff
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache

# Made last, so that an install that was cut short is begun again.
$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' || \
		{ echo "Python 3.10 to 3.14 is needed, $(PYTHON) is $$($(PYTHON) --version): make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch and friends into $(VENV): about 3 minutes and 6 GB the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.ruff: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'ruff>=0.12,<1'
	@touch $@
