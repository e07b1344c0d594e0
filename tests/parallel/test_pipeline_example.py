"""examples/train_pipeline.py: its ranks, and under torchrun, as its first lines say."""

import io
import os
import re
import runpy
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers import short_config
from processes import run_ranks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from attnres import AttnResForCausalLM

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_pipeline.py"
SMALL = ["--length", "16", "--rows", "1", "--micro-batches", "2", "--learning-rate", "1e-2"]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with `plain`, a PreNorm checkpoint with a tokenizer of single bytes, and `text.txt`."""
    folder = tmp_path_factory.mktemp("material")
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece: index for index, piece in enumerate(["<pad>", "<bos>", "<eos>", *characters])}
    raw = Tokenizer(models.BPE(pieces, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = short_config("qwen3", 5, vocab_size=len(pieces), initializer_range=0.1, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "plain")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    tokenizer.save_pretrained(folder / "plain")
    (folder / "text.txt").write_text("Attention over depth: the sublayer reads what came before it. " * 30)
    return folder


def torchrun(ranks: int, *arguments) -> subprocess.CompletedProcess:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen(
        [sys.executable, *command, EXAMPLE, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=150)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def printed(arguments: list[str]) -> str:
    """What the script prints in a rank, which has its process group already."""
    with (
        patch("torch.distributed.init_process_group"),
        patch("torch.distributed.destroy_process_group"),
        patch.object(sys, "argv", [str(EXAMPLE), *arguments]),
        redirect_stdout(io.StringIO()) as output,
    ):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return output.getvalue()


def test_replicas_of_a_pipeline_learn_and_save_a_folder_that_loads_in_one_process(material, tmp_path):
    options = ["--replicas", "2", "--virtual-stages", "2", "--steps", "10", "--checkpointing"]
    paths = [str(material / "plain"), str(material / "text.txt"), "--out", str(tmp_path / "out")]
    first, *others = run_ranks(printed, 4, [*paths, *SMALL, *options])
    assert others == [""] * 3
    before, after = re.search(r"held-out loss: ([\d.]+) before, ([\d.]+) after 10 steps", first).groups()
    assert float(after) < 0.9 * float(before)
    shards = sorted(path.name for path in (tmp_path / "out").glob("model-*.safetensors"))
    assert shards == [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]

    model = AttnResForCausalLM.from_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(material / "plain")
    assert model.depth_mixer.output_norm.query.any()
    assert not torch.equal(model.model.layers[4].mlp.up_proj.weight, plain.model.layers[4].mlp.up_proj.weight)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer((material / "text.txt").read_text(), return_tensors="pt", verbose=False)["input_ids"][0]
    rows = ids[: len(ids) // 16 * 16].view(-1, 16)[-8:]
    assert float(after) == pytest.approx(model(rows, labels=rows).loss.item(), abs=2e-4)


@pytest.mark.slow
def test_a_mistake_is_one_line_of_each_process(material, tmp_path):
    done = torchrun(2, material / "plain", material / "text.txt", *SMALL, "--virtual-stages", "3")
    assert done.returncode != 0 and 'examples/train_pipeline.py", line' not in done.stderr
    assert "train_pipeline.py: num_hidden_layers=5 are fewer than the 6 stages" in done.stderr
