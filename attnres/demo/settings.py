"""Sizes and hyper-parameters of the demo."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Settings:
    """All settings of a run. Learning rates are AdamW's peak learning rates; lengths are in tokens."""

    seed: int = 0
    # backbone
    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    decoder_sparse_step: int = 2
    initializer_range: float = 0.09
    num_blocks: int = 6
    # training
    sequence_length: int = 128
    batch_size: int = 8
    steps: int = 320
    warmup_steps: int = 32
    learning_rate: float = 1.6e-2
    final_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    # evaluation
    eval_every: int = 20
    eval_batch_size: int = 16
    held_out_sequences: int = 40
    document_bytes: int = 16_384
    held_out_bytes: int = 200_000
    resamples: int = 10_000  # bootstrap resamples of the files, for the intervals

    @property
    def half_way_step(self) -> int:
        """Returns the step after which the plain model is saved for conversion."""
        return self.steps // 2

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length


FULL = Settings()
QUICK = replace(
    FULL,
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    moe_intermediate_size=64,
    num_blocks=4,
    sequence_length=64,
    steps=120,
    warmup_steps=12,
    held_out_sequences=16,
    document_bytes=4_096,
    held_out_bytes=16_384,
)
