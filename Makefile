# One command for each thing one does with this repository. `make` alone lists them and changes nothing.
.DEFAULT_GOAL := help
.PHONY: help setup train test test-fast test-slow chaos matrix gpu-check s3-check models docs docs-test lint lock clean
PYTHON_VENV := .venv/bin/python
# Set-up leaves it to the first import to compile a module: without a cache every process would do that again.
unexport PYTHONDONTWRITEBYTECODE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv with the pinned packages (PYTHON=python3.12 chooses the Python)
	@sh launch/setup.sh

train: setup ## train recipes/quickstart (ARGS='train.budget=1M' overrides the recipe)
	@.venv/bin/turbolm train recipes/quickstart/config.yaml $(ARGS)

test: setup lint ## lint, then run the tests (ARGS='-k packing' selects)
	@$(PYTHON_VENV) -m pytest -n 2 $(ARGS)

test-fast: setup ## the tests that start no other process, in about a minute (ARGS='-k packing' selects)
	@$(PYTHON_VENV) -m pytest -n 2 --fast $(ARGS)

test-slow: setup ## run the tests marked slow, which `make test` leaves out
	@$(PYTHON_VENV) -m pytest -n 2 -m slow $(ARGS)

chaos: setup ## kill runs, fill disks, damage checkpoints for longer (CHAOS_KILLS=30 CHAOS_SEED=n)
	@CHAOS_KILLS=$${CHAOS_KILLS:-30} CHAOS_SEED=$${CHAOS_SEED:-$$(date +%s)} $(PYTHON_VENV) -m pytest -s -m "" tests/chaos $(ARGS)

matrix: setup ## the tests with other versions of torch and Transformers, and Liger; gigabytes (ARGS='oldest' selects)
	@$(PYTHON_VENV) tests/matrix.py $(ARGS)

gpu-check: ## 3 minutes on a machine with a GPU: does it train as it should? (PYTHON chooses the Python)
	@sh benchmarks/gpu.sh --check $(ARGS)

s3-check: setup ## the tests of object storage, with a local S3 server (installs s3fs and moto into build/s3)
	@$(PYTHON_VENV) -m pip install --quiet --target build/s3 s3fs 'moto[server]'
	@PYTHONPATH=build/s3 $(PYTHON_VENV) -m pytest tests/test_storage.py tests/checkpoint/test_mirror.py \
		tests/data/test_url_sources.py tests/data/test_remote_store.py $(ARGS)

models: setup ## try every model type and write src/turbolm/models/README.md
	@.venv/bin/turbolm models --write

docs: setup ## build a site of all pages in build/site (installs mkdocs-material into .venv)
	@$(PYTHON_VENV) -c 'import material' 2>/dev/null || $(PYTHON_VENV) -m pip install --quiet \
		"$$(sed -n 's/^docs = \["\(.*\)"\].*/\1/p' pyproject.toml)"
	@$(PYTHON_VENV) -m tests.docs.site

docs-test: setup ## check every code block of the pages, and run those that can run here
	@$(PYTHON_VENV) -m pytest -m "" tests/docs tests/test_pages.py $(ARGS)

lint: setup ## ruff, mypy and the import contracts
	@$(PYTHON_VENV) -m ruff check .
	@$(PYTHON_VENV) -m ruff format --check .
	@$(PYTHON_VENV) -m mypy src
	@.venv/bin/lint-imports

# torch is left out: which build is right depends on the machine, so launch/setup.sh installs it. The override makes uv
# ignore it and its CUDA libraries; the group `lock` in pyproject.toml adds the rest of what torch needs.
lock: ## pin the newest suitable packages in requirements.lock (needs uv)
	@printf 'torch; python_version < "3"\n' | UV_CUSTOM_COMPILE_COMMAND='make lock' PATH="$(CURDIR)/.venv/bin:$$PATH" \
		uv pip compile pyproject.toml --extra dev --group lock --universal --python-version 3.11 --generate-hashes \
		--upgrade --override - --no-emit-index-url --no-emit-find-links --no-annotate --quiet -o requirements.lock

clean: ## remove caches and build products; keeps .venv, runs and prepared data
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
