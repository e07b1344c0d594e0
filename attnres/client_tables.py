"""Registers AttnRes models in tables where other libraries look up a `model_type` or a class name."""

import sys

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

# Trainer (label smoothing), pipelines, model cards, lm-eval and transformers' model tests look up a class's task here.
CLASSES = {
    "MODEL_MAPPING_NAMES": "AttnResModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "AttnResForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "AttnResForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "AttnResForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "AttnResForQuestionAnswering",
}
for _table, _class in CLASSES.items():
    getattr(modeling_auto, _table).setdefault("attnres", _class)

# Keys that PEFT's prompt methods read from the dictionary of a configuration.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def sizes(backbone: PreTrainedConfig) -> dict[str, int]:
    """Returns the backbone's sizes that clients expect at the top level of a configuration's dictionary."""
    return {key: getattr(backbone, key) for key in SIZES if getattr(backbone, key, None) is not None}


def offer_backbone_defaults(model_type: str, backbone_type: str):
    """Copies PEFT's defaults for a backbone to a model type, in every table of PEFT that has any.

    PEFT asks a configuration for its dictionary right before it looks up a default by `model_type`, which all AttnRes
    models share. `to_dict` calls this function, so that the tables always hold the defaults of the model at hand.
    """
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:  # PEFT is not in use
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
