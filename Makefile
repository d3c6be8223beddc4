# The few things one does here. `make help` lists them.
BIN   := .venv/bin
STAMP := .venv/.installed
# held to 100 %: numbers, files, merge methods, the artifact and the router
EXACT := src/twinmerge/tensors/*,src/twinmerge/files/*,src/twinmerge/models/*,src/twinmerge/merging/*,src/twinmerge/twin/*,src/twinmerge/routing/*
# set-up compiles all packages but these, on all cores: where PYTHONDONTWRITEBYTECODE is set no later command may, and each would do it anew
NOT_COMPILED := /tests?/|/torch/testing/|/ray/|/transformers/models/(?!auto/|bert/|llama/)

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help setup test lint walk docs demo demo-vision demo-llm clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## .venv with everything in it

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || python3 -m venv .venv
	@echo 'installing the packages of constraints.txt into .venv, a minute or two'
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -e '.[dev]'
	@start=$$(date +%s); cd $(BIN)/../lib/python3*/site-packages; \
	  env -u PYTHONDONTWRITEBYTECODE ../../../bin/python -m compileall -qq -j 0 -x '$(NOT_COMPILED)' .; \
	  echo "compiled what commands import in $$(($$(date +%s) - start)) s"
	@touch $@

lint: $(STAMP) ## style, types, import directions, generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python scripts/generate_cli_docs.py --check

test: lint ## lint, then all tests and the coverage gates
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --cov
	@gaps=$$($(BIN)/coverage report --include='$(EXACT)' --fail-under=100) || \
	  { echo "$$gaps"; echo 'tensors, files, models, merging, twin and routing must be covered whole'; exit 1; }

walk: $(STAMP) ## every class of transformers' auto mappings, tiny, as a twin: two minutes
	$(BIN)/python -m tests.walk --out walk.jsonl

docs: $(STAMP) ## the documentation, in site/
	$(BIN)/python scripts/generate_cli_docs.py
	$(BIN)/mkdocs build --quiet --strict

demo: $(STAMP) ## real experts into one twin, measured: the report's path at the end
	$(BIN)/python examples/demo.py

demo-vision: $(STAMP) ## the same with image classifiers
	$(BIN)/python examples/demo.py vision

demo-llm: $(STAMP) ## the same with language models that write their answers
	$(BIN)/python examples/demo.py llm

clean: ## caches and generated files, not .venv
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage site dist
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
