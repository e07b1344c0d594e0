"""Counts the memory of the sources in a prefill whose sequence is sharded over tensor-parallel gloo processes.

    python benchmarks/sequence_shards.py --ranks 1,2,4

A weak reference follows every storage that the forward pass allocates. When the last decoder layer is called, all
storages of states (tensors with last dimension D) that are still alive are counted. They should be the n sources: the
complete ones and the partial sum. One rank runs the same model without shards.
"""

import argparse
import json
import tempfile
import time

import torch
import torch.distributed as dist
from processes import run_ranks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.parallel import shard_sequence


def is_plain(value) -> bool:
    return type(value) is torch.Tensor or type(value) is torch.nn.Parameter


class LiveStates(TorchDispatchMode):
    """Follows the storages of tensors `[..., D]` with at least `rows` rows that are allocated under this mode."""

    def __init__(self, hidden_size: int, rows: int):
        super().__init__()
        self.width, self.smallest = (hidden_size,), rows * hidden_size
        self._storages: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if is_plain(tensor)}
        for tensor in tree_leaves(result):
            if is_plain(tensor) and tensor.shape[-1:] == self.width and tensor.numel() >= self.smallest:
                storage = tensor.untyped_storage()
                if storage._cdata not in given:  # not a view of an input, such as a parameter
                    self._storages.append((StorageWeakRef(storage), storage.nbytes()))
        return result

    def bytes(self) -> int:
        """Returns the size of all storages that are still alive, also of those with small views only."""
        time.sleep(0.2)  # gloo's threads release what they have sent a moment after it has arrived
        return sum(size for reference, size in self._storages if not reference.expired())


@torch.no_grad()
def measure(folder: str, tokens: int, batch: int) -> dict:
    """Returns this rank's bytes of live states at the last decoder layer, and the expected numbers."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ranks = dist.get_world_size()
    options = {"distributed_config": DistributedConfig(tp_size=ranks, tp_plan="auto")} if ranks > 1 else {}
    model = AttnResForCausalLM.from_pretrained(folder, **options)
    if ranks > 1:
        shard_sequence(model)
    config = model.config
    states = LiveStates(config.hidden_size, batch * (tokens // ranks))
    found = {}
    first_call = model.model.layers[-1].register_forward_pre_hook(lambda *_: found.update(states=states.bytes()))
    input_ids = torch.randint(3, config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
    with states:
        model(input_ids, use_cache=False, logits_to_keep=1)
    first_call.remove()
    own = model.model.sequence_shards(tokens).sizes[dist.get_rank()] if ranks > 1 else tokens
    layers, per_block = config.num_hidden_layers, config.layers_per_block
    if config.residual_mode == "full":
        sources = 2 * layers - 1
    else:
        sources = 1 + (layers - 1) // per_block + ((layers - 1) % per_block > 0)
    return {"tokens": own, "sources": sources, "bytes": found["states"], "of_one": batch * own * config.hidden_size * 4}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,4", help="numbers of processes (default: 1,2,4)")
    parser.add_argument("--tokens", type=int, default=4096, help="T, of the prompt (default: 4096)")
    parser.add_argument("--batch", type=int, default=1, help="prompts (default: 1)")
    parser.add_argument("--hidden-size", type=int, default=128, help="D (default: 128)")
    parser.add_argument("--layers", type=int, default=16, help="decoder layers (default: 16)")
    parser.add_argument("--num-blocks", type=int, default=8, help="blocks in block mode (default: 8)")
    parser.add_argument("--json", action="store_true", help="every rank's figures instead of the table")
    given = parser.parse_args()
    logging.disable_progress_bar()
    backbone = AutoConfig.for_model(
        "qwen3",
        vocab_size=512,
        hidden_size=given.hidden_size,
        intermediate_size=2 * given.hidden_size,
        num_hidden_layers=given.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=given.hidden_size // 4,
    )
    found = []
    if not given.json:
        print("| mode | ranks | tokens per rank | n | counted, MB | n * T / P * D * 4 bytes, MB | counted / expected |")
        print("|---|---|---|---|---|---|---|")
    for mode in ("block", "full"):
        with tempfile.TemporaryDirectory() as folder:
            config = AttnResConfig.from_backbone(backbone, residual_mode=mode, num_blocks=given.num_blocks)
            AttnResForCausalLM(config).save_pretrained(folder)
            for ranks in map(int, given.ranks.split(",")):
                rows = run_ranks(measure, ranks, folder, given.tokens, given.batch)
                found += [{"mode": mode, "ranks": ranks, "rank": rank, **row} for rank, row in enumerate(rows)]
                most = max(rows, key=lambda row: row["bytes"])
                expected = most["sources"] * most["of_one"]
                if not given.json:
                    print(
                        f"| {mode} | {ranks} | {most['tokens']} | {most['sources']} | {most['bytes'] / 1e6:.2f} "
                        f"| {expected / 1e6:.2f} | {most['bytes'] / expected:.3f} |",
                        flush=True,
                    )
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
