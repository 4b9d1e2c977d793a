# Two commands on a fresh machine with Python 3.11: `make study` runs the main study, `make test` the tests.
STUDY ?= digits
PYTHON ?= python3.11
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONUNBUFFERED := 1
# Compiled modules are kept, whatever the shell says: else each notebook compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE
# Another copy of the project on this path would run in place of this one.
unexport PYTHONPATH
# Freed memory stays with the process: else the C library hands every activation back to the system and faults it in again.
export MALLOC_TRIM_THRESHOLD_ := 1000000000
export MALLOC_MMAP_THRESHOLD_ := 33554432

.PHONY: help env study test lab bench format

help:  ## say what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

env: $(BIN)/.ready  ## make the virtual environment

$(BIN)/.ready: requirements.lock pyproject.toml
	@echo "Making the environment in .venv: about two minutes and 2 GB, the first time only."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet --no-compile --requirement requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $@

study: env  ## run the pipeline (STUDY=digits): every number and figure
	$(BIN)/python -m lib.study.run study $(STUDY)

test: env  ## check the style, run the tests, and step through all notebooks
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --nbval-lax \
		--nbval-current-env --nbval-cell-timeout 300 --nbval-sanitize-with nbval.cfg notebooks tests
	@echo "All tests passed. What the notebooks made on the way lies in data/smoke."

lab: env  ## open the notebooks
	$(BIN)/jupyter lab notebooks

bench: env  ## measure speed, as ratios in one run
	$(BIN)/python -m pytest tests/benchmarks -o python_files="bench_*.py" -s

format: env  ## mend the style, strip volatile notebook metadata
	$(BIN)/ruff check --fix .
	$(BIN)/nbstripout --keep-count --keep-id notebooks/*.ipynb
