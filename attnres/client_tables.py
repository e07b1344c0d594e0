"""Registers AttnRes models in the tables where other libraries look up a `model_type` or class name."""

import sys

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

# Label smoothing in Trainer, pipelines, model cards, lm-eval and tests of models ask these tables what a class is for.
CLASSES = {
    "MODEL_MAPPING_NAMES": "AttnResModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "AttnResForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "AttnResForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "AttnResForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "AttnResForQuestionAnswering",
}
for _table, _class in CLASSES.items():
    getattr(modeling_auto, _table).setdefault("attnres", _class)

# What PEFT's prompt methods read from the dictionary of a configuration.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def sizes(backbone: PreTrainedConfig) -> dict[str, int]:
    """Sizes of a backbone that clients expect at the top of a configuration's dictionary."""
    return {key: getattr(backbone, key) for key in SIZES if getattr(backbone, key, None) is not None}


def offer_backbone_defaults(model_type: str, backbone_type: str):
    """Gives a model type the defaults that PEFT has for a backbone, in every table that it has; none where it has none.

    PEFT asks a configuration for its dictionary right before it looks a default up, and has nothing else to go by:
    called from there, the tables hold what belongs to the model at hand.
    """
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:  # nobody asks
        return
    names = (name for name in vars(constants) if name.startswith("TRANSFORMERS_MODELS_TO_"))
    tables = [getattr(constants, name) for name in names]
    adaption = sys.modules.get("peft.tuners.adaption_prompt.config")
    if adaption is not None:
        tables.append(adaption.TRANSFORMERS_MODEL_CONFIG)
    for table in tables:
        if backbone_type in table:
            table[model_type] = table[backbone_type]
        else:
            table.pop(model_type, None)
