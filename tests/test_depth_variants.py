"""Every variant against a loop over tokens and sources, and as a model: saved, generating, checkpointed, converted."""

import copy
import math
import warnings

import pytest
import torch
from helpers import random_attnres, random_tokens, randomise_depth, relative_error, short_config
from transformers import AutoModelForCausalLM

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.depth_variants import STREAMS, VARIANTS, read_streams, write_streams

EPS = 1e-6
D, RECENT, HEADS = 48, 8, 16
MIXTURES = [name for name, variant in VARIANTS.items() if variant.mixture is not None]


def key(value):
    return value / math.sqrt(sum(x * x for x in value) / len(value) + EPS)


def softmax(logits):
    exponentials = [math.exp(each - max(logits)) for each in logits]
    return [each / sum(exponentials) for each in exponentials]


def weights_of(name, values, query, extra):
    """Returns the depth weights of one token by the definitions in docs/variants.md, given n float64 rows."""
    n = len(values)
    logits = [float(query @ key(value)) for value in values]
    if name == "input_dependent_query":
        own = query + extra @ key(values[-1])
        return softmax([float(own @ key(value)) for value in values])
    if name == "static":
        return softmax([float(each) for each in extra[:n]])
    if name == "sigmoid":
        return [1 / (1 + math.exp(-each)) for each in logits]
    if name == "no_key_norm":
        return softmax([float(query @ value) for value in values])
    if name == "sliding_window":
        kept = [i for i in range(n) if i == 0 or i >= n - RECENT]
        found = dict(zip(kept, softmax([logits[i] for i in kept]), strict=True))
        return [found.get(i, 0.0) for i in range(n)]
    if name == "denseformer":
        return [float(each) for each in extra[:n]]
    if name == "null_source":
        return softmax([*logits, 0.0])[:-1]
    if name == "delta":
        return [0.0, *(softmax(logits[1:]) if n > 1 else [])]
    return softmax(logits)


def mix_token(name, values, query, extra):
    if name == "multi_head":
        width = len(query) // HEADS
        parts, weights = [], []
        for head in range(HEADS):
            own = slice(head * width, (head + 1) * width)
            weights.append(softmax([float(query[own] @ key(value)[own]) for value in values]))
            parts.append(sum(w * value[own] for w, value in zip(weights[-1], values, strict=True)))
        return torch.cat(parts), [sum(each) / HEADS for each in zip(*weights, strict=True)]
    weights = weights_of(name, values, query, extra)
    mixture = sum(w * value for w, value in zip(weights, values, strict=True))
    return (sum(values) + extra * mixture if name == "delta" else mixture), weights


