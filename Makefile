# make demo   the main job, for real: real model, real vLLM on this CPU, real Ray, real text
# make test   the tests            make check   format, lint, types, documents and tests
# make chaos  the proof that no row is lost or repeated, whatever fails; under 40 minutes on two cores
# make infra-test  infra/, run for real where one machine can; under 15 minutes on two cores, as root
# make image-test  the image for CPUs, built and run without a Docker engine; under 15 minutes on two cores, as root
VENV := .venv
PYTHON := $(VENV)/bin/python
ROWS ?= 600
SHARE ?= 1

.PHONY: demo test chaos infra-test image-test check cover docs format lint lock lock-check wheel wheel-test clean
.DELETE_ON_ERROR:

# Another number of rows is another corpus and another output.
OTHER := $(filter-out 600,$(ROWS))
DEMO := sentiment_transcripts$(OTHER:%=-%)

demo: $(VENV)/.cpu
	$(PYTHON) jobs/sentiment_transcripts/corpus.py data/$(DEMO) --rows $(ROWS)
	$(PYTHON) -m batchq job=sentiment_transcripts $(if $(OTHER),input.path=data/$(DEMO) output.path=out/$(DEMO))

# Files of long tests come first, so that both cores have work to the end.
SLOW := run chaos spent report reuse budget quantize model preview tune trust corpus storage engine bad_commands log
FIRST := $(SLOW:%=tests/test_%.py)
TESTS := $(FIRST) $(filter-out $(FIRST),$(wildcard tests/test_*.py))
# Four processes, because tests wait more than they compute: two on two cores took 13:26 for 1,479 tests and 9:06 of the
# cores' time.
PYTEST := $(PYTHON) -m pytest -q -n 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev
	$(PYTEST) --durations 15 $(TESTS)

chaos: $(VENV)/.dev
	$(PYTHON) -m chaos --share $(SHARE)

# What the checks need is installed into .infra/: Airflow, schedulers, validators.
infra-test: $(VENV)/.dev
	$(PYTHON) -m infra.check

image-test: $(VENV)/.dev
	$(PYTHON) -m infra.check images

check: $(VENV)/.dev lint lock-check docs
	$(PYTEST) $(TESTS)

# Which lines of batchq the quick tests run. Tests that start Ray, vLLM, a store or a quantization are left out: most of what
# they run, they run in other processes, where nothing is counted.
cover: $(VENV)/.dev
	$(PYTEST) -m "not engine" $(filter-out $(FIRST),$(TESTS)) --cov --cov-report=term:skip-covered

lint: $(VENV)/.dev
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

docs: $(VENV)/.dev
	$(PYTHON) -m mkdocs build --strict # without --quiet, which silences warnings before --strict sees them

format: $(VENV)/.dev
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

$(VENV)/.cpu: requirements/setup.txt requirements/cpu.txt requirements/demo.txt requirements/install.sh pyproject.toml
	bash requirements/install.sh $(abspath $(VENV)) cpu.txt demo.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.cpu requirements/dev.txt
	bash requirements/install.sh $(abspath $(VENV)) dev.txt
	@touch $@

lock: $(VENV)/.cpu
	UV=$(abspath $(VENV))/bin/uv bash requirements/lock.sh

# Whether somebody changed what is locked, or a lock by hand; asks no index.
lock-check:
	cd requirements && sha256sum --check --strict --quiet locked.sha256

wheel: $(VENV)/.dev
	$(PYTHON) -m build --wheel --no-isolation

wheel-test: wheel
	$(PYTHON) -m tests.wheel dist

clean:
	rm -rf $(VENV) dist build out data site .coverage .pytest_cache .mypy_cache .ruff_cache
