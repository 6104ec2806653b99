# make run      train, quantize, read back and score a tiny model on the bundled text, on a CPU (or one GPU)
# make test     all tests; GPU tests are skipped without a GPU
# make check    the quick tests and ruff: under a minute on two cores
# make record   a record run on 8 Hopper GPUs, from nothing: environment, data, run; what is done is skipped.
#               DATA_DIR=... has data of your own, or data/ what data/download.py fetches
# make bench    time a training step on this machine's GPUs
# make docs     write what is generated in docs/
# make clean    remove environments and caches; runs/ stays

PYTHON ?= python3
SEED ?= 1337
GPUS ?= 8
VENV := .venv
RUN := $(VENV)/bin/python
GPU_VENV := .venv-gpu
GPU_RUN := $(GPU_VENV)/bin/python
CASE_OPS := data/record/datasets/fineweb10B_sp8192
RECORD := runs/$(GPUS)gpus-seed$(SEED)
PIP := -m pip install -q --disable-pip-version-check

.PHONY: run test check record bench docs clean

run: $(VENV)/installed
	PRESET=smoke SEED=$(SEED) $(RUN) train_gpt.py

test: $(VENV)/installed-dev
	$(RUN) -m pytest -q -n 2

check: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m pytest -q -n 2 -m check

record: $(RECORD)/result.json
	@echo "== the run is in $(RECORD); other data or settings: RECORD=runs/NAME"

$(RECORD)/result.json: | $(GPU_VENV)/installed $(if $(DATA_DIR),,$(CASE_OPS))
	@echo "== 3 of 3: the run, into $(RECORD)"
	SEED=$(SEED) ARTIFACT_DIR=$(RECORD) DATA_DIR=$(or $(DATA_DIR),data/record) \
	  $(GPU_RUN) -m torch.distributed.run --standalone --nproc_per_node=$(GPUS) train_gpt.py

bench: $(GPU_VENV)/installed
	$(GPU_RUN) tools/bench_step.py

docs: $(VENV)/installed-dev
	$(RUN) tools/maintenance/docs.py

clean:
	rm -rf $(VENV) $(GPU_VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python requirements.txt
	$(RUN) $(PIP) -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(RUN) $(PIP) -r requirements-dev.txt
	touch $@

$(GPU_VENV)/installed: requirements-gpu.txt
	@echo "== 1 of 3: the environment of a record, in $(GPU_VENV)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_RUN) $(PIP) -r requirements-gpu.txt
	touch $@

$(CASE_OPS): | $(GPU_VENV)/installed  # it gets its name when it is whole
	@echo "== 2 of 3: the challenge's documents, 48 GB, into data/, and shards of them, 12 GB, into data/record/"
	$(GPU_RUN) data/download.py --documents
	$(GPU_RUN) data/prepare.py data/docs_selected.jsonl --out data/record --val-docs 50000 \
	  --case-ops v3 --train-tokens 6e9
