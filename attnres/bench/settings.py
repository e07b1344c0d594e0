"""Options of a benchmark, their defaults and rules, in one place."""

from dataclasses import dataclass, field

MEASURES = {
    "prefill": "forward of a prompt that fills a cache, as generate() starts; logits of the last token only",
    "decode": "one token per sequence with a cache of --context tokens, per step",
    "compiled-decode": "the same by torch.compile with a static cache, on a GPU with CUDA graphs",
    "train": "forward with loss, and backward; without the optimiser, which is the same for all",
    "generate": "generate() end to end: a prompt of --context tokens, then --new-tokens tokens, greedy",
    "memory": "bytes saved for backward; peak memory of a training step and of a prefill",
    "depth": "the residual path alone: sublayers and their norms replaced by the identity",
}
DEFAULT_MEASURES = tuple(name for name in MEASURES if not name.startswith("compiled"))
DTYPES = ("float32", "bfloat16", "float16")

# Qwen3-like, with a small vocabulary so that the head does not hide what the residual path costs.
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
    """Size of the residual path that is measured alone.

    Attributes:
        sublayers: attention and MLP count as one each; even.
        sublayers_per_block: the paper's S; even.
        tokens, hidden_size: T and D.
    """

    sublayers: int
    sublayers_per_block: int
    tokens: int
    hidden_size: int

    def __str__(self):
        return f"{self.sublayers},{self.sublayers_per_block},{self.tokens},{self.hidden_size}"

    def __post_init__(self):
        for name in ("sublayers", "sublayers_per_block"):
            if getattr(self, name) % 2:
                raise ValueError(
                    f"depth shape: {name} must be even, as a decoder layer is two sublayers; got {getattr(self, name)}"
                )
        if self.sublayers_per_block > self.sublayers:
            raise ValueError(
                f"depth shape: sublayers_per_block must be at most sublayers={self.sublayers}, "
                f"got {self.sublayers_per_block}"
            )


@dataclass(frozen=True)
class Settings:
    """Everything that determines a run. Where there are several values, each combination is measured.

    Attributes:
        backbone: configuration of the backbone, used where `model` is not given.
        model: folder, config.json or hub id whose configuration is used, with random weights.
        depths: decoder layers; empty: as the configuration says.
        num_blocks: at most this many blocks; or, where given, layers_per_block: decoder layers per block.
        tokens: sequence lengths of prefill, train and memory, batch 1.
        batches, context, new_tokens: of decode; generate has batch 1.
        implementations: of the depth mixing, a variant for each; empty: only the one that is shipped as default.
        rounds: in each of them every variant is measured once.
    """

    arms: tuple[str, ...]
    backbone: dict = field(default_factory=lambda: BACKBONE)
    model: str | None = None
    depths: tuple[int, ...] = ()
    num_blocks: tuple[int, ...] = (8,)
    layers_per_block: tuple[int, ...] = ()
    tokens: tuple[int, ...] = (256,)
    batches: tuple[int, ...] = (1, 16)
    context: int = 128
    new_tokens: int = 8
    dtypes: tuple[str, ...] = ("float32",)
    measures: tuple[str, ...] = DEFAULT_MEASURES
    implementations: tuple[str, ...] = ()
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
