"""GGUF files by `gguf_file=`, as for the plain class: the same logits, and a folder like any other."""

import gguf
import pytest
import torch
from helpers import random_tokens, relative_error, short_config
from transformers import AutoModelForCausalLM

from attnres import AttnResForCausalLM, AttnResForSequenceClassification

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes a tiny Llama with random weights as model.gguf."""
    folder = tmp_path_factory.mktemp("gguf")
    torch.manual_seed(0)
    config = short_config("llama")
    model = AutoModelForCausalLM.from_config(config)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            stem = f"blk.{layer}.{NAMES[rest]}"
        else:
            stem = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[stem]
        writer.add_tensor(f"{stem}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@pytest.mark.parametrize("load", [AttnResForCausalLM.from_backbone, AttnResForCausalLM.from_pretrained])
@pytest.mark.parametrize("mode", ["block", "full"])
def test_a_gguf_file_converts_to_what_the_plain_class_reads_from_it(folder, load, mode, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
    model = load(folder, gguf_file="model.gguf", dtype=torch.float32, residual_mode=mode).eval()
    tokens = random_tokens(2, 7)
    assert model.config.residual_mode == mode and model.config.backbone_config.model_type == "llama"
    assert relative_error(model(tokens).logits, plain(tokens).logits) < 2e-6
    model.save_pretrained(tmp_path)
    assert torch.equal(AttnResForCausalLM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_a_gguf_file_for_another_head_is_refused_in_one_line(folder):
    with pytest.raises(ValueError, match="is a language model: load it with AttnResForCausalLM"):
        AttnResForSequenceClassification.from_backbone(folder, gguf_file="model.gguf")
