# The commands of the README. Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
# Threads that wait release their core early, so that a demo next to other work is not slowed down.
export GOMP_SPINCOUNT ?= 5000
BIN := $(VENV)/bin

.PHONY: demo test docs numbers clean

demo: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py --output_dir demo

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The tutorial is run anew where its cells have changed.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going docs docs/_build/html

# Every number of README and docs, made again at this state: `make numbers WORK=folder`, and again to continue.
WORK ?= outputs/numbers
numbers: $(VENV)/.installed
	$(BIN)/python benchmarks/make_numbers.py --work_dir $(WORK)

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."'
	$(PYTHON) -m venv $(VENV)

# Stamps, remade when the requirements change.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) demo docs/_build docs/notebook docs/project
