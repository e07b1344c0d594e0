"""What test_plan.py has torchrun start: counts what two processes hold and send."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from collectives import counted_step
from families import tiny_config
from helpers import random_tokens
from torch.distributed.tensor import DTensor
from training_cases import use_cpus_as_accelerators
from transformers.distributed import DistributedConfig
from transformers.integrations import moe

from attnres import AttnResConfig, AttnResForCausalLM


def local_bytes(tensors) -> int:
    local = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
    return sum(each.numel() * each.element_size() for each in local)


def fsdp(case: dict) -> dict:
    """FSDP2 as accelerate sets it up."""
    accelerator = Accelerator(
        cpu=True,
        mixed_precision=case["mixed_precision"],
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["AttnResDecoderLayer"],
            reshard_after_forward=True,
        ),
    )
    config = AttnResConfig(backbone_config=tiny_config(case["family"], tie_word_embeddings=case["tied"]))
    model = AttnResForCausalLM(config)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    forward, backward = counted_step(model, random_tokens(1, 8))
    optimizer.step()
    moments = (each for state in optimizer.optimizer.state.values() for each in state.values() if each.ndim)
    return {
        "forward": forward,
        "backward": backward,
        "parameters": local_bytes(model.parameters()),
        "gradients": local_bytes(each.grad for each in model.parameters()),
        "optimizer state": local_bytes(moments),
    }


def experts(case: dict) -> dict:
    """Expert parallelism as transformers sets it up."""
    from transformers.distributed.utils import initialize_distributed_mesh  # not in the oldest transformers

    config = AttnResConfig(backbone_config=tiny_config(case["family"], num_local_experts=6, vocab_size=96))
    distributed = DistributedConfig(tp_size=case["tensor"], fsdp_size=case["data"], ep_size=case["expert"])
    torch.manual_seed(0)
    model = AttnResForCausalLM(config)
    _, mesh = initialize_distributed_mesh(distributed)
    model = AttnResForCausalLM.maybe_distribute_model(model, distributed, mesh)
    forward, backward = counted_step(model, random_tokens(2, 8, vocab_size=96))
    shapes = {name: list(each.to_local().shape) for name, each in model.named_parameters() if ".experts." in name}
    return {"forward": forward, "backward": backward, "experts": shapes}


def main():
    use_cpus_as_accelerators()
    moe._can_use_grouped_mm = lambda *arguments, **options: False  # wants sizes that are multiples of 16 bytes
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    kinds = {"fsdp": fsdp, "experts": experts}
    found = []
    for case in json.loads((folder / "cases.json").read_text()):
        torch.manual_seed(0)
        found.append(kinds[case["kind"]](case))
        AcceleratorState._reset_state(reset_partial_state=True)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
