"""A run's folder: its settings, its complete checkpoints, and atomic writes."""

import json
import os
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..folders import check_writable

RECORD = "run.json"
UNFINISHED = "unfinished"  # where things are written, to be renamed when they are complete

# What may be another when a run is resumed: it leaves the weights, and the losses of each step, as they are. Data and
# tokenizer are compared by content.
_MAY_CHANGE = """
    resume out data eval_data tokenizer trust_remote_code depth_dynamics depth_dynamics_steps
    output_dir disable_tqdm report_to run_name project log_level log_level_replica log_on_each_node logging_dir
    logging_strategy logging_first_step logging_steps logging_nan_inf_filter include_num_input_tokens_seen
    eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps per_device_eval_batch_size do_eval
    save_strategy save_steps save_total_limit save_on_each_node
    load_best_model_at_end metric_for_best_model greater_is_better
    push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision
    trackio_space_id trackio_bucket_id trackio_static_space_id
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    skip_memory_metrics torch_empty_cache_steps use_cpu local_rank do_train do_predict
"""
MAY_CHANGE = frozenset(_MAY_CHANGE.split())


def last_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step. Their folders have their names when all is in them; a folder of
    such a name that something else has made has no state of a Trainer."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    numbered = {int(path.name.removeprefix("checkpoint-")): path for path in found if path.name[11:].isdecimal()}
    return numbered[max(numbered)] if numbered else None


def check_undamaged(checkpoint: Path):
    """Opens what a run is resumed from: what is cut short is named before anything is loaded.

    Raises:
        ValueError: the first damaged file, and what to do.
    """
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
                raise ValueError("its end is missing")
        except (ValueError, OSError, SafetensorError) as error:
            raise ValueError(
                f"{path}: is damaged ({' '.join(str(error).split())}); remove {checkpoint} to resume from the "
                "checkpoint before it"
            ) from None


def check_place(folder: Path, resume: bool):
    """Whether a run may begin, or go on, in a folder.

    Raises:
        ValueError: there is something in the way, or nothing to go on with.
        OSError: it cannot be written.
    """
    if resume:
        if not (folder / RECORD).is_file():
            raise ValueError(f"{folder} holds no run to resume (no {RECORD}): leave out --resume to start one")
    elif folder.exists() and (not folder.is_dir() or any(path.name != UNFINISHED for path in folder.iterdir())):
        raise ValueError(f"{folder} is not empty: --resume continues the run in it; to start one, give another --out")
    check_writable(folder)


def begin(folder: Path, record: dict):
    """Writes down what the run is; clears away what an interrupted one was about to write."""
    remove_unfinished(folder)
    unfinished = folder / UNFINISHED
    unfinished.mkdir(parents=True)
    (unfinished / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
    os.replace(unfinished / RECORD, folder / RECORD)
    unfinished.rmdir()


def remove_unfinished(folder: Path):
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def name_checkpoint(written: Path, folder: Path):
    """A checkpoint is complete."""
    final = folder / written.name
    shutil.rmtree(final, ignore_errors=True)  # --enable-jit-checkpoint makes the folder before
    os.rename(written, final)
    written.parent.rmdir()


def put_in_place(folder: Path, name: str):
    """Moves what is in a subfolder of the unfinished into the folder, over what was there."""
    for path in sorted((folder / UNFINISHED / name).iterdir()):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    remove_unfinished(folder)


def check_same_run(folder: Path, record: dict):
    """Refuses to continue a run as another one.

    Raises:
        ValueError: the first thing that is another, what it was and what to do.
    """
    try:
        began = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        parts = {part: began[part] for part in record}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / RECORD} is not what `attnres train` writes ({error!r}): give another --out"
        ) from None
    now = json.loads(json.dumps(record, default=str))
    for part, then in parts.items():
        may_change = MAY_CHANGE if part == "arguments" else set()
        for name in sorted((then.keys() & now[part].keys()) - may_change):  # another transformers has other fields
            old, new = then[name], now[part][name]
            if old != new:
                _refuse(folder, part, name, old, new)


def _refuse(folder: Path, part: str, name: str, old, new):
    what = f"--{name.replace('_', '-')} was {old}" if part == "arguments" else f"{part}: {name} was {old}"
    last = last_checkpoint(folder)
    if last is not None and not (last / "config.json").is_file():  # with adapters alone
        last = folder if (folder / "config.json").is_file() else None
    other = "" if last is None else f", or train {last} as a new run with another --out"
    raise ValueError(
        f"{folder}: {what} when the run began and is {new} now, which would make it another run: resume with what it "
        f"was{other}"
    )
