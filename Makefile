# The commands of the README. Everything is installed into .venv; nothing outside this folder is touched.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
.PHONY: demo install test test-slow test-engines test-browser dist test-dist lint types docs format clean

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

test-slow: install  ## Whether intervals and verdicts hold what they promise, over thousands of simulated reports.
	$(BIN)/python -m pytest -q -m slow

# llama.cpp and its converter, out of the source distribution of its Python bindings; building it takes a C++ compiler.
LLAMA_CPP_PYTHON := 0.3.36
ENGINES := build/engines

test-engines: install $(ENGINES)/built-$(LLAMA_CPP_PYTHON)  ## Pruned checkpoints as GGUF: llama.cpp against transformers.
	$(BIN)/python -m pytest -q tests/engines/check_llama_cpp.py

$(ENGINES)/built-$(LLAMA_CPP_PYTHON): | install
	rm -rf $(ENGINES) && mkdir -p $(ENGINES)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
	  --dest $(ENGINES) llama-cpp-python==$(LLAMA_CPP_PYTHON)
	tar -xzf $(ENGINES)/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz -C $(ENGINES)
	CMAKE_ARGS=-DLLAVA_BUILD=OFF $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --target $(ENGINES)/site $(ENGINES)/llama_cpp_python-$(LLAMA_CPP_PYTHON) diskcache==5.6.3
	touch $@

# A driver and the rules of axe-core; the browser itself is the one that the machine has.
PLAYWRIGHT := 1.65.2
AXE_CORE := 4.14.1
BROWSER := build/browser
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

test-browser: install $(BROWSER)/built-$(PLAYWRIGHT)-$(AXE_CORE)  ## The HTML report in a headless Chromium.
	@test -n "$(CHROMIUM)" || { echo "no Chromium here: install one (Debian: apt-get install chromium), or name it with CHROMIUM=" >&2; exit 1; }
	CHROMIUM=$(CHROMIUM) $(BIN)/python -m pytest -q tests/browser/check_report.py

$(BROWSER)/built-$(PLAYWRIGHT)-$(AXE_CORE): | install
	rm -rf $(BROWSER) && mkdir -p $(BROWSER)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(BROWSER)/site playwright==$(PLAYWRIGHT)
	npm install --silent --no-audit --no-fund --prefix $(BROWSER) axe-core@$(AXE_CORE)
	touch $@

dist: install  ## The source distribution and the wheel, checked; equal commits give equal bytes.
	rm -rf dist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python tools/dist.py -o dist

# With its dependencies from the package index, which takes minutes; the test suite has the same without a download.
test-dist: dist  ## The default model in an empty environment that the wheel was installed into.
	rm -rf build/dist && mkdir -p build/dist/empty
	$(PYTHON) -m venv build/dist/environment
	build/dist/environment/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build/dist/empty && ../environment/bin/python -P ../../../tests/integration/installed.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

docs: install  ## docs/cli.md, from the command line itself.
	$(BIN)/python tools/cli_docs.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info src/*.egg-info examples/*/build examples/*/src/*.egg-info moeprune-tiny-*of*
