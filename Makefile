# Two commands do all of their own set-up: `make demo` and `make test`.
# PYTHON=... picks another interpreter for the virtual environment. On Linux, PyPI's torch brings CUDA along;
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets the smaller CPU build of the same version.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TYPECHECK := build/typecheck
BENCHMARKS := $(addprefix benchmarks/,rendering.py refinement.py scaling.py encoder.py training_step.py methods.py \
	onnx_export.py)

# Real data sets and checkpoints; tests that need them skip without.
ifndef IMEDSAM_DATA
ifneq ($(wildcard ../shared/.),)
export IMEDSAM_DATA := $(abspath ../shared)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-lowest style quality bench docs dist clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([.a-z][a-z.-]*\):.*  ## /\1  /p' $(firstword $(MAKEFILE_LIST)) | awk '{ name = $$1; $$1 = ""; printf "  make %-10s%s\n", name, $$0 }'

$(VENV): $(INSTALLED)  ## make the virtual environment and install everything the other targets need

# `.installing` is there only while an installation runs or after one that did not finish: then start afresh.
$(INSTALLED): pyproject.toml setup.py $(CONSTRAINTS) | README.md
	@test -n "$(PYTHON)" || { echo "No Python found: install Python 3.11 or run make PYTHON=/path/to/python3.11"; exit 1; }
	@if test -e $(VENV)/.installing || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "Making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(VENV); fi
	@touch $(VENV)/.installing
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) "$$(grep '^torch==' $(CONSTRAINTS))"
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	@rm $(VENV)/.installing
	@touch $@

demo: $(INSTALLED)  ## train on drawn phantoms and leave a picture, a table and a checkpoint in outputs/demo
	$(BIN)/python -m imedsam.training.demo --output_dir outputs/demo
	@echo "Picture, table and checkpoint:"
	@find outputs/demo -type f \( -name '*.png' -o -name '*.md' -o -name '*.json' -o -name '*.safetensors' \) | sort | sed 's/^/  /'

# One thread per worker: two pytest workers share two cores without competing. Benchmarks have the machine to themselves;
# the other slow tests go by files, whose tests share what takes long.
test: test-fast  ## run all tests, the fast ones first
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder \
		--ignore tests/test_benchmarks.py
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow tests/test_benchmarks.py

test-fast: $(INSTALLED)  ## run the tests that take a few seconds at most
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2

test-lowest:  ## run the fast tests with the lowest versions of the dependencies, in .venv-lowest
	$(MAKE) test-fast VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

style: $(INSTALLED)  ## format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# mypy does not follow the editable install's import hook: it reads a plain installation instead.
quality: $(INSTALLED)  ## check format, lint and types without changing anything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target $(TYPECHECK) .
	cd $(TYPECHECK) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p imedsam

bench: $(INSTALLED)  ## run every script in benchmarks/
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# Warnings are errors; REPOSITORY_URL=... is where links to files beside docs/ go.
docs: $(INSTALLED)  ## build the documentation site into build/site
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) "mkdocs-material==9.8.2" "mkdocstrings[python]==1.0.8"
	rm -rf $(TYPECHECK)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target $(TYPECHECK) .
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# In an environment of its own, as a user has it: what the wheel misses is not found beside it.
dist: $(INSTALLED)  ## build sdist and wheel, check them, and run the wheel in a fresh environment
	rm -rf dist build/smoke
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) "$$(grep '^torch==' $(CONSTRAINTS))"
	build/smoke/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) dist/*.whl
	cd build && smoke/bin/imedsam --help >/dev/null && smoke/bin/python -c "import imedsam; print(imedsam.__version__)"

clean:  ## remove what the other targets made, the virtual environment and outputs/ excepted
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
