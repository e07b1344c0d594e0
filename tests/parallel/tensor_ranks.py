"""What the two ranks of test_tensor_parallel.py and test_expert_parallel.py do.

Each case is a function below; a rank compares what it has with a whole model that it computes itself, and notes errors.
"""

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from families import FAMILY_OPTIONS, LINEAR_FAMILIES
from helpers import random_attnres, random_tokens, relative_error, short_config
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.distributed.sharding_utils import DtensorShardOperation

from attnres import AttnResForCausalLM, AttnResModel

TP = {"tp_size": 2, "tp_plan": "auto"}
EP = {**TP, "enable_expert_parallel": True}
# In float64 with loops over experts nothing is left of rounding: the norms round to float32 whatever they are given.
EXACT = {"dtype": torch.float64, "attn_implementation": "eager", "experts_implementation": "eager"}
AS_USERS_DO = {"dtype": torch.float32}
# What two ranks and, with floats of 32 bits, grouped matrix products on a CPU can take: multiples of 16 bytes.
SIZES = {"intermediate_size": 64, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
EVEN_EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
TOKENS = random_tokens(2, 11, vocab_size=96)


def save(folder: Path, family: str, mode: str | None, even_experts: bool = False, **options) -> Path:
    """A checkpoint, with `mode=None` of a plain PreNorm model."""
    layers = 4 if family in LINEAR_FAMILIES else 3  # one of softmax attention among them
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        known = {"intermediate_size", *FAMILY_OPTIONS[family]}
        sizes = {name: size for name, size in (SIZES | (EVEN_EXPERTS if even_experts else {})).items() if name in known}
        options = {"vocab_size": 96, "initializer_range": 0.1, **sizes, **options}
        if mode is None:
            model = AutoModelForCausalLM.from_config(short_config(family, layers, **options))
        else:
            model = random_attnres(family, mode, layers=layers, **options)
        model.save_pretrained(folder)
    dist.barrier()
    return folder


def load(folder: Path, parallel: dict | None, loader=AutoModelForCausalLM, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the older ways to ask for expert parallelism
        config = None if parallel is None else DistributedConfig(**parallel)
    return loader.from_pretrained(folder, **({} if config is None else {"distributed_config": config}), **options)


def backward(model, **inputs) -> torch.Tensor:
    """Logits while training; gradients are left in the model."""
    model.zero_grad()
    outputs = model.train()(input_ids=TOKENS, labels=TOKENS, use_cache=False, **inputs)
    outputs.loss.backward()
    model.eval()
    return outputs.logits.detach()


def own_part(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The part of a whole tensor that this rank has of a parameter."""
    return DtensorShardOperation(like).shard_tensor(whole) if isinstance(like, DTensor) else whole


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def experts_of(model) -> list:
    return [each for each in model.modules() if isinstance(getattr(each, "gate_up_proj", None), DTensor)]


def gradient_errors(model, one) -> dict:
    """The relative error of all gradients and of the worst, and what must hold of the gradients of the depth mixer."""
    whole = dict(one.named_parameters())
    worst, sharded, squares, all_squares = ("none", 0.0), 0, 0.0, 0.0
    for name, parameter in model.named_parameters():
        expected = whole[name].grad
        if expected is None or parameter.grad is None:
            assert expected is parameter.grad, f"only one has a gradient: {name}"
            continue
        gradient = parameter.grad
        if isinstance(parameter, DTensor):
            sharded += 1
            if gradient.placements != parameter.placements:  # tied embeddings leave a partial sum
                gradient = gradient.redistribute(placements=parameter.placements)
        difference = local(gradient) - own_part(expected, parameter)
        error = (difference.norm() / expected.norm().clamp_min(1e-30)).item()
        squares, all_squares = squares + difference.square().sum().item(), all_squares + expected.square().sum().item()
        if not error <= worst[1]:
            worst = (name, error)
    return {
        "gradients": (squares / all_squares) ** 0.5,
        "one gradient": worst[1],
        "which": worst[0],
        "sharded": sharded,
        **depth_gradients(model),
    }


def depth_gradients(model) -> dict:
    found = {"depth_equal_on_all_ranks": True, "depth_whole": True, "smallest_depth_gradient": float("inf")}
    for parameter in model.depth_parameters():
        found["depth_whole"] &= not isinstance(parameter, DTensor)
        every = [torch.empty_like(parameter.grad) for _ in range(dist.get_world_size())]
        dist.all_gather(every, parameter.grad)
        found["depth_equal_on_all_ranks"] &= all(torch.equal(every[0], other) for other in every)
        found["smallest_depth_gradient"] = min(found["smallest_depth_gradient"], parameter.grad.norm().item())
    return found


def equal(folder: Path, family: str, mode: str, how: str = "tp", precision: str = "exact") -> dict:
    """Logits with and without autograd, depth weights, and all gradients, against one process."""
    checkpoint = save(folder, family, mode, even_experts=how == "ep")
    loading = EXACT if precision == "exact" else AS_USERS_DO
    one, model = load(checkpoint, None, **loading), load(checkpoint, TP if how == "tp" else EP, **loading)
    found = {}
    with torch.no_grad():
        found["logits"] = relative_error(model(TOKENS).logits, one(TOKENS).logits)
        if mode != "standard":
            ours, theirs = (each(TOKENS, output_depth_weights=True).depth_weights for each in (model, one))
            found["depth_weights"] = max(map(relative_error, ours, theirs))
    found["training_logits"] = relative_error(backward(model), backward(one))
    found["experts_here"] = max((module.gate_up_proj.to_local().shape[0] for module in experts_of(model)), default=0)
    return {**found, **gradient_errors(model, one)}


def plain_checkpoint(folder: Path, family: str) -> dict:
    """The lossless conversion on load, sharded: against the plain model whole, and sharded by transformers alone."""
    checkpoint = save(folder, family, None)
    found = {}
    with torch.no_grad():
        plain = load(checkpoint, None, **EXACT)(TOKENS).logits
        found["plain_sharded"] = relative_error(load(checkpoint, TP, **EXACT)(TOKENS).logits, plain)
        for mode in ("block", "full", "standard"):
            model = load(checkpoint, TP, AttnResForCausalLM, residual_mode=mode, **EXACT)
            found[mode] = relative_error(model(TOKENS).logits, plain)
    return found


def saved(folder: Path, family: str, how: str = "tp") -> dict:
    """A sharded model saves the tensors it was loaded from, under the same names, for one process to load."""
    checkpoint = save(folder / "whole", family, "block", even_experts=how == "ep")
    again = folder / "again"
    load(checkpoint, TP if how == "tp" else EP, **AS_USERS_DO).save_pretrained(again)
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, again))
    with torch.no_grad():
        one, other = (load(path, None, **EXACT)(TOKENS).logits for path in (checkpoint, again))
    return {
        "names": sorted(before.keys() ^ after.keys()),
        "same_tensors": all(torch.equal(tensor, after[name]) for name, tensor in before.items()),
        "logits": relative_error(other, one),
        "config_mentions_the_devices": "distributed_config" in (again / "config.json").read_text(),
    }


def generated(folder: Path, family: str) -> dict:
    """Tokens from a padded batch: greedy with the default and with a static cache, in chunks, and sampled."""
    checkpoint = save(folder, family, "block")
    one, model = load(checkpoint, None, **AS_USERS_DO), load(checkpoint, TP, **AS_USERS_DO)
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    ways = {
        "greedy": {"do_sample": False},
        "static": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
        "chunked": {"do_sample": False, "prefill_chunk_size": 4},
        "sampled": {"do_sample": True},
    }
    if family == "kimi_linear":
        del ways["chunked"], ways["static"]  # a linear attention's state has neither
    found = {}
    for way, options in ways.items():
        rows = []
        for each in (one, model):
            torch.manual_seed(1)
            rows.append(each.generate(TOKENS, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, **options))
        found[way] = torch.equal(*rows)
    return found


def trained(folder: Path, family: str) -> dict:
    """Steps of AdamW, with and without activation checkpointing; the depth mixer stays the same on all ranks."""
    checkpoint = save(folder, family, "block")
    found = {}
    for checkpointing in (False, True):
        models = load(checkpoint, None, **EXACT), load(checkpoint, TP, **EXACT)
        for model in models:
            if checkpointing:
                model.gradient_checkpointing_enable()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
            for _ in range(3):
                backward(model)
                optimizer.step()
        one, model = models
        whole = dict(one.named_parameters())
        errors = [
            relative_error(local(parameter.detach()), own_part(whole[name].detach(), parameter))
            for name, parameter in model.named_parameters()
        ]
        found[f"parameters{', checkpointed' * checkpointing}"] = max(errors)
        depth = torch.cat([parameter.detach().flatten() for parameter in model.depth_parameters()])
        every = [torch.empty_like(depth) for _ in range(2)]
        dist.all_gather(every, depth)
        found[f"same depth mixer{', checkpointed' * checkpointing}"] = torch.equal(*every)
    return found


def outputs(folder: Path) -> dict:
    """What else a model returns, and the ways to ask for tensor parallelism."""
    checkpoint = save(folder, "mixtral", "block")
    wishes = {"output_hidden_states": True, "output_router_logits": True, "output_attentions": True}
    one, model = load(checkpoint, None, **EXACT), load(checkpoint, TP, **EXACT)
    found = {}
    with torch.no_grad():
        theirs, ours = (each(TOKENS, labels=TOKENS, **wishes) for each in (one, model))
        for name in ("hidden_states", "router_logits"):
            found[name] = max(map(relative_error, ours[name], theirs[name]))
        found["aux_loss"] = relative_error(ours.aux_loss, theirs.aux_loss)
        found["loss"] = relative_error(ours.loss, theirs.loss)
        base = load(checkpoint, TP, AttnResModel, **EXACT)
        whole = load(checkpoint, None, AttnResModel, **EXACT)(TOKENS).last_hidden_state
        found["base_model"] = relative_error(base(TOKENS).last_hidden_state, whole)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            model = AutoModelForCausalLM.from_pretrained(checkpoint, tp_plan="auto")
        found["tp_plan_argument"] = relative_error(model(TOKENS).logits, load(checkpoint, None)(TOKENS).logits)
    weight = model.model.layers[0].self_attn.q_proj.weight
    found["rows_of_a_query_projection"] = weight.to_local().shape[0]
    found["depth_mixer_is_whole"] = not any(isinstance(each, DTensor) for each in model.depth_parameters())
    found["plan"] = model.tp_plan
    return found


def refusal(folder: Path, parallel: dict, family: str = "llama", **options) -> str | None:
    checkpoint = save(folder, family, "block", **options)
    try:
        load(checkpoint, parallel, AttnResForCausalLM)
    except (ValueError, RuntimeError) as error:
        return str(error)


def refusals(folder: Path) -> dict:
    """The messages of what cannot be."""
    found = {
        "key heads": refusal(folder / "keys", TP, num_key_value_heads=1),
        "heads of latent attention": refusal(
            folder / "latent", TP, family="deepseek_v2", num_attention_heads=5, num_key_value_heads=5
        ),
        "pipeline": refusal(folder / "pipeline", {"pp_size": 2}),
        "world": refusal(folder / "world", {"tp_size": 3}),
    }
    sharded = load(save(folder / "sharded", "llama", None), TP)
    try:
        AttnResForCausalLM.from_backbone(sharded)
    except ValueError as error:
        found["from_backbone"] = str(error)
    return found


def expert_refusals(folder: Path) -> dict:
    return {
        "experts": refusal(folder / "uneven", EP, family="mixtral"),
        "no experts": refusal(folder / "dense", EP),
    }
