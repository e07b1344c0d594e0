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
    """Adds adapters to the model and freezes everything else but the depth mixer."""
    if find_spec("peft") is None:
        raise ValueError("--train lora needs peft, which is not installed: pip install 'attention-residuals[train]'")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_rank,
        lora_alpha=2 * arguments.lora_rank if arguments.lora_alpha is None else arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules="all-linear",
        modules_to_save=["depth_mixer"],
    )
    return get_peft_model(model, config)


def save_with_adapter(
    folder: Path, model: AttnResForCausalLM, tokenizer: PreTrainedTokenizerBase, base: Path | None = None
):
    """Replaces a folder with a saved adapter by one with the merged model and the adapter in a subfolder.

    `model` is the model before training, so that this works for any kind of distributed training. `base` is the final
    path of the subfolder `BASE`, which gets the converted model and is named by the adapter: otherwise PEFT would load
    the adapter of a converted model onto the plain model and ignore the depth mixer.
    """
    from peft import PeftConfig, PeftModel

    adapter, converted = folder.with_name(ADAPTER), folder.with_name(BASE)
    os.rename(folder, adapter)
    if base is not None:
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        config = PeftConfig.from_pretrained(str(adapter))
        config.base_model_name_or_path = str(base)
        config.save_pretrained(str(adapter))
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in (adapter, converted) if base is not None else (adapter,):
        os.rename(path, folder / path.name)
