# Each target works alone from a bare clone; `make setup` is done when needed.
PYTHON ?= python3.11
VENV ?= .venv
export FLUTE_VENV := $(VENV)
export PYTHON
BIN := $(abspath $(VENV))/bin

.PHONY: setup demo test lint bench-cpu wheel clean

setup:
	@bash .ci/env/setup.sh

demo: setup
	@$(BIN)/python examples/demo.py

test: setup
	@$(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@git ls-files 'kernels/*.cpp' 'kernels/*.h' 'kernels/*.cu' 'kernels/*.cuh' \
	  | xargs -r $(BIN)/clang-format --dry-run --Werror

bench-cpu: setup
	@$(BIN)/python benchmarks/bench_cpu.py

wheel: setup
	@$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

clean:
	rm -rf build dist *.egg-info flute_vllm/_C*.so
