"""The timed workloads, with a sample for every variant. Shapes: B batch, T tokens, D hidden size."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel, StaticCache

from .arms import PLAIN, random_ids
from .settings import Settings
from .timing import Sample

RECOMPILATIONS = 64  # torch gives up after 8 of one function, which all variants share

Models = Mapping[str, PreTrainedModel]


@dataclass(frozen=True)
class Workload:
    """A workload to time, with a sample for every variant."""

    name: str  # in the results
    parameters: dict[str, int]  # sizes that distinguish it from others of its name, such as `batch` and `tokens`
    samples: dict[str, Sample]
    steps: int = 1  # units of work in one run; times are given per unit


def prefill(models: Models, settings: Settings) -> Iterator[Workload]:
    for tokens in settings.tokens:
        ids = random_ids(models[PLAIN], 1, tokens, settings.seed)
        samples = {name: Sample(partial(run_prefill, model, ids)) for name, model in models.items()}
        yield Workload("prefill", {"batch": 1, "tokens": tokens}, samples)


def decode(models: Models, settings: Settings) -> Iterator[Workload]:
    for batch in settings.batches:
        ids = random_ids(models[PLAIN], batch, settings.context, settings.seed)
        with torch.no_grad():
            # All variants use copies of one cache, because its content does not affect the time.
            cache = models[PLAIN](input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        run = partial(_decode, token=ids[:, :1], steps=settings.new_tokens)
        samples = {name: Sample(partial(run, model), partial(copy.deepcopy, cache)) for name, model in models.items()}
        yield Workload("decode", _decode_parameters(batch, settings), samples, steps=settings.new_tokens)


def compiled_decode(models: Models, settings: Settings) -> Iterator[Workload]:
    mode = "reduce-overhead" if models[PLAIN].device.type == "cuda" else "default"  # reduce-overhead: CUDA graphs
    for batch in settings.batches:
        ids = random_ids(models[PLAIN], batch, settings.context, settings.seed)
        torch.compiler.reset()  # code compiled for other sizes counts towards the limit of recompilations
        samples = {}
        for name, model in models.items():
            # Compiled code is tied to its cache: each model has one, and every run continues from the same context.
            cache = StaticCache(config=model.config, max_cache_len=settings.context + settings.new_tokens)
            with torch.no_grad():
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            compiled = torch.compile(model, dynamic=False, mode=mode)
            run = partial(_decode_compiled, compiled, cache, token=ids[:, :1], steps=settings.new_tokens)
            samples[name] = Sample(run, partial(_rewind, cache, settings.context))
        yield Workload("compiled-decode", _decode_parameters(batch, settings), samples, steps=settings.new_tokens)


def train(models: Models, settings: Settings) -> Iterator[Workload]:
    for tokens in settings.tokens:
        ids = random_ids(models[PLAIN], 1, tokens, settings.seed)
        samples = {
            name: Sample(partial(run_train_step, model, ids), model.train, partial(end_training, model))
            for name, model in models.items()
        }
        yield Workload("train", {"batch": 1, "tokens": tokens}, samples)


def generate(models: Models, settings: Settings) -> Iterator[Workload]:
    ids = random_ids(models[PLAIN], 1, settings.context, settings.seed)
    samples = {name: Sample(partial(_generate, model, ids, settings.new_tokens)) for name, model in models.items()}
    yield Workload("generate", _decode_parameters(1, settings), samples)


# In the order of measurement. The measures "memory" and "depth" are not workloads of the whole model.
WORKLOADS: dict[str, Callable[[Models, Settings], Iterator[Workload]]] = {
    "prefill": prefill,
    "decode": decode,
    "compiled-decode": compiled_decode,
    "train": train,
    "generate": generate,
}


def depth_alone(models: Models, settings: Settings) -> Iterator[Workload]:
    """Yields forward, and forward with backward, of models that `hollow` has reduced to their residual path."""
    shape, plain = settings.depth_shape, models[PLAIN]
    generator = torch.Generator().manual_seed(settings.seed)
    embedding = torch.randn(1, shape.tokens, shape.hidden_size, generator=generator)
    embedding = embedding.to(plain.device, plain.dtype)
    parameters = {
        "batch": 1,
        "tokens": shape.tokens,
        "sublayers": shape.sublayers,
        "sublayers_per_block": shape.sublayers_per_block,
        "hidden_size": shape.hidden_size,
    }
    samples = {name: Sample(partial(_depth_forward, model, embedding)) for name, model in models.items()}
    yield Workload("depth forward", parameters, samples)
    samples = {
        name: Sample(partial(_depth_step, model, embedding), model.train, partial(end_training, model))
        for name, model in models.items()
    }
    yield Workload("depth forward+backward", parameters, samples)


def hollow(model: PreTrainedModel):
    """Replaces all sublayers and norms of a Qwen3-like model by the identity, which leaves only the residual path."""
    for layer in model.model.layers:
        layer.self_attn = _IdentityAttention(model.device)
        layer.mlp = layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()


class _IdentityAttention(nn.Module):
    def __init__(self, device: torch.device):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, device=device))  # the model looks up a layer's device by a parameter

    def forward(self, hidden_states: torch.Tensor, **_) -> tuple[torch.Tensor, None]:
        return hidden_states, None


def loss_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Returns the training loss on `[B, T]` token ids."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


# What samples run. The last positional argument is the result of `Sample.prepare`.


@torch.no_grad()
def run_prefill(model, ids, _=None):
    model(input_ids=ids, use_cache=True, logits_to_keep=1)


def run_train_step(model, ids, _=None):
    loss_of(model, ids).backward()


def end_training(model):
    model.zero_grad(set_to_none=True)
    model.eval()


@torch.no_grad()
def _decode(model, cache, token, steps: int):
    for _ in range(steps):
        model(input_ids=token, past_key_values=cache, use_cache=True)


def _decode_compiled(model, cache, _, token, steps: int):
    with torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS):
        _decode(model, cache, token, steps)


def _rewind(cache, length: int):
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def _generate(model, ids, new_tokens: int, _):
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )


@torch.no_grad()
def _depth_forward(model, embedding, _):
    model.model(inputs_embeds=embedding, use_cache=False)


def _depth_step(model, embedding, _):
    leaf = embedding.detach().requires_grad_()
    model.model(inputs_embeds=leaf, use_cache=False).last_hidden_state.backward(embedding)


def _decode_parameters(batch: int, settings: Settings) -> dict[str, int]:
    return {"batch": batch, "context": settings.context, "new_tokens": settings.new_tokens}
