"""Pages of the site that are made from other files: the home page, the command-line reference, the examples."""

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"index.md": "README.md", **{name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff")}}
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")


def on_files(files, config):
    """Adds what lies outside docs/, at the path it has in the repository, and the command-line reference."""
    pages = PAGES | {path: path for path in (p.relative_to(ROOT).as_posix() for p in _examples())}
    for address, path in pages.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.endswith(".md"):
            text = _moved(text, path, address)
        files.append(File.generated(config, address, content=text))
    files.append(File.generated(config, "cli.md", content=_command_line()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links from docs/ to the rest of the repository, where the site has that file."""
    address = page.file.src_uri
    return markdown if page.file.generated_by else _moved(markdown, f"docs/{address}", address)


def on_page_content(html, page, config, files):
    """Types in docstrings are written in Markdown, which mkdocstrings shows as it is."""
    return html.replace("`", "").replace("*optional*", "optional") if page.file.src_uri == "api.md" else html


def _examples():
    return [p for p in sorted((ROOT / "examples").rglob("*")) if p.suffix in {".md", ".py", ".yaml", ".json"}]


def _moved(text, path, address):
    """The Markdown of a repository file with its links as they have to be at its address on the site."""

    def moved(link):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
        if (ROOT / target).is_dir():  # a folder has no page
            target = f"{target}/README.md" if (ROOT / target / "README.md").exists() else "examples/README.md"
        target = {"README.md": "index.md"}.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(target, posixpath.dirname(address) or ".")

    return LINK.sub(moved, text)


def _command_line():
    """The output of --help, of the command and of each sub-command that it lists."""
    overview = _help()
    listed = re.split(r"(?i)commands?\b[^\n]*\n", overview)[-1].split("\noptions")[0]
    names = re.findall(r"^ {0,4}[│|]? {0,4}([a-z][a-z-]+)(?=\s|$)", listed, re.MULTILINE)
    if "convert" not in names:
        raise RuntimeError(f"no sub-commands found in the output of attnres --help:\n{overview}")
    parts = ["# Command line", "What the commands print with `--help`.", f"```text\n{overview}```"]
    for name in names:
        parts.append(f"## attnres {name}\n\n```text\n{_help(name)}```")
    return "\n\n".join(parts)


def _help(*command):
    environment = os.environ | {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    run = [sys.executable, "-m", "attnres", *command, "--help"]
    return subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
