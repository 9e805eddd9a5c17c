# Every target sets up what it needs: `make demo` or `make test` on a fresh clone is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FRAMEWORKS := $(VENV)-frameworks
AUTOMODEL := $(VENV)-automodel
LIBRARIES := $(VENV)-libraries
VERSIONS := $(VENV)-versions
OLDEST_PYTHON ?= python3.10
MIDDLE_PYTHON ?= python3.12
NEWEST_PYTHON ?= python3.13
# Several ranks share few cores here: more threads than one each only fight over them.
export OMP_NUM_THREADS ?= 1
# Or every process of a test would compile the library anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup test test-device test-versions test-frameworks test-libraries test-peers fuzz mutants lint format \
	docs dist demo plot recipes bench clean

# The stamp names the place: a checkout that was moved or copied sets up anew, and does not run the
# code of another folder. What fails half-way is removed.
STAMP := ready-$(shell pwd | cksum | cut -d' ' -f1)
READY := $(VENV)/$(STAMP)

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	rm -rf $(VENV)
	{ $(PYTHON) -m venv $(VENV) && \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]' && \
	touch $@; } || { rm -rf $(VENV); exit 1; }

# One process more than 2 cores: ranks wait for each other, which left a core idle at times.
test: setup
	$(BIN)/python -m pytest -n 3 --durations=10

# The whole suite on a machine that has a device: the simulated one.
test-device: setup
	TORCH_CPP_LOG_LEVEL=ERROR PYTHONPATH=tests/devices/simulated_device $(BIN)/python -m pytest -n 2

# 1,000,000 damaged or mixed records and 100,000 sequences of uses; 40,000 damaged .metadata files,
# rows and files of frameworks; 200 loads against what `explain` foretold;
# a resume in every combination of a loader's order, workers and draws;
# 200 schedules of world sizes on logical ranks.
fuzz: setup
	FUZZ_RECORDS=$${FUZZ_RECORDS:-1000000} FUZZ_SEQUENCES=$${FUZZ_SEQUENCES:-100000} \
		$(BIN)/python -m pytest -n 2 --dist=load tests/fuzz/test_records.py
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-10000} \
		$(BIN)/python -m pytest -n 2 --dist=load tests/fuzz/test_metadata.py tests/fuzz/test_foreign.py
	FUZZ_LOADS=$${FUZZ_LOADS:-200} \
		$(BIN)/python -m pytest -n 2 --dist=load tests/fuzz/test_explain.py
	FUZZ_SCHEDULES=$${FUZZ_SCHEDULES:-200} \
		$(BIN)/python -m pytest -n 2 --dist=load tests/fuzz/test_schedules.py
	FUZZ_LOADERS=1 $(BIN)/python -m pytest -n 2 --dist=load tests/library/test_loader.py

# Plants faults one at a time and looks whether the tests that reach them notice; an hour on 2 cores.
mutants: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt mutmut
	$(BIN)/python -m scripts.mutants

# The frameworks' real packages on the CPU, in environments of their own: 10 minutes with set-up.
test-frameworks: $(FRAMEWORKS)/ready $(AUTOMODEL)/ready
	PYTHONPATH=. $(FRAMEWORKS)/bin/python -m pytest -m frameworks --ignore=tests/frameworks/automodel tests/frameworks
	PYTHONPATH=. $(AUTOMODEL)/bin/python -m pytest -m frameworks tests/frameworks/automodel

# NumPy's, Python's and torch's own tests and helpers, on streams that were saved and loaded.
test-peers: setup
	$(BIN)/python -m pytest -n 2 -m peers tests/peers

# The libraries that docs/libraries.md names, in the same way: 3 GB, 3 minutes after that.
test-libraries: $(LIBRARIES)/ready
	PYTHONPATH=. $(LIBRARIES)/bin/python -m pytest -m libraries tests/libraries

vpath %.txt tests/frameworks tests/libraries
$(VENV)-%/ready: %.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@

# The suite on the oldest, the project's own and the newest versions, in environments of their own:
# 5 GB each.
OF_VERSIONS := oldest middle newest
test-versions: $(OF_VERSIONS:%=$(VERSIONS)/%/$(STAMP))
	$(PYTHON) scripts/versions.py $(OF_VERSIONS:%=$(VERSIONS)/%/bin/python)

$(VERSIONS)/oldest/$(STAMP): BASE = $(OLDEST_PYTHON)
$(VERSIONS)/middle/$(STAMP): BASE = $(MIDDLE_PYTHON)
$(VERSIONS)/newest/$(STAMP): BASE = $(NEWEST_PYTHON)

$(VERSIONS)/%/$(STAMP): tests/versions/%.txt
	@$(BASE) --version || { echo "$(BASE) does not run: put it on PATH, or name another one" \
		"with OLDEST_PYTHON=, MIDDLE_PYTHON= or NEWEST_PYTHON=" >&2; exit 1; }
	rm -rf $(@D)
	$(BASE) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement $<
	$(@D)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: setup
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

# What the API reference shows.
API := nemo_rng_dcp '!nemo_rng_dcp[.]' nemo_rng_dcp.determinism nemo_rng_dcp.generators.adapter

docs: setup
	$(BIN)/python -W error -m pdoc --docformat google --output-directory build/docs $(API)

dist: setup
	rm -rf dist *.egg-info/SOURCES.txt # which keeps what MANIFEST.in no longer names
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest -m dist tests/project/test_dist.py

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
	rm -rf $(VENV) $(FRAMEWORKS) $(AUTOMODEL) $(LIBRARIES) $(VERSIONS) runs build dist *.egg-info \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis
