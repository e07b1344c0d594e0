"""Workloads that are timed, as samples for every variant. Shapes: B batch, T tokens, D hidden size."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel, StaticCache

from .arms import PLAIN
from .settings import Settings
from .timing import Sample

RECOMPILATIONS = 64  # torch gives up after 8 of one function, which all variants share

Models = Mapping[str, PreTrainedModel]


@dataclass(frozen=True)
class Workload:
    """Something to time.

    Attributes:
        name: shown in the results.
        parameters: `batch`, `tokens` and what else tells it from others of that name.
        samples: per variant.
        steps: pieces of work in one run; times are given per piece.
    """

    name: str
    parameters: dict[str, int]
    samples: dict[str, Sample]
    steps: int = 1


def prefill(models: Models, settings: Settings) -> Iterator[Workload]:
    for tokens in settings.tokens:
        ids = random_ids(models[PLAIN], 1, tokens, settings.seed)
        yield Workload(
            "prefill",
            {"batch": 1, "tokens": tokens},
            {name: Sample(_prefill_of(model, ids)) for name, model in models.items()},
        )


def decode(models: Models, settings: Settings) -> Iterator[Workload]:
    for batch in settings.batches:
        ids = random_ids(models[PLAIN], batch, settings.context, settings.seed)
        with torch.no_grad():
            # One cache for all: what it holds does not matter to the time. A copy for each run works for every kind.
            cache = models[PLAIN](input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        yield Workload(
            "decode",
            {"batch": batch, "context": settings.context, "new_tokens": settings.new_tokens},
            {
                name: Sample(_decode_of(model, ids[:, :1], settings.new_tokens), partial(copy.deepcopy, cache))
                for name, model in models.items()
            },
            steps=settings.new_tokens,
        )


def compiled_decode(models: Models, settings: Settings) -> Iterator[Workload]:
    mode = "reduce-overhead" if models[PLAIN].device.type == "cuda" else "default"  # reduce-overhead: CUDA graphs
    for batch in settings.batches:
        ids = random_ids(models[PLAIN], batch, settings.context, settings.seed)
        torch.compiler.reset()  # what was compiled for other sizes counts towards the limit of recompilations
        samples = {}
        for name, model in models.items():
            # Compiled code holds on to its cache: each model has one, and every run goes on after the same context.
            cache = StaticCache(config=model.config, max_cache_len=settings.context + settings.new_tokens)
            with torch.no_grad():
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            compiled = torch.compile(model, dynamic=False, mode=mode)
            run = _decode_of(compiled, ids[:, :1], settings.new_tokens)
            samples[name] = Sample(partial(_with, run, cache), partial(_rewind, cache, settings.context))
        yield Workload(
            "compiled-decode",
            {"batch": batch, "context": settings.context, "new_tokens": settings.new_tokens},
            samples,
            steps=settings.new_tokens,
        )


def train(models: Models, settings: Settings) -> Iterator[Workload]:
    for tokens in settings.tokens:
        ids = random_ids(models[PLAIN], 1, tokens, settings.seed)
        yield Workload(
            "train",
            {"batch": 1, "tokens": tokens},
            {
                name: Sample(_train_step_of(model, ids), model.train, partial(_after_training, model))
                for name, model in models.items()
            },
        )


def generate(models: Models, settings: Settings) -> Iterator[Workload]:
    ids = random_ids(models[PLAIN], 1, settings.context, settings.seed)
    yield Workload(
        "generate",
        {"batch": 1, "context": settings.context, "new_tokens": settings.new_tokens},
        {name: Sample(_generate_of(model, ids, settings.new_tokens)) for name, model in models.items()},
    )


# In the order in which they are measured. "memory" and "depth" of the settings are no workloads of the whole model.
WORKLOADS: dict[str, Callable[[Models, Settings], Iterator[Workload]]] = {
    "prefill": prefill,
    "decode": decode,
    "compiled-decode": compiled_decode,
    "train": train,
    "generate": generate,
}


def depth_alone(models: Models, settings: Settings) -> Iterator[Workload]:
    """Forward, and forward with backward, of models that `hollow` has left nothing but their residual path."""
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

    def forward_of(model):
        def run(_):
            with torch.no_grad():
                model.model(inputs_embeds=embedding, use_cache=False)

        return run

    def both_of(model):
        def run(_):
            leaf = embedding.detach().requires_grad_()
            hidden_states = model.model(inputs_embeds=leaf, use_cache=False).last_hidden_state
            hidden_states.backward(embedding)

        return run

    yield Workload("depth forward", parameters, {name: Sample(forward_of(model)) for name, model in models.items()})
    yield Workload(
        "depth forward+backward",
        parameters,
        {name: Sample(both_of(model), model.train, partial(_after_training, model)) for name, model in models.items()},
    )


def hollow(model: PreTrainedModel):
    """Replaces all sublayers and norms of a Qwen3-like model by the identity, so that the residual path is left."""
    for layer in model.model.layers:
        layer.self_attn = _IdentityAttention(model.device)
        layer.mlp = layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()


class _IdentityAttention(nn.Module):
    def __init__(self, device: torch.device):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, device=device))  # a layer is where its parameters are

    def forward(self, hidden_states: torch.Tensor, **_) -> tuple[torch.Tensor, None]:
        return hidden_states, None


def random_ids(model: PreTrainedModel, batch: int, tokens: int, seed: int) -> torch.Tensor:
    """`[batch, tokens]` token ids on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


def loss_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The training loss on `[B, T]` token ids."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def _prefill_of(model, ids):
    def run(_):
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return run


def _decode_of(model, token, steps: int):
    def run(cache):
        with torch.no_grad():
            for _ in range(steps):
                model(input_ids=token, past_key_values=cache, use_cache=True)

    return run


def _with(run, cache, _):
    with torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS):
        run(cache)


def _rewind(cache, length: int):
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def _train_step_of(model, ids):
    def run(_):
        loss_of(model, ids).backward()

    return run


def _after_training(model):
    model.zero_grad(set_to_none=True)
    model.eval()


def _generate_of(model, ids, new_tokens: int):
    def run(_):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    return run
