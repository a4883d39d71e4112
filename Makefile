# One target per task; `make` alone lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
UV_VERSION := 0.13.9
UV := .uv/bin/uv
BIN := .venv/bin
INSTALLED := .venv/.installed

export VIRTUAL_ENV := $(CURDIR)/.venv
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# DeepSpeed compiles the operators that a run needs at first use, and caches them here.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/build/torch_extensions
# No target needs a model hub.
export HF_HUB_OFFLINE := 1

# Options of the end-to-end suite's images: built without a registry, for machines without a GPU.
WHEELS := $(wildcard ../shared/wheels)
E2E_IMAGES ?= --base debian --torch cpu $(if $(WHEELS),--wheels $(WHEELS)) $(if $(SSL_CERT_FILE),--ca-file $(SSL_CERT_FILE))

# The tests of `make fast`: those that take milliseconds, of the packages without torch and of the trainer's parts that
# train nothing. In these folders, `pytest.mark.slow` leaves out modules that take seconds.
FAST := $(addprefix tests/,api core operator cli $(addprefix trainer/,batches data kernels losses rewards runtime samples text))

.PHONY: help install demo fast test explore fmt lint generate verify bench bench-alignment bench-faults bench-operator families images dist chart lock clean cluster cluster-down e2e

help: ## list the commands
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

install: $(INSTALLED) ## set up .venv from the lock (Python 3.11+, a C++ compiler)

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0]) if not (3, 11) <= sys.version_info < (3, 14) else None'
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet uv==$(UV_VERSION)

# DeepSpeed's build imports torch, so everything else is installed first.
$(INSTALLED): pyproject.toml requirements.lock | $(UV)
	@test -x $(BIN)/python || $(UV) venv --quiet --python $$($(PYTHON) -c 'import sys; print(sys.executable)') .venv
	@mkdir -p build
	@awk '/^[^ #]/ { skip = /^deepspeed==/ } !skip' requirements.lock > build/without-deepspeed.lock
	$(UV) pip install --require-hashes --requirement build/without-deepspeed.lock
	DS_BUILD_OPS=0 $(UV) pip sync --require-hashes --no-build-isolation requirements.lock
	$(UV) pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: install ## train a small Chinese LLaMA from raw text to a released model (about 6 minutes on 2 cores)
	$(BIN)/stagecoach run examples/chinese-alpaca-tiny.yaml

fast: install ## the quick tests, for while you work (under a minute on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -q -m "not slow and not go and not cluster" $(FAST)

test: install ## the whole suite, without cluster or GPU
	$(BIN)/python -m pytest -n 2 --dist loadfile -q -m "not go and not cluster"

explore: install ## run the property tests with fresh random examples, instead of the same ones in every run
	$(BIN)/python -m pytest -n 2 --dist loadfile -q -m "hypothesis and not go and not cluster" --hypothesis-profile=explore

fmt: install ## format the code and fix what the linter can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: install ## style, types, import contracts, wording
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/wording.py

generate: install ## write the generated files: CRD, JSON schema, field reference, the chart's schema and README
	$(BIN)/python -m stagecoach_api.schema.generate
	STAGECOACH_GOLDEN=write $(BIN)/python -m pytest -q tests/core/manifests/test_manifests_golden.py
	$(BIN)/python charts/generate.py

verify: install ## check that the generated files are up to date
	$(BIN)/python -m stagecoach_api.schema.generate --check
	$(BIN)/python -m pytest -q tests/core/manifests/test_manifests_golden.py
	$(BIN)/python charts/generate.py --check

bench: install $(UV) ## compare ours with transformers' Trainer and TRL; writes bench/results/*.json
	$(BIN)/python -m bench

bench-alignment: install $(UV) ## only the benches of alignment: speed and memory against TRL, learning on small tasks
	$(BIN)/python -m bench alignment

families: install ## try every family of models and write the table in docs/models.md
	$(BIN)/python -m tests.trainer.families

bench-faults: install ## replay the faults of Llama 3's training in 1,000 simulated runs; writes bench/results/fault_mix.json
	@$(BIN)/python -m bench.fault_mix

bench-operator: install ## measure the time between two stages on a cluster; writes bench/results/operator.json
	@$(BIN)/python -m bench.handover

e2e: install ## the end-to-end suite on the cluster of KUBECONFIG, or on one that is started for it
	STAGECOACH_TEST_IMAGES="$(E2E_IMAGES)" $(BIN)/python -m pytest -q -m cluster --timeout 1800 --durations 5 tests/e2e_cluster

cluster: install ## start a real Kubernetes on this machine, for tests (root, Go 1.26; builds for 40 minutes once)
	@$(BIN)/python -m tests.cluster up

cluster-down: install ## stop that Kubernetes and remove everything except the built programs
	@$(BIN)/python -m tests.cluster down

images: ## build both images; options in IMAGES="--torch cpu", see python images/build.py --help
	$(PYTHON) images/build.py $(IMAGES)

dist: install ## build the wheel and the source distribution into dist/
	$(BIN)/python -c 'from hatchling.build import build_sdist, build_wheel; build_sdist("dist"); build_wheel("dist")'

chart: install ## test the chart with Helm and a real API server, both built from Go modules once (Go 1.26)
	$(BIN)/python -m pytest -q -m go tests/charts

lock: $(UV) ## resolve pyproject.toml into the locks
	$(UV) pip compile --quiet --universal --python-version 3.11 --all-extras --generate-hashes --no-header \
		--output-file requirements.lock pyproject.toml
	$(UV) pip compile --quiet --universal --python-version 3.11 --extra trainer --generate-hashes --no-header \
		--constraint requirements.lock --no-annotate \
		--output-file trainer/stagecoach_trainer/requirements.lock pyproject.toml
	$(UV) pip compile --quiet --universal --python-version 3.11 --extra operator --generate-hashes --no-header \
		--constraint requirements.lock --no-annotate \
		--output-file images/operator/requirements.lock pyproject.toml

clean: ## remove what the commands above made, except artifacts of runs
	rm -rf .venv .uv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
