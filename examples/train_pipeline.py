"""Trains a model whose decoder layers are spread over the processes of torchrun, with the paper's cross-stage caching.

    torchrun --nproc-per-node 4 examples/train_pipeline.py my-attnres notes.txt --out trained --virtual-stages 2

MODEL is a folder that `attnres convert` or `save_pretrained` wrote, or a plain PreNorm checkpoint, which is converted
without loss; each process reads its own tensors of it. With --replicas 2 on 8 processes two pipelines of 4 train
together; with --replicas 2 --tensor 2 two pipelines of 2 stages, each divided between 2 processes by transformers'
tensor-parallel plan of the family. The result is one folder that `from_pretrained` loads, a shard from each stage.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoTokenizer

import attnres  # noqa: F401  (registers the model)
from attnres.parallel import Pipeline, PipelineError


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint with its tokenizer")
    parser.add_argument("text", metavar="TEXT", help="text file in UTF-8; its last tenth is held out")
    parser.add_argument("--out", default="attnres-pipeline", help="folder of the result (default: %(default)s)")
    parser.add_argument("--replicas", type=int, default=1, help="pipelines side by side (default: %(default)s)")
    parser.add_argument("--tensor", type=int, default=1, help="processes of a pipeline's rank (default: %(default)s)")
    parser.add_argument(
        "--schedule", default="interleaved-1f1b", help="gpipe, 1f1b or interleaved-1f1b (default: %(default)s)"
    )
    parser.add_argument("--virtual-stages", type=int, default=1, help="stages per process (default: %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1, help="sequences in a micro-batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="peak (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument("--checkpointing", action="store_true", help="compute decoder layers again in backward")
    options = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(dist.get_node_local_rank())
    try:
        train(options, "cuda" if on_gpu else "cpu")
    except (ValueError, PipelineError) as error:
        sys.exit(f"train_pipeline.py: {error}")
    dist.destroy_process_group()


def train(options: argparse.Namespace, device: str):
    world = dist.get_world_size()
    if options.replicas < 1 or options.tensor < 1 or world % (options.replicas * options.tensor):
        raise ValueError(
            f"--replicas times --tensor must divide the {world} processes, got {options.replicas} and {options.tensor}"
        )
    # The processes that divide a stage exchange the most: they are neighbours, on one machine where it has so many.
    shape = (options.replicas, world // (options.replicas * options.tensor), options.tensor)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("dp", "pp", "tp"))
    pipeline = Pipeline(
        options.model,
        mesh,
        schedule=options.schedule,
        virtual_stages=options.virtual_stages,
        micro_batches=options.micro_batches,
    )
    if options.checkpointing:
        pipeline.gradient_checkpointing_enable()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows_per_step = options.micro_batches * options.rows
    rows, held_out = sequences(tokenizer, options.text, options.length, rows_per_step * options.replicas)
    mine = rows[mesh.get_local_rank("dp") :: options.replicas]
    held_out = held_out[mesh.get_local_rank("dp") :: options.replicas]

    named = list(pipeline.named_parameters())
    exempt = [p for name, p in named if "norm" in name or p.ndim < 2]  # pseudo-queries and gains are in ..._norm too
    decayed = [p for name, p in named if not ("norm" in name or p.ndim < 2)]
    groups = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=options.learning_rate, weight_decay=options.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps)

    before = pipeline.train(False).evaluate(held_out, held_out)
    pipeline.train()
    for step in range(options.steps):
        first = step * rows_per_step % (len(mine) - rows_per_step + 1)
        batch = mine[first : first + rows_per_step]
        loss = pipeline.step(batch, batch)
        pipeline.clip_grad_norm_(1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if dist.get_rank() == 0 and (step + 1) % max(1, options.steps // 10) == 0:
            print(f"step {step + 1}: loss {loss:.4f}", flush=True)
    after = pipeline.train(False).evaluate(held_out, held_out)

    pipeline.save(options.out)
    if dist.get_rank() == 0:
        tokenizer.save_pretrained(options.out)
        crossed = pipeline.traffic.forward + pipeline.traffic.backward
        print(f"held-out loss: {before:.4f} before, {after:.4f} after {options.steps} steps")
        print(f"sent by the first rank: {crossed / options.steps / 2**20:.2f} MiB per step")
        print(f"saved: {options.out}")


def sequences(tokenizer, path: str, length: int, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out sequences `[rows, length]`, in the order of the text, rows a multiple of a step's."""
    ids = tokenizer(Path(path).read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    rows = ids[: len(ids) // length * length].view(-1, length)
    held_out = max(1, len(rows) // 10 // multiple) * multiple
    if len(rows) - held_out < multiple:
        raise ValueError(
            f"{path}: {len(ids)} tokens make {len(rows)} sequences, {2 * multiple} are needed: a step's for training "
            "and as many held out; choose a smaller --length, --rows or --micro-batches"
        )
    return rows[:-held_out], rows[-held_out:]


if __name__ == "__main__":
    main()
