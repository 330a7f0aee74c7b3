# The environment of all commands, made by `make setup`.
VENV ?= .venv
# The Python to make it with, which may be one that has Detectron2 already. Where none is given,
# a new environment takes python3 and an existing one is kept.
PYTHON ?=
# Files for black, isort and flake8.
SOURCES := setup.py wsbcn_d2 benchmarks demo tools tests docs

RUN := $(VENV)/bin/python
DEMO := output/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo tutorial test benchmark lint types format clean

help:  ## list the commands
	@echo "make COMMAND [PYTHON=python3.12] [VENV=.venv]"
	@sed -nE 's/^([a-z]+):.*## (.*)/  \1\t\2/p' Makefile | expand -t 12

setup:  ## make the environment in $(VENV); the other commands do it themselves
	@$(or $(PYTHON),python3) tools/setup_env.py --venv "$(VENV)" $(if $(PYTHON),,--keep-python)

demo: setup  ## train Mask R-CNN with BCN+WS at 1 image per step, evaluate, draw predictions
	@rm -rf $(DEMO)
	@$(RUN) -m demo.digits
	@$(RUN) tools/train_net.py \
		--config-file configs/Digits-InstanceSegmentation/mask_rcnn_R_18_FPN_bcn_ws.yaml \
		OUTPUT_DIR $(DEMO)
	@$(RUN) tools/visualize.py --dataset digits_val \
		--predictions $(DEMO)/inference/coco_instances_results.json \
		--output $(DEMO)/predictions.png

tutorial: setup  ## run docs/tutorial.py: one norm string, two trainings, comparison, export
	@PYTHONPATH=. $(RUN) docs/tutorial.py

# One thread each: the processes of the tests take all cores.
test: setup  ## run the tests
	@OMP_NUM_THREADS=1 $(RUN) -m pytest

benchmark: setup  ## measure what the layers cost, on a GPU if there is one; writes docs/benchmarks.md, docs/memory.md
	@$(RUN) -m benchmarks.layers --output benchmarks/results
	@$(RUN) -m benchmarks.train --model R-18-FPN --output benchmarks/results
	@$(RUN) -m benchmarks.train --model R-50-FPN --output benchmarks/results
	@$(RUN) -m benchmarks.memory --dtypes float32 --warmup 1 --repetitions 1 --output benchmarks/results
	@$(RUN) -m benchmarks.memory --dtypes bfloat16 --warmup 1 --repetitions 1 --output benchmarks/results
	@$(RUN) -m benchmarks.import_time --output benchmarks/results
	@$(RUN) -m benchmarks.page

lint: setup  ## check format, imports and style
	@$(RUN) -m black --check --quiet --diff $(SOURCES)
	@$(RUN) -m isort --check --diff $(SOURCES)
	@$(RUN) -m flake8 $(SOURCES)

types: setup  ## check the types; setup.cfg says of which files
	@$(RUN) -m mypy

format: setup  ## format the code
	@$(RUN) -m isort --quiet $(SOURCES)
	@$(RUN) -m black --quiet $(SOURCES)

clean:  ## remove caches and build leftovers; keeps $(VENV), datasets/ and output/
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
