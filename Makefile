# make demo | make test | make zoo | make test-lowest | make fuzz | make test-slurm | make bench | make docs | make lint | make format
# VENV and PYTHON may be given: make test VENV=~/venvs/clafusion
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Newer than setup.cfg: what is installed is what setup.cfg asks for.
STAMP := $(VENV)/.clafusion-installed
DOCS_STAMP := $(VENV)/.clafusion-docs-installed

.PHONY: demo test zoo test-lowest fuzz test-slurm bench docs lint format

# Trains two parents that know different digits, fuses them and shows how the result compares (about a minute).
demo: $(STAMP)
	$(BIN)/clafusion fit --config configs/train/digits_low.yaml --overwrite
	$(BIN)/clafusion fit --config configs/train/digits_high.yaml --overwrite
	$(BIN)/clafusion fuse runs/digits_low/best.ckpt runs/digits_high/best.ckpt -o runs/fused.ckpt --overwrite
	$(BIN)/clafusion test --ckpt_path runs/fused.ckpt

# Two processes of one thread each; a file's tests stay together, because they share what is trained for them.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The tests with the oldest Python and the oldest packages that setup.cfg admits; TESTS names some of them.
LOWEST ?= .venv-lowest
LOWEST_PYTHON ?= python3.10
test-lowest: $(LOWEST)/.clafusion-installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest --numprocesses 2 --dist loadfile $(TESTS)

$(LOWEST)/.clafusion-installed: setup.cfg pyproject.toml .ci/lowest.py
	test -x $(LOWEST)/bin/python || $(LOWEST_PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python .ci/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(LOWEST)/constraints.txt --editable '.[dev]'
	touch $@

# All networks of torchvision, timm and Hugging Face that are tried, the large ones too, and generated ones (an hour).
zoo: $(STAMP)
	ZOO=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 tests/clafusion/tracing tests/clafusion/formats/test_stored.py tests/clafusion/fusion/test_zoo.py
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.generated --count 1000

# Damages files of every kind that is read, and reads them, for ten minutes.
FUZZ_SECONDS ?= 600
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.fuzzing --seconds $(FUZZ_SECONDS)

# As root, on a Debian or Ubuntu without SLURM: installs it, trains with two tasks, requeues the job, removes SLURM.
test-slurm: $(STAMP)
	scripts/slurm/test.sh $(BIN)

# What fusing, data, training and solvers cost, side by side on one thread (eleven minutes; plots in docs/plots).
bench: $(STAMP)
	for name in fusion data train solvers startup; do OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py || exit 1; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/installed_layout.py
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/setup.cfg --package clafusion

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in build/site: a warning or a dead link is an error. The notice about future releases of MkDocs is no warning.
docs: $(DOCS_STAMP)
	$(BIN)/python scripts/installed_layout.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

$(STAMP): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
