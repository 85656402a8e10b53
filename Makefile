# `make demo` and `make test` need nothing but python3 (venv, headers), a C++ compiler and make: see .ci/setup.
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: demo test test-all mutants sanitize bench lint clean help
# A worker per core, up to eight: they share one GPU, and short tests gain nothing from more.
parallel = -n auto --maxprocesses 8 --dist worksteal
cpp_sources = $(shell find csrc -name '*.h' -o -name '*.inc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

demo: ## Four facts about LT2 and a small training run, about 3 minutes (ARGS=--help for options)
	@.ci/setup recipes
	@echo "[3/3] demo"
	@.venv/bin/lt2 demo $(ARGS)

test: ## The quick tests, 5 to 12 minutes on two cores
	@.ci/setup test recipes hf
	@echo "[3/3] tests"
	@.venv/bin/python .ci/test.py -q -m "not slow" $(parallel) $(ARGS)

test-all: ## Every test: all instruction sets, long shapes, repeats
	@.ci/setup test recipes hf
	@.venv/bin/python -m pytest $(parallel) $(ARGS)

mutants: ## Plants known bugs one at a time: do the quick tests notice? (about 12 minutes)
	@.ci/setup test recipes hf
	@echo "[3/3] mutants"
	@.venv/bin/python .ci/mutants.py $(ARGS)

sanitize: ## CUDA kernels of the linear mixers under compute-sanitizer (about 3 minutes on 16 cores)
	@.ci/setup test
	@echo "[3/3] sanitize"
	@.venv/bin/python .ci/sanitize.py $(ARGS)

bench: ## The operators against PyTorch and peers, quick form, about 2 minutes (longer on a CPU without bfloat16)
	@.ci/setup recipes hf
	@echo "[3/3] bench"
	@.venv/bin/python bench/run.py --quick $(ARGS)

lint: ## ruff, clang-format, mypy
	@.ci/setup lint
	.venv/bin/ruff check .
	@.venv/bin/clang-format --dry-run -Werror $(cpp_sources) && echo "clang-format: $(words $(cpp_sources)) files"
	.venv/bin/mypy lt2_ext

clean: ## Remove what was built (not .venv)
	rm -rf build dist *.egg-info lt2_ext/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

help: ## This list
	@echo "Everything is set up in .venv on first use; a torch >= 2.11 of the active Python is used as it is."
	@grep -E '^[a-z-]+: ##' Makefile | sed 's/: ## /|/' | while IFS='|' read -r t h; do printf '  make %-10s %s\n' "$$t" "$$h"; done
	@echo "Options: PYTHON=python3.12  TORCH=torch==2.12.0  LT2_CUDA=OFF  MAX_JOBS=2  ARGS='...' (passed on)"
