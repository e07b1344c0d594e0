"""The demo: pre-training, conversion, training and evaluation of a small model on real text, with public APIs only.

A small PreNorm mixture of experts is trained on Python's standard library and saved half-way. Three models are compared
on held-out files: the plain backbone trained to the end, the half-way checkpoint converted to Block AttnRes and trained
to the end, and Block AttnRes trained from scratch.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers import logging as transformers_logging

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.hub_card import build as build_card

from . import corpus as text
from .evaluation import (
    compare_logits,
    complete,
    evaluate_with_lm_eval,
    interval_over_files,
    loss_by_position,
    mean_depth_weights,
    write_documents,
)
from .folder import building
from .report import (
    ARMS,
    CARD,
    CONVERTED,
    HALF_WAY,
    PLAIN,
    SCRATCH,
    conclude,
    describe_lossless,
    draw_figures,
    versions,
    write_tables,
)
from .settings import FULL, QUICK, Settings
from .training import HalfWay, History, train_arm

__all__ = ["FULL", "QUICK", "Settings", "backbone_config", "build_plain", "build_scratch", "prepare_data", "run"]


def run(
    out: str | os.PathLike, *, model: str | None = None, quick: bool = False, overwrite: bool = False, seed: int = 0
) -> dict:
    """Runs the demo, fills the folder `out` and returns what `results.json` holds. Results are printed on stdout.

    Args:
        out: folder to make; it appears, complete, when the demo ends.
        model: `"smollm2"` shows the same with real weights, which are downloaded; default: trained here.
        quick: a smaller model, and fewer steps, that show the same life in about a minute.
        overwrite: replace a folder that an earlier demo made.
        seed: of the initial weights, of the order of the training text, and of the sampled completions.

    Raises:
        OSError: `out` cannot be used, see `attnres.demo.folder.building`, or there is no standard library to read.
    """
    if model is not None:
        return _run_with_weights(Path(out), quick, overwrite, seed)
    settings = replace(QUICK if quick else FULL, seed=seed)
    started = time.perf_counter()
    with building(Path(out), overwrite) as folder, _quiet_transformers(), _few_threads():
        results = _run_in(folder, settings)
        results["seconds"] = round(time.perf_counter() - started, 1)
        write_tables(results, folder)
        _name_final_place(folder, Path(out))
    print(conclude(results, Path(out)))
    return results


def _run_with_weights(out: Path, quick: bool, overwrite: bool, seed: int) -> dict:
    from . import smollm2

    started = time.perf_counter()
    with building(out, overwrite) as folder, _quiet_transformers():
        results = smollm2.run_in(folder, smollm2.settings_for(quick, seed), smollm2.weights_folder())
        results |= {"versions": versions(), "seconds": round(time.perf_counter() - started, 1)}
        shutil.rmtree(folder / "trainer", ignore_errors=True)
        smollm2.write(results, folder)
        _name_final_place(folder, out)
    print(f"\n{smollm2.table(results)}\n\nfolder: {out}; depth weights: depth-weights.png; Hub folder: card")
    return results


def _name_final_place(folder: Path, out: Path):
    """Evaluations say which folder they measured; by the time someone reads it, that has its final name."""
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".md", ".csv"):
            content = path.read_text(encoding="utf-8")
            if str(folder) in content:
                path.write_text(content.replace(str(folder), str(out)), encoding="utf-8")


@contextmanager
def _few_threads(most: int = 2):
    """Operations this small gain nothing from more threads, and lose two orders of magnitude on a busy machine, where
    threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(most, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare_data(settings: Settings, folder: Path) -> dict:
    """Reads the corpus, trains the tokenizer, packs what is trained on, and writes the held-out documents.

    Returns:
        `corpus` (file and byte counts), `tokenizer`, `train` `[steps * batch_size, T]` in the order of training,
        `held_out` `[held_out_sequences, T]`, and `documents`, the path of the held-out documents.
    """
    root = text.standard_library()
    corpus = text.read_corpus(root)
    counts = corpus.describe()
    _say(
        f"corpus: {root}: {counts['train_files']} files, {counts['train_bytes'] / 1e6:.1f} MB to train on; "
        f"{counts['held_out_files']} files, {counts['held_out_bytes'] / 1e6:.1f} MB held out"
    )
    tokenizer = text.train_tokenizer(corpus.train, settings.vocab_size, settings.sequence_length)
    train = text.pack(corpus.train, tokenizer, settings.steps * settings.batch_size, settings.sequence_length)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed))
    held_out = text.limit_documents(corpus.held_out, settings.document_bytes, settings.held_out_bytes)
    write_documents(held_out, folder / "held-out.jsonl")
    file_bytes = [len(document.text.encode()) for document in held_out]
    counts.update(
        evaluated_files=len(held_out),
        evaluated_bytes=sum(file_bytes),
    )
    _say(
        f"tokenizer: byte-level BPE with {len(tokenizer)} entries; {train.numel():,} training tokens, none seen twice; "
        f"evaluation on {counts['evaluated_files']} held-out files, {counts['evaluated_bytes'] / 1e3:.0f} kB"
    )
    return {
        "corpus": counts,
        "tokenizer": tokenizer,
        "train": train[order],
        "held_out": text.pack(held_out, tokenizer, settings.held_out_sequences, settings.sequence_length),
        "documents": folder / "held-out.jsonl",
        "file_bytes": file_bytes,
    }


