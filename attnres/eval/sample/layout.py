"""From tables to the files of the mirror: a README.md with `configs:`, and JSON lines per config and split."""

import json

from .schemas import SCHEMAS, yaml_features
from .tables import tables


def files() -> dict[str, bytes]:
    """Contents of every file by its path below the root."""
    return {path: text.encode() for path, text in _texts()}


def _texts():
    for repository, configs in tables().items():
        yield f"{repository}/README.md", _card(repository, configs)
        for config, splits in configs.items():
            for split, rows in splits.items():
                lines = (json.dumps(row, ensure_ascii=False) for row in rows)
                yield f"{repository}/{_path(config, split)}", "".join(f"{line}\n" for line in lines)


def _path(config: str, split: str) -> str:
    return f"data/{config}/{split}.jsonl"


def _card(repository: str, configs: dict) -> str:
    """The front matter names the types: an empty column has none of its own, and integers are of several widths."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        entries = ", ".join(f"{{split: {split}, path: {_path(config, split)}}}" for split in splits)
        lines.append(f"- {{config_name: {_quoted(config)}, data_files: [{entries}]}}")
    lines.append("dataset_info:")
    features = json.dumps(yaml_features(SCHEMAS[repository]))
    for index, config in enumerate(configs):
        # An alias: the types are the same in all configs, and a card with 67 copies of them is slow to parse.
        reference = f"&features {features}" if index == 0 else "*features"
        lines.append(f"- config_name: {_quoted(config)}\n  features: {reference}")
    title = f"Miniature stand-in for {repository}"
    text = "Items of attnres's own in that data set's schema, for trying out an evaluation. None is from the data set."
    return "\n".join([*lines, "---", "", f"# {title}", "", text, ""])


def _quoted(name: str) -> str:
    return json.dumps(name)  # "no" and the like are no strings in YAML
