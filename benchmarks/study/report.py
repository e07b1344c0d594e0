"""Makes the report of the study, Markdown and PNG, from its JSON lines and nothing else.

    python -m benchmarks.study.report --out report.md --figure docs/images/study.png

Losses come from results.jsonl, times from speed.jsonl, for which steps of all models were timed in one process.
"""

import argparse
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import matplotlib
import matplotlib.ticker
import numpy as np
from scipy.optimize import brentq
from scipy.stats import nct, t

from .files import read_results
from .train import HERE, SCALED

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESAMPLES = 1000
FLOPS, SECONDS = "FLOPs (6 N tokens)", "seconds (one thread)"
BLOCK = "block, scaled init"
COMPARED = [("block", SCALED), ("block", "static"), (BLOCK, "static, scaled init")]  # beside each to its control


def group(results: list[dict]) -> dict[tuple[str, int], dict[str, dict[int, dict]]]:
    """Finished runs outside sweeps by (size, steps), model and seed; without the sizes that have no plain model yet."""
    groups = defaultdict(lambda: defaultdict(dict))
    for result in results:
        if not result["sweep"]:
            groups[result["size"], result["steps"]][result["arm"]][result["seed"]] = result
    found = {key: dict(arms) for key, arms in groups.items() if {"plain", SCALED} & arms.keys()}
    return dict(sorted(found.items(), key=lambda item: plain_run(item[1])["flops"]))


def baseline(arms: dict) -> str:
    """The model of a size that the others are compared to."""
    return "plain" if "plain" in arms else SCALED


def control(name: str) -> str:
    """The plain model with a model's depth and initialisation; for a plain model, the one with the defaults."""
    kind = name.partition(", ")[2] if not name.startswith("plain") else ""
    return f"plain, {kind}" if kind in ("scaled init", "4 layers") else "plain"


def differences(arm: dict[int, dict], other: dict[int, dict]) -> np.ndarray:
    """Held-out loss of a model less that of another on the same batches, one per seed that both have."""
    seeds = sorted(arm.keys() & other.keys())
    for seed in seeds:
        if any(arm[seed].get(name) != other[seed].get(name) for name in ("batches", "corpus")):
            names = f"{arm[seed]['arm']!r} and {other[seed]['arm']!r}"
            raise ValueError(f"seed {seed} of {names} saw different text; run both again")
    return np.array([arm[seed]["held_out_loss"] - other[seed]["held_out_loss"] for seed in seeds])


def half_width(values: np.ndarray) -> float:
    """Half of Student's 95 % interval of the mean."""
    return t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))


def interval(values: np.ndarray) -> str:
    """The mean with its 95 % interval, as far as there are values for them."""
    if len(values) < 2:
        return "".join(f"{value:+.3f}" for value in values)
    return f"{values.mean():+.3f} ± {half_width(values):.3f}"


def excludes_zero(values: np.ndarray) -> bool:
    return len(values) > 1 and abs(values.mean()) > half_width(values)


def mean_difference(arm: dict[int, dict], other: dict[int, dict]) -> str:
    return interval(differences(arm, other))


def smallest_difference(arms: dict[str, dict[int, dict]]) -> tuple[float, int] | None:
    """The difference that the t test behind an interval of `seeds` seeds finds with a power of 80 % at p = 0.05.

    The standard deviation of a difference is pooled over the models; the test has but `seeds` values of its own.
    """
    base = baseline(arms)
    found = [d for name, runs in arms.items() if name != base and len(d := differences(runs, arms[base])) > 1]
    if not found:
        return None
    deviation = np.sqrt(sum(((d - d.mean()) ** 2).sum() for d in found) / sum(len(d) - 1 for d in found))
    seeds = max(map(len, found))
    critical = t.ppf(0.975, seeds - 1)
    # The part of the power below -critical is nil.
    shift = brentq(lambda shift: nct.sf(critical, seeds - 1, shift) - 0.8, 0, 100)
    return shift * deviation / np.sqrt(seeds), seeds


