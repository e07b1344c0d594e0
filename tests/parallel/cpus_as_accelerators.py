"""Runs a module as `python -m` does, with the CPUs taken for accelerators (see training_cases.py)."""

import runpy
import sys

from training_cases import use_cpus_as_accelerators

if __name__ == "__main__":
    use_cpus_as_accelerators()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
