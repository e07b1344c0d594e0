"""Options of a benchmark with their defaults and rules."""

from collections.abc import Collection
from dataclasses import dataclass, field

MEASURES = {
    "prefill": "forward pass over a prompt that fills a cache, as generate() starts; logits of the last token only",
    "decode": "one token per sequence with a cache of --context tokens; time per step",
    "compiled-decode": "decode with torch.compile and a static cache, on a GPU with CUDA graphs",
    "train": "forward with loss, and backward; without the optimizer, which costs every variant the same",
    "generate": "generate() end to end: a prompt of --context tokens, then --new-tokens tokens, greedy",
    "memory": "bytes saved for backward; peak memory of a training step and of a prefill",
    "depth": "the residual path alone: sublayers and their norms are replaced by the identity",
}
DEFAULT_MEASURES = tuple(name for name in MEASURES if not name.startswith("compiled"))
DTYPES = ("float32", "bfloat16", "float16")

# Qwen3-like, with a small vocabulary so that the head does not hide the cost of the residual path.
BACKBONE = {
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
QUICK_BACKBONE = BACKBONE | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class DepthShape:
    """Size of the residual path that is measured alone; `sublayers_per_block` is the paper's S."""

    sublayers: int
    sublayers_per_block: int
    tokens: int
    hidden_size: int

    def __str__(self):
        return f"{self.sublayers},{self.sublayers_per_block},{self.tokens},{self.hidden_size}"

    def __post_init__(self):
        for name, value in (("sublayers", self.sublayers), ("sublayers_per_block", self.sublayers_per_block)):
            if value % 2:
                raise ValueError(
                    f"depth shape: {name} must be even, because a decoder layer is two sublayers; got {value}"
                )
        if self.sublayers_per_block > self.sublayers:
            raise ValueError(
                f"depth shape: sublayers_per_block must be at most sublayers={self.sublayers}, "
                f"got {self.sublayers_per_block}"
            )


@dataclass(frozen=True)
class Settings:
    """Settings of a run. Every combination of the values in tuples is measured."""

    arms: tuple[str, ...]  # names of the variants; `plain` is always included
    backbone: dict = field(default_factory=lambda: BACKBONE)  # unless `model` is given
    model: str | None = None  # folder, config.json or hub id of a configuration, for random weights
    depths: tuple[int, ...] = ()  # numbers of decoder layers; empty: the number in the configuration
    num_blocks: tuple[int, ...] = (8,)
    layers_per_block: tuple[int, ...] = ()  # replaces `num_blocks` if it is not empty
    tokens: tuple[int, ...] = (256,)  # of prefill, train and memory, with batch size 1
    batches: tuple[int, ...] = (1, 16)  # of decode; generate has batch size 1
    context: int = 128
    new_tokens: int = 8
    dtypes: tuple[str, ...] = ("float32",)
    measures: tuple[str, ...] = DEFAULT_MEASURES
    implementations: tuple[str, ...] = ()  # of the depth mixing; empty: only the default
    depth_shape: DepthShape = DepthShape(32, 8, 512, 2048)
    rounds: int = 5
    warmup: int = 1
    device: str | None = None
    threads: int | None = None
    seed: int = 0


DEFAULT_ARMS = ("plain", "standard", "block", "full", "stacked", "fla-naive", "fla-fused")
FULL = Settings(DEFAULT_ARMS)
QUICK = Settings(
    DEFAULT_ARMS,
    backbone=QUICK_BACKBONE,
    tokens=(128,),
    batches=(1,),
    context=32,
    new_tokens=4,
    depth_shape=DepthShape(32, 8, 128, 256),
    rounds=3,
)


def check_names(kind: str, given: Collection[str], known: Collection[str]):
    """Raises ValueError if a given name is unknown."""
    for name in given:
        if name not in known:
            raise ValueError(f"{kind} must be one of {', '.join(known)}; got {name!r}")
