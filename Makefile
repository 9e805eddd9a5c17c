# Every target sets up what it needs: `make demo` or `make test` on a fresh clone is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Several ranks share few cores here: more threads than one each only fight over them.
export OMP_NUM_THREADS ?= 1

.PHONY: setup test fuzz mutants lint format demo plot recipes bench clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

test: setup
	$(BIN)/python -m pytest -n 2

# 1,000,000 damaged or mixed records and 100,000 sequences of uses: under 20 minutes on 2 cores.
fuzz: setup
	FUZZ_RECORDS=$${FUZZ_RECORDS:-1000000} FUZZ_SEQUENCES=$${FUZZ_SEQUENCES:-100000} \
		$(BIN)/python -m pytest -n 2 --dist=load tests/test_fuzz.py

# Plants faults one at a time and looks whether the nearest tests notice; an hour on 2 cores.
mutants: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt mutmut
	$(BIN)/python scripts/mutants.py

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
