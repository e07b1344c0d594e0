"""The configuration of Kimi K3's text model: Kimi Linear with other gates, another activation and latent experts."""

from huggingface_hub.dataclasses import strict
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig

SITU = "situ"
ROUTER_ACTIVATIONS = ("sigmoid", "softmax")

# The released model: 2.78 T parameters. Layers are counted from 0; the last two both have softmax attention.
KIMI_K3_LAYERS = 93
KIMI_K3 = {
    "model_type": "kimi_k3",
    "vocab_size": 163840,
    "hidden_size": 7168,
    "intermediate_size": 33792,
    "num_hidden_layers": KIMI_K3_LAYERS,
    "num_attention_heads": 96,
    "hidden_act": SITU,
    "activation_situ_beta": 4.0,
    "activation_situ_linear_beta": 25.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1048576,
    "pad_token_id": 163839,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "q_lora_rank": 1536,
    "mla_use_output_gate": True,
    "layer_types": [
        "full_attention" if layer % 4 == 3 or layer == KIMI_K3_LAYERS - 1 else "linear_attention"
        for layer in range(KIMI_K3_LAYERS)
    ],
    "mlp_layer_types": ["dense"] + ["sparse"] * (KIMI_K3_LAYERS - 1),
    "linear_num_heads": 96,
    "linear_use_full_rank_gate": True,
    "linear_gate_lower_bound": -5.0,
    "num_local_experts": 896,
    "num_experts_per_tok": 16,
    "moe_intermediate_size": 3072,
    "n_shared_experts": 2,
    "routed_expert_hidden_size": 3584,
    "latent_moe_use_norm": True,
}
KIMI_K3_LAYERS_PER_BLOCK = 12

# Keys of a released linear_attn_config and the names of the options here, in Kimi Linear too or in Kimi K3 only.
LINEAR_KEYS = {
    "num_heads": "linear_num_heads",
    "head_dim": "linear_head_dim",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
OWN_LINEAR_KEYS = {"use_full_rank_gate": "linear_use_full_rank_gate", "gate_lower_bound": "linear_gate_lower_bound"}


@strict
class KimiK3Config(KimiLinearConfig):
    r"""The configuration of Kimi K3's text model and of smaller models with any of its features.

    The options have the names of transformers' Kimi Linear or of the released `config.json` (`num_experts`,
    `num_experts_per_token`, `moe_renormalize`, `linear_attn_config`, `first_k_dense_replace`, `moe_layer_freq`, ...).
    An option that a released file leaves out has the default of the official code.

    Args:
        hidden_act (`str`, defaults to `"silu"`):
            Activation of the MLPs and experts, but not of the short convolutions: `"situ"` or a key of `ACT2FN`.
        activation_situ_beta (`float`, *optional*, defaults to 1):
            Bound of SiTU's gate branch.
        activation_situ_linear_beta (`float`, *optional*):
            Bound of SiTU's linear branch, which is unbounded by default.
        mla_use_output_gate (`bool`, defaults to `False`):
            Whether the output of the softmax attention is multiplied by a sigmoid gate computed from its input.
        linear_use_full_rank_gate (`bool`, defaults to `False`):
            Whether the output gate of the linear attention is one matrix instead of a product of two.
        linear_gate_lower_bound (`float`, *optional*):
            Logarithm of the strongest decay of the linear attention's state, from -5 to 0 (excluded). The default is
            the unbounded decay of Kimi Linear.
        num_local_experts (`int`, *optional*):
            Number of routed experts of a sparse layer. By default every MLP is dense.
        routed_expert_hidden_size (`int`, *optional*, defaults to `hidden_size`):
            Width of the inputs and outputs of the routed experts.
        latent_moe_use_norm (`bool`, defaults to `False`):
            Whether the sum of the routed experts is normed at that width.
        moe_router_activation_func (`str`, defaults to `"sigmoid"`):
            Function that turns logits into scores of the experts: `"sigmoid"` or `"softmax"`.

    Raises:
        ValueError: an option is out of range, or belongs to another model (rotary attention).
    """

    model_type = "kimi_k3"

    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int | None = None
    num_hidden_layers: int = 32
    num_key_value_heads: int | None = None
    n_shared_experts: int = 0
    routed_scaling_factor: float = 1.0
    num_experts_per_tok: int | None = None
    num_local_experts: int | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    activation_situ_beta: float | None = None
    activation_situ_linear_beta: float | None = None
    mla_use_output_gate: bool = False
    linear_use_full_rank_gate: bool = False
    linear_gate_lower_bound: float | None = None
    routed_expert_hidden_size: int | None = None
    latent_moe_use_norm: bool = False
    moe_router_activation_func: str = "sigmoid"

    def __post_init__(self, **kwargs):
        released = kwargs.pop("linear_attn_config", None) or {}
        first_dense, frequency = kwargs.pop("first_k_dense_replace", 0), kwargs.pop("moe_layer_freq", 1)
        grouped = kwargs.pop("use_grouped_topk", True)
        if kwargs.pop("mla_use_nope", True) is False:
            raise ValueError("mla_use_nope must be true, got False: Kimi K3 has no rotary attention.")
        if (method := kwargs.pop("topk_method", "noaux_tc")) != "noaux_tc":
            raise ValueError(f"topk_method must be 'noaux_tc', got {method!r}.")
        for key, name in {**LINEAR_KEYS, **OWN_LINEAR_KEYS}.items():
            if key in released:
                setattr(self, name, released[key])
        layers = range(self.num_hidden_layers)
        if self.layer_types is None:
            if "kda_layers" in released:
                linear = {layer - 1 for layer in released["kda_layers"]}  # counted from 1
            else:
                linear = {layer for layer in layers if layer % 4 != 3 and layer != self.num_hidden_layers - 1}
            self.layer_types = ["linear_attention" if layer in linear else "full_attention" for layer in layers]
        mlp_layer_types = self.mlp_layer_types
        if mlp_layer_types is None:  # kwargs may contain options that decide which layers are sparse
            self.mlp_layer_types = ["dense" for _ in layers]
        super().__post_init__(**kwargs)
        if mlp_layer_types is None and self.num_local_experts is not None:
            self.mlp_layer_types = [
                "sparse" if layer >= first_dense and layer % frequency == 0 else "dense" for layer in layers
            ]
        if not grouped:
            self.n_group = self.topk_group = 1
        self.check_options()

    def check_options(self):
        """Checks the options that this class adds."""
        bound = self.linear_gate_lower_bound
        if bound is not None and not -5 <= bound < 0:
            raise ValueError(f"linear_gate_lower_bound must be at least -5 and below 0, or None, got {bound!r}.")
        if self.moe_router_activation_func not in ROUTER_ACTIVATIONS:
            raise ValueError(
                f"moe_router_activation_func must be one of {', '.join(ROUTER_ACTIVATIONS)}, "
                f"got {self.moe_router_activation_func!r}."
            )
        if "sparse" not in self.mlp_layer_types:
            return
        for name in ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive number if any layer is sparse, got {value!r}.")
        if self.num_local_experts % self.n_group:
            raise ValueError(f"n_group must divide num_local_experts={self.num_local_experts}, got {self.n_group}.")


__all__ = ["KIMI_K3", "KimiK3Config"]
