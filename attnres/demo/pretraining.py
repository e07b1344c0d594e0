"""Trains three small models on Python's standard library and compares them on held-out files.

The models are a plain PreNorm mixture of experts, its half-way checkpoint converted to Block AttnRes and trained to the
end, and Block AttnRes trained from scratch.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed

from .. import AttnResConfig, AttnResForCausalLM, plots
from ..analysis.depth_weights import depth_weights
from ..analysis.inspection import panels
from ..hub_card import build as build_card
from .corpus import prepare_data
from .evaluation import compare_logits, evaluate_with_lm_eval, interval_over_files
from .report import interval_text, markdown_table
from .settings import Settings
from .training import History, OptimizerState, train_model

HALF_WAY, PLAIN, CONVERTED, SCRATCH = "half-way", "plain", "converted", "from-scratch"
MODELS = {
    HALF_WAY: "the plain model after half of the steps",
    PLAIN: "PreNorm residuals, all steps",
    CONVERTED: "the half-way checkpoint as Block AttnRes, then the other half of the steps",
    SCRATCH: "Block AttnRes, all steps",
}


def backbone_config(settings: Settings, eos_token_id: int) -> PreTrainedConfig:
    """Returns the configuration of the plain PreNorm mixture of experts."""
    defaults = AutoConfig.for_model("qwen3_moe")
    return AutoConfig.for_model(
        "qwen3_moe",
        **{name: value for name, value in asdict(settings).items() if hasattr(defaults, name)},
        head_dim=settings.hidden_size // settings.num_attention_heads,
        norm_topk_prob=True,
        output_router_logits=True,
        tie_word_embeddings=True,
        max_position_embeddings=settings.sequence_length,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )


def build_plain(settings: Settings, eos_token_id: int) -> PreTrainedModel:
    """Returns the plain model at initialisation."""
    set_seed(settings.seed)
    return AutoModelForCausalLM.from_config(backbone_config(settings, eos_token_id))


def build_scratch(settings: Settings, eos_token_id: int) -> AttnResForCausalLM:
    """Returns the from-scratch model at initialisation; its backbone weights are those of `build_plain`."""
    set_seed(settings.seed)
    config = AttnResConfig.from_backbone(backbone_config(settings, eos_token_id), num_blocks=settings.num_blocks)
    return AttnResForCausalLM(config)


def run_in(folder: Path, settings: Settings) -> dict:
    """Runs the demo in `folder` and returns what `results.json` holds."""
    # Operations of this size gain nothing from more threads, and become many times slower on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    try:
        return _run(folder, settings)
    finally:
        torch.set_num_threads(threads)


def _run(folder: Path, settings: Settings) -> dict:
    data = prepare_data(settings, folder)
    histories, lossless = _train_models(data, settings, folder)
    results = _evaluate_models(data, histories, settings, folder) | {"lossless_start": lossless}
    text = folder / "trainer" / "held-out.txt"
    text.parent.mkdir(exist_ok=True)
    text.write_text(data["evaluated"][0].text, encoding="utf-8")
    build_card(folder / SCRATCH, folder / "hub", text=text, language="en", progress=True)
    shutil.rmtree(folder / "trainer")
    return results


def _train_models(data: dict, settings: Settings, folder: Path) -> tuple[dict[str, History], dict[str, float]]:
    """Trains and saves all models; returns their histories and a check of the conversion."""
    tokenizer, held_out = data["tokenizer"], data["held_out"]
    histories: dict[str, History] = {}
    half_way_states: list[OptimizerState] = []

    def save(model: PreTrainedModel, name: str):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    def save_half_way(model: PreTrainedModel, optimizer_state: OptimizerState):
        save(model, HALF_WAY)
        half_way_states.append(optimizer_state)

    def train(name: str, model: PreTrainedModel, **options):
        places = (data["train"], held_out, settings, folder / "trainer")
        histories[name] = train_model(name, model, *places, **options)
        save(model, name)

    train(PLAIN, build_plain(settings, tokenizer.eos_token_id), at_half_way=save_half_way)

    converted = AttnResForCausalLM.from_backbone(folder / HALF_WAY, num_blocks=settings.num_blocks)
    half_way = AutoModelForCausalLM.from_pretrained(folder / HALF_WAY)
    lossless = compare_logits(converted, half_way, held_out[: settings.eval_batch_size])
    train(CONVERTED, converted, start=half_way_states[0])

    train(SCRATCH, build_scratch(settings, tokenizer.eos_token_id))
    return histories, lossless


def _evaluate_models(data: dict, histories: dict[str, History], settings: Settings, folder: Path) -> dict:
    """Evaluates the saved models and draws the figures."""
    models = {name: AutoModelForCausalLM.from_pretrained(folder / name) for name in MODELS}
    tokens = data["held_out"].flatten().tolist()
    options = {"token_ids": tokens, "context": settings.sequence_length, "keep_tokens": 0, "text_name": "held-out text"}
    mixed = {name: depth_weights(models[name], None, name=name, **options) for name in (CONVERTED, SCRATCH)}
    results = {
        "settings": asdict(settings) | {"half_way_step": settings.half_way_step},
        "threads": torch.get_num_threads(),
        "corpus": data["corpus"],
        "arms": {name: _evaluate(name, model, histories, data, settings) for name, model in models.items()},
        "curves": {name: asdict(history) for name, history in histories.items()},
        "depth_weights": {name: [mixture.mean for mixture in found.mixtures] for name, found in mixed.items()},
    }
    sizes = [document.num_bytes for document in data["evaluated"]]
    for row in results["arms"].values():
        pairs = zip(row["file_bits"], results["arms"][PLAIN]["file_bits"], strict=True)
        row["minus_plain_interval"] = interval_over_files([bits - plain for bits, plain in pairs], sizes, settings)

    step_label = f"optimiser step (1 step = {settings.tokens_per_step:,} tokens)"
    plots.loss_curves(folder / "loss-curves.png", results["curves"], baseline=PLAIN, step_label=step_label)
    plots.depth_panels(folder / "depth-weights.png", [panels(found) for found in mixed.values()])
    return results


def _evaluate(name: str, model: PreTrainedModel, histories: dict[str, History], data: dict, settings: Settings) -> dict:
    history = histories[PLAIN if name == HALF_WAY else name]
    steps = settings.half_way_step if name == HALF_WAY else settings.steps
    return {
        "steps": steps,
        "tokens": steps * settings.tokens_per_step,
        "parameters": model.num_parameters(),
        "held_out_loss": history.held_out_loss[history.held_out_steps.index(steps)],
        **evaluate_with_lm_eval(model, data["tokenizer"], data["documents"], settings, name),
        "training_seconds": None if name == HALF_WAY else round(history.seconds, 1),
    }


def summary(results: dict) -> str:
    """Returns the results as Markdown; the text does not depend on which model is better."""
    rows, plain = [], results["arms"][PLAIN]["bits_per_byte"]
    for name, row in results["arms"].items():
        rows.append(
            f"{name} | {row['steps']} | {row['tokens']:,} | {row['held_out_loss']:.4f} | {row['bits_per_byte']:.4f} "
            f"| {interval_text(row['interval'])} | {row['bits_per_byte'] - plain:+.4f} "
            f"| {interval_text(row['minus_plain_interval'], '+.3f')} | {row['parameters']:,} "
            f"| {row['training_seconds'] or ''}"
        )
    columns = "model | steps | tokens | held-out loss | bits per byte | 95 % interval | minus plain | 95 % interval"
    corpus, lossless = results["corpus"], results["lossless_start"]
    models = "\n".join(f"- {name}: {description}" for name, description in MODELS.items())
    return f"""{markdown_table(f"{columns} | parameters | training s", rows)}

{models}

Lower is better. Held-out loss is in nats per token; bits per byte are lm-eval's rolling likelihood of
{corpus["evaluated_files"]} held-out files ({corpus["evaluated_bytes"]:,} bytes), and "minus plain" is their difference
from the plain model. Intervals come from resampling the files. With one run and one seed, small differences are noise.

Conversion: the largest logit difference on held-out text is {lossless["max_abs_logit_difference"]:.1e} (the
standard deviation of the logits is {lossless["logit_std"]:.2f}), and {lossless["top1_agreement"]:.2%} of the top-1
tokens agree."""


def next_steps(out: Path) -> str:
    """Returns a hint on what is in the folder and how to go on."""
    return f"""{out} has a checkpoint per model, results.md, results.json and the figures.

The from-scratch model as a Hub folder, with code, figures and model card: open {out / "hub" / "README.md"}

Next, your own model: any PreNorm checkpoint of a supported family becomes an AttnRes model without loss:

    from attnres import AttnResForCausalLM
    model = AttnResForCausalLM.from_backbone("path/or/hub-id", num_blocks=8)"""
