"""`attnres card`."""

import sys

import click

from ..messages import say
from .options import Command
from .process import local_folder, require


@click.command("card", cls=Command, short_help="build a Hub folder with code, weights and a card of measured results")
@click.argument("model", metavar="MODEL")
@click.option("--out", metavar="DIR", default="card-out", help="folder to create")
@click.option(
    "--results",
    multiple=True,
    metavar="DIR...",
    help="folders that `attnres eval` wrote for MODEL, without --limit; several hold different rows",
)
@click.option("--text", metavar="FILE", help="text over which depth weights are drawn (default: four short texts)")
@click.option(
    "--dynamics",
    multiple=True,
    metavar="RUN...",
    help="output_dir of Trainers whose logged training dynamics are drawn",
)
@click.option("--license", metavar="ID", help="such as apache-2.0 (default: from MODEL's card or LICENSE)")
@click.option(
    "--language", multiple=True, metavar="CODE...", help="such as en, zh or code (default: from MODEL's card)"
)
@click.option("--base-model", metavar="ID", help="hub id of the model that MODEL was converted or fine-tuned from")
@click.option(
    "--no-run",
    is_flag=True,
    help="do not load the model: no snippet is run, no depth weights are drawn, and the card says so",
)
@click.option("--link", is_flag=True, help="hard-link MODEL's weights; saving over DIR later changes MODEL")
@click.option("--overwrite", is_flag=True, help="replace DIR once the new folder is complete")
@click.option("--push", "repository", metavar="REPO", help="upload to this hub repository, private unless --public")
@click.option("--public", is_flag=True, help="make the uploaded repository public")
@click.option("--yes", is_flag=True, help="upload without asking")
def card(model, out, results, dynamics, language, no_run, repository, public, yes, **options):
    """Builds a folder that loads anywhere with trust_remote_code=True: the model's code, weights, tokenizer, and a
    model card with results measured on these very weights. Before the folder appears, the card's usage snippets are
    run, offline and without this package, and every file is checked for tokens and local paths.

    MODEL is a folder or hub id of an AttnRes checkpoint with its tokenizer.
    """
    require("matplotlib", extra="hub")
    if repository is None and (public or yes):
        raise click.ClickException("--public and --yes say how to upload: name a repository with --push")
    from ..hub_card import build, push, upload_list

    folder = build(
        local_folder(model),
        out,
        list(results),
        dynamics=list(dynamics),
        language=list(language) or None,
        repo=repository,
        execute_snippets=not no_run,
        progress=True,
        **options,
    )
    print(folder)
    if repository is None:
        return
    kind = "public" if public else "private"
    print(f"{upload_list(folder)}, to the {kind} repository {repository}", file=sys.stderr)
    if yes or _confirmed():
        print(push(folder, repository, public=public))
    else:
        say("not uploaded")


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        raise click.ClickException(
            "not uploaded: there is no terminal to ask for confirmation; --yes skips the question"
        )
    print("Upload? [y/N] ", end="", file=sys.stderr, flush=True)
    return input().strip().lower() in ("y", "yes")
