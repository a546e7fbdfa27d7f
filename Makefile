# waggle: `make help` lists what there is to do.
SHELL := /bin/bash
PY    := .venv/bin/python
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: ## install what waggle needs; leaves the command at .venv/bin/waggle
	@tools/setup.sh install

build: ## compile the BPF objects and the CNI plugin
	@$(MAKE) --no-print-directory -C bpf
	@$(MAKE) --no-print-directory -C cni

demo: install ## a cluster of three nodes on this machine, real traffic, a summary (KEEP=1 leaves it up)
	@.venv/bin/waggle lab demo $(if $(KEEP),--keep)

test: ## install what the tests need and run all of them
	@tools/setup.sh test
	@tools/run_tests.sh

lint: ## formatting, lint, types, layers, generated files
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports
	@$(MAKE) --no-print-directory abi-check

abi: ## write the Python side of the BPF programs' types again
	@$(MAKE) --no-print-directory -C bpf all abi
	@$(PY) tools/generate_abi.py

abi-check: ## fail when the generated Python side is stale
	@$(MAKE) --no-print-directory -C bpf all abi
	@$(PY) tools/generate_abi.py --check

bench: ## measure against direct connections and against plain namespaces, side by side
	@tools/setup.sh test
	@$(PY) -m bench $(ARGS)

clean: ## remove what was built
	@$(MAKE) --no-print-directory -C bpf clean
	@$(MAKE) --no-print-directory -C cni clean

.PHONY: help install build demo test lint abi abi-check bench clean
