# Two commands do everything, set-up included:  make train   make test
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin

.PHONY: help setup train test mutants lab notebooks sync book pdf wheel bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile
	@echo 'Options go into ARGS:  make train ARGS="--preset cpu --seed 1"'

setup: $(VENV)/ready  ## make the virtual environment and install everything into it

$(VENV)/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { echo "Python 3.10 to 3.13 is needed: make PYTHON=/path/to/python3"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { echo "On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

$(VENV)/ready-book: book/requirements.txt $(VENV)/ready
	$(BIN)/python -m pip install --quiet --requirement book/requirements.txt
	@touch $@

train: setup  ## train a complete latent diffusion model (ten minutes on two CPU cores)
	$(BIN)/python -m ldm_minimal train $(ARGS)

# A cell may take ten minutes: a slow machine is no error. The times stored in the chapters are held to two (test_notebooks).
test: setup $(VENV)/ready-book  ## run every test, and a sample of the mutants
	$(BIN)/python -m pytest $(ARGS)
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=600 notebooks
	$(BIN)/python tests/mutants.py --sample 6

mutants: setup  ## put each known bug into a copy, and see that the tests find it
	$(BIN)/python tests/mutants.py

lab: setup  ## JupyterLab on the notebooks
	$(BIN)/python -m jupyterlab --notebook-dir=notebooks $(ARGS)

notebooks: setup  ## execute every chapter and its solutions, and store the outputs (ARGS="03" for one)
	$(BIN)/python book/notebooks.py run $(ARGS)

sync: setup  ## carry the package's definitions into the chapters
	$(BIN)/python book/notebooks.py sync

book: setup $(VENV)/ready-book  ## the site, into book/_build/html
	$(BIN)/python book/build.py

pdf: setup $(VENV)/ready-book  ## the book as one file, book/_build/book.pdf
	$(BIN)/python book/build.py --pdf

wheel: setup  ## dist/ldm_minimal-*.whl, to upload to Colab
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .

bench: setup  ## measure speed on this machine
	$(BIN)/python -m ldm_minimal bench $(ARGS)

clean:  ## remove the virtual environment and caches (runs stay)
	rm -rf $(VENV) build dist book/_build book/node_modules *.egg-info .pytest_cache
