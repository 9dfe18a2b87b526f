# make train     everything, from nothing to a table of AUCs
# make test      everything the README promises, checked
# make test-slow   the tests that take minutes or gigabytes
# make test-spark   the tests of the Spark engine, which need Java 17
# make test-newest   the tests with the newest supported torch and TorchRec, in an environment of its own
# make check     format, lint, types, layers, glossary
# make docs      the site, in site/
# make ground-truth   ESMM beside plain PyTorch, BASE and the oracle, on three worlds
# make paper     the methods compared at the paper's rates and at dense ones: tables, figures, reports;
#                make paper-full: at the rates of the paper's Public data set as well; make paper-small:
#                a minute of it; make paper-grid: over CVR, correlation and volume
# make first-model   `train` at its defaults beside scikit-learn; LOGS=folder adds the real logs in it
# make after     the methods that came after ESMM, and its towers, compared at the paper's rates in small worlds;
#                make after-small: without tuning, in worlds of a quarter of the size
# make bench     the figures of speed, the short form; make bench-full: all of them
# DEVICE=cuda    CUDA builds and NCCL instead of the CPU and gloo

DEVICE ?= cpu
PYTHON ?= python3
RANKS ?= $(if $(filter cuda,$(DEVICE)),gpu,2)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(DEVICE)
RUN ?= runs/$(shell date +%Y-%m-%d-%H%M%S)

# torchrun asks for it by name; the library divides the cores among the ranks of a machine itself.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install train test test-slow test-spark test-newest docs ground-truth first-model paper paper-full paper-small paper-grid after after-small bench bench-full check format clean

install: $(INSTALLED)

$(INSTALLED): requirements/$(DEVICE).txt requirements/common.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -r requirements/$(DEVICE).txt
	$(BIN)/pip check
	touch $@

train: install
	$(BIN)/torchrun --nproc-per-node $(RANKS) examples/train_ali_ccp.py --device $(DEVICE) --out $(RUN)

test: install
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: install
	$(BIN)/pytest -m slow

OLDEST := .venv-spark-oldest

test-spark: $(VENV)/.installed-spark $(OLDEST)/.installed
	OLDEST_PYTHON=$(OLDEST)/bin/python $(BIN)/pytest -m spark

# What a cluster may have at least; docs/spark.md says so.
$(OLDEST)/.installed: requirements/spark-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -r requirements/spark-oldest.txt
	touch $@

$(VENV)/.installed-spark: requirements/spark.txt $(INSTALLED)
	$(BIN)/pip install -r requirements/spark.txt
	touch $@

NEWEST := .venv-newest

test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/pytest -n 2 --dist loadfile

$(NEWEST)/.installed: requirements/newest.txt requirements/common.txt pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install -r requirements/newest.txt
	$(NEWEST)/bin/pip check
	touch $@

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(VENV)/.installed-docs: requirements/docs.txt $(INSTALLED)
	$(BIN)/pip install -r requirements/docs.txt
	touch $@

ground-truth: install
	$(BIN)/python benchmarks/ground_truth.py --out bench/ground-truth

first-model: install
	$(BIN)/python benchmarks/first_model.py --out bench/first-model $(if $(LOGS),--logs $(LOGS))

# The two regimes side by side: the paper's rates, then a dense world that takes away what ESMM is for.
# esmm_torchrec/comparison/data.py says why.
paper: install
	$(BIN)/esmm-torchrec compare --out paper --regime paper --seeds 5 --trials 16 --epochs 2
	$(BIN)/esmm-torchrec compare --out paper/dense --regime dense --seeds 5 --trials 16 --epochs 2

# The ratio of conversions to impressions in the paper's Public data set beside them.
paper-full: paper
	$(BIN)/esmm-torchrec compare --out paper/public --regime public --seeds 5 --trials 16 --epochs 2

paper-small: install
	$(BIN)/esmm-torchrec compare --out paper-small --seeds 2 --trials 1 --epochs 1 --fractions 0.3 1 \
		--batch-size 512 --test-impressions 5000 --world.impressions 20000

paper-grid: paper
	$(BIN)/python benchmarks/methods_grid.py --settings paper --out bench/methods-grid

# What came after, in worlds of the paper's rates of 1 000 000 training impressions.
after: install
	$(BIN)/esmm-torchrec compare --out after --methods after --seeds 3 --trials 8 --epochs 2 \
		--world.impressions 2000000

after-small: install
	$(BIN)/esmm-torchrec compare --out after-small --methods after --seeds 3 --trials 1 --epochs 1 \
		--world.impressions 500000

bench: install
	mkdir -p bench
	$(BIN)/python benchmarks/training_speed.py --out bench/training_speed.json
	$(BIN)/python benchmarks/step_parts.py --out bench/step_parts.json
	$(BIN)/python benchmarks/reading.py --turns 5 --out bench/reading.json
	$(BIN)/python benchmarks/evaluation.py --out bench/evaluation.json
	$(BIN)/python benchmarks/two_ranks.py --turns 5 --out bench/two_ranks.json
	$(BIN)/python benchmarks/shared_features.py --out bench/shared_features.json
	$(BIN)/python benchmarks/encodings.py --impressions 200000 --out bench/encodings.json
	$(BIN)/python benchmarks/generate.py --impressions 1000000 --out bench/generate.json
	$(BIN)/python benchmarks/prepare_ali_ccp.py --megabytes 500 --out bench/prepare_ali_ccp.json

bench-full: bench
	$(BIN)/python benchmarks/other_libraries.py --out bench/other_libraries.json
	$(BIN)/python benchmarks/shared_features.py --dtype float32 --out bench/shared_features-float32.json
	$(BIN)/python benchmarks/shared_features.py --accuracy --impressions 1000000 --out bench/shuffle_chunk.json
	$(BIN)/python benchmarks/memory.py --out bench/memory.json
	$(BIN)/python benchmarks/auc.py --out bench/auc.json
	$(BIN)/python benchmarks/prepare_ali_ccp.py --megabytes 5200 --out bench/prepare_ali_ccp-5gb.json

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	# The Python of a Spark cluster may be 3.10.
	$(BIN)/ruff check --target-version py310 --select F esmm_torchrec/data esmm_torchrec/*.py
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/pytest -q -p no:cacheprovider tests/unit/test_words.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(NEWEST) $(OLDEST) site runs generated paper paper-full paper-small after after-small bench