def usual_budget(groups: dict) -> dict:
    """The shortest training of each size, which is the one that the grid gives it."""
    fewest = {}
    for size, steps in groups:
        fewest[size] = min(steps, fewest.get(size, steps))
    return {(size, steps): arms for (size, steps), arms in groups.items() if steps == fewest[size]}


def plain_run(arms: dict) -> dict:
    """Any run of a size's plain model, for what all of them share."""
    return next(iter(arms[baseline(arms)].values()))


def widths_only(groups: dict) -> dict:
    """The sizes for the fits: of the layers and sequence length that most have, with data that grow with the width.

    Longer sequences have a lower loss at the same cost, as their tokens have more before them; a wider model on no more
    data than a narrower one has a higher loss than its cost could buy.
    """
    groups, narrowest = usual_budget(groups), {}
    shapes = {key: plain_run(arms) for key, arms in groups.items()}
    shapes = {key: (run["layers"], run["sequence_length"]) for key, run in shapes.items()}
    common = Counter(shapes.values()).most_common(1)
    for key, arms in groups.items():
        run = plain_run(arms)
        if common and shapes[key] == common[0][0]:
            at_most = narrowest.setdefault(run["tokens"], key)
            if run["hidden"] < plain_run(groups[at_most])["hidden"]:
                narrowest[run["tokens"]] = key
    return {key: groups[key] for key in narrowest.values()}


