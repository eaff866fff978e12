# Each environment is made once, and again only when pyproject.toml or constraints.txt changes.
# An environment that you made yourself at .venv is used as it is. JOBS=N sets the number of test processes.

VENV := .venv
OLDEST := .venv-oldest
JOBS := 2

PIP := -m pip --disable-pip-version-check --quiet install --no-compile
# Neighbouring tests share fixtures and compiled functions: each process starts with a half, and takes from the other's.
PYTEST := -m pytest -n $(JOBS) --dist worksteal --durations=15
# Tests start dozens of processes: without bytecode, each would compile all of JAX's modules.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-oldest lint bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/installed ## Train a small MoE language model on this machine, and show what it learned
	$(VENV)/bin/jmoe-train --preset tiny

test: $(VENV)/installed-dev ## Run the tests, with a sample of the long series of cases
	$(VENV)/bin/python $(PYTEST)

test-all: $(VENV)/installed-dev ## Run all cases of all tests
	$(VENV)/bin/python $(PYTEST) -m ''

# A fifth of each test's cases: this looks for what an older JAX lacks, which seldom depends on the case.
test-oldest: $(OLDEST)/installed-dev ## Run a smaller sample of the kernels' and layers' tests on the oldest supported JAX
	$(OLDEST)/bin/python $(PYTEST) --thin 5 tests/pallas_kernels tests/jmoe

lint: $(VENV)/installed-dev ## Check style, formatting and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright

bench: $(VENV)/installed ## Measure the kernels and the layer on this machine's GPU
	$(VENV)/bin/python -m benchmarks.grouped_matmul
	$(VENV)/bin/python -m benchmarks.layer

clean: ## Delete environments, builds and caches; keep runs
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/bin/python $(OLDEST)/bin/python:
	@python=$$(sh scripts/find_python.sh) && \
	echo "making $(@D:/bin=) with $$python" && \
	"$$python" -m venv --clear $(@D:/bin=)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo 'installing jmoe into $(@D); this takes a minute or two'
	@$(@D)/bin/python $(PIP) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo 'installing the development tools into $(@D)'
	@$(@D)/bin/python $(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(OLDEST)/installed-dev: $(OLDEST)/bin/python pyproject.toml constraints.txt
	@echo 'installing jmoe with the oldest supported JAX into $(@D)'
	@sed -E 's/^(jax|jaxlib)==.*/\1==0.11.2/' constraints.txt > $(@D)/constraints.txt
	@$(@D)/bin/python $(PIP) --constraint $(@D)/constraints.txt --editable '.[dev]'
	@touch $@
