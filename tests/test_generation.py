"""Generation: every cache, padding and decoding strategy gives what a full forward pass gives."""

import pytest
import torch
from families import FAMILIES, LINEAR_FAMILIES
from helpers import random_attnres, random_tokens, relative_error, short_config
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from attnres import AttnResForCausalLM

# float32, relative. A perturbation grows up to a hundredfold through these random models; a wrong wire gives above 0.1.
TOLERANCE = 1e-3
MODES = ("block", "full", "standard")
STEPS = 5
GREEDY = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}


def greedy_by_hand(model, input_ids, steps):
    """Decodes greedily with a full forward pass per token, without a cache."""
    for _ in range(steps):
        logits = model(input_ids, use_cache=False).logits[:, -1].clone()
        logits[:, model.config.eos_token_id] = -torch.inf  # as `min_new_tokens` does
        input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=1)
    return input_ids


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_with_the_cache_equals_full_forward_passes(family, mode):
    model = random_attnres(family, mode)
    prompt = random_tokens(2, 9)
    expected = greedy_by_hand(model, prompt, STEPS)
    assert torch.equal(model.generate(prompt, **GREEDY), expected)


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", *LINEAR_FAMILIES])
@pytest.mark.parametrize("strategy", ["sample", "beam"])
def test_generation_with_and_without_the_cache_are_equal(family, strategy):
    model = random_attnres(family)
    prompt = random_tokens(2, 6)
    options = {
        "sample": {"do_sample": True, "top_k": 20, "temperature": 1.3},
        "beam": {"num_beams": 3, "num_return_sequences": 2},
    }[strategy]
    options = {"do_sample": False, "max_new_tokens": 8, **options}
    generated = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        generated.append(model.generate(prompt, use_cache=use_cache, **options))
    assert torch.equal(*generated)
    assert generated[0].shape[0] == (4 if strategy == "beam" else 2)


def test_samples_depend_on_the_seed():
    model = random_attnres("qwen3")
    prompt = random_tokens(2, 6)
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(model.generate(prompt, do_sample=True, top_k=0, temperature=2.0, max_new_tokens=12))
    assert torch.equal(samples[0], samples[1])
    assert samples[0].shape != samples[2].shape or not torch.equal(samples[0], samples[2])


