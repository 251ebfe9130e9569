# make demo, make test, make bench and make lint each prepare .venv first and reuse it afterwards.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
COMPILER := $(shell command -v $${CXX:-c++} || command -v g++ || command -v clang++)
NATIVE := $(if $(COMPILER),$(RESFUSE_NATIVE),0)
# what the build depends on beside its sources: another value builds again
SETTINGS := CXX=$(COMPILER) RESFUSE_NATIVE=$(NATIVE) RESFUSE_CUDA=$(RESFUSE_CUDA) CUDA_HOME=$(CUDA_HOME) \
	TORCH_CUDA_ARCH_LIST=$(TORCH_CUDA_ARCH_LIST)
# torch before everything else: the build needs it, and no build isolation may fetch another one
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test venv bench benchmark gpu-check gate lint clean always

demo: venv
	$(BIN)/python -m resfuse demo

# workers take tests from each other, since a few take minutes
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

bench: venv
	$(BIN)/python benchmarks/bench_units.py
	$(BIN)/python benchmarks/bench_blocks.py
	$(BIN)/python benchmarks/bench_models.py
	$(BIN)/python benchmarks/bench_serving.py
	$(BIN)/python benchmarks/bench_models.py --scaling
	$(BIN)/python benchmarks/report.py

# the units under pytest-benchmark; its history is kept in .benchmarks
benchmark: venv
	$(BIN)/python -m pytest benchmarks/test_units_benchmark.py -p no:xdist --benchmark-autosave --benchmark-columns=min,median,iqr,rounds

# on a machine with an NVIDIA GPU, under a Python that has torch: no environment, no network
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

# every Triton kernel for every target, and the table in docs/triton.md; needs no GPU. `make gate TRITON=folder` compiles
# by the Triton there, as pip install --no-deps --target folder triton==3.6.0 puts it, and writes no table
gate: venv
	PYTHONPATH=$(if $(TRITON),$(TRITON):)tests $(BIN)/python tests/triton_build.py $(if $(TRITON),--triton $(TRITON),--docs)

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc -type f)

venv: .venv/installed

.venv/requirements: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install $(shell grep '^torch==' requirements.txt)
	$(PIP) install -r requirements.txt
	touch $@

# written only where it differs, so that its date is that of the last change
.venv/settings: always
	@mkdir -p .venv
	@echo '$(SETTINGS)' | cmp -s - $@ || echo '$(SETTINGS)' > $@

.venv/installed: .venv/requirements .venv/settings $(SOURCES)
	rm -f resfuse/*.so
ifeq ($(COMPILER),)
	@echo "no C++ compiler found: resfuse is installed without its native kernels and runs on the reference backend"
endif
ifeq ($(NATIVE),0)
	RESFUSE_NATIVE=0 $(PIP) install --no-build-isolation --no-deps -e .
else
	CXX="$(COMPILER)" $(PIP) install --no-build-isolation --no-deps -e .
endif
	touch $@

.venv/lint: .venv/installed requirements-lint.txt
	$(PIP) install -r requirements-lint.txt
	touch $@

clean:
	rm -rf .venv build dist *.egg-info resfuse/*.so