def backbone_config(settings: Settings, eos_token_id: int):
    """The configuration of the plain PreNorm mixture of experts."""
    return AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
        head_dim=settings.hidden_size // settings.num_attention_heads,
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.num_experts_per_tok,
        moe_intermediate_size=settings.moe_intermediate_size,
        decoder_sparse_step=settings.decoder_sparse_step,
        initializer_range=settings.initializer_range,
        norm_topk_prob=True,
        output_router_logits=True,
        tie_word_embeddings=True,
        max_position_embeddings=settings.sequence_length,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )


def build_plain(settings: Settings, eos_token_id: int) -> PreTrainedModel:
    """The plain model at initialisation."""
    set_seed(settings.seed)
    return AutoModelForCausalLM.from_config(backbone_config(settings, eos_token_id))


def build_scratch(settings: Settings, eos_token_id: int) -> AttnResForCausalLM:
    """The from-scratch model at initialisation; its backbone weights are those of `build_plain`."""
    set_seed(settings.seed)
    config = AttnResConfig.from_backbone(backbone_config(settings, eos_token_id), num_blocks=settings.num_blocks)
    return AttnResForCausalLM(config)


def _run_in(folder: Path, settings: Settings) -> dict:
    data = prepare_data(settings, folder)
    tokenizer = data["tokenizer"]
    histories, half_way = _train_plain(data, settings, folder)

    converted = AttnResForCausalLM.from_backbone(folder / HALF_WAY, num_blocks=settings.num_blocks)
    lossless = compare_logits(
        converted, AutoModelForCausalLM.from_pretrained(folder / HALF_WAY), data["held_out"][: settings.eval_batch_size]
    )
    print(f"conversion: {describe_lossless(lossless)}", flush=True)
    histories[CONVERTED] = _train(CONVERTED, converted, data, settings, folder, start=half_way)

    scratch = build_scratch(settings, tokenizer.eos_token_id)
    _require_equal_start(build_plain(settings, tokenizer.eos_token_id), scratch)
    histories[SCRATCH] = _train(SCRATCH, scratch, data, settings, folder)
    _require_equal_batches(histories, settings)
    shutil.rmtree(folder / "trainer", ignore_errors=True)

    models = {arm: AutoModelForCausalLM.from_pretrained(folder / arm) for arm in ARMS}
    results = {
        "settings": asdict(settings) | {"half_way_step": settings.half_way_step},
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "corpus": data["corpus"],
        "lossless_start": lossless,
        "arms": {arm: _evaluate(arm, model, histories, data, settings) for arm, model in models.items()},
        "loss_by_position": {
            arm: loss_by_position(model, data["held_out"], settings.eval_batch_size) for arm, model in models.items()
        },
        "completions": {arm: complete(model, tokenizer, settings) for arm, model in models.items()},
        "curves": {arm: history.curves() for arm, history in histories.items()},
        "depth_weights": {
            arm: mean_depth_weights(models[arm], data["held_out"], settings.eval_batch_size)
            for arm in (CONVERTED, SCRATCH)
        },
        "layers_per_block": scratch.config.layers_per_block,
    }
    _add_intervals(results["arms"], data["file_bytes"], settings)
    draw_figures(results, folder)
    _make_card(data["documents"], folder)
    return results


