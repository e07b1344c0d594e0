"""Tests statistics of depth weights over a text: equal to those of all weights at once, in bounded memory."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_inspect import TEXT, made_up, tiny_model, tiny_tokenizer

from attnres.analysis import DepthWeights, depth_weights
from attnres.analysis.text import PIECE, read_pieces


def all_weights(model, ids, context, prefix=()):
    """`[T, n]` weights of every mixture, chunk by chunk."""
    chunks = []
    for start in range(0, len(ids), context):
        inputs = torch.tensor([[*prefix, *ids[start : start + context]]])
        with torch.no_grad():
            found = model(inputs, output_depth_weights=True).depth_weights
        chunks.append([weights[0, len(prefix) :].double() for weights in found])
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize("start", [False, True], ids=["plain", "starts"])
def test_statistics_are_those_of_all_tokens_at_once(mode, start):
    model, tokenizer = tiny_model(mode), tiny_tokenizer(start)
    result = depth_weights(model, tokenizer, TEXT, context=20)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    expected = all_weights(model, ids, 20 - start, prefix=[0] * start)
    assert result.num_tokens == len(ids) == len(expected[0])
    assert len(result.mixtures) == 11
    for mixture, weights in zip(result.mixtures, expected, strict=True):
        assert mixture.num_sources == weights.shape[1]
        for name, value in (
            ("mean", weights.mean(0)),
            ("std", weights.std(0, correction=0)),
            ("min", weights.amin(0)),
            ("max", weights.amax(0)),
        ):
            torch.testing.assert_close(
                torch.tensor(getattr(mixture, name), dtype=torch.float64), value, atol=1e-6, rtol=0
            )
        entropy = -(weights * weights.log()).nansum(1).mean().item()
        assert mixture.entropy == pytest.approx(entropy, abs=1e-6)
        assert mixture.effective_sources == pytest.approx(math.exp(entropy), abs=1e-5)


def test_mixtures_know_their_layer_kind_and_partial_sum():
    block = depth_weights(tiny_model("block"), tiny_tokenizer(), "some text").mixtures
    assert [mixture.name for mixture in block[:3]] == ["layer 0 attention", "layer 0 MLP", "layer 1 attention"]
    assert block[-1].name == "output" and block[-1].layer is None
    # Blocks of 2, 2 and 1 decoder layers: only the first sublayer of a block has no partial sum.
    assert [mixture.partial for mixture in block] == [False, True, True, True] * 2 + [False, True, False]
    assert not any(mixture.partial for mixture in depth_weights(tiny_model("full"), tiny_tokenizer(), "text").mixtures)


def test_sources_are_named_in_the_order_of_depth():
    block = depth_weights(tiny_model("block"), tiny_tokenizer(), "some text")
    assert block.sources == ["embedding", "block 1 (layers 0 to 1)", "block 2 (layers 2 to 3)", "block 3 (layer 4)"]
    assert block.short_sources == ["emb", "b1", "b2", "b3"] and block.layers_per_block == 2
    full = depth_weights(tiny_model("full"), tiny_tokenizer(), "some text")
    assert full.sources[:3] == ["embedding", "output of layer 0 attention", "output of layer 0 MLP"]
    assert full.short_sources[:4] == ["emb", "0a", "0m", "1a"] and full.layers_per_block is None
    assert len(full.sources) == full.mixtures[-1].num_sources == 11


def test_the_first_tokens_keep_their_own_weights_and_text():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    result = depth_weights(model, tokenizer, TEXT, context=20, keep_tokens=50)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    expected = all_weights(model, ids, 20)
    assert [token.id for token in result.tokens] == ids[:50]
    assert [token.text for token in result.tokens[:4]] == ["T", "h", "e", " "]
    umlaut = [token.text for token in result.tokens if "ä" in token.text]
    assert umlaut == ["ä", "ä"]  # two bytes, two tokens, each shown as the character that it belongs to
    for kept, weights in zip(result.token_weights, expected, strict=True):
        torch.testing.assert_close(torch.tensor(kept, dtype=torch.float64), weights[:50], atol=1e-5, rtol=0)


def test_a_text_in_pieces_gives_what_the_whole_gives():
    whole = depth_weights(tiny_model(), tiny_tokenizer(), TEXT)
    middle = TEXT.index(" über")
    assert depth_weights(tiny_model(), tiny_tokenizer(), [TEXT[:middle], TEXT[middle:]]) == whole
    ids = tiny_tokenizer()(TEXT)["input_ids"]
    assert depth_weights(tiny_model(), None, token_ids=ids).mixtures == whole.mixtures


def test_a_text_is_read_no_further_than_the_chunk_at_hand():
    read, seen_when_read = 0, []

    def pieces():
        nonlocal read
        for _ in range(1000):
            read += 1
            yield "word and "

    def progress(count):
        seen_when_read.append(read)

    result = depth_weights(tiny_model(), tiny_tokenizer(), pieces(), context=9, max_tokens=90, progress=progress)
    assert result.num_tokens == 90
    assert seen_when_read == list(range(1, 11))  # pieces of 9 tokens, one per chunk


def test_the_number_of_tokens_kept_does_not_grow_with_the_text():
    short, long = (depth_weights(tiny_model(), tiny_tokenizer(), TEXT * times, keep_tokens=5) for times in (1, 4))
    assert [len(rows) for rows in short.token_weights] == [len(rows) for rows in long.token_weights] == [5] * 11
    assert len(long.tokens) == 5 and long.num_tokens == 4 * short.num_tokens


def test_summary_numbers_of_known_weights():
    summary = made_up(2).summary()
    last = summary["mixtures"][-1]
    assert last["name"] == "output" and last["sources"] == 5
    assert last["newest"] == 0.5 and last["embedding"] == 0.0625 and last["entropy"] == pytest.approx(0.4)
    assert last["effective_sources"] == pytest.approx(math.exp(0.4))
    assert summary["overall"]["all"]["mixtures"] == 4  # one source leaves no choice
    assert summary["overall"]["attention"]["mixtures"] == 1 and summary["overall"]["mlp"]["mixtures"] == 2
    assert summary["overall"]["mlp"]["embedding"] == pytest.approx((0.5 + 0.125) / 2)
    assert summary["overall"]["mlp"]["newest"] == 0.5


def test_a_source_is_ignored_below_a_tenth_of_the_uniform_weight():
    weights = made_up(2)
    mixture = replace(weights.mixtures[3], mean=[0.024, 0.026, 0.9, 0.05])  # a tenth of 1/4 is 0.025
    assert mixture.ignored == [0]
    weights.mixtures[3] = mixture
    summary = weights.summary()
    assert summary["ignored"] == {"embedding": {"by": ["layer 1 MLP"], "seen_by": 5}}
    assert summary["mixtures"][3]["ignored"] == ["embedding"]
    assert summary["overall"]["mlp"]["ignoring"] == 1 and summary["overall"]["attention"]["ignoring"] == 0
    assert "0.1/n" in summary["ignored_rule"]


def test_what_is_saved_loads_as_it_was(tmp_path):
    result = depth_weights(tiny_model(), tiny_tokenizer(), TEXT, name="a model", text_name="a text")
    result.save(tmp_path / "weights.json")
    assert DepthWeights.load(tmp_path / "weights.json") == result
    content = json.loads((tmp_path / "weights.json").read_text())
    assert content["format"] == "attnres-depth-weights/1" and content["summary"] == result.summary()
    assert content["model"] == "a model" and content["text"] == "a text"
    assert [path.name for path in tmp_path.iterdir()] == ["weights.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "holds no depth weights"),
        ("\x89PNG", "holds no depth weights"),
        ('{"format": "attnres-depth-weights/9"}', "format must be 'attnres-depth-weights/1', got"),
        ('{"format": "attnres-depth-weights/1", "model": "m"}', "holds no depth weights .KeyError: 'family'"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        DepthWeights.load(tmp_path / "x.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": ""}, "need at least 2 tokens, got 0"),
        ({"text": "T"}, "at least 2 tokens, got 1"),
        ({"text": TEXT, "max_tokens": 1}, "at least 2 tokens, got 1"),
        ({"text": TEXT, "context": 65}, "at most 64 tokens, got 65"),
        ({"text": TEXT, "token_ids": [1]}, "either a tokenizer and a text, or token_ids"),
        ({"token_ids": [1, 258]}, "token id 258, but the model has 258 embeddings"),
    ],
)
def test_a_bad_argument_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        depth_weights(tiny_model(), tiny_tokenizer(), **options)
    assert "\n" not in str(error.value)


def test_a_context_must_hold_more_than_what_starts_every_text():
    with pytest.raises(ValueError, match="context must be above 1"):
        depth_weights(tiny_model(), tiny_tokenizer(start=True), TEXT, context=1)


def test_a_model_without_depth_mixing_is_refused():
    with pytest.raises(ValueError, match='need residual_mode "block" or "full"; this model mixes nothing'):
        depth_weights(tiny_model("standard"), tiny_tokenizer(), TEXT)


def test_weights_that_are_not_finite_are_refused():
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[20:] = math.nan
    with pytest.raises(ValueError, match="depth weights are not finite"):
        depth_weights(model, tiny_tokenizer(), TEXT)


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    depth_weights(model, tiny_tokenizer(), TEXT)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "text",
    ["word " * (PIECE // 2), "x" * (3 * PIECE + 5), "", "  \n " * PIECE, "ein Wort\r\n" * PIECE],
    ids=["words", "no-spaces", "empty", "spaces", "line-ends"],
)
def test_pieces_are_the_text_in_bounded_parts(text):
    pieces = list(read_pieces(io.StringIO(text, newline=""), "name"))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 2 * PIECE for piece in pieces)


def test_pieces_are_cut_at_ends_of_lines():
    pieces = list(read_pieces(io.StringIO("some words.\n" * PIECE), "name"))
    assert len(pieces) > 2 and all(piece[-1] == "\n" for piece in pieces)
