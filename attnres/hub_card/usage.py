"""The card's usage snippets, and running them in a process without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

PROMPT = "The residual stream of a transformer"
NEW_TOKENS = 20

# Runs the snippets from stdin in a process that cannot import this package, and checks that the folder's own code ran.
_RUNNER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "attnres":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
names = {"__name__": "__main__"}
exec(compile(sys.stdin.read(), "usage", "exec"), names)
assert type(names["model"]).__module__.startswith("transformers_modules."), "the model is not of the folder's own code"
assert names["output"].shape[-1] > names["inputs"]["input_ids"].shape[-1], "generate() added no token"
"""


def snippets(name: str, has_depth_mixer: bool) -> dict[str, str]:
    """Title and code of the snippets, to be run one after the other.

    Args:
        name: what `from_pretrained` is given: a hub id or a folder.
        has_depth_mixer: whether the model mixes over depth.
    """
    found = {
        "Generate": f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {json.dumps(name, ensure_ascii=False)}
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)

inputs = tokenizer("{PROMPT}", return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens={NEW_TOKENS})
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
    }
    if has_depth_mixer:
        found["Look at the depth weights"] = """\
import torch

with torch.no_grad():
    depth_weights = model(**inputs, output_depth_weights=True).depth_weights

# Attention, MLP, attention, MLP, ..., output: [batch, tokens, sources] each, and every row sums to 1.
for sublayer, weights in enumerate(depth_weights):
    print(sublayer, [round(weight, 3) for weight in weights.mean((0, 1)).tolist()])
"""
    return found


def run(code: dict[str, str], folder: Path, name: str) -> None:
    """Runs the snippets on a folder, offline and without this package.

    Args:
        code: by title.
        folder: that `name` in the code stands for.
        name: hub id or folder name.

    Raises:
        ValueError: they fail, with the last line of what Python says.
    """
    with TemporaryDirectory(prefix="attnres-card-") as temporary:
        place = Path(temporary) / "run" / name
        place.parent.mkdir(parents=True)
        place.symlink_to(folder.resolve(), target_is_directory=True)
        # A home of its own for what the hub's library keeps: neither a cache nor a token of the user's is seen.
        home = {"HF_HOME": f"{temporary}/home", "HF_MODULES_CACHE": f"{temporary}/modules"}
        environment = {
            **{key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")},
            **home,
            "HF_HUB_OFFLINE": "1",
            "PYTHONUTF8": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            [sys.executable, "-c", _RUNNER],
            input="\n".join(code.values()),
            cwd=Path(temporary) / "run",
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    if done.returncode != 0:
        reason = next(
            (line for line in reversed(done.stderr.splitlines()) if line.strip()), f"status {done.returncode}"
        )
        raise ValueError(f"the card's usage snippets fail on the new folder ({reason.strip()[:300]}).")
