"""Serving engines for Kimi K3 checkpoints and the requirements of each, as a table."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig

from .checkpoint import CheckpointError

# SiTU with bounds so far away that it is SwiGLU: a relative difference of 3e-7 at activations of a thousand. A power of
# two, so that dividing and multiplying by it rounds nothing.
UNBOUNDED = float(2**20)

FULL_RANK_GATE, SITU, UNTIED_HEAD = "full-rank gate", "SiTU", "untied head"
EXPERT_SIZE = "size of experts, in a dense model too"


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        version: of the code that this describes.
        multimodal: whether it wants the root configuration with a `text_config` and the prefix of a language model.
        architecture: class name in `config.json`.
        insists_on: features that an equal function is written with.
        refuses: reason and test of what it cannot compute, of the backbone's configuration.
        differs: where it computes something slightly else, in words.
        commands: what to run; `{folder}` is the result.
    """

    version: str
    multimodal: bool
    architecture: str
    insists_on: frozenset[str]
    refuses: tuple[tuple[str, Callable[[PreTrainedConfig], bool]], ...]
    differs: tuple[str, ...]
    commands: tuple[str, ...]


def _sparse(config: PreTrainedConfig) -> bool:
    return "sparse" in config.mlp_layer_types


def _has_groups(config: PreTrainedConfig) -> bool:
    return _sparse(config) and config.n_group > max(1, config.topk_group or 1)


def _dense_layers_elsewhere(config: PreTrainedConfig) -> bool:
    return config.mlp_layer_types != sorted(config.mlp_layer_types)  # "dense" comes before "sparse"


def _is_softmax(config: PreTrainedConfig) -> bool:
    return _sparse(config) and getattr(config, "moe_router_activation_func", "sigmoid") != "sigmoid"


def _other_heads(config: PreTrainedConfig) -> bool:
    linear = "linear_attention" in config.layer_types
    return linear and config.linear_num_heads != config.num_attention_heads


_GROUPS = "groups of experts (num_expert_group > topk_group)"
_SOFTMAX = "a softmax router (moe_router_activation_func)"
_EPS_OF_NORMS = "q_a_layernorm and kv_a_layernorm with rms_norm_eps instead of 1e-6"
_EPS_OF_GATE = "o_norm of the linear attention with 1e-5 instead of rms_norm_eps"

ENGINES = {
    "llama.cpp": Engine(
        version="0c1e57098 (llama-cpp-python 0.3.36)",
        multimodal=True,
        architecture="KimiK3ForConditionalGeneration",
        insists_on=frozenset({FULL_RANK_GATE, SITU, UNTIED_HEAD, EXPERT_SIZE}),
        refuses=(
            ("linear_num_heads != num_attention_heads: it has one number of heads", _other_heads),
            (f"{_GROUPS}: its graph chooses among all experts", _has_groups),
            (f"{_SOFTMAX}: its converter asserts sigmoid", _is_softmax),
            ("dense layers after sparse ones: it counts leading dense layers only", _dense_layers_elsewhere),
        ),
        differs=(
            _EPS_OF_NORMS,
            "the norm of queries and keys in linear attention with rms_norm_eps instead of 1e-6",
            "attention in float16, unless flash attention is off and the cache is in float32",
        ),
        commands=(
            "python convert_hf_to_gguf.py {folder} --outfile {folder}.gguf --outtype bf16",
            "llama-server --model {folder}.gguf --flash-attn off --cache-type-k f32 --cache-type-v f32",
        ),
    ),
    "vllm": Engine(
        version="0.33.0",
        multimodal=False,
        architecture="KimiLinearForCausalLM",
        insists_on=frozenset({UNTIED_HEAD}),
        refuses=(),
        differs=(_EPS_OF_NORMS, _EPS_OF_GATE),
        commands=("vllm serve {folder} --trust-remote-code",),
    ),
    "sglang": Engine(
        version="0.5.23",
        multimodal=False,
        architecture="KimiK3LinearForCausalLM",
        insists_on=frozenset({UNTIED_HEAD}),
        refuses=(),
        differs=(_EPS_OF_NORMS, _EPS_OF_GATE),
        commands=("python -m sglang.launch_server --model-path {folder} --trust-remote-code",),
    ),
    "mlx": Engine(
        version="mlx-lm 0.32.2",
        multimodal=True,
        architecture="KimiK3ForConditionalGeneration",
        insists_on=frozenset({SITU}),
        refuses=(
            (f"{_GROUPS}: it gives experts of other groups the score 0 instead of leaving them out", _has_groups),
            (f"{_SOFTMAX}: its configuration allows sigmoid only", _is_softmax),
        ),
        differs=(),
        commands=("mlx_lm.server --model {folder} --trust-remote-code",),
    ),
}


def check_engine(name: str, config: PreTrainedConfig):
    """Raises CheckpointError, with the engine's reason, for a backbone that it cannot compute."""
    engine = ENGINES[name]
    if config.hidden_act not in ("silu", "situ"):
        raise CheckpointError(f"--for {name} needs hidden_act silu or situ, got {config.hidden_act!r}.")
    for reason, is_refused in engine.refuses:
        if is_refused(config):
            raise CheckpointError(f"{name} ({engine.version}) does not compute {reason}; another engine may.")


# vLLM runs what is no architecture of its own by transformers' code.
TRANSFORMERS_COMMAND = "vllm serve {folder} --model-impl transformers --trust-remote-code"


def serving_text(name: str, folder: str, layout: str) -> str:
    """What the user runs, and what to expect of the numbers."""
    engine = ENGINES[name]
    own = layout == "kimi-k3"
    commands, differs = (engine.commands, engine.differs) if own else ((TRANSFORMERS_COMMAND,), ())
    lines = [f"to serve it by {name} ({engine.version}):"]
    lines += [f"  {command.format(folder=folder)}" for command in commands]
    lines += [f"{name} computes {difference}" for difference in differs]
    return "\n".join(lines)
