"""The oracle of Kimi K3: its equations, written down naively in float64 from the tensors and keys of a released folder.

Knows nothing of the package or of transformers: one sequence, one token after the other, one head and expert at a time.
"""

import torch


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def gated(config, gate, up):
    if config["hidden_act"] == "silu":
        return gate * torch.sigmoid(gate) * up
    assert config["hidden_act"] == "situ"
    beta = config.get("activation_situ_beta") or 1.0
    if (bound := config.get("activation_situ_linear_beta")) is not None:
        up = bound * torch.tanh(up / bound)
    return beta * torch.tanh(gate / beta) * torch.sigmoid(gate) * up


def short_convolution(x, weight):
    """`[T, C]` by the depthwise kernels `[C, 1, K]`, causally, then silu."""
    kernel = weight.shape[-1]
    rows = []
    for token in range(len(x)):
        row = torch.zeros_like(x[0])
        for tap in range(kernel):
            source = token - (kernel - 1) + tap
            if source >= 0:
                row = row + weight[:, 0, tap] * x[source]
        rows.append(row)
    total = torch.stack(rows)
    return total * torch.sigmoid(total)


def delta_attention(config, get, x):
    linear = config["linear_attn_config"]
    heads, width = linear["num_heads"], linear["head_dim"]
    q, k, v = (
        short_convolution(x @ get(f"{name}_proj.weight").T, get(f"{name}_conv1d.weight")).view(-1, heads, width)
        for name in "qkv"
    )
    q = q / torch.sqrt((q * q).sum(-1, keepdim=True) + 1e-6) / width**0.5
    k = k / torch.sqrt((k * k).sum(-1, keepdim=True) + 1e-6)
    raw = x @ get("f_a_proj.weight").T @ get("f_b_proj.weight").T + get("dt_bias")
    raw = raw.view(-1, heads, width)
    rate = torch.exp(get("A_log").flatten()[:heads])[:, None]
    bound = linear.get("gate_lower_bound")
    decay = -rate * torch.log1p(torch.exp(raw)) if bound is None else bound * torch.sigmoid(rate * raw)
    beta = torch.sigmoid(x @ get("b_proj.weight").T)
    outputs = []
    for head in range(heads):
        state, rows = torch.zeros(width, width, dtype=x.dtype), []
        for token in range(len(x)):
            state = torch.exp(decay[token, head])[:, None] * state
            error = beta[token, head] * (v[token, head] - state.T @ k[token, head])
            state = state + torch.outer(k[token, head], error)
            rows.append(state.T @ q[token, head])
        outputs.append(torch.stack(rows))
    output = torch.stack(outputs, dim=1)
    if linear.get("use_full_rank_gate"):
        gate = x @ get("g_proj.weight").T
    else:
        gate = x @ get("g_a_proj.weight").T @ get("g_b_proj.weight").T
    output = rms_norm(output, get("o_norm.weight"), config["rms_norm_eps"]) * torch.sigmoid(gate.view_as(output))
    return output.flatten(1) @ get("o_proj.weight").T


def latent_attention(config, get, x):
    heads, nope, shared = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    values, rank = config["v_head_dim"], config["kv_lora_rank"]
    if config.get("q_lora_rank") is None:
        q = x @ get("q_proj.weight").T
    else:
        q = rms_norm(x @ get("q_a_proj.weight").T, get("q_a_layernorm.weight"), 1e-6) @ get("q_b_proj.weight").T
    q = q.view(-1, heads, nope + shared)
    compressed = x @ get("kv_a_proj_with_mqa.weight").T
    keys_values = rms_norm(compressed[:, :rank], get("kv_a_layernorm.weight"), 1e-6) @ get("kv_b_proj.weight").T
    keys_values = keys_values.view(-1, heads, nope + values)
    outputs = []
    for head in range(heads):
        key = torch.cat([keys_values[:, head, :nope], compressed[:, rank:]], dim=-1)
        scores = q[:, head] @ key.T * (nope + shared) ** -0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ keys_values[:, head, nope:])
    output = torch.cat(outputs, dim=-1)
    if config.get("mla_use_output_gate"):
        output = output * torch.sigmoid(x @ get("g_proj.weight").T)
    return output @ get("o_proj.weight").T


