"""What requests share goes through the model once, and the answers are those of lm-eval's own model."""

import copy

import pytest
import torch
from families import FAMILY_OPTIONS, tiny_config
from helpers import randomise_depth
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_eval import byte_tokenizer
from transformers import AutoModelForCausalLM

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.eval import lm as lm_module
from attnres.eval.batches import Batch, Unit, plan
from attnres.eval.lm import CausalLM

LENGTH = 211
EXAMPLES = "".join(f"Q: {number} and {number + 1}? A: {2 * number + 1}\n" for number in range(7))
QUESTIONS = [f"{EXAMPLES}Q: {text}? A:" for text in ("3 and 4", "11 and 2", "one hundred", "7", "11 and 13")]
ANSWERS = [" 7", " thirteen", "1", " 1", "", " 11 and 13"]
ALONE = [("What?", " Nothing."), ("", "empty"), ("What?", "x"), (EXAMPLES[:40], " Q")]


def instances(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("task", number, 1))
        for number, each in enumerate(arguments)
    ]


def likelihoods():
    choices = [(question, answer) for question in QUESTIONS for answer in ANSWERS if answer]
    return instances("loglikelihood", choices + ALONE)


def tiny(family: str):
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    return tiny_config(family, vocab_size=257, max_position_embeddings=LENGTH, **ends)


def model_of(name: str, seed: int):
    """A model of a family, or AttnRes over one, with trained pseudo-queries."""
    torch.manual_seed(seed)
    family, _, attnres = name.partition("-")
    if not attnres:
        return AutoModelForCausalLM.from_config(tiny(family)).eval()
    model = AttnResForCausalLM(AttnResConfig.from_backbone(tiny(family), layers_per_block=5)).eval()
    randomise_depth(model, seed)
    return model


# Caches of full attention, of sliding windows and of linear attention, and AttnRes over both; others run with -m slow.
KINDS = ["llama", "gemma2", "kimi_linear", "llama-attnres", "kimi_linear-attnres"]
OTHERS = [family for family in FAMILY_OPTIONS if family not in KINDS]


def stock(model, batch_size):
    return HFLM(
        pretrained=copy.deepcopy(model),
        tokenizer=byte_tokenizer(eos_token="<end>"),
        backend="causal",
        max_length=LENGTH,
        batch_size=batch_size,
    )


def cases(names, slow=()):
    return [
        pytest.param(name, seed, marks=pytest.mark.slow if seed or name in slow else ())
        for name in (*names, *slow)
        for seed in (0, 1)
    ]


