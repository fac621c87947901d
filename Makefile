# Everything from a fresh machine with Python 3.10 or newer: `make demo` builds the digits recipe, `make test` runs the tests.
# Pins are in constraints.txt (what was tested); PYTHON, VENV and RECIPE can be set.
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= recipes/digits.yaml
# A worker more than CPUs, since tests wait for servers a third of their time, and five at most, of which builds take much memory;
# a file's tests stay together, and so do its servers and stores.
PARALLEL ?= -n $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) + 1 ))) --maxprocesses=5 --dist loadfile
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# On all CPUs, in place of pip on one; some packages ship files that no Python compiles. What is installed editable, pip leaves
# out, and where PYTHONDONTWRITEBYTECODE is set, nothing else would compile it.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
  $(BIN)/python -m compileall -q artifacts enginery flows tasks recipes/*.py

.PHONY: help demo test test-fast test-slow test-long test-gpu check fix docs clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable '.[demo]'
	$(COMPILE)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(COMPILE)
	@touch $@ $(VENV)/.demo

# The Python bindings alone of TensorRT versions that cannot be installed here: adapters are checked against their members.
# Where one cannot be had (another Python, no compiler), its tests skip and say so.
BINDINGS := 8/tensorrt-bindings==8.6.1 10/tensorrt-cu13-bindings==10.16.1.11 11/tensorrt-cu13-bindings==11.4.0.106

$(VENV)/.bindings: $(VENV)/.dev
	-for one in $(BINDINGS); do \
	  $(PIP) install --quiet --no-deps --upgrade --target $(VENV)/bindings/$${one%%/*} $${one#*/} || exit 1; \
	done
	@touch $@

# Prefect's workers for Docker and Kubernetes, and the schema of Kubernetes: beside the environment, since a Prefect server
# and a process worker import every worker that is installed with them, which takes seconds.
$(VENV)/.workers: $(VENV)/.dev
	$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/workers --constraint constraints.txt \
	  prefect-docker prefect-kubernetes kubernetes-validate \
	  aiohappyeyeballs aiohttp aiosignal frozenlist importlib_resources iso8601 kopf kubernetes_asyncio multidict propcache \
	  python-on-whales tenacity yarl
	@touch $@

demo: $(VENV)/.demo ## set up and build the digits recipe into .enginery/
	$(BIN)/enginery build $(RECIPE)

test: check test-slow ## set up and pass every test: gates and fast tests first, then the slow ones

check: $(VENV)/.dev ## the gates: ruff, mypy --strict, lint-imports, fast tests, coverage of the core
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test-fast

# Coverage makes tests three times slower, so that only what tests the core runs with it.
FAST := -m "not slow and not long and not gpu"
CORE := tests/unit/artifacts tests/unit/recipes tests/unit/enginery tests/unit/tasks/test_remembered.py tests/contract/test_stores.py

test-fast: $(VENV)/.dev $(VENV)/.bindings
	$(BIN)/python -m pytest $(PARALLEL) $(FAST) --cov --cov-report=term-missing:skip-covered $(CORE)
	$(BIN)/coverage report --include='artifacts/*,recipes/*.py' --fail-under=95 --skip-covered
	ENGINERY_TRT_BINDINGS=$(VENV)/bindings/8:$(VENV)/bindings/10:$(VENV)/bindings/11 $(BIN)/python -m pytest $(PARALLEL) $(FAST) $(CORE:%=--ignore=%)

test-slow: $(VENV)/.dev ## the tests marked slow: whole builds, real servers, kills
	$(BIN)/python -m pytest $(PARALLEL) --no-loadscope-reorder -m "slow and not long and not gpu"

test-long: $(VENV)/.dev $(VENV)/.workers ## the tests marked long: full-size models, minutes and gigabytes each; not part of `make test`
	ENGINERY_WORKERS=$(VENV)/workers $(BIN)/python -m pytest -v -m "long and not gpu"

test-gpu: ## the tests that need a GPU, by PYTHON, which has enginery[tensorrt] and pytest: a process for each file
	failed=; for file in tests/gpu/test_*.py; do \
	  $(PYTHON) -X faulthandler -m pytest -v -p no:cacheprovider $$file || failed="$$failed $$file"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

fix: $(VENV)/.dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev ## write the published JSON schemas anew
	$(BIN)/enginery schema recipe > docs/recipe-v1.schema.json
	$(BIN)/enginery schema manifest > docs/manifest-v1.schema.json

clean: ## remove the environment and the store
	rm -rf $(VENV) .enginery
