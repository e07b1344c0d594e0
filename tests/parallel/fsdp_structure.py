"""What transformers' own FSDP2 wraps of a plain model and of its conversion; every rank prints one line of JSON.

torchrun --nproc-per-node 2 fsdp_structure.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import attnres  # noqa: F401


def wrapped(folder: Path) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    names = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    return {"modules": names, "class": type(model).__name__, "name": model._get_name(), "plan": model.fsdp_plan}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    print(json.dumps({path.name: wrapped(path) for path in sorted(Path(sys.argv[1]).iterdir())}), flush=True)
    dist.destroy_process_group()