def extra_of(name, rows=41):
    initial = VARIANTS[name].initial
    return None if initial is None else torch.randn(initial(rows, D)[0].shape, dtype=torch.float64) / 3


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 2, 13])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_variant_is_its_definition(name, count, seed):
    torch.manual_seed(seed)
    sources = [torch.randn(2, 3, D, dtype=torch.float64) for _ in range(count)]
    query, extra = torch.randn(D, dtype=torch.float64) / 3, extra_of(name)
    mixture, weights = VARIANTS[name].mixture(torch.stack(sources, dim=2), query, extra, EPS)
    for b in range(2):
        for t in range(3):
            expected, expected_weights = mix_token(name, [source[b, t] for source in sources], query, extra)
            torch.testing.assert_close(mixture[b, t], expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(weights[b, t].tolist(), list(expected_weights), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MIXTURES)
def test_gradients_of_a_variant_are_those_of_finite_differences(name):
    torch.manual_seed(0)
    sources = [torch.randn(1, 2, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    query, extra = torch.randn(D, dtype=torch.float64, requires_grad=True), extra_of(name, 5)
    leaves = [query, *sources] + ([] if extra is None else [extra.requires_grad_()])

    def mixture(query, *others):
        values = torch.stack(others[:3], dim=2)
        return VARIANTS[name].mixture(values, query, others[3] if extra is not None else None, EPS)

    assert torch.autograd.gradcheck(mixture, leaves, fast_mode=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_streams_are_read_and_written_as_mhc_says(seed):
    torch.manual_seed(seed)
    streams, output = torch.randn(2, 3, STREAMS, D, dtype=torch.float64), torch.randn(2, 3, D, dtype=torch.float64)
    extra = torch.randn(STREAMS * D + 1, 2 * STREAMS + STREAMS**2, dtype=torch.float64) / 5
    read, pre, maps = read_streams(streams, extra, EPS, torch.float64)
    written = write_streams(streams, output, maps)
    for b in range(2):
        for t in range(3):
            x = streams[b, t]
            values = key(x.flatten()) @ extra[:-1] + extra[-1]
            own_pre, own_post = torch.sigmoid(values[:4]), 2 * torch.sigmoid(values[4:8])
            mix = values[8:].view(4, 4).exp()
            for _ in range(20):
                mix = mix / mix.sum(0, keepdim=True)
                mix = mix / mix.sum(1, keepdim=True)
            torch.testing.assert_close(pre[b, t], own_pre, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(read[b, t], own_pre @ x, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(written[b, t], mix @ x + own_post.outer(output[b, t]), rtol=1e-9, atol=1e-9)


def model_of(name, mode="block", seed=0):
    torch.manual_seed(seed)
    config = AttnResConfig(
        backbone_config=short_config("qwen3", 5, hidden_size=D),
        residual_mode=mode,
        layers_per_block=2,
        depth_variant=name,
    )
    model = randomise_depth(AttnResForCausalLM(config).eval(), seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "variant_norm" in parameter_name:
                parameter.copy_(torch.randn_like(parameter) / 3)
    return model


@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_saves_loads_generates_and_trains_under_checkpointing(name, mode, tmp_path):
    model, tokens = model_of(name, mode), random_tokens(2, 7)
    model.save_pretrained(tmp_path)
    loaded = AttnResForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.depth_variant == name
    for parameter_name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(parameter_name)), parameter_name
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(tokens, **options)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))

    checkpointed = copy.deepcopy(model).train()
    for use_reentrant in (False, True):
        checkpointed.zero_grad()
        # transformers 5.23 renamed it
        enable = getattr(checkpointed, "activation_checkpointing_enable", None)
        (enable or checkpointed.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})
        checkpointed.enable_input_require_grads()
        for each in (model.zero_grad() or model.train(), checkpointed):
            each(tokens, labels=tokens).loss.backward()
        for (parameter_name, parameter), other in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
            if parameter.grad is not None and parameter.grad.norm() > 1e-4:
                assert relative_error(other.grad, parameter.grad) < 1e-3, parameter_name


@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_starts_as_the_plain_model_or_says_that_it_does_not(name, mode):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(short_config("qwen3", 7, hidden_size=D)).eval()
    tokens = random_tokens(2, 9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = AttnResForCausalLM.from_backbone(plain, residual_mode=mode, layers_per_block=2, depth_variant=name)
    lossless = VARIANTS[name].lossless is not None
    assert any("does not start" in str(each.message) for each in caught) != lossless
    with torch.no_grad():
        error = relative_error(model(tokens).logits, plain(tokens).logits)
    if lossless:
        assert error < (1e-5 if name == "mhc" else 2e-6)  # its doubly stochastic matrices are good to a few 1e-7
    elif (name, mode) != ("sliding_window", "block"):  # with no more than nine sources it leaves out none
        assert error > 1e-3


def test_a_variant_that_is_unknown_or_does_not_fit_is_one_clear_error():
    with pytest.raises(ValueError, match=r"depth_variant must be one of attnres, .*, got 'nonsense'"):
        AttnResConfig(backbone_config=short_config("llama"), depth_variant="nonsense")
    with pytest.raises(ValueError, match=r"multiple of 16, got 40"):
        AttnResConfig(backbone_config=short_config("llama"), depth_variant="multi_head")


def test_training_tells_the_streams_of_mhc_apart():
    torch.manual_seed(0)
    config = AttnResConfig(backbone_config=short_config("llama"), depth_variant="mhc", scale_norm_eps=True)
    model, tokens = AttnResForCausalLM(config), random_tokens(2, 9)
    model(tokens, labels=tokens).loss.backward()
    by_post = model.depth_mixer.variant_norm.weight.grad[:-3, -1, STREAMS : 2 * STREAMS]
    assert (by_post.std(-1) > 0).all()


def test_trained_variants_are_not_taken_for_others(tmp_path):
    model_of("null_source").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained for .*depth_variant=null_source"):
        AttnResForCausalLM.from_pretrained(tmp_path, depth_variant="attnres")


def test_depth_weights_of_variants_come_with_the_output():
    for name in ("attnres", "static", "mhc"):
        output = model_of(name)(random_tokens(1, 5), output_depth_weights=True)
        assert len(output.depth_weights) == 11
    assert random_attnres("llama").config.depth_variant == "attnres"


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.initial is not None])
@pytest.mark.filterwarnings("ignore:depth_variant=")
def test_a_plain_checkpoint_on_disk_becomes_a_variant_with_its_initial_parameters(name, tmp_path):
    """The file does not contain these parameters, which must not be left as uninitialised memory."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(short_config("qwen3", 5, hidden_size=D)).eval()
    plain.save_pretrained(tmp_path)
    torch.full((1 << 20,), float("nan"))  # memory that may be handed out again
    model = AttnResForCausalLM.from_backbone(tmp_path, depth_variant=name, num_blocks=2)
    expected = AttnResForCausalLM.from_backbone(plain, depth_variant=name, num_blocks=2)
    mixers = model.model.depth_mixer.state_dict(), expected.model.depth_mixer.state_dict()
    for parameter, value in mixers[1].items():
        assert torch.equal(mixers[0][parameter], value), parameter
