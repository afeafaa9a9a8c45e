PYTHON ?= python3
# the library itself asks for torch>=2.10; this is what it is developed and measured with
TORCH ?= torch==2.13.0
BIN := .venv/bin
# with a compiler the native kernels must build: an error in them is not to pass for a machine without one
export REGARD_NATIVE ?= $(if $(shell command -v $(or $(CXX),c++)),require)
SYSTEM_CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

.PHONY: demo test test-slow test-triton test-transformers lint docs tiny-lm chromium clean

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/regard compare --quick --systems softmax,sliding_window,based,lightning --out out/demo

# the report is opened in a browser by its tests
chromium:
ifeq ($(SYSTEM_CHROMIUM),)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq chromium; \
	else echo "no Chromium found: the tests that open the report will be skipped"; fi
endif

test: .venv/installed chromium
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: .venv/installed chromium
	$(BIN)/python -m pytest -m slow

# triton is large, and of use with a GPU only: it stands beside the environment, and is seen by its own tests alone
.triton/installed: .venv/installed pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --target .triton "$$(sed -n 's/^triton = \["\(.*\)"\]/\1/p' pyproject.toml)"
	touch $@

test-triton: .triton/installed
	PYTHONPATH=.triton TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/engines/test_triton_*.py

# the oldest version of transformers that the extra `hf` allows, beside the environment's own
.transformers/installed: .venv/installed pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .transformers "$$(sed -n 's/^hf = \["transformers>=\(.*\)"\]/transformers==\1.*/p' pyproject.toml)"
	touch $@

test-transformers: .transformers/installed
	PYTHONPATH=.transformers $(BIN)/python -m pytest -m "not slow" tests/hosts tests/steer

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m pytest tests/architecture

docs: .venv/installed
	$(BIN)/python docs/generate.py

# minutes of one core; goes on when killed, and fails when a score is below what the recipe promises
tiny-lm: .venv/installed
	$(BIN)/python -m regard.bench.proving.tiny_lm

clean:
	rm -rf .venv .triton .transformers out
