"""What the tests of `attnres inspect` share: a tokenizer of bytes and pairs, checkpoints, and made-up measurements."""

from helpers import random_attnres
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from attnres.analysis import DepthWeights
from attnres.analysis.depth_weights import Mixture, Token

TEXT = "The quick brown fox; läuft über <b>den</b> Zaun.\nAnd so on, and so on.\n" * 3


def tiny_tokenizer(start: bool = False) -> PreTrainedTokenizerFast:
    """A token per byte, but for one merged pair.

    Args:
        start: put a special token before every text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", *alphabet, "so"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("s", "o")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def tiny_model(residual_mode: str = "block", **options):
    """5 decoder layers in blocks of 2, 2 and 1 that take 64 tokens, for `tiny_tokenizer`."""
    return random_attnres("llama", residual_mode, vocab_size=258, max_position_embeddings=64, **options)


def save_checkpoint(folder, residual_mode: str = "block", **options):
    """A checkpoint with its tokenizer; returns the folder."""
    tiny_model(residual_mode, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def made_up(num_layers: int = 3, name: str = "made-up", residual_mode: str = "full", tokens=("a", "b")) -> DepthWeights:
    """A measurement with known numbers: weight halves with each older source, the oldest takes the rest."""
    mixtures = []
    for index in range(2 * num_layers + 1):
        is_output = index == 2 * num_layers
        size = index + 1 if residual_mode == "full" else 1 + (index + 1) // 2
        mean = [0.5 ** (size - column if column else size - 1) for column in range(size)]
        mixtures.append(
            Mixture(
                layer=None if is_output else index // 2,
                kind="output" if is_output else ("attention", "mlp")[index % 2],
                partial=residual_mode == "block" and index % 2 == 1,
                mean=mean,
                std=[value / 10 for value in mean],
                min=[value / 2 for value in mean],
                max=[min(1.0, value * 1.5) for value in mean],
                entropy=0.1 * index,
            )
        )
    outputs = [f"output {number}" for number in range(len(mixtures[-1].mean) - 1)]
    shares = [[1 / len(mixture.mean)] * len(mixture.mean) for mixture in mixtures]
    return DepthWeights(
        model=name,
        family="llama",
        residual_mode=residual_mode,
        num_layers=num_layers,
        layers_per_block=1 if residual_mode == "block" else None,
        text="text.txt",
        num_tokens=1234,
        context=64,
        sources=["embedding", *outputs],
        short_sources=["emb", *(str(number) for number in range(len(outputs)))],
        mixtures=mixtures,
        tokens=[Token(number, text) for number, text in enumerate(tokens)],
        token_weights=[[share] * len(tokens) for share in shares],
    )
