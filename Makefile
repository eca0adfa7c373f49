# make test   lint, format check, every test            make demo   the main job on a real model
# Each sets up what it needs on first use: .venv (packages), .cache/smollm2 (SmolLM2-135M-Instruct).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  := .cache/smollm2
READY  := $(VENV)/.ready

.PHONY: test lint demo venv model clean

test: lint $(MODEL)/config.json
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

demo: $(READY) $(MODEL)/config.json
	$(BIN)/python benchmarks/demo.py --model $(MODEL) --out demo-out

venv: $(READY)
model: $(MODEL)/config.json

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev,eval]'
	@touch $@

# Order-only: a newer environment is no reason to convert the weights again.
$(MODEL)/config.json: | $(READY)
	$(BIN)/python -m hfsparse_eval.smollm2 $(MODEL)

clean:
	rm -rf $(VENV) .cache demo-out build dist *.egg-info
