"""Makes the report of the study, Markdown and PNG, from its JSON lines and nothing else.

python -m benchmarks.study.report --out report.md --figure docs/images/study.png
"""

import argparse
from collections import Counter, defaultdict
from pathlib import Path

import matplotlib
import matplotlib.ticker
import numpy as np

from .train import HERE, read_results

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Quantiles of Student's t by degrees of freedom 1, 2, ...; the last for all above.
T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 1.96]
T_80 = [1.376, 1.061, 0.978, 0.941, 0.920, 0.906, 0.896, 0.889, 0.883, 0.879, 0.842]
RESAMPLES = 1000
BLOCK = "block, scaled init"
SCALED = "plain, scaled init"  # the second baseline, which block is compared to as well, and the only one of a size


def quantile(table: list[float], freedom: int) -> float:
    return table[min(freedom, len(table)) - 1]


def group(results: list[dict]) -> dict[tuple[str, int], dict[str, dict[int, dict]]]:
    """Finished runs outside sweeps, by (size, steps), model and seed."""
    groups = defaultdict(lambda: defaultdict(dict))
    for result in results:
        if not result["sweep"]:
            groups[result["size"], result["steps"]][result["arm"]][result["seed"]] = result
    found = {key: dict(arms) for key, arms in groups.items()}
    return dict(sorted(found.items(), key=lambda item: next(iter(item[1][baseline(item[1])].values()))["flops"]))


def baseline(arms: dict) -> str:
    """The model of a size that the others are compared to; a size without any plain model is an error of the grid."""
    return "plain" if "plain" in arms else SCALED


def differences(arm: dict[int, dict], plain: dict[int, dict]) -> np.ndarray:
    """Held-out loss of a model less that of the plain model on the same batches, one per seed that both have."""
    for seed in arm.keys() & plain.keys():
        if any(arm[seed].get(name) != plain[seed].get(name) for name in ("batches", "corpus")):
            raise ValueError(f"seed {seed} of {arm[seed]['arm']!r} and 'plain' saw different text: run both again.")
    return np.array([arm[s]["held_out_loss"] - plain[s]["held_out_loss"] for s in sorted(arm.keys() & plain.keys())])


def mean_difference(arm: dict[int, dict], plain: dict[int, dict]) -> str:
    """The mean of `differences` with its 95 % interval, as far as there are seeds for them."""
    paired = differences(arm, plain)
    if not len(paired):
        return ""
    if len(paired) == 1:
        return f"{paired.mean():+.3f}"
    half = quantile(T_975, len(paired) - 1) * paired.std(ddof=1) / np.sqrt(len(paired))
    return f"{paired.mean():+.3f} ± {half:.3f}"


def smallest_difference(arms: dict[str, dict[int, dict]]) -> tuple[float, int] | None:
    """What a paired comparison at a size sees with a power of 80 % at p = 0.05, and for how many seeds.

    The variance of the differences is pooled over the models.
    """
    base = baseline(arms)
    found = [d for name, runs in arms.items() if name != base and len(d := differences(runs, arms[base])) > 1]
    if not found:
        return None
    freedom = sum(len(d) - 1 for d in found)
    deviation = np.sqrt(sum(((d - d.mean()) ** 2).sum() for d in found) / freedom)
    seeds = max(map(len, found))
    return (quantile(T_975, freedom) + quantile(T_80, freedom)) * deviation / np.sqrt(seeds), seeds


def widths_only(groups: dict) -> dict:
    """The sizes at which plain has the layers and sequence length that most have: those that differ by width and data.

    The loss of longer sequences is lower at the same cost, as their tokens have more before them.
    """
    plain = {key: next(iter(arms[baseline(arms)].values())) for key, arms in groups.items()}
    shapes = {key: (run["layers"], run["sequence_length"]) for key, run in plain.items()}
    common = [value for value, _ in Counter(shapes.values()).most_common(1)]
    return {key: groups[key] for key, value in shapes.items() if value in common}


