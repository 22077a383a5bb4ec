# make demo    set up .venv, train dense and with DGC under mpirun, compare, compress the model
# make test    set up .venv, run all tests
# make check   the same with format, lint, types, shell, Horovod, and the wheel tested elsewhere
#
# TORCH=torch==2.13.0   what to install as torch      PYTHON=python3   which interpreter
# RANKS, EPOCHS, DATA, OUT: see launch/demo.sh

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
export PATH := $(BIN):$(PATH)

.PHONY: demo test check setup horovod format clean

setup: $(VENV)/.ready

# Says what the environment was made with: another TORCH or PYTHON makes it anew.
$(VENV)/.made: FORCE
	@if [ -e $@ ] && ! echo '$(PYTHON) $(TORCH)' | cmp -s - $@; then rm -rf $(VENV); fi
	@if [ ! -e $@ ]; then mkdir -p $(VENV); echo '$(PYTHON) $(TORCH)' > $@; fi
FORCE:

$(VENV)/.ready: pyproject.toml .ci/constraints.txt $(VENV)/.made
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[mpi,integrations,plots,dev]'
	touch $@

demo: setup
	PYTHON=$(BIN)/python launch/demo.sh

test: setup
	$(BIN)/python -m pytest

horovod: setup
	launch/install_horovod.sh $(VENV)

check: setup horovod
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	bash -n launch/*.sh launch/*.sbatch .ci/*.sh .ci/run
	$(BIN)/python -m pytest
	.ci/wheel.sh $(BIN)/python

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .cache out dist
