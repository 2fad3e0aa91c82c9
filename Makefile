# Thin targets: each is one obvious command. Stamps record what was installed from which files.
PYTHON ?= python3
VENV ?= .venv
PACKAGE ?= --editable .
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCK := requirements/torch.txt requirements/core.txt requirements/serve.txt requirements/dev.txt

.PHONY: demo test test-newest test-oldest lint check format lock clean

demo: $(VENV)/.core  ## Generate an image from an example mask and a prompt: bundled model, offline, CPU
	$(BIN)/likeness generate "a smiling woman with blond hair" --mask examples/masks/smile.png --seed 9 --out demo.png
	@echo "The image is $(CURDIR)/demo.png"

test: $(VENV)/.dev  ## Run the test suite
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev  ## Check style, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports

check: lint test  ## Everything CI checks

format: $(VENV)/.dev  ## Rewrite in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-newest .venv-oldest build demo.png

# The lock files list every package with the hashes of its files, so pip resolves nothing. torch is installed after them by
# version only: its CPU and CUDA builds are different files, and an installed build of that version is kept.
define install
	$(PIP) install --quiet --no-deps --require-hashes -r $(1)
	$(PIP) install --quiet -r requirements/torch.txt
	$(PIP) install --quiet --no-deps --no-build-isolation $(PACKAGE)
	$(PIP) check
	touch $@
endef

$(VENV):
	$(PYTHON) -m venv $@

$(VENV)/.core: pyproject.toml $(LOCK) | $(VENV)
	$(call install,requirements/core.txt)

$(VENV)/.serve: pyproject.toml $(LOCK) | $(VENV)  # the service with PostgreSQL, see Dockerfile
	$(call install,requirements/serve.txt)

$(VENV)/.dev: pyproject.toml $(LOCK) | $(VENV)
	$(call install,requirements/dev.txt)
	touch $(VENV)/.core

COMPILE := $(BIN)/uv pip compile pyproject.toml --quiet --python-version 3.11 --no-header --no-annotate
UNIVERSAL := --universal --generate-hashes --constraint requirements/torch.txt --no-emit-package torch

lock: $(VENV)/.dev  ## Renew the lock files: the newest versions that pyproject.toml allows
	$(COMPILE) $(UNIVERSAL) --upgrade --extra dev --output-file requirements/dev.txt
	$(COMPILE) $(UNIVERSAL) --constraint requirements/dev.txt --output-file requirements/core.txt
	$(COMPILE) $(UNIVERSAL) --constraint requirements/dev.txt --extra serve --extra postgresql \
		--output-file requirements/serve.txt

test-newest:  ## Run the suite with the newest versions that pyproject.toml allows
	rm -rf .venv-newest && $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet -r requirements/torch.txt
	.venv-newest/bin/python -m pip install --quiet --upgrade --editable ".[dev]"
	.venv-newest/bin/python -m pytest -n 2

test-oldest: $(VENV)/.dev  ## Run the suite with the oldest versions that pyproject.toml allows
	mkdir -p build
	$(COMPILE) --extra dev --resolution lowest-direct --output-file build/oldest.txt
	rm -rf .venv-oldest && $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet "$$(grep -o '^torch==[0-9.]*' build/oldest.txt)" # with its own CUDA
	.venv-oldest/bin/python -m pip install --quiet --no-deps -r build/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --no-deps --editable .
	.venv-oldest/bin/python -m pytest -n 2