def power_law(cost: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    """a and b of L = a C^-b, by least squares on logarithms."""
    slope, intercept = np.polyfit(np.log(cost), np.log(loss), 1)
    return float(np.exp(intercept)), float(-slope)


def resampled_fits(points: list[list[tuple[float, float]]], rng: np.random.Generator) -> np.ndarray:
    """(a, b) `[RESAMPLES, 2]`: at each size as many seeds as there are, drawn with replacement."""
    fits = []
    for _ in range(RESAMPLES):
        drawn = [size[i] for size in points for i in rng.integers(0, len(size), len(size))]
        fits.append(power_law(*np.array(drawn).T))
    return np.array(fits)


def advantage(fits: np.ndarray, plain: np.ndarray, cost: float) -> tuple[float, float, float]:
    """Cost at which plain has the loss that the model has at `cost`, over `cost`: median and 95 % interval."""
    loss = fits[:, 0] * cost ** -fits[:, 1]
    ratio = (plain[:, 0] / loss) ** (1 / plain[:, 1]) / cost
    return tuple(np.quantile(ratio, [0.5, 0.025, 0.975]))


def fit_lines(groups: dict) -> list[str]:
    """Fits of the models that have three sizes of one depth, against training FLOPs and seconds of one core.

    What a model gains is counted against the plain model with the same initialisation.
    """
    groups = widths_only(groups)
    names = dict.fromkeys(name for arms in groups.values() for name in arms)
    arms = [name for name in names if sum(name in g for g in groups.values()) >= 3]
    if "plain" not in arms:
        return ["No fit: it takes three sizes of the plain model."]
    lines = [
        "| model | cost | a | b (95 %) | cost of plain, with the same init, at equal loss, over the model's (95 %) |",
        "|:--|:--|--:|:-:|:-:|",
    ]
    for cost in ("flops", "core_seconds"):
        points = {
            arm: [[(r[cost], r["held_out_loss"]) for r in g[arm].values()] for g in groups.values() if arm in g]
            for arm in arms
        }
        fits = {arm: resampled_fits(points[arm], np.random.default_rng(0)) for arm in arms}
        for arm in arms:
            a, b = power_law(*np.array([point for size in points[arm] for point in size]).T)
            low, high = np.quantile(fits[arm][:, 1], [0.025, 0.975])
            base = SCALED if arm.endswith("scaled init") else "plain"
            middle = np.exp(np.mean([np.log(c) for size in points[base] for c, _ in size]))
            gain, least, most = advantage(fits[arm], fits[base], middle)
            gained = "1" if arm == base else f"{gain:.2f} ({least:.2f} to {most:.2f})"
            name = {"flops": "FLOPs (6 N tokens)", "core_seconds": "seconds of one core"}[cost]
            lines.append(f"| {arm} | {name} | {a:.3g} | {b:.4f} ({low:.4f} to {high:.4f}) | {gained} |")
    return lines


def table(arms: dict[str, dict[int, dict]]) -> list[str]:
    base = baseline(arms)
    lines = [
        f"| model | layers | parameters | seeds | nats/token | SD | bits/byte | against {base}, same batches (95 %) "
        "| core s | wall s | tokens/s |",
        "|:--|--:|--:|--:|--:|--:|--:|:-:|--:|--:|--:|",
    ]
    for name, runs in sorted(arms.items(), key=lambda item: np.mean([r["held_out_loss"] for r in item[1].values()])):
        values = list(runs.values())

        def mean(field: str, values=values) -> float:
            return float(np.mean([value[field] for value in values]))

        losses = [value["held_out_loss"] for value in values]
        spread = f"{np.std(losses, ddof=1):.3f}" if len(losses) > 1 else ""
        against = "" if name == base else mean_difference(runs, arms[base])
        lines.append(
            f"| {name} | {values[0]['layers']} | {values[0]['parameters']:,} | {len(values)} "
            f"| {mean('held_out_loss'):.3f} | {spread} | {mean('bits_per_byte'):.3f} | {against} "
            f"| {mean('core_seconds'):.1f} | {mean('wall_seconds'):.1f} | {mean('tokens_per_second'):,.0f} |"
        )
    return lines


def sweeps(results: list[dict]) -> dict[tuple, dict[float, float]]:
    """Validation loss by learning rate, for each (size, model, steps) that was swept."""
    found = defaultdict(dict)
    for result in results:
        if result["sweep"]:
            losses = found[result["size"], result["arm"], result["steps"]]
            losses[result["learning_rate"]] = result["curve"][-1]["validation_loss"]
    return dict(found)


def report(results: list[dict]) -> str:
    groups = group(results)
    corpora = sorted({result["corpus"] for result in results})
    lines = [f"Corpus (SHA-256, first 16 digits): {', '.join(corpora)}. Finished runs: {len(results)}.", ""]
    lines += ["Learning rates of Muon (validation loss, nats/token, seed 0):", ""]
    rates = sorted({result["learning_rate"] for result in results if result["sweep"]})
    lines += [f"| size | model | steps | {' | '.join(map(str, rates))} |", "|:--|:--|--:|" + "--:|" * len(rates)]
    for (size, arm, steps), losses in sweeps(results).items():
        shown = (f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates)
        lines.append(f"| {size} | {arm} | {steps} | {' | '.join(shown)} |")
    for (size, steps), arms in groups.items():
        first = next(iter(next(iter(arms.values())).values()))
        heading = f"**{size}**: D = {first['hidden']}, {steps} steps, {first['tokens']:,} tokens in sequences of "
        heading += f"{first['sequence_length']}, learning rate "
        used = {name: next(iter(runs.values()))["learning_rate"] for name, runs in arms.items()}
        usual = used[baseline(arms)]
        others = ", ".join(f"{name}: {rate}" for name, rate in used.items() if rate != usual)
        heading += f"{usual} ({others})." if others else f"{usual}."
        lines += ["", heading, "", *table(arms)]
        lines += [
            f"\n{name} less {SCALED}, same batches (95 %): {mean_difference(arms[name], arms[SCALED])} nats/token."
            for name in sorted(arms)
            if "plain" in arms and SCALED in arms and name != SCALED
            if name == "block" or name.endswith(", scaled init")
        ]
        if seen := smallest_difference(arms):
            lines += ["", f"Power: with {seen[1]} seeds this design sees a difference of {seen[0]:.3f} nats/token "]
            lines[-1] += "four times in five (p = 0.05, paired by seed, variance pooled over the models)."
    lines += ["", "Fits of L = a C^-b, intervals by bootstrap over seeds:", "", *fit_lines(groups)]
    return "\n".join(lines) + "\n"


def draw(results: list[dict], path: Path):
    """Each model less plain, a point per seed; loss against seconds of one core; what block gains by depth."""
    groups = group(results)
    figure, panels = plt.subplot_mosaic([["left", "right"], ["left", "depth"]], figsize=(13, 11), layout="constrained")
    left, right, depth = (panels[name] for name in ("left", "right", "depth"))
    names = list(dict.fromkeys(arm for arms in groups.values() for arm in arms if arm != "plain"))
    for index, ((size, steps), arms) in enumerate(groups.items()):
        base = baseline(arms)
        label = f"{size}, {steps} steps" + ("" if base == "plain" else f", less {base}")
        for row, name in enumerate(names):
            values = differences(arms[name], arms[base]) if name in arms and name != base else []
            height = np.full(len(values), row + 0.9 * ((index + 0.5) / len(groups) - 0.5))
            left.plot(values, height, "o", color=f"C{index}", label=label, ms=5)
            label = None
    left.axvline(0, color="0.5", lw=1)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("held-out loss less that of plain, same seed (nats/token)")
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.06), ncols=2)
    widths = widths_only(groups)
    for index, name in enumerate(["plain", *names]):
        points = [
            np.mean([(r["core_seconds"], r["held_out_loss"]) for r in arms[name].values()], axis=0)
            for arms in widths.values()
            if name in arms
        ]
        if not points:
            continue
        style = {"color": f"C{index % 10}", "marker": "os^"[index // 10 % 3]}
        right.plot(*np.array(points).T, label=name, **style)
    right.set_xscale("log")
    right.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter("")
    right.set_xlabel("seconds of one core, training only")
    right.set_ylabel("held-out loss (nats/token), mean over seeds")
    right.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    by_width = defaultdict(list)
    for arms in groups.values():
        if SCALED in arms and BLOCK in arms:
            run = next(iter(arms[SCALED].values()))
            found = differences(arms[BLOCK], arms[SCALED])
            by_width[run["hidden"], run["sequence_length"]].append((run["layers"], found))
    for index, ((width, length), points) in enumerate(sorted(by_width.items())):
        label, style = f"D = {width}, sequences of {length}", {"color": f"C{index}", "marker": "os^Dv"[index % 5]}
        shifted = 1.012 ** (index - (len(by_width) - 1) / 2)  # so that no width hides another
        for layers, found in sorted(points, key=lambda point: point[0]):
            depth.plot([layers * shifted] * len(found), found, ls="", alpha=0.4, **style)
        means = sorted((layers * shifted, found.mean()) for layers, found in points)
        depth.plot(*np.array(means).T, label=label, ms=10, **style)
    depth.axhline(0, color="0.5", lw=1)
    depth.set_xscale("log", base=2)
    depth.xaxis.set_major_formatter("{x:g}")
    depth.set_xticks(sorted({layers for points in by_width.values() for layers, _ in points}))
    depth.minorticks_off()
    depth.set_xlabel("layers")
    depth.set_ylabel("block less plain, scaled init, same seed (nats/token)")
    if by_width:
        depth.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="JSON lines of finished runs")
    parser.add_argument("--out", type=Path, help="Markdown file; default: standard output")
    parser.add_argument("--figure", type=Path, help="PNG file")
    options = parser.parse_args()
    results = read_results(options.results)
    if not results:
        parser.error(f"--results {options.results} holds no finished run; make some with benchmarks.study.train.")
    if options.figure:
        draw(results, options.figure)
    if options.out:
        options.out.write_text(report(results), encoding="utf-8")
    else:
        print(report(results), end="")


if __name__ == "__main__":
    main()
