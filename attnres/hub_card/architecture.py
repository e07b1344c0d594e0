"""The card's sections about the model: architecture, depth, conversion."""

from ..configuration_attnres import AttnResConfig
from ..conversion.inspection import EXPERT_KEYS, ROUTED_KEYS, shown_size
from .markdown import number, plain, table

MODES = {
    "block": "block: every sublayer mixes the embedding, the sums of earlier blocks, and the partial sum of its own",
    "full": "full: every sublayer mixes the embedding and the outputs of all sublayers before it",
    "standard": "standard: plain residuals in the same code, the baseline",
}
# What is said of the backbone, and under which names families keep it.
BACKBONE = (
    ("Hidden size", ("hidden_size",)),
    ("Attention heads", ("num_attention_heads",)),
    ("Key-value heads", ("num_key_value_heads",)),
    ("MLP size", ("intermediate_size",)),
    ("Experts", EXPERT_KEYS),
    ("Experts per token", ROUTED_KEYS),
    ("Vocabulary", ("vocab_size",)),
    ("Context (tokens)", ("max_position_embeddings", "model_max_length")),
)
CONVERSION = (
    ("Largest logit difference", "max_logit_difference", "{:.2e}"),
    ("Mean logit difference", "mean_logit_difference", "{:.2e}"),
    ("99.9 % of logit differences are below", "p999_logit_difference", "{:.2e}"),
    ("Standard deviation of the logits", "logit_std", "{:.2e}"),
    ("Same most likely token", "top1_agreement", "{:.2%}"),
    ("Perplexity of the source", "source_perplexity", "{:.4f}"),
    ("Perplexity of the result", "result_perplexity", "{:.4f}"),
    ("Relative error of the logits, in float32", "relative_logit_error", "{:.1e}"),
    ("Effective epsilon of the norms, over the hidden states' mean square", "epsilon_effect", "{:.1e}"),
)


def architecture(facts: dict, config: AttnResConfig) -> str:
    """A table of the whole model.

    Args:
        facts: as `conversion.inspection.inspect_checkpoint` gives them.
    """
    layers = facts["decoder_layers"]
    rows = [
        ("Backbone", f"`{facts['family']}` of transformers"),
        ("Residual mode", MODES[config.residual_mode]),
        ("Decoder layers", f"{layers} ({2 * layers} sublayers: attention and MLP)"),
    ]
    if config.residual_mode == "block":
        rows += [
            ("Blocks", f"{facts['blocks']} of up to {facts['layers_per_block']} decoder layers"),
            ("Sources that the output mixes", f"{facts['blocks'] + 1}: the embedding and {facts['blocks']} blocks"),
        ]
    elif config.residual_mode == "full":
        rows.append(("Sources that the output mixes", f"{2 * layers + 1}: the embedding and {2 * layers} sublayers"))
    rows += [
        ("Parameters, total", number(facts["parameters"])),
        ("Parameters, active per token", number(facts["active_parameters"])),
        ("Parameters, depth mixer", f"{number(facts['depth_parameters'])}, {_share(facts)} of all"),
        ("Pseudo-queries", _queries(facts, layers)),
        *_backbone_rows(config.backbone_config),
        ("Weights", f"{', '.join(facts['dtypes'])}; {shown_size(facts['bytes'])} in {_files(facts['shards'])}"),
    ]
    return table(("", ""), rows)


def depth(config: AttnResConfig) -> str:
    """How many sources each block's sublayers mix, in block mode; otherwise a sentence."""
    layers, per_block = config.num_hidden_layers, config.layers_per_block
    if config.residual_mode == "standard":
        return "No depth mixing: each sublayer reads the sum of the embedding and all outputs before it."
    if config.residual_mode == "full":
        return (
            "Sublayer i (from 1) mixes i sources: the embedding and the outputs before it. "
            f"The output mixes {2 * layers + 1}."
        )
    rows = []
    for block, first in enumerate(range(0, layers, per_block), 1):
        last = min(first + per_block, layers) - 1
        span = str(first) if first == last else f"{first} to {last}"
        rows.append((block, span, 2 * (last - first + 1), block, block + 1))
    rows.append(("output", "", "", len(rows) + 1, ""))
    header = ("Block", "Decoder layers", "Sublayers", "Sources of its first sublayer", "Sources of the others")
    return table(header, rows, right=range(1, 5))


def conversion(report: dict, facts: dict) -> str:
    """What was measured when the checkpoint was converted."""
    rows = [
        (label, form.format(report[key]))
        for label, key, form in CONVERSION
        if isinstance(report.get(key), int | float) and not isinstance(report[key], bool)
    ]
    text = (
        f"Converted from the {plain(report.get('source_layout'))} layout and run beside its source on the same prompts "
        f"({plain(report.get('prompts'))}; {plain(report.get('tokens'))} tokens, {plain(report.get('dtype'))}). "
        "All of it is in `conversion_report.json`.\n\n" + table(("", ""), rows, right=[1])
    )
    if facts["depth_tensors"] == "trained":
        text += "\n\nThese figures are of the conversion. The pseudo-queries have been trained since, or before."
    return text


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _share(facts: dict) -> str:
    return f"{facts['depth_parameters'] / facts['parameters']:.2%}"


def _queries(facts: dict, layers: int) -> str:
    if facts["depth_tensors"] == "none":
        return "none"
    state = {
        "pseudo-queries are zero": "exactly zero: every mixture is a plain mean, and the model computes what its plain "
        "backbone computes until they are trained",
        "trained": "trained",
    }[facts["depth_tensors"]]
    return f"{2 * layers + 1}, {state}"


def _backbone_rows(backbone) -> list[tuple[str, str]]:
    found = (
        (label, next((getattr(backbone, key) for key in keys if getattr(backbone, key, None)), None))
        for label, keys in BACKBONE
    )
    return [(label, f"{value:,}" if isinstance(value, int) else plain(value)) for label, value in found if value]
