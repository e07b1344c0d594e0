"""The demo: pre-training, conversion, training and evaluation of a small model on real text, with public APIs only.

`pretraining` trains small models from scratch on Python's standard library. `smollm2` does the same with real weights,
which it downloads, converts and fine-tunes.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

MARKER = ".attnres-demo"


def run(
    out: str | os.PathLike, *, model: str | None = None, quick: bool = False, overwrite: bool = False, seed: int = 0
) -> dict:
    """Runs the demo, writes the folder `out`, prints the results to stdout and returns the content of `results.json`.

    Args:
        out: folder that appears, complete, when the demo ends.
        model: `"smollm2"` converts and fine-tunes a downloaded model; by default, models are trained from scratch.
        quick: use a smaller model and fewer steps, so that the demo takes about a minute.
        overwrite: replace a folder that an earlier demo made.
        seed: seed of the initial weights, the order of the training text, and the sampled completions.

    Raises:
        OSError: `out` is in use or cannot be written, or Python's standard library is not available as source files.
    """
    started, out = time.perf_counter(), Path(out)
    demo: ModuleType = pretraining
    if model is not None:
        from . import smollm2  # needs peft

        demo = smollm2
    with demo_folder(out, overwrite) as folder, quiet_transformers():
        results = demo.run_in(folder, demo.settings_for(quick, seed))
        results["seconds"] = round(time.perf_counter() - started, 1)
        write(results, demo.summary(results), folder)
    print(f"\n{demo.summary(results)}\n\n{results['seconds']:.0f} s in all. {demo.next_steps(out)}")
    return results


@contextmanager
def demo_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `out` when the block succeeds.

    Raises:
        FileExistsError: `out` exists and was not made by a demo, or was and `overwrite` is false.
        OSError: `out` cannot be written.
    """
    out = Path(os.path.abspath(out))
    _check_owner(out)
    with replaced_folder(out, overwrite) as folder:
        (folder / MARKER).write_text("made by attnres demo; --overwrite may replace this folder\n", encoding="utf-8")
        yield folder
        _check_owner(out)  # files may have been put there while the demo ran


def _check_owner(out: Path):
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise FileExistsError(f"{out}: is not empty and was not made by attnres demo; choose another folder with --out")
