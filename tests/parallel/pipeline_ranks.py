"""What the ranks of test_pipeline_training.py do; each compares its own part with the whole model in one process."""

import copy
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist
from helpers import random_attnres, random_tokens, relative_error, short_config
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.parallel import Pipeline, PipelineError, stage_files

ROWS, TOKENS = 2, 9  # of a micro-batch

TIED = "model.embed_tokens.weight"  # has the gradient of a head that is tied to it

_meshes = {}


def mesh_of(ranks: int):
    """Pipelines of 2 ranks run twice, side by side in the two halves of the process group."""
    world = dist.get_world_size()
    if ranks == world:
        return None
    if ranks not in _meshes:
        _meshes[ranks] = init_device_mesh("cpu", (world // ranks, ranks), mesh_dim_names=("dp", "pp"))
    return _meshes[ranks]["pp"]


def batch_of(micro_batches: int, seed: int = 0, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """Padding on the left of some rows, and different numbers of labels in the micro-batches, one of them with none."""
    input_ids = random_tokens(micro_batches * ROWS, tokens, seed)
    labels, attention_mask = input_ids.clone(), torch.ones_like(input_ids)
    attention_mask[1, :4] = attention_mask[-2, :2] = 0
    labels[attention_mask == 0] = -100
    labels[0, :5] = -100
    labels[-ROWS:] = -100
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def model_of(family="llama", mode="block", per_block=2, layers=7, dtype=torch.float64, **options) -> AttnResForCausalLM:
    options.setdefault("attn_implementation", "sdpa")
    return random_attnres(family, mode, per_block, layers=layers, **options).to(dtype)


@lru_cache
def reference(micro_batches: int, model: tuple) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`in_one_process` for `model_of(**dict(model))` and `batch_of(micro_batches)`."""
    return in_one_process(model_of(**dict(model)), batch_of(micro_batches))


def in_one_process(model: AttnResForCausalLM, *batches: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The last loss and all gradients of the whole model, by the names of its parameters."""
    model = copy.deepcopy(model)
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def gradients_of(pipeline: Pipeline) -> dict[str, tuple[str, slice, torch.Tensor | None]]:
    """Of this rank: the parameter of the whole model, which rows of it, and the gradient."""
    found = {}
    for number, stage in zip(pipeline.stage_numbers, pipeline.stages, strict=True):
        for name, parameter in stage.named_parameters():
            stacked = ".depth_mixer." in name and ".output_norm." not in name
            rows = slice(stage.route.layers.start, stage.route.layers.stop) if stacked else slice(None)
            found[f"{number}.{name}"] = (name, rows, parameter.grad)
    return found


def errors_of(pipeline: Pipeline, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """The relative error of every gradient of this rank; a gradient that is not there is as wrong as zero."""
    errors = {}
    for key, (name, rows, gradient) in gradients_of(pipeline).items():
        wanted = expected[TIED if name not in expected else name]
        if wanted is None:
            errors[key] = float("inf") if gradient is not None and gradient.any() else 0.0
        else:
            gradient = torch.zeros_like(wanted[rows]) if gradient is None else gradient
            errors[key] = relative_error(gradient, wanted[rows])
    return errors


def pipeline_of(model, ranks: int, **options) -> Pipeline:
    return Pipeline(model, mesh_of(ranks), **options)


def step(ranks: int, pipeline: dict, model: dict, checkpointing: dict | None = None, frozen: bool = False) -> dict:
    """One training step beside one process."""
    whole = model_of(**model)
    batch = batch_of(pipeline["micro_batches"])
    loss, expected = reference(pipeline["micro_batches"], tuple(sorted(model.items())))
    if frozen:
        whole.freeze_backbone()
        expected = {name: gradient if ".depth_mixer." in name else None for name, gradient in expected.items()}
    pipe = pipeline_of(whole, ranks, **pipeline)
    if checkpointing is not None:
        pipe.gradient_checkpointing_enable(checkpointing)
        pipe.train()
    pipe_loss = pipe.step(**batch)
    store, traffic = pipe.store, pipe.traffic
    return {
        "loss": abs(pipe_loss - loss).item() / loss.item(),
        "errors": errors_of(pipe, expected),
        "parameters": set(expected),
        "left": (len(store), store.waiting_gradients, store.alive),
        "peaks": (store.peak_stored, store.peak_alive),
        "forward": traffic.forward,
        "forward_sources": traffic.forward_sources,
        "backward": traffic.backward,
        "crossings": dict(traffic.crossings),
        "homes": {source: number % ranks for number, route in enumerate(pipe.routes) for source in route.completed},
    }


def posted_bytes(ranks: int, pipeline: dict, model: dict) -> dict:
    """Bytes that leave this rank, counted where torch posts them, beside what the pipeline counted."""
    posted, post = [], dist.ProcessGroup.send
    original = vars(dist.ProcessGroup)["send"]  # not the same: this one binds

    def send(group, tensors, *arguments, **options):
        posted.append(sum(tensor.nbytes for tensor in tensors if tensor.ndim == 3))  # not the votes of a first step
        return post(group, tensors, *arguments, **options)

    whole = model_of(**model)
    pipe = pipeline_of(whole, ranks, **pipeline)
    dist.ProcessGroup.send = send
    try:
        pipe.step(**batch_of(pipeline["micro_batches"]))
    finally:
        dist.ProcessGroup.send = original
    return {"posted": sum(posted), "counted": pipe.traffic.forward + pipe.traffic.backward}


def several_steps(ranks: int, pipeline: dict, model: dict) -> dict:
    """Steps whose gradients add up, of two shapes, with an evaluation between them."""
    whole = model_of(**model)
    micro_batches = pipeline["micro_batches"]
    batches = [batch_of(micro_batches, 1), batch_of(micro_batches, 2, TOKENS + 4), batch_of(micro_batches, 3)]
    losses = [in_one_process(whole, batch)[0] for batch in batches]
    _, expected = in_one_process(whole, *batches)
    pipe = pipeline_of(whole, ranks, **pipeline)
    steps = [pipe.step(**batches[0]), pipe.evaluate(**batches[1]), pipe.step(**batches[1]), pipe.step(**batches[2])]
    wanted = [losses[0], losses[1], losses[1], losses[2]]
    return {
        "losses": [abs(found - loss).item() / loss.item() for found, loss in zip(steps, wanted, strict=True)],
        "errors": errors_of(pipe, expected),
        "left": (len(pipe.store), pipe.store.waiting_gradients, pipe.store.alive),
    }


def peaks(ranks: int, pipeline: dict, model: dict, numbers: tuple[int, ...]) -> dict:
    """Most blocks alive on this rank by the number of micro-batches."""
    found = {}
    for micro_batches in numbers:
        pipe = pipeline_of(model_of(**model), ranks, micro_batches=micro_batches, **pipeline)
        pipe.step(**batch_of(micro_batches))
        found[micro_batches] = pipe.store.peak_alive, pipe.store.peak_stored
    return found


def replicas(pipeline: dict, model: dict) -> dict:
    """Two replicas, each with its own half of the batch, beside one process with all of it."""
    mesh_of(2)
    mesh = _meshes[2]
    whole = model_of(**model)
    batch = batch_of(2 * pipeline["micro_batches"])
    loss, expected = in_one_process(whole, batch)
    half = len(batch["labels"]) // 2 * mesh.get_local_rank("dp")
    mine = {name: tensor[half : half + len(tensor) // 2] for name, tensor in batch.items()}
    pipe = Pipeline(whole, mesh, **pipeline)
    found = pipe.step(**mine)
    norm = pipe.clip_grad_norm_(1e9)
    one_norm = torch.nn.utils.get_total_norm(expected.values())
    return {
        "loss": abs(found - loss).item() / loss.item(),
        "errors": errors_of(pipe, expected),
        "norm": abs(norm - one_norm).item() / one_norm.item(),
    }


def tied(ranks: int, pipeline: dict, steps: int) -> dict:
    """Training steps with tied embeddings: the two copies, and the loss, stay those of one process."""
    whole = model_of(tie_word_embeddings=True)
    one = copy.deepcopy(whole)
    pipe = pipeline_of(whole, ranks, **pipeline)
    norms, losses = [], []
    optimisers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (one, pipe)]
    for number in range(steps):
        batch = batch_of(pipeline["micro_batches"], number)
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss = one(**batch, use_cache=False).loss
        loss.backward()
        losses.append(abs(pipe.step(**batch) - loss).item() / loss.item())
        norm = torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5)
        norms.append(abs(pipe.clip_grad_norm_(0.5) - norm).item() / norm.item())
        for optimiser in optimisers:
            optimiser.step()
    copies = {name: parameter.detach() for name, parameter in pipe.named_parameters() if parameter.shape[0] == 97}
    embedding = one.model.embed_tokens.weight.detach()
    return {
        "losses": losses,
        "norms": norms,
        "copies": copies,
        "error": max((relative_error(each, embedding) for each in copies.values()), default=0.0),
    }


def from_folder(ranks: int, folder: str, pipeline: dict) -> dict:
    """A checkpoint folder into a pipeline beside `from_pretrained` of it, and the tensors that were read."""
    whole = AttnResForCausalLM.from_pretrained(folder)
    batch = batch_of(pipeline["micro_batches"])
    loss, expected = in_one_process(whole, batch)
    read = []

    @contextmanager
    def noting(*arguments, **options):
        with safe_open(*arguments, **options) as tensors:
            noted = Mock(wraps=tensors)
            noted.get_tensor = lambda name: read.append(name) or tensors.get_tensor(name)
            yield noted

    with patch.object(stage_files, "safe_open", noting):
        pipe = pipeline_of(folder, ranks, **pipeline)
    found = pipe.step(**batch)
    return {
        "loss": abs(found - loss).item() / loss.item(),
        "errors": errors_of(pipe, expected),
        "dtypes": {parameter.dtype for parameter in pipe.parameters()},
        "read": read,
        "training": all(stage.training for stage in pipe.stages),
    }


def save(ranks: int, pipeline: dict, model: dict, folder: str) -> dict:
    """Saves a pipelined model, and once more where that cannot be; each pipeline of 2 ranks has its own folder."""
    target = Path(folder, str(dist.get_rank() // ranks)) if ranks < dist.get_world_size() else Path(folder)
    pipe = pipeline_of(model_of(**model, dtype=torch.float32), ranks, **pipeline)
    pipe.save(target)
    pipe.save(target)  # over what is there
    try:
        pipe.save(target / "config.json" / "below")
    except PipelineError as error:
        return {"refused": str(error)}
    return {}


def from_scratch(ranks: int, pipeline: dict, family: str, folder: str) -> dict:
    """A model that no rank ever holds as a whole, after one step, saved."""
    config = AttnResConfig.from_backbone(short_config(family, 8, tie_word_embeddings=True), num_blocks=3)
    torch.manual_seed(dist.get_rank())
    pipe = pipeline_of(config, ranks, **pipeline)
    loss = pipe.step(**batch_of(pipeline["micro_batches"]))
    norm = pipe.clip_grad_norm_(1.0)
    evaluated = pipe.evaluate(**batch_of(pipeline["micro_batches"]))
    if dist.get_rank() < ranks:
        pipe.save(folder)
    return {
        "loss": loss.item(),
        "evaluated": evaluated.item(),
        "norm": norm.item(),
        "devices": {tensor.device.type for tensor in (*pipe.parameters(), *pipe.stages.buffers())},
    }


def refusal(ranks: int, model: dict, pipeline: dict, batch: dict | None = None, differs: dict | None = None) -> dict:
    """The one line that an argument is refused with."""
    if differs and dist.get_rank() == 1:
        pipeline = {**pipeline, **differs}
    try:
        pipe = pipeline_of(model if isinstance(model, str) else model_of(**model), ranks, **pipeline)
        made = {"input_ids": random_tokens(4, 9), "labels": random_tokens(4, 9)}
        made.update({name: random_tokens(*shape) for name, shape in (batch or {}).items()})
        pipe.step(**made)
    except Exception as error:
        return {"type": type(error).__name__, "line": str(error)}
    return {"type": None, "line": ""}
