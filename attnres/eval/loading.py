"""Turns a row into lm-eval task objects: names expanded to leaf tasks, shots and token limits set."""

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from .mirror import Mirror, MissingData
from .suites import MIN_GENERATED_TOKENS, OWN_TASKS, Row

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager


@dataclass
class LoadedTask:
    """One leaf task, ready to run.

    Attributes:
        name: as lm-eval calls it; the same for all seeds.
        seed: which order of the choices, None where there is one only.
        task: lm-eval's object.
    """

    name: str
    seed: int | None
    task: "ConfigurableTask"

    @property
    def key(self) -> str:
        """Unique within a row."""
        return self.name if self.seed is None else f"{self.name}_seed{self.seed}"


def load_tasks(
    row: Row, seed: int, seeds: int | None = None, mirror: Mirror | None = None, chat: bool = False
) -> list[LoadedTask]:
    """All leaf tasks of a row with their data.

    Args:
        seed: of the choice of examples where a task draws them.
        seeds: orders of the choices, instead of the row's.
        mirror: where the data are; without it, on the hub.
        chat: whether prompts are wrapped in a chat template.

    Raises:
        MissingData: items are missing or not what the task reads.
    """
    loaded = []
    for config in task_configs(row, resolve=True, chat=chat):
        for number in range(seeds or row.seeds) if row.seeds > 1 else [None]:
            loaded.append(LoadedTask(config["task"], number, _build(config, row, number, seed, mirror)))
    return loaded


def task_configs(row: Row, resolve: bool = False, chat: bool = False) -> list[dict]:
    """The YAML configurations of a row's leaf tasks, without their data.

    Args:
        resolve: load the functions that they name, too.
        chat: those for a chat template, where the row has others for it.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = _manager(row.folder)
    tasks = row.chat_tasks if chat and row.chat_tasks else row.tasks
    names = [leaf for name in tasks for leaf in _leaves(manager, name)]
    return [load_yaml(manager.task_index[name].yaml_path, resolve_func=resolve) for name in names]


def task_fingerprint(loaded: LoadedTask, mirror: Mirror | None) -> dict:
    """Version, definition (with the source of its functions) and data of a task."""
    config = asdict(loaded.task.config)
    config.pop("custom_dataset")  # the data themselves count, not where they are
    definition = json.dumps(config, sort_keys=True, default=_describe)
    if mirror is None:
        data = "-".join(getattr(part, "_fingerprint", "") for part in loaded.task.dataset.values())
    else:
        data = mirror.digest(config["dataset_path"], config["dataset_name"])
    return {
        "version": loaded.task.VERSION,
        "definition": hashlib.sha256(definition.encode()).hexdigest(),
        "data": data,
    }


def _build(config: dict, row: Row, number: int | None, seed: int, mirror: Mirror | None) -> "ConfigurableTask":
    from lm_eval.api.task import ConfigurableTask

    config = {key: value for key, value in config.items() if key not in ("tag", "group", "task_alias")}
    if number is not None:
        process = partial(config["process_docs"], seed=number)
        examples = {**(config.get("fewshot_config") or {}), "process_docs": process}
        config |= {"task": f"{config['task']}_seed{number}", "process_docs": process, "fewshot_config": examples}
    # Set in the configuration, not as lm-eval's num_fewshot argument: that cannot replace a 0 that a YAML sets.
    config["num_fewshot"] = row.shots
    if config.get("output_type") == "generate_until":
        generation = dict(config.get("generation_kwargs") or {})
        generation["max_gen_toks"] = max(generation.get("max_gen_toks", 0), MIN_GENERATED_TOKENS)
        config["generation_kwargs"] = generation
    if mirror is not None:
        # lm-eval passes the task's metadata, which says nothing of the data.
        config["custom_dataset"] = lambda **_: mirror.load(config["dataset_path"], config.get("dataset_name"))
    where = _data(config, mirror)
    with _naming_the_data(where, config["task"]):
        task = ConfigurableTask(config=config)
    _check_shots(task, row.shots, where)
    task.set_fewshot_seed(seed=seed)
    build = task.build_all_requests

    def build_all_requests(**options):
        with _naming_the_data(where, config["task"]):
            build(**options)

    task.build_all_requests = build_all_requests
    return task


def _check_shots(task: "ConfigurableTask", shots: int, where: str) -> None:
    """lm-eval draws one example more where it must leave the question out."""
    there, split = len(task.sampler.df), task.fewshot_cfg.split
    needed = shots + (split == task.config.test_split) if shots else 0
    if there < needed:
        raise MissingData(
            f"{where}: the task {task.config.task} shows {shots} examples from "
            f"{f'the split {split!r}' if split else 'it'}, which needs at least {needed} items; it has {there}"
        )


@contextmanager
def _naming_the_data(where: str, task: str) -> Iterator[None]:
    """What a task's templates and functions raise over an item's fields names neither the data set nor the task."""
    try:
        yield
    except (MissingData, OSError, RuntimeError):  # of the hub
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise MissingData(
            f"{where}: the task {task} cannot read its items ({reason}); compare their fields with those on the hub"
        ) from error


def _data(config: dict, mirror: Mirror | None) -> str:
    repository, name = config["dataset_path"], config.get("dataset_name")
    place = "on the hub" if mirror is None else f"in {mirror.root / repository}"
    return f"{repository}{f', config {name!r}' if name else ''} {place}"


@lru_cache
def _manager(folder: str | None) -> "TaskManager":
    """An index of one folder of YAML files: that of all of lm-eval takes seconds."""
    import lm_eval.tasks

    path = OWN_TASKS if folder is None else Path(lm_eval.tasks.__file__).parent / folder
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(path))


def _leaves(manager: "TaskManager", name: str) -> list[str]:
    """Names of the leaf tasks below a group or tag."""
    from lm_eval.tasks._index import Kind

    entry = manager.task_index[name]
    if entry.kind == Kind.GROUP:
        children = entry.cfg["task"]
    elif entry.kind == Kind.TAG:
        children = sorted(entry.tags)
    else:
        return [name]
    return [leaf for child in children for leaf in _leaves(manager, child)]


def _describe(value) -> str:
    """A function by the source of its module, so that an edited helper is another task."""
    if isinstance(value, partial):
        return f"{_describe(value.func)} {sorted(value.keywords.items())}"
    if callable(value):
        source = inspect.getsourcefile(value)
        digest = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""
        return f"{value.__qualname__} {digest}"
    return str(value)
