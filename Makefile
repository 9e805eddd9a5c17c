# Every target sets up what it needs: `make demo` or `make test` on a fresh clone is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Several ranks share few cores here: more threads than one each only fight over them.
export OMP_NUM_THREADS ?= 1

.PHONY: setup test fuzz lint format demo plot recipes bench clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

test: setup
	$(BIN)/python -m pytest -n 2

fuzz: setup
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-26000} $(BIN)/python -m pytest -n 2 --dist=load tests/test_fuzz.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: setup
	$(BIN)/python -m scripts.demo

plot: setup
	test -d runs/demo || $(BIN)/python -m scripts.demo
	$(BIN)/python -m scripts.demo.plot runs/demo scripts/resume.svg

recipes: setup
	$(BIN)/python -m scripts.demo.recipes

bench: setup
	mkdir -p runs
	$(BIN)/python -m scripts.bench --json runs/bench.json

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