def _add_intervals(arms: dict, sizes: list[int], settings: Settings):
    """Intervals over files, of every model and of its difference from the plain one on the same files."""
    plain = arms[PLAIN]["file_bits"]
    for row in arms.values():
        differences = [bits - other for bits, other in zip(row["file_bits"], plain, strict=True)]
        for name, bits in (("interval", row["file_bits"]), ("minus_plain_interval", differences)):
            row[name] = interval_over_files(bits, sizes, settings.resamples, settings.seed)


def _make_card(documents: Path, folder: Path):
    """The from-scratch model as a Hub folder; depth weights are those over a held-out document."""
    with TemporaryDirectory() as temporary, documents.open(encoding="utf-8") as lines:
        text = Path(temporary) / "held-out.txt"
        text.write_text(json.loads(next(lines))["text"], encoding="utf-8")
        build_card(folder / SCRATCH, folder / CARD, text=text, language="en", progress=True)


def _train_plain(data: dict, settings: Settings, folder: Path) -> tuple[dict[str, History], HalfWay]:
    states = []

    def keep(model: PreTrainedModel, optimizer_state: dict):
        _save(model, data["tokenizer"], folder / HALF_WAY)
        states.append(optimizer_state)

    model = build_plain(settings, data["tokenizer"].eos_token_id)
    history = _train(PLAIN, model, data, settings, folder, at_half_way=keep)
    return {PLAIN: history}, HalfWay(settings.half_way_step, states[0])


def _train(
    arm: str,
    model: PreTrainedModel,
    data: dict,
    settings: Settings,
    folder: Path,
    start: HalfWay | None = None,
    at_half_way: Callable | None = None,
) -> History:
    history = train_arm(
        arm, model, data["train"], data["held_out"], settings, folder / "trainer", start=start, at_half_way=at_half_way
    )
    _save(model, data["tokenizer"], folder / arm)
    return history


def _save(model: PreTrainedModel, tokenizer, folder: Path):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _evaluate(arm: str, model: PreTrainedModel, histories: dict[str, History], data: dict, settings: Settings) -> dict:
    half, plain = settings.half_way_step, histories[PLAIN]
    if arm == HALF_WAY:
        steps, loss, seconds = half, plain.held_out_loss[plain.held_out_steps.index(half)], None
    else:
        steps, loss, seconds = settings.steps, histories[arm].held_out_loss[-1], round(histories[arm].seconds, 1)
    return {
        "steps": steps,
        "tokens": steps * settings.tokens_per_step,
        "parameters": model.num_parameters(),
        "held_out_loss": loss,
        **evaluate_with_lm_eval(model, data["tokenizer"], data["documents"], settings, arm),
        "training_seconds": seconds,
    }


def _require_equal_start(plain: PreTrainedModel, scratch: AttnResForCausalLM):
    initial = plain.state_dict()
    for name, parameter in scratch.named_parameters():
        if name in initial and not torch.equal(initial.pop(name), parameter):
            raise RuntimeError(f"the models do not start from the same weights: {name} differs")
    left = set(initial) - set(scratch.state_dict())
    if left:
        raise RuntimeError(f"the models do not start from the same weights: AttnRes has no {sorted(left)[0]}")


def _require_equal_batches(histories: dict[str, History], settings: Settings):
    plain = histories[PLAIN].batch_digests
    expected = {SCRATCH: plain, CONVERTED: plain[settings.half_way_step :]}
    if any(histories[arm].batch_digests != digests for arm, digests in expected.items()):
        raise RuntimeError("the models were not trained on the same batches in the same order")


@contextmanager
def _quiet_transformers():
    """Hides the bars of loading weights and advice that does not concern a reader of the demo; errors are shown."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _say(message: str):
    print(message, file=sys.stderr, flush=True)
