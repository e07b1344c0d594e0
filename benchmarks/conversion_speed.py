"""Throughput and peak memory of `attnres convert` beside `cp -r`, on a synthetic checkpoint.

    python benchmarks/conversion_speed.py --gigabytes 8 --rounds 3 --folder /tmp

Interleaved, medians of ratios: the machine's state is shared by both. Memory is the peak resident set of the process,
above that of `attnres --help`.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.utils import logging

from attnres.conversion.layouts import depth_names

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 8192, 32000
SHARD_BYTES = 2**30


def make_checkpoint(folder: Path, gigabytes: float):
    """A sharded bfloat16 Llama checkpoint of about this size, with random content that no file system compresses."""
    matrices = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, HIDDEN), "v": (HIDDEN, HIDDEN), "o": (HIDDEN, HIDDEN)}
    layer_bytes = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / layer_bytes))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=16,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": shape for name, shape in matrices.items()}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {f"{prefix}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (HIDDEN,)
    shards, size = [{}], 0
    for name, shape in shapes.items():
        if size > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * torch.Size(shape).numel()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.randint(0, 2**15, shape, dtype=torch.int16) for name, shape in shard.items()}
        save_file({name: tensor.view(torch.bfloat16) for name, tensor in tensors.items()}, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return layers


def run(*command) -> tuple[float, float]:
    """Wall-clock seconds and peak resident megabytes of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0.0
    # Not getrusage: its maximum also counts this process, as it was when it forked.
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")))
        except (OSError, TypeError):  # it has just ended
            break
        time.sleep(0.01)
    if process.wait():
        raise SystemExit(f"{command} failed with status {process.returncode}")
    return time.perf_counter() - start, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the checkpoint (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved runs (default: %(default)s)")
    parser.add_argument("--folder", help="where to work; needs three times the size (default: the system's)")
    options = parser.parse_args()
    logging.set_verbosity_error()
    attnres = [sys.executable, "-m", "attnres"]
    with TemporaryDirectory(dir=options.folder) as work:
        work = Path(work)
        source = work / "source"
        source.mkdir()
        layers = make_checkpoint(source, options.gigabytes)
        size = sum(path.stat().st_size for path in source.iterdir())
        print(f"{size / 1e9:.2f} GB, {layers} decoder layers, {len(depth_names(layers))} depth tensors to add")
        ways = {
            "cp -r": ["cp", "-r", "--reflink=auto", source, work / "result"],
            "convert": [*attnres, "convert", source, work / "result", "--verify", "none"],
            "convert --link": [*attnres, "convert", source, work / "result", "--verify", "none", "--link"],
        }
        _, help_memory = run(*attnres, "--help")
        seconds, memory = {way: [] for way in ways}, dict.fromkeys(ways, 0.0)
        for _ in range(options.rounds):
            for way, command in ways.items():
                elapsed, peak = run(*command)
                shutil.rmtree(work / "result")
                seconds[way].append(elapsed)
                memory[way] = max(memory[way], peak)
        for way in ways:
            ratio = statistics.median(a / b for a, b in zip(seconds[way], seconds["cp -r"], strict=True))
            print(
                f"{way:<15} {statistics.median(seconds[way]):7.1f} s  {ratio:5.2f} x cp -r  "
                f"{memory[way] - help_memory:+7.0f} MB above attnres --help ({help_memory:.0f} MB)"
            )


if __name__ == "__main__":
    main()
