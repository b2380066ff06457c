# The commands of the README. Everything is installed into .venv; nothing outside this folder is touched.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
.PHONY: demo install test lint types format clean

demo: install  ## Prune the bundled model to half of its experts and report what it costs.
	$(BIN)/moeprune prune --ratio 0.5 --overwrite

install: .venv/installed

# A torch that the interpreter already has is kept where it satisfies pyproject.toml; otherwise the pinned one is installed.
.venv/installed: pyproject.toml constraints.txt
	rm -rf .venv
	if $(PYTHON) -c 'import torch; assert torch.torch_version.TorchVersion(torch.__version__) >= (2, 6)' 2>/dev/null; then \
	  $(PYTHON) -m venv --system-site-packages .venv && grep -v '^torch==' constraints.txt > .venv/constraints.txt; \
	else \
	  $(PYTHON) -m venv .venv && cp constraints.txt .venv/constraints.txt; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt -e '.[dev]'
	touch $@

test: install lint types  ## Lint, types and the test suite.
	$(BIN)/python -m pytest -q

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info src/*.egg-info moeprune-tiny-*of*
