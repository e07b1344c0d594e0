"""The model card: fills the template in card.yaml."""

import re
from pathlib import Path
from urllib.parse import quote

import yaml
from huggingface_hub import ModelCard

from ..configuration_attnres import AttnResConfig
from ..conversion.inspection import EXPERT_KEYS, ROUTED_KEYS, shown_size
from ..eval.results import SAMPLE
from ..eval.suites import ROWS
from .front_matter import front_matter, shown_value
from .provenance import Provenance

TEXTS = yaml.safe_load(Path(__file__).with_name("card.yaml").read_text(encoding="utf-8"))
# Labels, and the keys under which different families store the value.
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
MEASURED_WITH = ("lm_eval", "transformers", "torch", "attnres")
_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~$])")


def model_card(
    name: str,
    facts: dict,
    config: AttnResConfig,
    provenance: Provenance,
    rows: dict[str, dict],
    smoke: dict[str, dict],
    snippets: dict[str, str],
    ran_with: str | None,
    figures: dict[str, str],
) -> ModelCard:
    """Writes the card of a checkpoint with the hub id or folder name `name`.

    `facts` come from `conversion.inspection.inspect_checkpoint`. `rows` has the results of benchmarks and `smoke` those
    of the sample suite. `snippets` and `figures` (Markdown) have titles as keys. `ran_with` names the packages that ran
    the snippets; None if they were not run.
    """
    layers = facts["decoder_layers"]
    return ModelCard.from_template(
        front_matter(name.rpartition("/")[2], facts["family"], provenance, rows),
        template_str=TEXTS["template"] + "\n",  # Jinja drops the last line break
        name=name,
        paper="[Attention Residuals](https://arxiv.org/abs/2603.15031) (AttnRes; Kimi Team, 2026)",
        facts=facts,
        mode=config.residual_mode,
        modes=TEXTS["modes"],
        layers=layers,
        depth_share=f"{facts['depth_parameters'] / facts['parameters']:.2%}",
        pseudo_queries=TEXTS["pseudo_queries"][facts["depth_tensors"]].format(2 * layers + 1),
        backbone=_backbone_rows(config.backbone_config),
        size=shown_size(facts["bytes"]),
        snippets=snippets,
        ran_with=ran_with,
        rows=rows,
        smoke=smoke,
        sample=SAMPLE,
        benchmarks=ROWS,
        published={name: row.paper for name, row in ROWS.items()},
        conditions=sorted({_conditions(result) for result in rows.values()}),
        figures=figures,
        report=provenance.report,
        conversion=TEXTS["conversion"],
        provenance=provenance,
        shown_value=shown_value,
        plain=plain,
        quote=quote,
    )


def plain(value) -> str:
    """Returns an untrusted value as one line of text that Markdown does not interpret."""
    text = "".join(each if each.isprintable() else " " for each in str(value))
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _backbone_rows(backbone) -> list[tuple[str, str]]:
    found = (
        (label, next((getattr(backbone, key) for key in keys if getattr(backbone, key, None)), None))
        for label, keys in BACKBONE
    )
    return [(label, f"{value:,}" if isinstance(value, int) else plain(value)) for label, value in found if value]


def _conditions(result: dict) -> str:
    settings = result["settings"]
    facts = {name: result["versions"].get(name) for name in MEASURED_WITH}
    facts["dtype"] = result["model"].get("dtype")
    facts["batch size"] = settings.get("batch_size")
    facts["seed"] = settings.get("seed")
    facts["prompts"] = "in the chat template" if settings.get("chat_template") else None
    return plain(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
