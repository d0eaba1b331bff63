# `make demo` runs the main job, `make test` passes the tests; both make .venv first where it is missing.

VENV   ?= .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

.PHONY: help venv demo test lint clean

help:
	@echo "make demo   a real net on real digits, searched under a quarter of its latency"
	@echo "make test   the tests, on 2 cores"
	@echo "make lint   ruff and mypy"
	@echo "make venv   only the environment"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt compressors/kernels/CMakeLists.txt estimators/analytic/bitfusion.cpp $(wildcard compressors/kernels/*.cpp compressors/kernels/*.h compressors/kernels/*.inl)
	@echo "== environment in $(VENV) (a few minutes the first time: torch, onnxruntime, ray, and the C++ kernels)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --upgrade pip
	@$(PY) -m pip install --quiet --constraint constraints.txt torch scikit-build-core nanobind cmake ninja
	@echo "== compiling the kernels and installing tightrope"
	@$(PY) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[demo,test,dev]"
	@touch $(STAMP)

demo: venv
	@echo "== tightrope demo (up to 10 minutes on 2 cores)"
	@$(VENV)/bin/tightrope demo

test: venv
	@echo "== the tests"
	@$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: venv
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(PY) -m mypy

clean:
	rm -rf $(VENV) build runs