@pytest.mark.parametrize(("name", "seed"), cases(KINDS, OTHERS))
def test_likelihoods_are_those_of_lm_eval(name, seed):
    model = model_of(name, seed)
    expected = stock(model, 3).loglikelihood(likelihoods(), disable_tqdm=True)

    lm = CausalLM(model, byte_tokenizer(eos_token="<end>"), LENGTH, 3)
    found = lm.loglikelihood(likelihoods(), disable_tqdm=True)

    torch.testing.assert_close(
        torch.tensor([value for value, _ in found]),
        torch.tensor([value for value, _ in expected]),
        rtol=1e-4,
        atol=1e-4,
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def written(requests, model, batch_size, own):
    lm = CausalLM(model, byte_tokenizer(eos_token="<end>"), LENGTH, batch_size) if own else stock(model, batch_size)
    return lm.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize(("name", "seed"), cases(KINDS[:4], ["deepseek_v3"]))
def test_generated_answers_are_those_of_lm_eval_although_ended_rows_are_left_out(name, seed, monkeypatch):
    monkeypatch.setattr(lm_module, "PORTION", 3)
    model = model_of(name, seed)
    options = {"until": ["\n\n"], "max_gen_toks": 29, "do_sample": False}
    arguments = [(text, options) for text in [*QUESTIONS, "What?", "Where to?"]]
    whole = written(instances("generate_until", arguments), model, 3, own=False)
    # What two of them write in the middle ends them there, and some of the others elsewhere.
    options |= {"until": [whole[0][5:9], whole[-1][20:23]]}
    requests = instances("generate_until", arguments)

    expected = written(requests, model, 3, own=False)

    assert any(len(text) < len(free) for text, free in zip(expected, whole, strict=True))
    assert written(requests, model, 3, own=True) == expected


def test_rows_that_ended_cost_nothing_more(monkeypatch):
    model = model_of("llama", 0)
    model.generation_config.eos_token_id = None
    lm = CausalLM(model, byte_tokenizer(eos_token="<end>"), LENGTH, 3)
    assert lm._layers
    counts = count_tokens(model)
    monkeypatch.setattr(lm_module, "PORTION", 5)
    # One ends in the first portion, one in the second, one goes on to the limit of 20.
    monkeypatch.setattr(CausalLM, "_ended", lambda self, answer, stop: len(answer) >= 5 * ends.pop(0))
    ends = [1, 2, 9, 2, 9, 9]

    with torch.no_grad():
        output = lm._model_generate(torch.arange(1, 34).reshape(3, 11), 31, ["never written"], do_sample=False)

    assert output.shape == (3, 31)
    assert output[0, 16:].tolist() == [lm.tokenizer.pad_token_id] * 15
    assert counts["decoder"] == 3 * 11 + 3 * 4 + 2 * 5 + 1 * 10


def count_tokens(model):
    """Tokens that go through the decoder, and those whose logits are computed."""
    counts = {"decoder": 0, "head": 0}
    backbone, head = model.get_decoder(), model.get_output_embeddings()
    backbone.register_forward_pre_hook(
        lambda _, args, kwargs: counts.update(decoder=counts["decoder"] + (args or [kwargs["input_ids"]])[0].numel()),
        with_kwargs=True,
    )
    head.register_forward_pre_hook(lambda _, args: counts.update(head=counts["head"] + args[0].shape[:-1].numel()))
    return counts


def test_shared_tokens_are_computed_once_and_only_scored_ones_have_logits():
    model = model_of("llama", 0)
    lm = CausalLM(model, byte_tokenizer(eos_token="<end>"), LENGTH, 100)
    assert lm._shares
    counts = count_tokens(model)
    choices = [(question, answer) for question in QUESTIONS for answer in (" 1", "22", "3")]

    lm.loglikelihood(instances("loglikelihood", choices), disable_tqdm=True)

    prefix = len(EXAMPLES) + len("Q: ")
    rest = max(map(len, QUESTIONS)) - prefix
    # The prefix, what differs between the questions, and the first token of answers that have two.
    assert counts["decoder"] == prefix + len(QUESTIONS) * rest + len(QUESTIONS) * 2 * 1
    assert counts["head"] == 1 + len(QUESTIONS) + len(QUESTIONS) * 2


def test_a_generated_row_reads_its_examples_once():
    model = model_of("llama", 0)
    lm = CausalLM(model, byte_tokenizer(eos_token="<end>"), LENGTH, 2)
    assert lm._shares
    counts = count_tokens(model)
    options = {"until": ["\n\n"], "max_gen_toks": 1, "do_sample": False}

    lm.generate_until(instances("generate_until", [(text, options) for text in QUESTIONS]), disable_tqdm=True)

    prefix = len(EXAMPLES) + len("Q: ")
    rests = sorted(len(text) - prefix for text in QUESTIONS)
    assert counts["decoder"] == prefix + 2 * rests[4] + 2 * rests[2] + rests[0]


def tokens(text):
    return tuple(text.encode())


def test_batches_hold_what_starts_alike_and_the_longest_come_first():
    shared = tokens("x" * 40)
    units = [Unit(shared + tokens("a" * number), (number,)) for number in (1, 3, 2)]
    units += [Unit(tokens("something else entirely"), (7,)), Unit(tokens("y"), (8,))]

    assert plan(units, 2, True) == [
        Batch((3, 2), shared + tokens("")), Batch((1,), shared), Batch((7, 8)),
    ]  # fmt: skip
    assert plan(units, 2, False) == [Batch((3, 2)), Batch((1, 7)), Batch((8,))]


def test_equal_contexts_keep_a_token_to_go_on_from():
    context = tokens("z" * 30)

    (batch,) = plan([Unit(context, (0,)), Unit(context, (1,))], 2, True)

    assert batch == Batch((0, 1), context[:-1])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_no_batch_is_larger_than_was_asked_for_and_no_request_is_lost(size):
    generator = torch.Generator().manual_seed(size)
    examples = [tuple(torch.randint(0, 9, (23,), generator=generator).tolist()) for _ in range(3)]
    units = []
    for number in range(41):
        length, which, weight = torch.randint(1, 5, (3,), generator=generator).tolist()
        start = examples[which - 1] if which < 4 else ()
        units.append(Unit(start + tuple(range(length)), (number,), weight, min(weight, size)))

    batches = plan(units, size, True)

    assert sorted(number for batch in batches for number in batch.members) == list(range(41))
    assert all(sum(units[number].weight for number in batch.members) <= size for batch in batches)
    for batch in batches:
        for number in batch.members:
            assert units[number].context[: len(batch.prefix)] == batch.prefix
