# make run      the whole pipeline on the bundled text, on a CPU (or one GPU): about four minutes after the install
# make test     all tests
# make record   a record run on 8 Hopper GPUs, by the torch that PYTHON has; needs the challenge's data and FlashAttention-3
# make clean    remove what these leave behind

PYTHON ?= python3
SEED ?= 1337
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: run test record clean
run: $(VENV)/installed
	OMP_NUM_THREADS=1 PRESET=smoke SEED=$(SEED) $(RUN) train_gpt.py  # more threads only wait for each other here

test: $(VENV)/installed-dev
	$(RUN) -m pytest tests -q -n 2 --dist loadfile

record:
	SEED=$(SEED) $(PYTHON) -m torch.distributed.run --standalone --nproc_per_node=8 train_gpt.py

clean:
	rm -rf $(VENV) runs .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python requirements.txt requirements-tools.txt
	$(RUN) -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(RUN) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@
