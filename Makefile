# Two commands on a fresh machine: `make demo` and `make test`. Each makes the virtual environment when there is none.

PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
INTEROP := $(VENV)/.interop
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check
TORCH  := $(shell grep ^torch== requirements/interop.txt)
TORCH_INDEX := https://download.pytorch.org/whl/cpu
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
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal --hypothesis-profile=default

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
	$(PIP) -r requirements/dev.txt
	$(PIP) --no-deps --no-build-isolation -e .
	touch $(READY)

# What the tests compare imported models with; the demo does without. PyPI has torch for CUDA alone, which does not load
# without two gigabytes of libraries: those are installed only where no index has the CPU's. A test that needs torch is
# skipped where it is not there, so it is looked at here.
$(INTEROP): requirements/interop.txt $(READY)
	$(PIP) --no-deps --retries 1 --timeout 30 --extra-index-url $(TORCH_INDEX) $(TORCH)+cpu || $(PIP) $(TORCH)
	$(PIP) --no-deps -r requirements/interop.txt
	$(BIN)/python -c "import torch, transformers"
	touch $@