def mlp(config, get, prefix, x, names=("gate_proj", "up_proj", "down_proj")):
    gate, up, down = (get(f"{prefix}{name}.weight") for name in names)
    return gated(config, x @ gate.T, x @ up.T) @ down.T


def choose(config, scores, bias):
    """Indices of the experts of one token."""
    groups, experts = config.get("num_expert_group", 1), len(scores)
    choice, size = (scores + bias).detach(), experts // groups
    if groups > 1 and groups > config["topk_group"]:
        best = [choice[group * size : (group + 1) * size].sort().values[-2:].sum().item() for group in range(groups)]
        kept = sorted(range(groups), key=lambda group: -best[group])[: config["topk_group"]]
        choice = [value if place // size in kept else float("-inf") for place, value in enumerate(choice.tolist())]
    else:
        choice = choice.tolist()
    return sorted(range(experts), key=lambda expert: -choice[expert])[: config["num_experts_per_token"]]


def experts(config, get, x):
    logits = x @ get("gate.weight").T
    softmax = config.get("moe_router_activation_func", "sigmoid") == "softmax"
    scores = logits.softmax(-1) if softmax else torch.sigmoid(logits)
    latent = config.get("routed_expert_hidden_size") is not None
    z = x @ get("routed_expert_down_proj.weight").T if latent else x
    rows = []
    for token in range(len(x)):
        chosen = choose(config, scores[token], get("gate.e_score_correction_bias"))
        weights = scores[token, chosen]
        if config.get("moe_renormalize", True) and len(chosen) > 1:
            weights = weights / (weights.sum() + 1e-20)
        weights = weights * config.get("routed_scaling_factor", 1.0)
        outputs = [mlp(config, get, f"experts.{expert}.", z[token], ("w1", "w3", "w2")) for expert in chosen]
        rows.append(sum(weight * output for weight, output in zip(weights, outputs, strict=True)))
    y = torch.stack(rows)
    if latent and config.get("latent_moe_use_norm"):
        y = rms_norm(y, get("routed_expert_norm.weight"), config["rms_norm_eps"])
    if latent:
        y = y @ get("routed_expert_up_proj.weight").T
    return y + mlp(config, get, "shared_experts.", x) if config.get("num_shared_experts") else y


def mix(sources, projection, norm, eps):
    values = torch.stack(sources)
    logits = (values / torch.sqrt((values * values).mean(-1, keepdim=True) + eps) * norm * projection).sum(-1)
    return (torch.softmax(logits, dim=0).unsqueeze(-1) * values).sum(0)


def logits(config, tensors, tokens):
    """Logits `[T, V]` of one sequence.

    Args:
        config: the text configuration, with the keys of a release.
        tensors: by their name on disk, without `language_model.`.
        tokens: `[T]`.
    """
    eps, block = config["rms_norm_eps"], config.get("attn_res_block_size")
    linear = config["linear_attn_config"]["kda_layers"]
    hidden, bank = tensors["model.embed_tokens.weight"][tokens], []
    for layer in range(config["num_hidden_layers"]):

        def get(name, prefix=f"model.layers.{layer}."):
            return tensors[prefix + name]

        def within(part, get=get):
            return lambda name: get(part + name)

        def mixed(state, kind, get=get):
            if not bank:
                return state
            return mix([*bank, state], get(f"{kind}_proj.weight"), get(f"{kind}_norm.weight"), eps)

        x = rms_norm(mixed(hidden, "self_attention_res"), get("input_layernorm.weight"), eps)
        attention = delta_attention if layer + 1 in linear else latent_attention
        output = attention(config, within("self_attn."), x)
        if block is not None and layer % block == 0:
            bank.append(hidden)
            hidden = output
        else:
            hidden = hidden + output
        x = rms_norm(mixed(hidden, "mlp_res"), get("post_attention_layernorm.weight"), eps)
        first, frequency = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
        if config.get("num_experts") is not None and layer >= first and layer % frequency == 0:
            hidden = hidden + experts(config, within("block_sparse_moe."), x)
        else:
            hidden = hidden + mlp(config, get, "mlp.", x)
    if bank:
        names = ("model.output_attn_res_proj.weight", "model.output_attn_res_norm.weight")
        hidden = mix([*bank, hidden], *(tensors[name] for name in names), eps)
    head = tensors["model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"]
    return rms_norm(hidden, tensors["model.norm.weight"], eps) @ head.T
