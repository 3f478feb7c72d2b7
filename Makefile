# A virtual environment in .venv is made on first use; set VENV to use yours.
VENV ?= .venv
PYTHON := $(VENV)/bin/python

.PHONY: demo fashion figures test lint docs cuda clean

demo: $(VENV)/installed
	$(PYTHON) benchmarks/demo.py

BUDGET ?= sprint
SEEDS ?= 0
DEVICES ?= 1

fashion: $(VENV)/installed
	$(PYTHON) benchmarks/fashion_mnist.py --budget $(BUDGET) --seeds $(SEEDS) --devices $(DEVICES)

SCALE ?= medium
JOBS ?= 1
FIGURES := fig4 fig5a fig5b fig5c fig6 fig7 ablations
.PHONY: $(FIGURES)

# make -j 7 makes them at the same time; they share runs.
figures: $(FIGURES)
$(FIGURES): $(VENV)/installed
	$(PYTHON) benchmarks/figures/$@.py --scale $(SCALE) --seeds $(SEEDS) --jobs $(JOBS)

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n logical --maxprocesses 8 --dist loadfile

lint: $(VENV)/installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

docs: $(VENV)/installed
	$(PYTHON) -m pip install --quiet -e '.[docs]'
	$(PYTHON) -m sphinx -W --keep-going docs docs/_build/html

# The CUDA extension ahead of its first use (docs/cuda.md); it needs nvcc and no GPU.
cuda: $(VENV)/installed
	$(PYTHON) -m sclightning.ops.cuda.build

$(VENV)/installed: pyproject.toml
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs docs/_build
