# make venv    the environment, in .venv (EXTRA=cuda for NVIDIA GPUs; pip's settings, PIP_*, are honoured)
# make test    style, types, import rules, tests (RANKER_DATA=DIR also tests on the public logs there)
# make demo    generated logs to a trained, measured, exported ranker, in demo/
# make clean   remove what the others made

VENV := .venv
BIN := $(VENV)/bin
EXTRA ?= cpu
WORKERS ?= 2
INSTALLED := $(VENV)/.installed-$(EXTRA)
DEMO_MODELS := din target_attention_sids uxsid

.PHONY: venv check test demo clean

venv: $(INSTALLED)

# TorchRec comes with --no-deps on CPU machines: it requires the CUDA build of FBGEMM by name (see README.md).
$(INSTALLED): pyproject.toml
	@test -x $(BIN)/python || { \
		for python in python3.11 python3 python3.12 python3.13; do \
			if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
				echo "$$python -m venv $(VENV)"; exec $$python -m venv $(VENV); \
			fi; \
		done; \
		echo "make venv: needs Python 3.11 or newer with its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; \
		exit 1; }
	$(BIN)/python -m pip install --editable '.[$(EXTRA),dev]'
ifeq ($(EXTRA),cpu)
	$(BIN)/python -m pip install --no-deps torchrec==1.8.0
endif
	@rm -f $(VENV)/.installed-* && touch $@

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

test: check
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

demo: venv
	rm -rf demo
	$(BIN)/ranker doctor
	$(BIN)/ranker prepare configs/synthetic/data.yaml --out demo/dataset
	$(BIN)/ranker sids fit configs/synthetic/sids.yaml --dataset demo/dataset --out demo/codebook
	$(BIN)/ranker sids apply demo/codebook --dataset demo/dataset
	set -e; for model in $(DEMO_MODELS); do \
		$(BIN)/ranker train configs/synthetic/$$model.yaml --set dataset=demo/dataset --out demo/$$model; \
		$(BIN)/ranker evaluate demo/$$model --split test; \
	done
	$(BIN)/ranker export demo/uxsid --out demo/export
	$(BIN)/ranker memory build demo/uxsid --store lmdb:demo/memories
	$(BIN)/ranker runs $(addprefix demo/,$(DEMO_MODELS))

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