@torch.no_grad()
@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill_equals_one_prefill(family, mode):
    model = random_attnres(family, mode)
    tokens = random_tokens(2, 13)
    expected = model(tokens, use_cache=False).logits
    cache, logits = None, []
    for chunk in tokens.split([6, 1, 6], dim=1):
        output = model(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert cache.get_seq_length() == 13
    assert relative_error(torch.cat(logits, dim=1), expected) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_nothing(family):
    model = random_attnres(family)
    short, long = random_tokens(1, 6, seed=1), random_tokens(1, 10, seed=2)
    batch = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1), long])
    mask = (batch != 0).long()

    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(batch, attention_mask=mask, position_ids=position_ids).logits
    assert relative_error(logits[:1, 4:], model(short).logits) < TOLERANCE
    assert relative_error(logits[1:], model(long).logits) < TOLERANCE

    generated = model.generate(batch, attention_mask=mask, **GREEDY)
    assert torch.equal(generated[:1, 4:], model.generate(short, **GREEDY))
    assert torch.equal(generated[1:], model.generate(long, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_changes_nothing(family):
    model = random_attnres(family)
    tokens = random_tokens(1, 6, seed=1)
    padded = torch.cat([tokens, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    logits = model(padded, attention_mask=(padded != 0).long()).logits
    assert relative_error(logits[:, :6], model(tokens).logits) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_static_cache_generates_what_the_dynamic_cache_does(family):
    model = random_attnres(family)
    prompt = random_tokens(2, 9)
    static = model.generate(prompt, cache_implementation="static", **GREEDY)
    assert torch.equal(static, model.generate(prompt, **GREEDY))


@torch.no_grad()
def test_a_static_cache_built_from_the_configuration_has_the_layers_of_the_backbone():
    model = random_attnres("gpt_oss")
    tokens = random_tokens(2, 9)
    cache = StaticCache(config=model.config, max_cache_len=16)
    logits = model(tokens, past_key_values=cache).logits
    assert [layer.is_sliding for layer in cache.layers] == [True, False, True, False, True]
    assert relative_error(logits, model(tokens).logits) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "kimi_linear"])
def test_a_cache_is_returned_as_the_configuration_says(family):
    model = random_attnres(family)
    tokens = random_tokens(1, 5)
    assert isinstance(model(tokens).past_key_values, DynamicCache)
    assert model(tokens, use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(tokens).past_key_values is None


def test_a_cache_that_was_passed_is_filled_and_returned_even_without_use_cache():
    """The backbones do the same: a cache that is passed is used."""
    model = random_attnres("qwen3")
    cache = DynamicCache(config=model.config)
    output = model(random_tokens(1, 5), past_key_values=cache, use_cache=False)
    assert output.past_key_values is cache
    assert cache.get_seq_length() == 5


@torch.no_grad()
@pytest.mark.parametrize("mode", ["block", "full"])
def test_a_cache_cropped_to_a_prefix_continues_from_there(mode):
    model = random_attnres("llama", mode)
    tokens = random_tokens(1, 12)
    cache = model(tokens, use_cache=True).past_key_values
    cache.crop(-5)
    other = random_tokens(1, 3, seed=5)
    logits = model(other, past_key_values=cache).logits
    expected = model(torch.cat([tokens[:, :7], other], dim=1)).logits[:, 7:]
    assert relative_error(logits, expected) < TOLERANCE


def test_assisted_generation_gives_what_greedy_generation_does():
    model, assistant = random_attnres("llama"), random_attnres("llama", "standard", layers=2, seed=4)
    prompt = random_tokens(1, 6)
    assert torch.equal(model.generate(prompt, assistant_model=assistant, **GREEDY), model.generate(prompt, **GREEDY))


@torch.no_grad()
def test_phi3_computes_its_keys_again_when_generation_crosses_the_length_where_its_rotary_factors_change():
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 5, "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0]}
    model = random_attnres(
        "phi3",
        original_max_position_embeddings=10,
        max_position_embeddings=40,
        rope_parameters={"rope_theta": 10000.0, "original_max_position_embeddings": 10, **factors},
    )
    prompt = random_tokens(1, 8)
    assert torch.equal(model.generate(prompt, **GREEDY), greedy_by_hand(model, prompt, STEPS))


def test_generation_reports_scores_and_hidden_states_per_step():
    model = random_attnres("qwen3")
    prompt = random_tokens(2, 6)
    output = model.generate(
        prompt, return_dict_in_generate=True, output_logits=True, output_hidden_states=True, **GREEDY
    )
    expected = model(output.sequences[:, :-1], use_cache=False, output_hidden_states=True)
    assert relative_error(torch.stack(output.logits, dim=1), expected.logits[:, 5:]) < TOLERANCE
    last_step = output.hidden_states[-1]
    assert len(last_step) == model.config.num_hidden_layers + 1
    for state, wanted in zip(last_step, expected.hidden_states, strict=True):
        assert relative_error(state[:, -1], wanted[:, -1]) < TOLERANCE


@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "kimi_linear", "gemma3_text"])
def test_a_text_alone_and_in_a_batch_of_eight_gets_equal_greedy_tokens(family, mode):
    model, lengths = random_attnres(family, mode), [3, 9, 5, 7, 4, 9, 6, 8]
    tokens = random_tokens(8, max(lengths))
    mask = torch.tensor([[0] * (max(lengths) - length) + [1] * length for length in lengths])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(tokens, attention_mask=mask, **options)[:, max(lengths) :]
    for row, length in enumerate(lengths):
        alone = model.generate(tokens[row : row + 1, -length:], **options)[0, length:]
        assert torch.equal(alone, together[row]), row


@pytest.mark.parametrize("family", ["kimi_linear", "qwen3_next"])
@pytest.mark.parametrize("options", [{"assistant_model": True}, {"prompt_lookup_num_tokens": 2}])
def test_drafts_are_refused_where_the_plain_model_refuses_them(family, options):
    """A recurrent state cannot be rolled back after a rejected draft."""
    plain = AutoModelForCausalLM.from_config(short_config(family)).eval()
    for model in (plain, random_attnres(family)):
        drafts = {"assistant_model": model} if "assistant_model" in options else options
        with pytest.raises(ValueError, match="not supported with stateful models"):
            model.generate(random_tokens(1, 5), **drafts, **GREEDY)


@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize("family", ["llama", "kimi_linear", "qwen3_next"])
def test_packed_sequences_without_a_mask_are_read_as_the_plain_model_reads_them(family, mode):
    """Softmax attention separates packed sequences by position_ids; linear attention does as in the plain model."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(short_config(family), attn_implementation="sdpa").eval()
    converted = AttnResForCausalLM.from_backbone(plain, residual_mode=mode).eval()
    tokens, positions = random_tokens(1, 12), torch.tensor([[*range(5), *range(7)]])
    with torch.no_grad():
        packed = {"position_ids": positions, "use_cache": False}
        expected, found = (model(tokens, **packed).logits for model in (plain, converted))
        unpacked = plain(tokens, use_cache=False).logits
    assert relative_error(found, expected) < 1e-5
    assert relative_error(unpacked, expected) > 1e-3
