# make train     everything, from nothing to a table of AUCs
# make test      everything the README promises, checked
# make check     format, lint, types, layers
# make ground-truth   ESMM beside plain PyTorch, BASE and the oracle, on three worlds
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

.PHONY: install train test ground-truth check format bench clean

install: $(INSTALLED)

$(INSTALLED): requirements/$(DEVICE).txt requirements/common.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -r requirements/$(DEVICE).txt
	$(BIN)/pip check
	touch $@

train: install
	$(BIN)/torchrun --nproc-per-node $(RANKS) examples/train_ali_ccp.py --device $(DEVICE) --out $(RUN)

test: install
	$(BIN)/pytest -n 2

ground-truth: install
	$(BIN)/python benchmarks/ground_truth.py --out bench/ground-truth

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs generated paper bench
