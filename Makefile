PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test check clean

## quickstart: the whole method on this machine, into ./quickstart
quickstart: .venv/ready
	$(BIN)/dem-opt quickstart quickstart

## test: all tests, in two processes
test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

## check: lint, format and types
check: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info quickstart
