"""What the 4 ranks of test_pipeline_tensor.py do: 2 pipeline ranks, each divided between 2."""

from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import relative_error, short_config
from pipeline_ranks import TIED, batch_of, gradients_of, in_one_process
from pipeline_ranks import model_of as model_with
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.parallel import Pipeline
from attnres.parallel.tensor import whole

VOCABULARY = {"vocab_size": 98}  # transformers 5.17 divides a head without a remainder only
model_of = partial(model_with, **VOCABULARY)
PIPELINE = {"schedule": "interleaved-1f1b", "virtual_stages": 2, "micro_batches": 4}
BATCH = batch_of(PIPELINE["micro_batches"])


@cache
def mesh():
    return init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp", "pp", "tp"))


def errors_of(pipe: Pipeline, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """The relative error of every gradient of this pipeline rank, gathered."""
    return {
        key: relative_error(whole(gradient), expected[name if name in expected else TIED][rows])
        for key, (name, rows, gradient) in gradients_of(pipe).items()
    }


def equal_on_all(tensors) -> bool:
    """Whether the ranks that divide a stage have the same of what is not divided."""
    mine = torch.cat([tensor.detach().flatten() for tensor in tensors if not isinstance(tensor, DTensor)])
    every = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(every, mine, group=mesh().get_group("tp"))
    return torch.equal(*every)


def step(folder: str, steps: int = 1, **options) -> dict:
    """Training steps beside one process; what was saved after them, too."""
    one, given = model_of(**options), model_of(**options)
    pipe = Pipeline(given, mesh(), **PIPELINE)
    optimisers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (one, pipe)]
    found = {"loss": [], "norm": [], "errors": {}}
    for _ in range(steps):
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss = one(**BATCH, use_cache=False).loss
        loss.backward()
        found["loss"].append(abs(pipe.step(**BATCH) - loss).item() / loss.item())
        found["errors"].update(errors_of(pipe, {name: each.grad for name, each in one.named_parameters()}))
        norm = torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5)
        found["norm"].append(abs(pipe.clip_grad_norm_(0.5) - norm).item() / norm.item())
        found["clipped"] = norm.item() > 0.5
        for optimiser in optimisers:
            optimiser.step()
    parameters = list(pipe.parameters())
    pipe.save(folder)
    dist.barrier()
    experts = {name: option for name, option in options.items() if name == "experts_implementation"}
    saved = AttnResForCausalLM.from_pretrained(folder, dtype=torch.float64, **experts)
    with torch.no_grad():
        found["logits"] = relative_error(saved(BATCH["input_ids"]).logits, one(BATCH["input_ids"]).logits)
    return {
        **found,
        "names": {name for name, _ in one.named_parameters()},
        "divided": sum(isinstance(each, DTensor) for each in parameters),
        "elements": sum((each.to_local() if isinstance(each, DTensor) else each).numel() for each in parameters),
        "memory": sum(whole_storage(each) for each in parameters),
        "gradients alike": equal_on_all(each.grad for each in parameters),
        "parameters alike": equal_on_all(parameters),
        "files": sorted(path.name for path in Path(folder).glob("model-*")),
        "left": [path.name for path in Path(folder).parent.glob(".*")],
    }


def whole_storage(parameter: torch.Tensor) -> int:
    """Elements that a parameter keeps in memory."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.untyped_storage().nbytes() // local.element_size()


def from_folder(folder: str) -> dict:
    """A checkpoint folder beside `from_pretrained` of it."""
    one = AttnResForCausalLM.from_pretrained(folder)
    loss, expected = in_one_process(one, BATCH)
    pipe = Pipeline(folder, mesh(), **PIPELINE)
    found = pipe.step(**BATCH)
    return {"loss": abs(found - loss).item() / loss.item(), "errors": errors_of(pipe, expected)}


def from_scratch(folder: str) -> dict:
    """A model that every rank draws with a seed of its own, saved; routers are not divided."""
    config = AttnResConfig.from_backbone(short_config("mixtral", 5, intermediate_size=64, **VOCABULARY), num_blocks=3)
    torch.manual_seed(dist.get_rank())
    pipe = Pipeline(config, mesh(), **PIPELINE).train(False)
    loss = pipe.evaluate(**BATCH)
    pipe.save(folder)
    dist.barrier()
    one = AttnResForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = one(**BATCH, use_cache=False).loss
    return {"loss": abs(loss - expected).item() / expected.item(), "alike": equal_on_all(pipe.parameters())}


def refusal(wanted: str) -> str:
    """The one line that an argument is refused with."""
    given, ranks = model_of(), mesh()
    if wanted == "heads":
        given = model_of(num_attention_heads=4, num_key_value_heads=1)
    elif wanted == "divided":
        Pipeline(given, ranks, **PIPELINE)
    elif wanted == "dimensions":
        ranks = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    try:
        Pipeline(given, ranks, **PIPELINE)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
