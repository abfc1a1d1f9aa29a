# Two commands on a fresh machine: `make demo` and `make test`. Each makes the virtual environment when there is none.

PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
INTEROP := $(VENV)/.interop
WORKERS ?= 2
SIZE    ?= small
RESULTS ?= results$(if $(filter-out small,$(SIZE)),-$(SIZE))
PUBLISH ?= $(if $(filter-out trial,$(SIZE)),docs/$(notdir $(RESULTS)))

.PHONY: demo results test test-all lint bench clean

demo: $(READY)
	$(BIN)/python launch/demo.py --workdir=demo

# DATA=FOLDER with the text that launch/results.py describes; SIZE=large for one GPU, whose JAX the README says how to
# install. Each size has a directory of its own; tables and plots go to docs/.
results: $(READY)
	$(BIN)/python launch/results.py --data="$(DATA)" --workdir="$(RESULTS)" --size="$(SIZE)" --publish="$(PUBLISH)"

test: $(READY) $(INTEROP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal -m "not slow"

test-all: $(READY) $(INTEROP)
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/python tools/benchmark.py

clean:
	rm -rf $(VENV) .cache demo

# The pinned packages first, then this package without resolving anything again.
$(READY): requirements/dev.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(READY)

# What the tests compare imported models with; the demo does without.
$(INTEROP): requirements/interop.txt $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/interop.txt
	touch $@
