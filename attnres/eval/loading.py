"""Turns a row into lm-eval task objects: expands names to leaf tasks and sets shots and token limits."""

import hashlib
import inspect
import json
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..messages import one_line
from .mirror import Mirror, MissingData
from .suites import MIN_GENERATED_TOKENS, OWN_TASKS, Row

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager


class LoadedTask(NamedTuple):
    """A leaf task with its data, ready to run.

    `name` is lm-eval's name of the task. `seed` is the number of the order of the choices, None if there is only one.
    """

    name: str
    seed: int | None
    task: "ConfigurableTask"

    @property
    def key(self) -> str:
        """The name with the seed, which is unique within a row."""
        return self.task.config.task


def load_tasks(
    row: Row, seeds: int | None = None, mirror: Mirror | None = None, chat: bool = False
) -> list[LoadedTask]:
    """Returns all leaf tasks of a row with their data.

    Args:
        seeds: the number of orders of the choices, instead of the row's.
        mirror: the mirror to read the data from, instead of the hub.
        chat: whether prompts are wrapped in a chat template.

    Raises:
        MissingData: items are missing, or the task cannot read them.
    """
    numbers = range(seeds or row.seeds) if row.seeds > 1 else [None]
    return [
        LoadedTask(config["task"], number, _build(config, row, number, mirror))
        for config in task_configs(row, resolve=True, chat=chat)
        for number in numbers
    ]


def task_configs(row: Row, resolve: bool = False, chat: bool = False) -> list[dict]:
    """Returns the YAML configurations of a row's leaf tasks, without loading any data.

    Args:
        resolve: whether to import the functions that the configurations name.
        chat: whether to use the tasks that the row has for chat templates, if it has any.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = _manager(row.folder)
    tasks = row.chat_tasks if chat and row.chat_tasks else row.tasks
    names = [leaf for name in tasks for leaf in _leaves(manager, name)]
    return [load_yaml(manager.task_index[name].yaml_path, resolve_func=resolve) for name in names]


def task_fingerprint(loaded: LoadedTask, mirror: Mirror | None) -> dict:
    """Returns a task's version and the hashes of its definition, with the source of its functions, and of its data."""
    config = asdict(loaded.task.config)
    config.pop("custom_dataset")  # the hash is over the data themselves, not over where they are
    definition = json.dumps(config, sort_keys=True, default=_describe)
    if mirror is None:
        data = "-".join(getattr(part, "_fingerprint", "") for part in loaded.task.dataset.values())
    else:
        data = mirror.digest(config["dataset_path"], config["dataset_name"])
    return {"version": loaded.task.VERSION, "definition": hashlib.sha256(definition.encode()).hexdigest(), "data": data}


def _build(config: dict, row: Row, number: int | None, mirror: Mirror | None) -> "ConfigurableTask":
    from lm_eval.api.task import ConfigurableTask

    config = {key: value for key, value in config.items() if key not in ("tag", "group", "task_alias")}
    repository, name = config["dataset_path"], config.get("dataset_name")
    if number is not None:
        process = partial(config["process_docs"], seed=number)
        examples = {**(config.get("fewshot_config") or {}), "process_docs": process}
        config |= {"task": f"{config['task']}_seed{number}", "process_docs": process, "fewshot_config": examples}
    # Set in the configuration, because lm-eval's num_fewshot argument cannot replace a 0 that a YAML sets.
    config["num_fewshot"] = row.shots
    if config.get("output_type") == "generate_until":
        generation = dict(config.get("generation_kwargs") or {})
        generation["max_gen_toks"] = max(generation.get("max_gen_toks", 0), MIN_GENERATED_TOKENS)
        config["generation_kwargs"] = generation
    if mirror is not None:
        config["custom_dataset"] = lambda **metadata: mirror.load(repository, name)
    where = f"{repository}{f', config {name!r}' if name else ''} {mirror.root / repository if mirror else 'on the hub'}"
    try:
        task = ConfigurableTask(config=config)
    except (MissingData, OSError, RuntimeError):  # RuntimeError comes from the hub
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error, 120)}"
        raise MissingData(
            f"{where}: the task {config['task']} cannot read its items ({reason}); compare splits and fields with the "
            "hub's"
        ) from error
    # lm-eval draws one more example if the question itself could be among them.
    needed = row.shots + (task.fewshot_cfg.split == task.config.test_split) if row.shots else 0
    if (available := len(task.sampler.df)) < needed:
        raise MissingData(
            f"{where}: the task {task.config.task} shows {row.shots} examples, which needs at least {needed} items in "
            f"the split {task.fewshot_cfg.split!r}; it has {available}"
        )
    return task


@lru_cache
def _manager(folder: str | None) -> "TaskManager":
    """Returns an index of one folder of lm-eval's YAML files, or of our own: indexing all of lm-eval takes seconds."""
    import lm_eval.tasks

    path = OWN_TASKS if folder is None else Path(lm_eval.tasks.__file__).parent / folder
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(path))


def _leaves(manager: "TaskManager", name: str) -> list[str]:
    """Returns the names of the leaf tasks below a task, group or tag."""
    from lm_eval.tasks._index import Kind

    entry = manager.task_index[name]
    if entry.kind not in (Kind.GROUP, Kind.TAG):
        return [name]
    children = entry.cfg["task"] if entry.kind == Kind.GROUP else sorted(entry.tags)
    return [leaf for child in children for leaf in _leaves(manager, child)]


def _describe(value) -> str:
    """Represents a function by the source of its module, so that an edited helper makes another task."""
    if isinstance(value, partial):
        return f"{_describe(value.func)} {sorted(value.keywords.items())}"
    if callable(value):
        source = inspect.getsourcefile(value)
        digest = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""
        return f"{value.__qualname__} {digest}"
    return str(value)
