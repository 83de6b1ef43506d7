# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= auto
DEMO := demo-output

.PHONY: demo test quick check engines coverage mutations reference format clean

demo: $(VENV)/installed
	rm -rf $(DEMO)
	$(BIN)/normconvert inspect models/tiny-llama
	$(BIN)/normconvert flashnorm models/tiny-llama --output $(DEMO)
	$(BIN)/python scripts/generate.py models/tiny-llama $(DEMO)

test: check
	$(BIN)/pytest --numprocesses $(WORKERS)

quick: check
	$(BIN)/pytest --numprocesses $(WORKERS) -m 'not coverage'

engines: $(VENV)/engines
	$(BIN)/pytest tests/engines

coverage: $(VENV)/developing
	$(BIN)/python scripts/measure_coverage.py

mutations: $(VENV)/developing
	$(BIN)/python scripts/measure_mutations.py

reference: $(VENV)/developing
	$(BIN)/python scripts/make_reference.py

check: $(VENV)/developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/developing
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/developing: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/engines: $(VENV)/developing
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,engines]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO)
