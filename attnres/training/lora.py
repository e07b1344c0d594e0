"""LoRA adapters (PEFT) on every linear layer, trained together with the whole depth mixer."""

import os
from importlib.util import find_spec
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import AttnResForCausalLM
from .arguments import RunArguments

ADAPTER, BASE = "adapter", "base"


def with_adapters(model: AttnResForCausalLM, arguments: RunArguments) -> nn.Module:
    """The model with adapters; all else but the depth mixer is frozen."""
    if find_spec("peft") is None:
        raise ValueError("--train lora needs peft, which is not installed: pip install 'attention-residuals[train]'")
    from peft import LoraConfig, get_peft_model

    alpha = 2 * arguments.lora_rank if arguments.lora_alpha is None else arguments.lora_alpha
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=arguments.lora_rank,
            lora_alpha=alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules="all-linear",
            modules_to_save=["depth_mixer"],
        ),
    )


def save_with_adapter(
    folder: Path, model: AttnResForCausalLM, tokenizer: PreTrainedTokenizerBase, base: Path | None = None
):
    """Turns a folder with a saved adapter into one with the merged model, the adapter in a folder of its own.

    Args:
        model: what was adapted, as it was before training. Loading it anew works however training had divided it.
        base: where the folder's subfolder `BASE` will be. It is written if a path is given, and the adapter names it:
            PEFT would put the adapter of a converted model on the plain one, and leave the depth mixer out.
    """
    from peft import PeftConfig, PeftModel

    adapter = folder.with_name(ADAPTER)
    os.rename(folder, adapter)
    converted = folder.with_name(BASE)
    if base is not None:
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        config = PeftConfig.from_pretrained(str(adapter))
        config.base_model_name_or_path = str(base)
        config.save_pretrained(str(adapter))
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    os.rename(adapter, folder / ADAPTER)
    if base is not None:
        os.rename(converted, folder / BASE)
