"""The folder of a run: its record, its complete checkpoints, and atomic writes."""

import json
import os
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..folders import check_writable, write_text
from ..messages import one_line
from .arguments import flag

RECORD = "run.json"
UNFINISHED = "unfinished"  # subfolder whose contents are renamed when they are complete

# Arguments that may change when a run is resumed, because the weights and losses do not depend on them. Data and
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
    """Returns the complete checkpoint with the highest step, if there is one."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    numbered = {int(path.name[11:]): path for path in found if path.name[11:].isdecimal()}
    return numbered[max(numbered)] if numbered else None


def _check_undamaged(checkpoint: Path):
    """Opens the files of a checkpoint, so that a truncated file is reported before anything is loaded."""
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
                f"{path}: is damaged ({one_line(error)}); remove {checkpoint} to resume from the checkpoint before it"
            ) from None


def check_place(folder: Path, resume: bool):
    """Checks that a run may start in a folder or be resumed there."""
    if resume:
        if not (folder / RECORD).is_file():
            raise ValueError(f"{folder}: holds no run to resume (no {RECORD}); leave out --resume to start one")
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; use --resume to continue the run in it, or start in another --out")
    check_writable(folder)


def begin(folder: Path, record: dict):
    """Writes the record of a run and removes what an interrupted run had not finished."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    write_text(folder / RECORD, json.dumps(record, indent=2, sort_keys=True, default=str) + "\n")


def name_checkpoint(written: Path, folder: Path):
    """Gives a complete checkpoint its final name."""
    final = folder / written.name
    shutil.rmtree(final, ignore_errors=True)  # --enable-jit-checkpoint creates this folder early
    os.rename(written, final)
    written.parent.rmdir()


def put_in_place(folder: Path, name: str):
    """Moves the contents of the unfinished subfolder `name` into the folder; existing files are replaced."""
    for path in sorted((folder / UNFINISHED / name).iterdir()):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    shutil.rmtree(folder / UNFINISHED)


def checkpoint_of_same_run(folder: Path, record: dict) -> Path | None:
    """Returns the last checkpoint of a run that is resumed with what it began with; None if there is none."""
    try:
        began = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        parts = {part: began[part] for part in record}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / RECORD}: is no record of a run ({error!r}); use another --out") from None
    now = json.loads(json.dumps(record, default=str))
    for part, then in parts.items():
        may_change = MAY_CHANGE if part == "arguments" else set()
        for name in sorted((then.keys() & now[part].keys()) - may_change):  # fields differ by transformers version
            if then[name] != now[part][name]:
                what = flag(name) if part == "arguments" else name
                raise ValueError(
                    f"{folder}: {what} was {then[name]} when the run began and is {now[part][name]} now; resume with "
                    "the old value, or start a new run with another --out"
                )
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        _check_undamaged(checkpoint)
    return checkpoint
