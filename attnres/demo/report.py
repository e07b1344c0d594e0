"""Results as tables, figures and printed lines. The text does not depend on which model wins."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from attnres import __version__, plots

from .evaluation import doublings

PLAIN, HALF_WAY, CONVERTED, SCRATCH = "plain", "half-way", "converted", "from-scratch"
CARD = "hub"
ARMS = (HALF_WAY, PLAIN, CONVERTED, SCRATCH)
DESCRIPTIONS = {
    HALF_WAY: "the plain model after half of the steps",
    PLAIN: "PreNorm residuals, all steps",
    CONVERTED: "the half-way checkpoint as Block AttnRes, then the other half",
    SCRATCH: "Block AttnRes, all steps",
}


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("torch", "transformers", "tokenizers", "lm_eval")
    return {"python": platform.python_version(), "attnres": __version__} | {name: version(name) for name in packages}


def table(results: dict) -> str:
    """The models as a Markdown table."""
    header = (
        "| model | steps | tokens | held-out loss | bits per byte | 95 % interval | minus plain | 95 % interval "
        "| parameters | training s |"
    )
    baseline = results["arms"][PLAIN]["bits_per_byte"]
    rows = [
        f"| {arm} | {row['steps']} | {row['tokens']:,} | {row['held_out_loss']:.4f} "
        f"| {row['bits_per_byte']:.4f} | {_interval(row['interval'], '.3f')} "
        f"| {row['bits_per_byte'] - baseline:+.4f} | {_interval(row['minus_plain_interval'], '+.3f')} "
        f"| {row['parameters']:,} "
        f"| {'' if row['training_seconds'] is None else row['training_seconds']} |"
        for arm, row in results["arms"].items()
    ]
    return "\n".join([header, f"|---|{'--:|' * 9}", *rows])


def _interval(interval: tuple[float, float], form: str) -> str:
    return f"{interval[0]:{form}} to {interval[1]:{form}}"


def position_table(results: dict) -> str:
    """Loss by the number of tokens before, for every model, as a Markdown table."""
    spans = doublings(results["settings"]["sequence_length"])
    names = [str(first) if first == last else f"{first} to {last}" for first, last in spans]
    lines = [f"| tokens before | {' | '.join(names)} |", f"|---|{'--:|' * len(names)}"]
    for arm, losses in results["loss_by_position"].items():
        means = (fmean(losses[first - 1 : last]) for first, last in spans)
        lines.append(f"| {arm} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(lines)


def describe_lossless(lossless: dict) -> str:
    """One line about `compare_logits` of the conversion and the checkpoint it came from."""
    return (
        f"the largest logit difference from the plain half-way checkpoint on held-out text is "
        f"{lossless['max_abs_logit_difference']:.1e} (the logits' standard deviation is {lossless['logit_std']:.2f}); "
        f"{lossless['top1_agreement']:.2%} of the top-1 tokens are equal"
    )


def write_tables(results: dict, folder: Path):
    """Writes `results.json` and, from the same numbers, `results.md`."""
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(_markdown(results), encoding="utf-8")


def draw_figures(results: dict, folder: Path):
    """Draws `loss-curves.png` and `depth-weights.png`."""
    settings, per_block = results["settings"], results["layers_per_block"]
    plots.loss_curves(
        folder / "loss-curves.png",
        results["curves"],
        baseline=PLAIN,
        step_label=f"optimiser step (1 step = {settings['batch_size'] * settings['sequence_length']:,} tokens)",
    )
    layers = settings["num_hidden_layers"]
    blocks = [range(first, min(first + per_block, layers)) for first in range(0, layers, per_block)]
    plots.depth_weights(
        folder / "depth-weights.png",
        results["depth_weights"],
        row_labels=[f"layer {layer} {part}" for layer in range(layers) for part in ("attention", "MLP")] + ["output"],
        column_labels=["embedding"]
        + [
            f"block {index}\nlayers {block[0]}-{block[-1]}" if len(block) > 1 else f"block {index}\nlayer {block[0]}"
            for index, block in enumerate(blocks, 1)
        ],
        partial_columns=[
            None if layer in blocks[index - 1][:1] and part == 0 else index
            for layer in range(layers)
            for index in [layer // per_block + 1]
            for part in range(2)
        ]
        + [None],
    )


def conclude(results: dict, out: Path) -> str:
    """What the demo prints at its end: the table, the completions, and what to do next."""
    completions = "\n".join(f"[{arm}]\n{results['completions'][arm]}\n" for arm in ARMS)
    return f"""
{table(results)}

{_legend(results)}

Held-out loss (nats per token) by the number of tokens before:

{position_table(results)}

{completions}
{results["seconds"]:.0f} s in all. In {out}: a checkpoint per model, results.md, results.json and the figures.

The from-scratch model as a Hub folder, with code, figures and model card: open {out / CARD / "README.md"}

Next, your own model: any PreNorm checkpoint of a supported family starts as an AttnRes model without loss:

    from attnres import AttnResForCausalLM
    model = AttnResForCausalLM.from_backbone("path/or/hub-id", num_blocks=8)
    ...  # train it as any transformers model; model.freeze_backbone() trains the depth mixer alone
    model.save_pretrained("my-attnres-model")

or load what was just made:

    import attnres
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("{out / SCRATCH}")
    weights = model(input_ids, output_depth_weights=True).depth_weights
"""


def _markdown(results: dict) -> str:
    corpus, lossless = results["corpus"], results["lossless_start"]
    shares = {
        part: f"{corpus[f'{part}_files']} files ({corpus[f'{part}_bytes']:,} bytes)" for part in ("train", "held_out")
    }
    settings = "\n".join(f"| {name} | {value} |" for name, value in results["settings"].items())
    packages = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    completions = "\n".join(f"{arm}:\n\n```\n{results['completions'][arm]}\n```\n" for arm in ARMS)
    return f"""# attnres demo

{table(results)}

{_legend(results)}

Lossless start: {describe_lossless(lossless)}.

![Loss curves](loss-curves.png)

![Depth weights](depth-weights.png)

## Held-out loss by the number of tokens before

{position_table(results)}

## Completions

{completions}
## Corpus

Python's standard library: {shares["train"]} to train on, {shares["held_out"]} held out.

## Settings

| setting | value |
|---|---|
{settings}

{packages}; {results["threads"]} threads; {results["seconds"]} s in all.
"""


def _legend(results: dict) -> str:
    corpus, settings = results["corpus"], results["settings"]
    evaluated_bytes = corpus["evaluated_bytes"]
    arms = "\n".join(f"- {arm}: {DESCRIPTIONS[arm]}" for arm in ARMS)
    return f"""{arms}

Lower is better. Held-out loss: nats per token on {settings["held_out_sequences"]} sequences of held-out text.
Bits per byte: lm-eval's rolling likelihood of {corpus["evaluated_files"]} held-out files, {evaluated_bytes:,} bytes.
"minus plain" is the difference in bits per byte. Intervals: the files redrawn; they say nothing of other seeds.
One run with one seed: small differences are noise."""
