"""Kimi K3's text model with plain residuals, as a backbone. It inherits from transformers' Kimi Linear.

It adds SiTU, a lower bound of the decay, a full-rank gate of the linear attention, an output gate of the softmax
attention, latent experts, and dense models.

Shapes: B batch, T tokens, D hidden size, H heads, N tokens of all sequences, E experts, k experts per token, W width of
the routed experts, M intermediate size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.integrations import use_experts_implementation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearAttention,
    KimiLinearDecoderLayer,
    KimiLinearDeltaAttention,
    KimiLinearForCausalLM,
    KimiLinearForgetGate,
    KimiLinearModel,
    KimiLinearPreTrainedModel,
    KimiLinearRMSNorm,
    KimiLinearTopkRouter,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder

from .configuration_kimi_k3 import SITU, KimiK3Config

# The parts of a mixture of experts, which is called block_sparse_moe on disk; a dense MLP is called mlp there.
MOE_PARTS = (
    "gate",
    "experts",
    "shared_experts",
    *(f"routed_expert_{part}" for part in ("down_proj", "norm", "up_proj")),
)


class GatedActivation(nn.Module):
    """Combines the gate and up projections: act(gate) * up, or SiTU.

    SiTU(gate, up) = beta tanh(gate / beta) sigmoid(gate) * linear_beta tanh(up / linear_beta), in float32 or wider.
    """

    def __init__(self, config: KimiK3Config):
        super().__init__()
        self.act_fn = None if config.hidden_act == SITU else ACT2FN[config.hidden_act]
        self.beta = config.activation_situ_beta or 1.0
        self.linear_beta = config.activation_situ_linear_beta

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self.act_fn is not None:
            return self.act_fn(gate) * up
        dtype = gate.dtype
        if dtype in (torch.float16, torch.bfloat16):
            gate, up = gate.float(), up.float()
        if self.linear_beta is not None:
            up = self.linear_beta * torch.tanh(up / self.linear_beta)
        return (self.beta * torch.tanh(gate / self.beta) * torch.sigmoid(gate) * up).to(dtype)


class KimiK3MLP(nn.Module):
    """A dense MLP, or the shared experts: `[..., D]` to `[..., D]`."""

    def __init__(self, config: KimiK3Config, intermediate_size: int | None = None):
        super().__init__()
        width = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.activation = GatedActivation(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(hidden_states), self.up_proj(hidden_states)))


@use_experts_implementation
class KimiK3Experts(nn.Module):
    """The routed experts, stacked: `gate_up_proj` `[E, 2 M, W]` and `down_proj` `[E, W, M]`."""

    def __init__(self, config: KimiK3Config):
        super().__init__()
        width = config.routed_expert_hidden_size or config.hidden_size
        self.num_experts = config.num_local_experts
        self.hidden_dim = width
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, self.intermediate_dim))
        self.act_fn = GatedActivation(config)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(*gate_up.chunk(2, dim=-1))

    def forward(self, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
        """Returns the weighted sum of each token's experts, `[N, W]`.

        Args:
            hidden_states: `[N, W]`.
            top_k_index: indices of the experts `[N, k]`; `num_experts` stands for experts on other ranks.
            top_k_weights: `[N, k]`.
        """
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index[top_k_index < self.num_experts].unique().tolist():
            token, choice = torch.where(top_k_index == expert)
            gated = self._apply_gate(F.linear(hidden_states[token], self.gate_up_proj[expert]))
            weighted = F.linear(gated, self.down_proj[expert]) * top_k_weights[token, choice, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        return output


class KimiK3TopkRouter(KimiLinearTopkRouter):
    """Scores and chooses the experts in float32; the correction bias affects the choice, but not the weights."""

    def __init__(self, config: KimiK3Config):
        super().__init__(config)
        self.softmax = config.moe_router_activation_func == "softmax"
        # As in the official code, the score of a single expert is not normalised to 1.
        self.renormalises = config.norm_topk_prob and config.num_experts_per_tok > 1
        self.grouped = config.n_group > 1 and config.n_group > config.topk_group

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns logits `[N, E]`, and weights and indices `[N, k]` of the chosen experts."""
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        logits = F.linear(hidden_states.float(), self.weight.float())
        scores = logits.softmax(-1) if self.softmax else logits.sigmoid()
        choice = scores + self.e_score_correction_bias
        if self.grouped:
            groups = choice.view(len(choice), self.num_group, -1)
            best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
            kept = torch.zeros_like(best, dtype=torch.bool)
            kept.scatter_(1, best.topk(self.topk_group, dim=-1, sorted=False).indices, True)
            choice = groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)
        indices = choice.topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, indices)
        if self.renormalises:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * self.routed_scaling_factor, indices


class KimiK3MoE(nn.Module):
    """Routed experts, which may have a width of their own, and shared experts: `[B, T, D]` to `[B, T, D]`."""

    def __init__(self, config: KimiK3Config):
        super().__init__()
        width = config.routed_expert_hidden_size
        self.gate = KimiK3TopkRouter(config)
        self.experts = KimiK3Experts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = KimiK3MLP(config, config.moe_intermediate_size * config.n_shared_experts)
        self.routed_expert_down_proj = self.routed_expert_norm = self.routed_expert_up_proj = nn.Identity()
        if width is not None:
            self.routed_expert_down_proj = nn.Linear(config.hidden_size, width, bias=False)
            if config.latent_moe_use_norm:
                self.routed_expert_norm = KimiLinearRMSNorm(width, config.rms_norm_eps)
            self.routed_expert_up_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        _, weights, indices = self.gate(hidden_states)
        routed = self.routed_expert_down_proj(hidden_states)
        routed = self.experts(routed.reshape(-1, routed.shape[-1]), indices, weights).view(routed.shape)
        routed = self.routed_expert_up_proj(self.routed_expert_norm(routed))
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden_states)


