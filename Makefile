# Every target installs what it needs into .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Two test files at a time, in their order: by the number of their tests the few long ones would come last.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder --durations=10
INSTALLED := .venv/installed
ECOSYSTEM := .venv/ecosystem

.PHONY: mnist test test-slow check clean

mnist: $(INSTALLED)  ## train on handwritten digits, on 2 ranks
	$(BIN)/python experiments/mnist.py comm=ring comm.checked=16 launch.nproc=2

test: $(INSTALLED)
	$(BIN)/pytest $(WORKERS)

test-slow: $(INSTALLED) $(ECOSYSTEM)  ## what `make test` leaves out: other ranks, algorithms and inputs of the same checks; long runs
	$(BIN)/pytest $(WORKERS) --slow -m slow

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv

$(INSTALLED): requirements.txt pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -e .
	touch $@

$(ECOSYSTEM): requirements-ecosystem.txt $(INSTALLED)
	$(BIN)/pip install --quiet -r requirements-ecosystem.txt
	touch $@
