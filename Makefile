# make demo    the main job; options in ARGS       make setup       .venv with pinned versions
# make test    all tests but slow and GPU ones     make test-floor  the same on the oldest supported versions
# make check   lint and formatting                 make clean       removes what these targets make
PYTHON ?= python3
ARGS ?=

# The tests' models are tiny: one thread per worker is fastest. A worker holds torch (about 1 GB), hence the limit.
PYTEST := pytest -n logical --maxprocesses 4 --dist worksteal

.PHONY: setup demo test test-floor check clean

setup: .venv/.installed

demo: setup
	@.venv/bin/attnres demo $(ARGS)

test: .venv/.installed
	@OMP_NUM_THREADS=1 .venv/bin/$(PYTEST)

test-floor: .venv-floor/.installed
	@OMP_NUM_THREADS=1 .venv-floor/bin/$(PYTEST)

check: .venv/.installed
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

clean:
	rm -rf .venv .venv-floor build dist demo-out .demo-out.* .pytest_cache .ruff_cache .hypothesis attnres.egg-info
	find attnres tests -name __pycache__ -prune -exec rm -rf {} +

.venv/.installed: requirements/current.txt
.venv-floor/.installed: requirements/floor.txt

# The stamp goes first and comes back last: after an interrupted installation the next one starts from an empty venv.
# torch comes before the rest so that nothing can pull in another build of it. Building without isolation uses the pinned
# setuptools. -qq leaves errors only.
.venv/.installed .venv-floor/.installed: requirements/common.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit( \
	    "attnres needs Python 3.10 to 3.13, $(PYTHON) is %d.%d: choose another with make PYTHON=..." % v)'
	@test -e $@ || $(PYTHON) -m venv --clear $(@D)
	@rm -f $@
	@echo "$(@D): installing torch ($(filter-out %common.txt,$(filter requirements/%,$^)))"
	@$(@D)/bin/python -m pip install -qq -c $(filter-out %common.txt,$(filter requirements/%,$^)) setuptools torch
	@echo "$(@D): installing attnres and what it needs"
	@$(@D)/bin/python -m pip install -qq -c $(filter-out %common.txt,$(filter requirements/%,$^)) \
	    --no-build-isolation --use-pep517 -e '.[dev]'
	@touch $@
	@echo "$(@D): ready"
