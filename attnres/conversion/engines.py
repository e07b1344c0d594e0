"""Serving engines that load Kimi K3 checkpoints, and what each of them needs, refuses and computes differently."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from .checkpoint import CheckpointError

# SiTU with bounds this large is SwiGLU: a relative difference of 3e-7 at activations of a thousand. Dividing and
# multiplying by a power of two does not round.
UNBOUNDED = float(2**20)

FULL_RANK_GATE, SITU, UNTIED_HEAD = "full-rank gate", "SiTU", "untied head"
EXPERT_SIZE = "size of experts, in a dense model too"
MULTIMODAL = "KimiK3ForConditionalGeneration"
# vLLM runs models that it has no implementation of with the code of transformers.
TRANSFORMERS_COMMAND = "vllm serve {folder} --model-impl transformers --trust-remote-code"


@dataclass(frozen=True)
class Engine:
    """A serving engine."""

    version: str  # of the code that this describes
    architecture: str  # class name in `config.json`; `MULTIMODAL` also has a `text_config` and a prefix of names
    insists_on: tuple[str, ...]  # features that it takes for granted; a model without one is written as an equal one
    commands: tuple[str, ...]  # shell commands that serve the result; `{folder}` stands for its folder
    differs: tuple[str, ...] = ()  # what it computes slightly differently


_EPS_OF_NORMS = "q_a_layernorm and kv_a_layernorm with rms_norm_eps instead of 1e-6"
_EPS_OF_GATE = "o_norm of the linear attention with 1e-5 instead of rms_norm_eps"

ENGINES = {
    "llama.cpp": Engine(
        "0c1e57098 (llama-cpp-python 0.3.36)",
        MULTIMODAL,
        (FULL_RANK_GATE, SITU, UNTIED_HEAD, EXPERT_SIZE),
        (
            "python convert_hf_to_gguf.py {folder} --outfile {folder}.gguf --outtype bf16",
            "llama-server --model {folder}.gguf --flash-attn off --cache-type-k f32 --cache-type-v f32",
        ),
        (
            _EPS_OF_NORMS,
            "the norm of queries and keys in linear attention with rms_norm_eps instead of 1e-6",
            "attention in float16, unless flash attention is off and the cache is in float32",
        ),
    ),
    "vllm": Engine(
        "0.33.0",
        "KimiLinearForCausalLM",
        (UNTIED_HEAD,),
        ("vllm serve {folder} --trust-remote-code",),
        (_EPS_OF_NORMS, _EPS_OF_GATE),
    ),
    "sglang": Engine(
        "0.5.23",
        "KimiK3LinearForCausalLM",
        (UNTIED_HEAD,),
        ("python -m sglang.launch_server --model-path {folder} --trust-remote-code",),
        (_EPS_OF_NORMS, _EPS_OF_GATE),
    ),
    "mlx": Engine("mlx-lm 0.32.2", MULTIMODAL, (SITU,), ("mlx_lm.server --model {folder} --trust-remote-code",)),
}


def insists(engine: str | None, feature: str) -> bool:
    """Returns whether the checkpoint is for an engine that loads only this form of a feature."""
    return engine is not None and feature in ENGINES[engine].insists_on


def check_engine(name: str, config: PreTrainedConfig):
    """Checks that an engine computes what a backbone computes."""
    if config.hidden_act not in ("silu", "situ"):
        raise CheckpointError(f"--for {name} needs hidden_act silu or situ, got {config.hidden_act!r}.")
    is_sparse = "sparse" in config.mlp_layer_types
    has_groups = is_sparse and config.n_group > max(1, config.topk_group or 1)
    has_softmax = is_sparse and getattr(config, "moe_router_activation_func", "sigmoid") != "sigmoid"
    has_linear = "linear_attention" in config.layer_types
    other_heads = has_linear and config.linear_num_heads != config.num_attention_heads
    dense_later = config.mlp_layer_types != sorted(config.mlp_layer_types)  # "dense" sorts before "sparse"
    groups, softmax = (
        "groups of experts (num_expert_group > topk_group)",
        "a softmax router (moe_router_activation_func)",
    )
    for engine, is_refused, reason in (
        ("llama.cpp", other_heads, "linear_num_heads != num_attention_heads: it has one number of heads"),
        ("llama.cpp", has_groups, f"{groups}: its graph chooses among all experts"),
        ("llama.cpp", has_softmax, f"{softmax}: its converter asserts sigmoid"),
        ("llama.cpp", dense_later, "dense layers after sparse ones: it counts leading dense layers only"),
        ("mlx", has_groups, f"{groups}: it gives experts of other groups the score 0 instead of leaving them out"),
        ("mlx", has_softmax, f"{softmax}: its configuration allows sigmoid only"),
    ):
        if engine == name and is_refused:
            raise CheckpointError(f"{name} ({ENGINES[name].version}) does not compute {reason}; another engine may.")


def serving_text(name: str, folder: str, layout: str) -> str:
    """Returns the commands that serve a result in a layout, and the known numerical differences, one per line."""
    engine = ENGINES[name]
    is_own = layout == "kimi-k3"
    commands, differs = (engine.commands, engine.differs) if is_own else ((TRANSFORMERS_COMMAND,), ())
    lines = [f"to serve it with {name} ({engine.version}):"]
    lines += [f"  {command.format(folder=folder)}" for command in commands]
    lines += [f"{name} computes {difference}" for difference in differs]
    return "\n".join(lines)
