"""What the tests of cards share: a tiny AttnRes checkpoint, and a process that cannot import this package."""

import os
import subprocess
import sys
from pathlib import Path

from helpers import random_attnres
from tiny_eval import byte_tokenizer

BLOCK = """\
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "attnres":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
"""


def save_checkpoint(folder: Path, residual_mode: str = "block", family: str = "qwen3_moe", seed: int = 0) -> Path:
    """A folder with weights, configuration and tokenizer: no code, no card."""
    model = random_attnres(family, residual_mode, seed=seed, vocab_size=257, max_position_embeddings=3000)
    model.save_pretrained(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    byte_tokenizer(eos_token="<end>").save_pretrained(folder)
    return folder


def run_elsewhere(arguments: list[str], place: Path) -> subprocess.CompletedProcess:
    """Runs Python in an empty folder, offline, where nobody can import this package."""
    (place / "site").mkdir()
    (place / "site" / "sitecustomize.py").write_text(BLOCK)
    names = ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "TMPDIR")
    environment = {name: os.environ[name] for name in names if name in os.environ} | {
        "HOME": str(place / "home"),
        "HF_HOME": str(place / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONPATH": str(place / "site"),
    }
    (place / "empty").mkdir()
    return subprocess.run(
        [sys.executable, *arguments], cwd=place / "empty", env=environment, capture_output=True, text=True
    )
