# Thin targets: each is one obvious command. A stamp records what the environment was installed from.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test check lint format clean

demo: $(STAMP)  ## A portrait from an example mask and a sentence, with the bundled model, offline, on the CPU
	$(BIN)/likeness generate "a smiling woman with blond hair" --mask examples/masks/smile.png --seed 9 --out demo.png
	@echo "The portrait is in $(CURDIR)/demo.png"

test: $(STAMP).dev  ## The test suite
	$(BIN)/python -m pytest -n 2

lint: $(STAMP).dev  ## Style, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

check: lint test  ## Everything CI checks

format: $(STAMP).dev  ## Rewrite in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build demo.png

.venv:
	$(PYTHON) -m venv .venv

$(STAMP): pyproject.toml | .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(STAMP).dev: pyproject.toml | .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(STAMP)
