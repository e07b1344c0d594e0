"""Compares converted checkpoints of flash-linear-attention with a naive float64 implementation of what they compute."""

import json

import pytest
import torch
from helpers import random_tokens, relative_error
from safetensors.torch import load_file, save_file

from attnres import AttnResForCausalLM
from attnres.conversion import CheckpointError, convert
from attnres.conversion.inspection import inspect_checkpoint

CONFIG = {
    "model_type": "transformer",
    "architectures": ["TransformerForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 40,
    "num_hidden_layers": 5,
    "num_heads": 4,
    "num_kv_heads": 2,
    "qkv_bias": False,
    "qk_norm": False,
    "window_size": None,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attnres_block_size": 4,
}
CASES = {
    "blocks of two layers": {},
    "blocks of one layer": {"attnres_block_size": 2},
    "one block": {"attnres_block_size": 16},
    "full": {"attnres_block_size": 1},
    "plain residuals": {"attnres_block_size": None},
    "as many key-value heads": {"num_kv_heads": None},
    "bias": {"qkv_bias": True},
    "normed queries and keys": {"qk_norm": True},
    "window": {"window_size": 3},
    "another base": {"rope_theta": 500.0, "norm_eps": 1e-3},
    "tied head": {"tie_word_embeddings": True},
}


def drawn(config, seed=0):
    """Returns random tensors under the names of flash-linear-attention."""
    generator = torch.Generator().manual_seed(seed)
    size, width, rows = config["hidden_size"], 52, config["vocab_size"]
    head = size // config["num_heads"]
    values = head * (config["num_kv_heads"] or config["num_heads"])
    shapes = {"model.embeddings.weight": (rows, size), "model.norm.weight": (size,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (rows, size)
    if config["attnres_block_size"]:
        shapes |= {"model.res_proj.weight": (1, size), "model.res_norm.weight": (size,)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}{kind}_norm.weight": (size,) for kind in ("attn", "mlp")}
        for kind, heads in {"q": size, "k": values, "v": values}.items():
            shapes[f"{name}attn.{kind}_proj.weight"] = (heads, size)
            if config["qkv_bias"]:
                shapes[f"{name}attn.{kind}_proj.bias"] = (heads,)
            if config["qk_norm"] and kind != "v":
                shapes[f"{name}attn.{kind}_norm.weight"] = (head,)
        shapes[f"{name}attn.o_proj.weight"] = (size, size)
        shapes |= {f"{name}mlp.{kind}_proj.weight": (width, size) for kind in ("gate", "up")}
        shapes[f"{name}mlp.down_proj.weight"] = (size, width)
        if config["attnres_block_size"]:
            shapes |= {f"{name}{kind}_res_proj.weight": (1, size) for kind in ("attn", "mlp")}
            shapes |= {f"{name}{kind}_res_norm.weight": (size,) for kind in ("attn", "mlp")}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + 0.3 * each if "norm" in name else 0.3 * each for name, each in tensors.items()}


def norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x, base):
    """Rotates `[T, D]`, whose halves are the coordinates of the rotated pairs."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x), dtype=x.dtype)[:, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    one, other = x[:, :half], x[:, half:]
    return torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], dim=-1)


def reference(config, tensors, tokens):
    """Returns the logits `[T, V]` of one sequence; block sizes are counted in sublayers."""
    eps, size, count = config["norm_eps"], config["attnres_block_size"], config["num_heads"]
    shared = count // (config["num_kv_heads"] or count)

    def attend(get, x):
        def project(kind):
            bias = tensors.get(f"{get}attn.{kind}_proj.bias", 0.0)
            heads = (x @ tensors[f"{get}attn.{kind}_proj.weight"].T + bias).view(
                len(x), -1, config["hidden_size"] // count
            )
            if config["qk_norm"] and kind != "v":
                heads = norm(heads, tensors[f"{get}attn.{kind}_norm.weight"], 1e-5)
            return heads

        q, k, v = map(project, "qkv")
        outputs, places = [], torch.arange(len(x))
        distance = places[:, None] - places[None]
        hidden = (distance < 0) | (distance >= (config["window_size"] or len(x)))
        for head in range(count):
            query = rotate(q[:, head], config["rope_theta"])
            key = rotate(k[:, head // shared], config["rope_theta"])
            scores = (query @ key.T / key.shape[-1] ** 0.5).masked_fill(hidden, float("-inf"))
            outputs.append(scores.softmax(-1) @ v[:, head // shared])
        return torch.cat(outputs, dim=-1) @ tensors[f"{get}attn.o_proj.weight"].T

    def mlp(get, x):
        gate, up = (x @ tensors[f"{get}mlp.{kind}_proj.weight"].T for kind in ("gate", "up"))
        return (torch.nn.functional.silu(gate) * up) @ tensors[f"{get}mlp.down_proj.weight"].T

    def mix(sources, name):
        values = torch.stack(sources)
        scores = norm(values, tensors[f"{name}_norm.weight"], eps) @ tensors[f"{name}_proj.weight"][0]
        return (scores.softmax(0).unsqueeze(-1) * values).sum(0)

    running, banked, sublayer = tensors["model.embeddings.weight"][tokens], [], 0
    for layer in range(config["num_hidden_layers"]):
        for kind, compute in (("attn", attend), ("mlp", mlp)):
            get = f"model.layers.{layer}."
            read = running if not size or not banked else mix([*banked, running], f"{get}{kind}_res")
            output = compute(get, norm(read, tensors[f"{get}{kind}_norm.weight"], eps))
            if size and sublayer % size == 0:
                banked.append(running)
                running = output
            else:
                running = running + output
            sublayer += 1
    if size:
        running = mix([*banked, running], "model.res")
    head = tensors["model.embeddings.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return norm(running, tensors["model.norm.weight"], eps) @ head.T


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_converted_checkpoint_computes_what_it_computed(case, tmp_path):
    config = {**CONFIG, **CASES[case]}
    tensors = drawn(config)
    convert(write(tmp_path / "fla", config, tensors), tmp_path / "ours", from_layout="fla", verify="full")
    model = AttnResForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = random_tokens(2, 11)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    expected = torch.stack([reference(config, wide, each) for each in tokens])
    assert relative_error(model(tokens).logits.double(), expected) < 1e-4
    stored = [load_file(path) for path in (tmp_path / "ours").glob("*.safetensors")]
    assert sorted(each.sum().item() for part in stored for each in part.values()) == sorted(
        each.sum().item() for each in tensors.values()
    )


def test_its_unit_of_blocks_is_converted(tmp_path):
    facts = {}
    for size in (2, 4, 6, 1):
        config = {**CONFIG, "attnres_block_size": size}
        facts[size] = inspect_checkpoint(write(tmp_path / f"{size}", config, drawn(config)))
    assert [facts[size]["layers_per_block"] for size in (2, 4, 6)] == [1, 2, 3]
    assert facts[1]["residual_mode"] == "full" and facts[2]["layout"] == "fla" and facts[2]["family"] == "llama"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "kda"}, "flash-linear-attention's 'kda' is not supported"),
        ({"model_type": "gated_deltanet"}, "'gated_deltanet' is not supported"),
        ({"attnres_block_size": 3}, "attnres_block_size must be 1 or an even number of sublayers, got 3"),
        ({"qk_norm": True, "norm_eps": 1e-6}, "norm_eps must be 1e-05 with qk_norm, got 1e-06"),
        ({"qk_norm": True, "qkv_bias": True}, "no supported family has the attention of qkv_bias=True, qk_norm=True"),
        ({"rope_theta": None}, "rope_theta must be a number"),
    ],
    ids=lambda value: "",
)
def test_what_no_family_computes_is_refused_by_its_name(change, message, tmp_path):
    folder = write(tmp_path / "fla", {**CONFIG, **change}, drawn(CONFIG))
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "ours", verify="none")
    assert not (tmp_path / "ours").exists()


def test_another_checkpoint_is_not_one_of_it(tmp_path):
    config = {key: value for key, value in CONFIG.items() if key != "attnres_block_size"} | {"model_type": "llama"}
    with pytest.raises(CheckpointError, match="is a checkpoint in the layout prenorm, but --from says fla"):
        convert(write(tmp_path / "plain", config, drawn(CONFIG)), tmp_path / "ours", from_layout="fla")
