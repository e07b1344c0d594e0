"""The card's usage snippets, and a run of them in a process without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

# Runs the snippets from stdin, blocks imports of this package, and checks that the folder's own code ran.
RUNNER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "attnres":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
names = {"__name__": "__main__"}
exec(compile(sys.stdin.read(), "usage", "exec"), names)
assert type(names["model"]).__module__.startswith("transformers_modules."), "the folder's own code was not used"
assert names["output"].shape[-1] > names["inputs"]["input_ids"].shape[-1], "generate() added no token"
"""
GENERATE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)

inputs = tokenizer("The residual stream of a transformer", return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
DEPTH_WEIGHTS = """\
import torch

with torch.no_grad():
    depth_weights = model(**inputs, output_depth_weights=True).depth_weights

# Attention, MLP, attention, MLP, ..., output: [batch, tokens, sources] each, and every row sums to 1.
for sublayer, weights in enumerate(depth_weights):
    print(sublayer, [round(weight, 3) for weight in weights.mean((0, 1)).tolist()])
"""


def snippets(name: str, has_depth_mixer: bool) -> dict[str, str]:
    """Returns the code of the snippets by title; they run one after the other and load the model by `name`."""
    found = {"Generate": GENERATE.format(name=json.dumps(name, ensure_ascii=False))}
    return found | {"Look at the depth weights": DEPTH_WEIGHTS} if has_depth_mixer else found


def run(code: dict[str, str], folder: Path, name: str) -> None:
    """Runs the snippets on a folder, which they load by `name`, offline and without this package.

    Raises:
        ValueError: a snippet failed; the message ends with the last line of Python's output.
    """
    with TemporaryDirectory(prefix="attnres-card-") as temporary:
        place = Path(temporary) / "run" / name
        place.parent.mkdir(parents=True)
        place.symlink_to(folder.resolve(), target_is_directory=True)
        tokens = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        environment = {key: value for key, value in os.environ.items() if key not in tokens} | {
            "HF_HOME": f"{temporary}/home",  # neither the user's cache nor a stored token is visible
            "HF_MODULES_CACHE": f"{temporary}/modules",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUTF8": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            [sys.executable, "-c", RUNNER],
            input="\n".join(code.values()),
            cwd=Path(temporary) / "run",
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ValueError(f"the card's usage snippets fail on the new folder ({lines[-1].strip()[:300]}).")
