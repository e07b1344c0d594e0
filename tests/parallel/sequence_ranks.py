"""What the four ranks of test_sequence_shards.py do.

Each case is a function below; a rank compares a model whose sequence is sharded with one process, and notes errors.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from families import LINEAR_FAMILIES
from helpers import random_attnres, random_tokens, relative_error
from sequence_shards import LiveStates
from torch.distributed.device_mesh import init_device_mesh
from transformers import DynamicCache
from transformers.distributed import DistributedConfig

from attnres import AttnResForCausalLM
from attnres.parallel import SequenceShards, shard_sequence, unshard_sequence

# Heads and widths that 4 ranks can divide.
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 96, "intermediate_size": 64}
_groups = {}


def group_of(ranks: int) -> dist.ProcessGroup:
    """Groups of 1 or 2 ranks stand side by side in the four."""
    if ranks not in _groups:
        _groups[ranks] = init_device_mesh("cpu", (4 // ranks, ranks), mesh_dim_names=("side", "tp"))
    return _groups[ranks]["tp"].get_group()


def model_of(family: str = "qwen3", mode: str = "block", **options) -> AttnResForCausalLM:
    layers = 4 if family in LINEAR_FAMILIES else 5
    options = {"attn_implementation": "eager", **SIZES, **options}
    return random_attnres(family, mode, layers=layers, **options).double()


def tensor_parallel(folder: Path, model: AttnResForCausalLM) -> AttnResForCausalLM:
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(tp_size=4, tp_plan="auto")
    options = {"attn_implementation": "eager", "dtype": torch.float64, "experts_implementation": "eager"}
    return AttnResForCausalLM.from_pretrained(folder, distributed_config=config, **options)


def whole_cache(cache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@torch.no_grad()
def prefill(folder: Path, family: str, mode: str, tokens: int, how: str) -> dict:
    """A prefill, its cache, what else it returns, and decoding from there on, beside one process."""
    one = model_of(family, mode)
    one.set_experts_implementation("eager")
    if how == "tensor parallel":
        model = tensor_parallel(folder, one)
        shard_sequence(model)
    else:
        model = model_of(family, mode)
        model.set_experts_implementation("eager")
        shard_sequence(model, dist.group.WORLD)
    wishes = {"output_hidden_states": True, "output_depth_weights": mode != "standard"}
    ids = random_tokens(2, tokens, vocab_size=96)
    found, caches = {}, (DynamicCache(config=one.config), DynamicCache(config=one.config))
    theirs, ours = (each(ids, past_key_values=cache) for each, cache in zip((one, model), caches, strict=True))
    found["logits"] = relative_error(ours.logits, theirs.logits)
    if how != "tensor parallel" and family not in LINEAR_FAMILIES:
        found["cache"] = max(map(relative_error, whole_cache(caches[1]), whole_cache(caches[0])))
    step = random_tokens(2, 1, seed=1, vocab_size=96)
    theirs, ours = (each(step, past_key_values=cache) for each, cache in zip((one, model), caches, strict=True))
    found["decoded"] = relative_error(ours.logits, theirs.logits)
    theirs, ours = (each(ids, **wishes) for each in (one, model))
    for name in ("hidden_states", *(["depth_weights"] if wishes["output_depth_weights"] else [])):
        assert len(ours[name]) == len(theirs[name])
        found[name] = max(map(relative_error, ours[name], theirs[name]))
    unshard_sequence(model)
    found["unsharded"] = relative_error(model(ids).logits, one(ids).logits)
    return found


def generated(folder: Path) -> dict:
    """Tokens from padded prompts, whole and in chunks that do not divide evenly."""
    one = model_of()
    model = tensor_parallel(folder, one)
    shard_sequence(model)
    ids = random_tokens(2, 23, vocab_size=96)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    found = {}
    for name, options in (("whole", {}), ("in chunks", {"prefill_chunk_size": 9})):
        options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, **options}
        rows = [each.generate(ids, attention_mask=mask, **options) for each in (one.float(), model.float())]
        found[name] = torch.equal(*rows)
    return found


@torch.no_grad()
def memory(folder: Path, mode: str, ranks: int, tokens: int) -> dict:
    """Bytes of the states that are alive when the last decoder layer is called."""
    model = model_of(mode=mode).float()
    if ranks > 1:
        shard_sequence(model, group_of(ranks))
    states, found = LiveStates(model.config.hidden_size, tokens // ranks), {}
    model.model.layers[-1].register_forward_pre_hook(lambda *_: found.update(bytes=states.bytes()))
    with states:
        # With depth weights sources are separate tensors, as on a GPU: none is there before it is complete.
        model(random_tokens(1, tokens, vocab_size=96), use_cache=False, output_depth_weights=True)
    found["rank"] = dist.get_rank() % ranks
    return found


def division(folder: Path) -> dict:
    """Every token belongs to one rank, in order, and parts differ by one at most."""
    found = {}
    for tokens in (4, 5, 7, 8, 23):
        shards = SequenceShards(dist.group.WORLD, tokens)
        whole = torch.arange(2 * tokens * 3, dtype=torch.float32).view(2, tokens, 3)
        own = shards.own(whole)
        found[str(tokens)] = {
            "back": torch.equal(shards.gather(own), whole),
            "sizes": shards.sizes,
            "own": own.shape[1],
            "bytes": own.untyped_storage().nbytes(),
        }
    return found


def refusals(folder: Path) -> dict:
    model = model_of()
    found = {}
    try:
        shard_sequence(model)
    except ValueError as error:
        found["no group"] = str(error)
    try:
        shard_sequence(torch.nn.Linear(2, 2), dist.group.WORLD)
    except ValueError as error:
        found["another model"] = str(error)
    shard_sequence(model, dist.group.WORLD)
    try:
        model(random_tokens(1, 8, vocab_size=96))
    except RuntimeError as error:
        found["autograd"] = str(error)
    unshard_sequence(model)
    model(random_tokens(1, 8, vocab_size=96))
    return found
