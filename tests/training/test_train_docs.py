"""Runs the commands of docs/training.md, shortened, in a folder with the files that they name."""

import re
import shlex
from pathlib import Path

import pytest
from tiny_train import loaded, words, write_lines, write_plain

from attnres.cli import main

DOCS = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
SHORT = ["--sequence-length", "16", "--max-steps", "2", "--disable-tqdm", "true"]

# PEFT reads the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def folder_of_a_reader(tmp_path, monkeypatch):
    """A folder with the files of the commands, and local folders instead of the hub ids."""
    monkeypatch.chdir(tmp_path)
    write_plain(tmp_path / "Qwen" / "Qwen3-0.6B", num_hidden_layers=8)
    (tmp_path / "book.txt").write_text(words(400))
    write_lines(tmp_path / "docs.jsonl", [words(50, number) for number in range(5)])
    import datasets

    datasets.Dataset.from_dict({"text": [words(60)]}).to_parquet("more.parquet")
    hub = tmp_path / "Salesforce" / "wikitext" / "wikitext-2-raw-v1"
    hub.mkdir(parents=True)
    for split in ("train", "validation"):
        write_lines(hub / f"{split}.jsonl", [words(200)])
    files = "".join(f"  - split: {split}\n    path: {hub.name}/{split}.jsonl\n" for split in ("train", "validation"))
    card = f"---\nconfigs:\n- config_name: {hub.name}\n  data_files:\n{files}---\n"
    (hub.parent / "README.md").write_text(card)
    (yaml,) = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
    (tmp_path / "run.yaml").write_text(yaml.replace("num_decay_steps: 100", "num_decay_steps: 1"))
    return tmp_path


def test_the_commands_of_the_documentation_run(folder_of_a_reader, capsys):
    ran = []
    for program, *arguments in COMMANDS:
        if program == "attnres":
            short = [*arguments, *SHORT] if arguments[0] == "train" else [*arguments, "--out", "results"]
            short += ["--limit", "1", "--max-length", "200"] if arguments[0] == "eval" else []
            assert main(short) == 0, (arguments, capsys.readouterr().err[-1000:])
            ran.append(arguments[0])
    assert ran.count("train") == 9 and {"eval", "dynamics"} <= set(ran)
    for run in ("a", "lora", "scratch", "yaml", "stream"):
        assert loaded(folder_of_a_reader / "runs" / run)
    assert loaded(folder_of_a_reader / "runs" / "scratch").config.residual_mode == "full"
