# make test          lint, format check, every test; of families, ways and methods in all settings
#                    an eighth, another as the code changes  make demo  the main job on a real model
# make test-oldest   families and ways on the oldest transformers that is supported: an eighth
#                    of them, another as the code changes (K=phi3: all of one family)
# make test-matrix   all of them on each tested version; writes docs/support.md (K=phi3: of one)
# make census        every family of transformers, half an hour; goes on where it was stopped, and
#                    writes docs/families.md (K=phi3: of one family)
# make test-gpu      kernels and patched models on a CUDA device, with the packages of PYTHON
# make plans         plans/ anew from what other projects publish, in the folder SOURCES
# make docs          docs/ as a site in build/docs; a broken link or anchor is an error
# All others set up what they need on first use: .venv (packages; those of tests only where tests
# run) and, of SmolLM2-135M-Instruct, .cache/smollm2.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  := .cache/smollm2
READY  := $(VENV)/.ready
DEV    := $(VENV)/.dev
# Not compiled: Python compiles what is imported, a small part of all packages, when it is.
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --no-compile -q

# Other versions of transformers: side folders over the same torch, with what they need older.
OLDER  := 4.57.6 5.0.0 5.17.0
HTTP   := httpx==0.28.1 httpcore==1.0.9 h11==0.16.0 anyio==4.16.0 sniffio==1.3.1
WITH_4.57.6 := huggingface_hub==0.36.2 tokenizers==0.22.2
WITH_5.0.0  := huggingface_hub==1.33.0 tokenizers==0.22.2 $(HTTP)
WITH_5.17.0 := huggingface_hub==1.33.0 $(HTTP)
SIDE   := .cache/transformers-
MATRIX := $(BIN)/python -m pytest -n 2 --dist loadfile $(if $(K),-k "$(K)") tests/support

.PHONY: test test-oldest test-matrix census test-gpu lint plans docs demo venv model oldest clean

test: lint $(MODEL)/config.json
	$(BIN)/python -m pytest -n 2 --dist loadfile --one-in 8

test-oldest: $(DEV) $(SIDE)4.57.6
	PYTHONPATH=$< $(MATRIX) $(if $(K),,--one-in 8)

test-matrix: $(DEV) $(addprefix $(SIDE),$(OLDER))
	for v in $(OLDER); do PYTHONPATH=$(SIDE)$$v $(MATRIX) tests/patcher --write-support || exit; done
	$(MATRIX) tests/patcher --write-support

census: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(if $(K),-k "$(K)") tests/census --census all --write-census

test-gpu:
	$(PYTHON) -m pytest tests/gpu $(shell $(PYTHON) -c "import xdist" 2>/dev/null && printf "%s" "-n 8")

$(SIDE)%: | $(READY)
	$(PIP) --no-deps --target $@ transformers==$* $(WITH_$*)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

plans: $(READY)
	$(BIN)/python -m benchmarks.studies.published.plans $(SOURCES)

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -f docs/site/mkdocs.yml

demo: $(READY) $(MODEL)/config.json
	$(BIN)/python -m benchmarks.demo --model $(MODEL) --out demo-out

venv: $(DEV)
model: $(MODEL)/config.json
oldest: $(SIDE)4.57.6

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[eval]'
	@touch $@

# At once, not after READY: what tests need has all that the rest needs.
$(DEV): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $(READY) $@

# Order-only: a newer environment is no reason to convert the weights again.
$(MODEL)/config.json: | $(READY)
	$(BIN)/python -m hfsparse_eval.smollm2 $(MODEL)

clean:
	rm -rf $(VENV) .cache demo-out build dist *.egg-info
