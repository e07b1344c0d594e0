"""The demo: pre-training, conversion, training and evaluation of a small model on real text, with public APIs only.

`pretraining` trains small models from scratch on Python's standard library. `smollm2` does the same with real weights,
which it downloads, converts and fine-tunes.
"""

import os
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from ..folders import replaced_folder
from ..messages import quiet_transformers
from . import pretraining
from .corpus import prepare_data
from .pretraining import backbone_config, build_plain, build_scratch
from .report import write
from .settings import FULL, QUICK, Settings

__all__ = ["FULL", "QUICK", "Settings", "backbone_config", "build_plain", "build_scratch", "prepare_data", "run"]


def run(
    out: str | os.PathLike, *, model: str | None = None, quick: bool = False, overwrite: bool = False, seed: int = 0
) -> dict:
    """Runs the demo, writes the folder `out`, prints the results to stdout and returns the content of `results.json`.

    Args:
        out: folder that appears, complete, when the demo ends.
        model: `"smollm2"` converts and fine-tunes a downloaded model; by default, models are trained from scratch.
        quick: use a smaller model and fewer steps, so that the demo takes about a minute.
        overwrite: replace an existing folder once the new one is complete.
        seed: seed of the initial weights and of the order of the training text.

    Raises:
        OSError: `out` is in use or cannot be written, or Python's standard library is not available as source files.
    """
    started, out = time.perf_counter(), Path(out)
    demo: ModuleType = pretraining
    settings = QUICK if quick else FULL
    if model is not None:
        from . import smollm2  # needs peft

        demo, settings = smollm2, smollm2.QUICK if quick else smollm2.FULL
    with replaced_folder(out.absolute(), overwrite) as folder, quiet_transformers():
        results = demo.run_in(folder, replace(settings, seed=seed))
        results["seconds"] = round(time.perf_counter() - started, 1)
        write(results, demo.summary(results), folder)
    print(f"\n{demo.summary(results)}\n\n{results['seconds']:.0f} s in all. {demo.next_steps(out)}")
    return results