def power_law(cost: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    """a and b of L = a C^-b, by least squares on logarithms."""
    slope, intercept = np.polyfit(np.log(cost), np.log(loss), 1)
    return float(np.exp(intercept)), float(-slope)


def resampled_exponents(points: list[dict[int, tuple[float, float]]], rng: np.random.Generator) -> np.ndarray:
    """b `[RESAMPLES]`: at each size as many seeds as there are, drawn with replacement."""
    exponents = []
    for _ in range(RESAMPLES):
        drawn = [size[seed] for size in points for seed in rng.choice(sorted(size), len(size))]
        exponents.append(power_law(*np.array(drawn).T)[1])
    return np.array(exponents)


def advantages(arm: list[dict[int, tuple]], plain: list[dict[int, tuple]]) -> np.ndarray:
    """What plain pays for the loss that a model reaches, over what the model pays: `[seeds, sizes]`.

    What a loss costs plain is read from its power law through the runs of the same seed.
    """
    seeds = sorted(set.intersection(*(set(size) for size in [*arm, *plain])))
    ratios = np.empty((len(seeds), len(arm)))
    for row, seed in enumerate(seeds):
        a, b = power_law(*np.array([size[seed] for size in plain]).T)
        for column, size in enumerate(arm):
            cost, loss = size[seed]
            ratios[row, column] = (a / loss) ** (1 / b) / cost
    return ratios


def points(groups: dict, arm: str, unit: str, speeds: dict) -> dict[tuple, dict[int, tuple[float, float]]]:
    """(cost, held-out loss) of a model's runs by size and seed; no size in seconds where its step was not timed."""
    found = {}
    for key, arms in groups.items():
        speed = speeds.get((key[0], arm))
        if arm in arms and (unit == FLOPS or speed):
            found[key] = {
                seed: (run["flops"] if unit == FLOPS else run["steps"] * speed["seconds"], run["held_out_loss"])
                for seed, run in arms[arm].items()
            }
    return found


def fit_lines(groups: dict, speeds: dict) -> list[str]:
    """Fits of the models that have three sizes of one depth, against training FLOPs and seconds.

    What a model saves is counted against the plain model with the same initialisation.
    """
    groups = widths_only(groups)
    names = dict.fromkeys(name for arms in groups.values() for name in arms)
    lines = [
        "| model | cost | a | b (bootstrap, 95 %) | what plain, with the same init, pays for the same loss (95 %) "
        "| at each size |",
        "|:--|:--|--:|:-:|:-:|:--|",
    ]
    for unit in (FLOPS, SECONDS):
        found = {arm: points(groups, arm, unit, speeds) for arm in names}
        for arm, sizes in found.items():
            baseline_of = SCALED if SCALED in (arm, control(arm)) else "plain"  # of 12 layers also for models of 4
            base = found.get(baseline_of, {})
            if len(sizes) < 3 or len(base) < 3 or not sizes.keys() <= base.keys():
                continue
            a, b = power_law(*np.array([point for size in sizes.values() for point in size.values()]).T)
            low, high = np.quantile(resampled_exponents(list(sizes.values()), np.random.default_rng(0)), [0.025, 0.975])
            saved, each = "1", ""
            if arm != baseline_of:
                ratios = np.log(advantages(list(sizes.values()), list(base.values())))
                each = ", ".join(
                    f"{key[0]} {ratio:.2f}" for key, ratio in zip(sizes, np.exp(ratios.mean(0)), strict=True)
                )
                saved = factor(ratios.mean(1))
            lines.append(f"| {arm} | {unit} | {a:.3g} | {b:.4f} ({low:.4f} to {high:.4f}) | {saved} | {each} |")
    if len(lines) == 2:
        return ["No fit: it takes three sizes of the plain model."]
    return lines


def factor(logarithms: np.ndarray) -> str:
    """The geometric mean of factors with Student's 95 % interval over seeds."""
    if len(logarithms) < 2:
        return "".join(f"{value:.2f}" for value in np.exp(logarithms))
    low, middle, high = np.exp(logarithms.mean() + half_width(logarithms) * np.array([-1, 0, 1]))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def depth_lines(groups: dict) -> list[str]:
    """How losses, and differences to plain, change with the number of layers at one width, budget and batches."""
    widths = defaultdict(dict)
    for arms in usual_budget(groups).values():
        run = plain_run(arms)
        widths[run["hidden"], run["steps"], run["sequence_length"]][run["layers"]] = arms
    rows = [(name, None) for name in ("plain", "block", "full", "static", SCALED, BLOCK)]
    rows += [(name, control(name)) for name in ("block", "full", "static", BLOCK)]
    lines = ["| D | what | layers | change of nats/token (95 %) |", "|--:|:--|:-:|:-:|"]
    for (hidden, *_), depths in sorted(widths.items()):
        for name, other in rows:
            having = sorted(
                layers for layers, arms in depths.items() if name in arms and (other is None or other in arms)
            )
            steps = [*pairwise(having), *([(having[0], having[-1])] if len(having) > 2 else [])]
            for low, high in steps:
                change = differences(depths[high][name], depths[low][name])
                if other is not None:
                    change = change - differences(depths[high][other], depths[low][other])
                what = f"loss of {name}" if other is None else f"{name} less {other}"
                lines.append(f"| {hidden} | {what} | {low} to {high} | {interval(change)} |")
    return lines


def table(arms: dict[str, dict[int, dict]], speeds: dict) -> list[str]:
    base = baseline(arms)
    lines = [
        f"| model | layers | parameters | seeds | nats/token | SD | bits/byte | against {base}, same batches (95 %) "
        f"| ms/step | over {base} (quartiles of steps) | tokens/s |",
        "|:--|--:|--:|--:|--:|--:|--:|:-:|--:|:-:|--:|",
    ]
    for name, runs in sorted(arms.items(), key=lambda item: np.mean([r["held_out_loss"] for r in item[1].values()])):
        first, losses = next(iter(runs.values())), [run["held_out_loss"] for run in runs.values()]
        bits = np.mean([run["bits_per_byte"] for run in runs.values()])
        spread = f"{np.std(losses, ddof=1):.3f}" if len(losses) > 1 else ""
        against = "" if name == base else mean_difference(runs, arms[base])
        timed = "| | |"
        speed = speeds.get((first["size"], name))
        if speed and speed["against"] == base:
            ratio = speed["ratio"]
            over = "" if name == base else f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"
            per_second = first["tokens"] / first["steps"] / speed["seconds"]
            timed = f"{1e3 * speed['seconds']:.1f} | {over} | {per_second:,.0f} |"
        lines.append(
            f"| {name} | {first['layers']} | {first['parameters']:,} | {len(runs)} | {np.mean(losses):.3f} | {spread} "
            f"| {bits:.3f} | {against} | {timed}"
        )
    return lines


def by_model(speed: list[dict]) -> dict[tuple[str, str], dict]:
    """Lines of speed.jsonl by size and model, with the seconds that the ratio to the plain model's gives."""
    lines = {(line["size"], line["arm"]): line for line in speed}
    return {
        key: line | {"seconds": line["ratio"]["median"] * plain["seconds"]}
        for key, line in lines.items()
        if (plain := lines.get((line["size"], line["against"])))
    }


def sweeps(results: list[dict]) -> dict[tuple, dict[float, float]]:
    """Validation loss by learning rate, for each (size, model, steps) that was swept."""
    found = defaultdict(dict)
    for result in results:
        if result["sweep"]:
            losses = found[result["size"], result["arm"], result["steps"]]
            losses[result["learning_rate"]] = result["curve"][-1]["validation_loss"]
    return dict(found)


def summary(results: list[dict]) -> str:
    """Markdown: what the main models gain over the plain one with the same initialisation, a row per shape."""
    lines = ["| D | layers | block | full | static scalars | block, scaled init |", "|--:|--:|:-:|:-:|:-:|:-:|"]
    groups = usual_budget(group(results)).values()
    for arms in sorted(groups, key=lambda arms: [plain_run(arms)[name] for name in ("layers", "hidden")]):
        cells = []
        for name in ("block", "full", "static", BLOCK):
            base = control(name)
            values = differences(arms[name], arms[base]) if {name, base} <= arms.keys() else np.array([])
            note = " (one seed)" if len(values) == 1 else ""
            cells.append(f"**{interval(values)}**" if excludes_zero(values) else interval(values) + note)
        if any(cells):
            lines.append(f"| {plain_run(arms)['hidden']} | {plain_run(arms)['layers']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(results: list[dict], speed: list[dict]) -> str:
    groups, speeds = group(results), by_model(speed)
    corpora = sorted({result["corpus"] for result in results})
    lines = [f"Corpus (SHA-256, first 16 digits): {', '.join(corpora)}. Finished runs: {len(results)}.", ""]
    lines += ["Learning rates of Muon (validation loss, nats/token, seed 0):", ""]
    rates = sorted({result["learning_rate"] for result in results if result["sweep"]})
    lines += [f"| size | model | steps | {' | '.join(map(str, rates))} |", "|:--|:--|--:|" + "--:|" * len(rates)]
    for (size, arm, steps), losses in sweeps(results).items():
        shown = (f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates)
        lines.append(f"| {size} | {arm} | {steps} | {' | '.join(shown)} |")
    for (size, steps), arms in groups.items():
        first = plain_run(arms)
        heading = f"**{size}**: D = {first['hidden']}, {steps} steps, {first['tokens']:,} tokens in sequences of "
        heading += f"{first['sequence_length']}, learning rate "
        used = {name: {run["learning_rate"] for run in runs.values()} for name, runs in arms.items()}
        used = {name: " and ".join(map(str, sorted(rates))) for name, rates in used.items()}
        usual = used[baseline(arms)]
        others = ", ".join(f"{name}: {rate}" for name, rate in used.items() if rate != usual)
        heading += f"{usual} ({others})." if others else f"{usual}."
        lines += ["", heading, "", *table(arms, speeds)]
        lines += [
            f"\n{name} less {other}, same batches (95 %): {mean_difference(arms[name], arms[other])} nats/token."
            for name, other in [*COMPARED, *((name, control(name)) for name in arms)]
            if name in arms and other in arms and other != baseline(arms)
        ]
        if seen := smallest_difference(arms):
            lines += ["", f"Power: with {seen[1]} seeds this design detects a difference of {seen[0]:.3f} nats/token "]
            lines[-1] += "four times in five (p = 0.05, paired by seed, standard deviation pooled over the models)."
    lines += ["", "What changes with depth, at the same width, budget and batches, paired by seed:", ""]
    lines += depth_lines(groups)
    lines += ["", "Fits of L = a C^-b:", "", *fit_lines(groups, speeds)]
    return "\n".join(lines) + "\n"


def draw(results: list[dict], speed: list[dict], path: Path):
    """Each model less its control; loss against seconds; what block gains by depth."""
    groups = group(results)
    names = list(dict.fromkeys(arm for arms in groups.values() for arm in arms if arm != "plain"))
    figure, panels = plt.subplot_mosaic([["arms", "cost"], ["arms", "depth"]], figsize=(13, 11), layout="constrained")
    draw_differences(panels["arms"], groups, names)
    draw_cost(panels["cost"], widths_only(groups), ["plain", *names], by_model(speed))
    draw_depth(panels["depth"], usual_budget(groups))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_differences(axes, groups: dict, names: list[str]):
    """Held-out loss of each model less that of its plain control, a point per seed."""
    for index, ((size, steps), arms) in enumerate(groups.items()):
        label = f"{size}, {steps} steps"
        for row, name in enumerate(names):
            base = control(name)
            values = differences(arms[name], arms[base]) if name in arms and base in arms else []
            height = np.full(len(values), row + 0.9 * ((index + 0.5) / len(groups) - 0.5))
            axes.plot(values, height, "o", color=f"C{index}", label=label, ms=5)
            label = None
    axes.axvline(0, color="0.5", lw=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("held-out loss less that of plain with the same init and depth, same seed (nats/token)")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.06), ncols=2)


def draw_cost(axes, groups: dict, names: list[str], speeds: dict):
    """Held-out loss of each model against the seconds that its training takes, a point per size."""
    for index, name in enumerate(names):
        means = [np.mean(list(size.values()), axis=0) for size in points(groups, name, SECONDS, speeds).values()]
        if means:
            style = {"color": f"C{index % 10}", "marker": "os^"[index // 10 % 3]}
            axes.plot(*np.array(means).T, label=name, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel(f"{SECONDS}, training only")
    axes.set_ylabel("held-out loss (nats/token), mean over seeds")
    if axes.lines:
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)


def draw_depth(axes, groups: dict):
    """Held-out loss of block less that of plain, both with scaled initialisation, against the number of layers."""
    lines = defaultdict(list)
    for arms in groups.values():
        if SCALED in arms and BLOCK in arms:
            run = plain_run(arms)
            found = differences(arms[BLOCK], arms[SCALED])
            lines[run["hidden"], run["sequence_length"]].append((run["layers"], found))
    for index, ((width, length), line) in enumerate(sorted(lines.items())):
        label, style = f"D = {width}, sequences of {length}", {"color": f"C{index}", "marker": "os^Dv"[index % 5]}
        shift = 1.012 ** (index - (len(lines) - 1) / 2)  # so that no width hides another
        for layers, found in line:
            axes.plot([layers * shift] * len(found), found, ls="", alpha=0.4, **style)
        means = sorted((layers * shift, found.mean()) for layers, found in line)
        axes.plot(*np.array(means).T, label=label, ms=10, **style)
    axes.axhline(0, color="0.5", lw=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xticks(sorted({layers for line in lines.values() for layers, _ in line}))
    axes.minorticks_off()
    axes.set_xlabel("layers")
    axes.set_ylabel("block less plain, scaled init, same seed (nats/token)")
    if lines:
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="JSON lines of finished runs")
    parser.add_argument("--speed", type=Path, default=HERE / "speed.jsonl", help="JSON lines of the timed steps")
    parser.add_argument("--out", type=Path, help="Markdown file; default: standard output")
    parser.add_argument("--figure", type=Path, help="PNG file")
    options = parser.parse_args()
    try:
        results, speed = read_results(options.results), read_results(options.speed)
    except ValueError as error:
        parser.error(str(error))
    if not results:
        parser.error(f"--results {options.results} holds no finished run; make some with benchmarks.study.train.")
    try:
        if options.figure:
            draw(results, speed, options.figure)
        text = summary(results) + "\n" + report(results, speed)
    except ValueError as error:
        parser.error(str(error))
    except KeyError as error:
        parser.error(f"a line of --results or --speed lacks {error}; is it a file of this study?")
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
