# waggle: `make help` lists what there is to do.
SHELL := /bin/bash
PY    := .venv/bin/python
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: ## install what waggle needs; leaves the command at .venv/bin/waggle
	@tools/setup.sh install

build: ## compile the BPF objects, the CNI plugin and waggle-health
	@$(MAKE) --no-print-directory -C bpf
	@$(MAKE) --no-print-directory -C cni
	@$(MAKE) --no-print-directory -C health

demo: ## a cluster of three nodes on this machine, real traffic, a summary (KEEP=1 leaves it up)
	@tools/setup.sh demo
	@.venv/bin/waggle lab demo $(if $(KEEP),--keep)

test: ## install what the tests need and run all of them
	@tools/setup.sh test
	@tools/run_tests.sh

test-vm: ## run tests in a virtual machine whose kernel has SCTP sockets (TESTS=… KERNEL=/path/to/boot/vmlinuz-…)
	@tools/setup.sh test
	@tools/test_vm.sh $(TESTS)

differential: ## random objects and packets, through the model and through the programs (SECONDS=60 SEED=n)
	@tools/setup.sh test
	@SECONDS=$(SECONDS) SEED=$(SEED) EXAMPLES=$(EXAMPLES) PROTOCOLS=$(PROTOCOLS) $(PY) tests/bpf/differential.py

lint: ## formatting, lint, types, layers, generated files
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports
	@$(MAKE) --no-print-directory abi-check reference-check deploy-check

abi: ## write the Python side of the BPF programs' types again
	@$(MAKE) --no-print-directory -C bpf all abi
	@$(PY) tools/generate_abi.py

abi-check: ## fail when the generated Python side is stale
	@$(MAKE) --no-print-directory -C bpf all abi
	@$(PY) tools/generate_abi.py --check

reference: ## write docs/reference again: settings, commands, maps, metrics, drop reasons
	@$(PY) tools/generate_reference.py

reference-check: ## fail when a page of docs/reference is stale
	@$(PY) tools/generate_reference.py --check

deploy: ## write the Kubernetes manifests and the Helm chart below deploy again
	@$(PY) tools/generate_deploy.py

deploy-check: ## fail when one of them is stale
	@$(PY) tools/generate_deploy.py --check

bench: ## measure beside direct connections, plain namespaces and kube-proxy's rules
	@tools/setup.sh test
	@$(PY) -m bench $(ARGS)

clean: ## remove what was built
	@$(MAKE) --no-print-directory -C bpf clean
	@$(MAKE) --no-print-directory -C cni clean
	@$(MAKE) --no-print-directory -C health clean

.PHONY: help install build demo test test-vm differential lint abi abi-check reference reference-check deploy deploy-check bench clean
