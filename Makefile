# Each target first makes .venv when it is missing. Python 3.11 or newer, gcc and git are all that must be there.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
SOURCES := polyvit_fast kernels tests benchmarks setup.py
# All workers run on the same cores: no thread spins while it waits, and NumPy has one in each.
TEST := OMP_WAIT_POLICY=passive OPENBLAS_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal

.PHONY: help demo test test-all test-gpu check lint measure bench aot wheel clean
help:
	@echo "make demo      install, make the demo files, co-train images, videos and audio (install 2 min, training 3 min on 2 cores)"
	@echo "make test      the tests that need no GPU (about 13 minutes on 2 cores)"
	@echo "make test-all  their long forms too: more sizes, files and processes (about 15 minutes)"
	@echo "make test-gpu  the tests on the NVIDIA GPU of this machine, side by side"
	@echo "make check     format, lint, types, import contracts, rules of the code (1 minute); all but the last: make lint"
	@echo "make measure   modules, imports, cycles, lines, functions and comments of this checkout"
	@echo "make bench     throughput against peers, small sizes on a CPU"
	@echo "make aot       compile every kernel for every GPU into build/aot/libpolyvit_kernels.so and test it (11 minutes on 2 cores, needs CMake)"
	@echo "make wheel     build dist/*.whl; with POLYVIT_AOT=1 it holds that library"

demo: .venv/installed
	@echo "== co-training the five demo tasks (about 3 minutes on 2 cores; Ctrl-C saves, 'make demo' resumes)"
	$(BIN)/polyvit-fast train demo

test: .venv/installed-tests
	@echo "== tests without a GPU (about 13 minutes on 2 cores)"
	$(TEST)

test-all: .venv/installed-tests
	@echo "== tests without a GPU, long forms too"
	$(TEST) -m "not gpu"

test-gpu: .venv/installed-tests
	$(BIN)/python benchmarks/gpu.py --out $$(mktemp -d) --only tests

check: lint
	@echo "== rules of the code (half a minute)"
	$(BIN)/pytest -q tests/test_architecture.py tests/test_words.py

lint: .venv/installed-tests
	@echo "== format, lint, types, import contracts (half a minute)"
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/basedpyright
	$(BIN)/lint-imports

measure: .venv/installed-tests
	$(BIN)/python tests/measure_tree.py

bench: .venv/installed-tests
	$(BIN)/pytest -q benchmarks

# For a quick look: make aot DTYPES=bf16 ARCHS=80
DTYPES ?= bf16 fp16
ARCHS ?= 80 90 100 120
CMAKE = $(shell PATH="$(CURDIR)/$(BIN):$$PATH" command -v cmake)

aot: .venv/installed
	@test -n "$(CMAKE)" || { echo "CMake 3.22 or newer is needed: install the system's, or $(BIN)/pip install cmake"; exit 1; }
	@echo "== compiling every kernel of the tile table ahead of time (about 11 minutes on 2 cores the first time)"
	$(CMAKE) -S . -B build/aot -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python "-DPOLYVIT_DTYPES=$(DTYPES)" "-DPOLYVIT_ARCHS=$(ARCHS)"
	$(CMAKE) --build build/aot
	$(CMAKE) -E chdir build/aot ctest --output-on-failure

wheel: .venv/installed
	@rm -rf build dist
	$(BIN)/pip wheel -q --no-deps -w dist .
	@ls dist/*.whl

clean:
	rm -rf .venv build dist *.egg-info

.venv/bin/pip:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
	  || { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "== making .venv"
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/pip pyproject.toml setup.py constraints.txt
	@echo "== installing polyvit-fast with the versions of constraints.txt (about 2 minutes, mostly PyTorch and DALI)"
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[all]"
	@touch $@

.venv/installed-tests: .venv/installed
	@echo "== installing what the tests and checks need (about 1 minute)"
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[all,test,check]"
	# Apart: torchmetrics and transformers import a torchvision where they find one, and its extension does not load with a CPU torch.
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target .venv/foreign timm torchvision
	@touch $@