class KimiK3Attention(KimiLinearAttention):
    """Multi-head latent attention without positions, with an optional gate of its output."""

    def __init__(self, config: KimiK3Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.g_proj = None
        if config.mla_use_output_gate:
            self.g_proj = nn.Linear(config.hidden_size, self.num_heads * self.v_head_dim, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the output `[B, T, D]` and the attention weights `[B, H, T, keys]` or `None`."""
        if self.g_proj is None:
            return super().forward(hidden_states, attention_mask, past_key_values, **kwargs)
        batch, length = hidden_states.shape[:2]
        if self.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query = query.view(batch, length, -1, self.qk_head_dim).transpose(1, 2)
        latent, shared_key = self.kv_a_proj_with_mqa(hidden_states).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        latent, shared_key = self.kv_a_layernorm(latent).unsqueeze(1), shared_key.unsqueeze(1)
        if past_key_values is not None:  # the cache holds the compressed states
            latent, shared_key = past_key_values.update(latent, shared_key, self.layer_idx)
        key, value = self.expand_kv(latent, shared_key)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.reshape(batch, length, -1) * torch.sigmoid(self.g_proj(hidden_states))
        return self.o_proj(output), weights


class KimiK3ForgetGate(KimiLinearForgetGate):
    """Computes the logarithm of each channel's decay: `[B, T, D]` to `[B, T, H, head dim]`, float32."""

    def __init__(self, config: KimiK3Config):
        super().__init__(config)
        self.lower_bound = config.linear_gate_lower_bound
        self.A_log = nn.Parameter(torch.empty(self.num_heads))  # as on disk

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raw = self.f_b_proj(self.f_a_proj(hidden_states)).float() + self.dt_bias.float()
        raw = raw.view(*raw.shape[:2], self.num_heads, self.head_dim)
        rate = self.A_log.float().exp().unsqueeze(-1)
        if self.lower_bound is None:
            return -rate * F.softplus(raw)
        return self.lower_bound * torch.sigmoid(rate * raw)


class KimiK3DeltaAttention(KimiLinearDeltaAttention):
    """Kimi Delta Attention, whose output gate can be one matrix, `g_proj`."""

    def __init__(self, config: KimiK3Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.activation = "silu"  # of the short convolutions, independent of the MLPs'
        self.forget_gate = KimiK3ForgetGate(config)
        if config.linear_use_full_rank_gate:
            self.g_a_proj = nn.Identity()
            del self._modules["g_b_proj"]
            self.g_proj = nn.Linear(self.hidden_size, self.qkv_dim, bias=False)

    @property
    def g_b_proj(self) -> nn.Module:
        """The module that the inherited forward pass applies after `g_a_proj` to compute the output gate."""
        return self._modules["g_proj" if "g_proj" in self._modules else "g_b_proj"]


class KimiK3DecoderLayer(KimiLinearDecoderLayer):
    """A decoder layer with plain residuals, whose forward pass is that of Kimi Linear."""

    def __init__(self, config: KimiK3Config, layer_idx: int):
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.block_type = config.layer_types[layer_idx]
        attention = KimiK3DeltaAttention if self.block_type == "linear_attention" else KimiK3Attention
        self.self_attn = attention(config, layer_idx)
        self.mlp = KimiK3MoE(config) if config.mlp_layer_types[layer_idx] == "sparse" else KimiK3MLP(config)
        self.input_layernorm = KimiLinearRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = KimiLinearRMSNorm(config.hidden_size, config.rms_norm_eps)


class KimiK3PreTrainedModel(KimiLinearPreTrainedModel):
    """Initialisation and recorded outputs."""

    config: KimiK3Config
    config_class = KimiK3Config
    _no_split_modules = ["KimiK3DecoderLayer"]
    # The released checkpoint stores these in float32 and all others in bfloat16.
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "conv1d", "o_norm", "e_score_correction_bias"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(KimiK3TopkRouter, index=0),
        "hidden_states": KimiK3DecoderLayer,
        "attentions": KimiK3Attention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, KimiK3Experts):
            for weight in (module.gate_up_proj, module.down_proj):
                init.normal_(weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, KimiK3ForgetGate) and module.lower_bound is not None:
            # As in flash-linear-attention: other rates would saturate the sigmoid.
            init.zeros_(module.A_log)


class KimiK3Model(KimiK3PreTrainedModel, KimiLinearModel):
    """The model without a head."""

    def __init__(self, config: KimiK3Config):
        KimiLinearPreTrainedModel.__init__(self, config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(KimiK3DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = KimiLinearRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()


class KimiK3ForCausalLM(KimiK3PreTrainedModel, KimiLinearForCausalLM):
    """The model with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: KimiK3Config):
        KimiLinearPreTrainedModel.__init__(self, config)
        self.model = KimiK3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


# The converters of Kimi Linear between tensors on disk and in memory, but dense MLPs keep their names.
_conversions = []
for _conversion in get_checkpoint_conversion_mapping("kimi_linear"):
    if isinstance(_conversion, WeightRenaming) and "block_sparse_moe" in _conversion.source_patterns[0]:
        _conversions += [WeightRenaming(rf"\.block_sparse_moe\.{part}\.", rf"\.mlp\.{part}\.") for part in MOE_PARTS]
    else:
        _conversions.append(_conversion)
register_checkpoint_conversion_mapping(KimiK3Config.model_type, _conversions, overwrite=True)


__all__ = ["KimiK3ForCausalLM", "KimiK3Model", "KimiK3PreTrainedModel"]
