PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo demo-emoji demo-seeds test test-extras test-matrix gpu docs quality checkpoints kernels clean

help:
	@echo "make demo          set up, then the main job end to end on the embedded world (5 to 7 minutes on 2 cores)"
	@echo "make demo-emoji    the same on the emoji drawings of two vendors and their names"
	@echo "make demo-seeds    the demo's comparison with 3 seeds"
	@echo "make test          set up, then lint and tests"
	@echo "make test-extras   tests that are slow or need more than 'make test' installs"
	@echo "make test-matrix   the tests of 'make test' on the lowest, the pinned and the newest versions (15 GB under .matrix)"
	@echo "make docs          build the documentation as a site, in site/"
	@echo "make gpu           what only a GPU can tell: kernels, steps, memory (under 10 minutes on one GPU, no network)"
	@echo "make kernels       build the alignment kernels that this machine can build (g++; not needed to use the library)"
	@echo "make quality       format the code and mend what the linter can mend"
	@echo "make checkpoints   rebuild the tiny checkpoints from nothing"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e ".[test,qlora,kernels,serve]"
	touch $@

$(VENV)/.installed-extras: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e ".[test,test-extras,qlora,deepspeed,kernels,serve,sentence-transformers,lancedb,app,mteb,lmms-eval]"
	$(PIP) install -c constraints.txt --no-deps lmms-eval
	touch $@

demo: $(VENV)/.installed
	$(BIN)/hf-sugar demo

demo-seeds: $(VENV)/.installed
	$(BIN)/hf-sugar demo --output_dir runs/demo-seeds --seeds 0 1 2 --ablations

demo-emoji: $(VENV)/.installed
	$(BIN)/python examples/emoji/train_checkpoints.py
	$(BIN)/hf-sugar demo --config examples/emoji/demo.yaml

checkpoints: $(VENV)/.installed
	$(BIN)/python examples/tiny_checkpoints/build.py --output_dir runs/weights

kernels: $(VENV)/.installed
	$(BIN)/python hub_kernels/build_local.py

# a test computes with one thread (tests/conftest.py)
test: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m "not extras" -n 2 --dist loadfile

# the tests that transformers runs on its own classes are in its source distribution alone
.cache/transformers-tests: constraints.txt $(VENV)/.installed-extras
	$(PIP) download -q --no-deps --no-binary transformers -c constraints.txt -d .cache transformers
	touch $@

# what vLLM does with an export is tested on its files, which are read and not installed (336 MB)
.cache/vllm: $(VENV)/.installed-extras
	$(PIP) download -q --no-deps -d .cache vllm==0.33.0
	touch $@

test-extras: $(VENV)/.installed-extras .cache/transformers-tests .cache/vllm
	$(BIN)/python -m pytest -m extras

docs: $(VENV)/.installed-extras
	$(BIN)/mkdocs build

# one set alone: make test-matrix SETS=newest
test-matrix:
	$(PYTHON) tests/matrix.py $(SETS)

gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu.py --output gpu.json

quality: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs
