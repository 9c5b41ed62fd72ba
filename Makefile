# Two commands for a fresh machine: `make demo` and `make test`. Everything is set up in .venv.
PYTHON ?= python3
VENV ?= .venv
# This release has a CPU build in the ordinary index of many installations; any torch from 2.10 on
# works, such as TORCH="torch==2.10.0".
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
# Of `make wheel-check`.
PYTHONS ?= python3.10 python3.13
# Tests of what the library computes, but for those that train.
SANITIZED = random_networks or widths or perturbations or inputs or frames or threads or refused
SOURCES = setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: help setup demo test sanitize emulate wheel wheel-check bench bench-ops gpu-check lint types docs clean

help:
	@echo "make demo       train and score on real digits, with a plot (about a minute)"
	@echo "make test       set everything up and run all tests"
	@echo "make sanitize   the engine's tests under the address and undefined-behaviour sanitizers"
	@echo "make emulate    the CPU kernels' tests with AVX-512 and AMX instructions emulated"
	@echo "make wheel      sdist and, built from it, wheel, in dist/; wheel-check tries them"
	@echo "make bench      the quick benchmark; python bench/run.py --help for the full one"
	@echo "make bench-ops  the ops under pytest-benchmark"
	@echo "make gpu-check  GPU tests and benchmarks with the torch that is there; writes JSON"
	@echo "make docs       the documentation site, into build/site; fails on a broken link"
	@echo "make lint types clean"

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastalps needs Python 3.10 or later; set PYTHON=python3.12, say" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "setuptools>=77" wheel ninja
	@# Most of the library compiles while torch is fetched.
	$(BIN)/python setup.py --quiet build_objects & compiled=$$!; \
	  $(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" && { wait $$compiled; true; }
	@touch $@

# The package alone: what the tests need takes longer to fetch than the demo takes.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable .
	@touch $@

$(VENV)/.ready: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[test]"
	@touch $(VENV)/.installed $@

setup: $(VENV)/.ready

demo: $(VENV)/.installed
	$(BIN)/python -m fastalps.cli.demo --out runs/demo

test: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The C++ library with checks of every access and of undefined behaviour, under the engine's tests;
# its code for AVX-512 is not checked: few machines would run it.
sanitize: setup
	FASTALPS_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build_ext \
	  --build-lib build/sanitized
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) \
	  $$($${CXX:-c++} -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  FASTALPS_TEST_LIBRARY=build/sanitized/fastalps/lib FASTALPS_CPU=avx2 OMP_NUM_THREADS=2 \
	  $(BIN)/python -m pytest -q -s -p no:cacheprovider tests/test_engine.py \
	  tests/test_quantization.py -k "$(SANITIZED)"

# The CPU kernels' code for AVX-512 and AMX on any x86 processor, those instructions emulated; then
# without AMX, and in the end that for AVX-VNNI without AVX-512.
emulate: setup
	FASTALPS_EMULATE=1 $(BIN)/python setup.py --quiet build_ext --build-lib build/emulated
	FASTALPS_TEST_LIBRARY=build/emulated/fastalps/lib OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q \
	  -n 2 -p no:cacheprovider tests/test_kernels.py tests/test_engine.py tests/test_quantization.py \
	  -k "$(SANITIZED) or native-cpu"
	for set in avx512 avx2; do \
	  FASTALPS_TEST_LIBRARY=build/emulated/fastalps/lib FASTALPS_CPU=$$set OMP_NUM_THREADS=1 \
	    $(BIN)/python -m pytest -q -n 2 -p no:cacheprovider tests/test_quantization.py \
	    -k "$(SANITIZED)" || exit 1; \
	done

# The wheel is built from the sdist: what the sdist lacks, fails here.
wheel: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

# Installs the wheel with all that it needs into an empty environment of each Python that is there:
# minutes and gigabytes, as each gets a torch of its own. tests/test_wheel.py does with less.
wheel-check:
	@for python in $(PYTHONS); do \
	  $$python -c '' 2>/dev/null || { echo "$$python: not found, skipped"; continue; }; \
	  rm -rf build/wheel-check && $$python -m venv build/wheel-check && \
	  build/wheel-check/bin/pip install --quiet --disable-pip-version-check dist/*.whl && \
	  build/wheel-check/bin/python tests/installed_package.py || exit 1; \
	done; rm -rf build/wheel-check

bench: setup
	$(BIN)/python bench/run.py --quick

bench-ops: setup
	$(BIN)/python -m pytest bench/test_ops_benchmark.py --benchmark-only

# No network, no .venv: whatever python3 with torch there is. ARGS="--quick --data UCSDped2", say.
gpu-check:
	$(PYTHON) bench/gpu_check.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.h csrc/cpu/*.cpp csrc/cpu/*.inl csrc/cuda/*)

types: setup
	$(BIN)/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open build/site/index.html"

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache fastalps/lib
