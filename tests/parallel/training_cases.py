"""Trains tiny models as a JSON file says, in one process or in each that a launcher started; notes what came out.

    accelerate launch ... training_cases.py CASES.json OUT

accelerate (1.15) gives FSDP to accelerators only: here it takes the processes' CPUs for such.
"""

import gc
import io
import json
import os
import sys
from contextlib import redirect_stderr
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, patch_environment
from helpers import random_attnres, random_tokens
from transformers import Trainer, TrainerCallback, TrainingArguments

from attnres import AttnResForCausalLM, cli, depth_mixer

EXACT = {"family": "qwen3", "mode": "block", "float64": True}
MODELS = {
    f"{family}-{mode}": {**EXACT, "family": family, "mode": mode}
    for family, mode in (("qwen3", "block"), ("qwen3", "full"), ("qwen3", "standard"), ("qwen3_moe", "block"))
}
MIXED = {
    f"mixed-{family}-{mode}": {"family": family, "mode": mode, "model": model}
    for family, mode, model in (("qwen3", "block", {}), ("qwen3_moe", "full", {"moe_intermediate_size": 16}))
}
# What one process trains, and what several are compared with.
ALONE = {
    **MODELS,
    "frozen-backbone": {**EXACT, "freeze_backbone": True},
    "zero-pseudo-queries": {**EXACT, "as_converted": True},
    "float32": {"family": "qwen3", "mode": "block"},
    "tied-embeddings": {**EXACT, "model": {"tie_word_embeddings": True}},
    "clipped": {**EXACT, "options": {"max_grad_norm": 0.5}},
    **MIXED,
}
BASE = "qwen3-block"
# Options that must not change anything.
ACCUMULATION = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
RECOMPUTE = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
CHECKPOINTING = {
    f"checkpointing-{use_reentrant}": {
        f"{RECOMPUTE}_checkpointing": True,
        f"{RECOMPUTE}_checkpointing_kwargs": {"use_reentrant": use_reentrant},
    }
    for use_reentrant in (False, True)
}

GLOBAL_BATCH = 4
OPTIONS = {
    "max_steps": 4,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "ddp_find_unused_parameters": False,
    "seed": 5,
}


class Data(torch.utils.data.Dataset):
    """Every sequence has another number of labels, so that a mean over processes of their means would be wrong."""

    def __init__(self):
        self.rows = random_tokens(32, 11, seed=3)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        labels = self.rows[index].clone()
        labels[: int(index) % 7] = -100
        return {"input_ids": self.rows[index], "labels": labels}


class Notes(TrainerCallback):
    """Losses and gradient norms of all steps; whole gradients of the first."""

    def __init__(self):
        self.losses, self.norms, self.gradients = [], [], {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            found = {plain(name): whole(parameter.grad) for name, parameter in model.named_parameters()}
            self.gradients = {name: gradient for name, gradient in found.items() if gradient is not None}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.norms.append(float(logs["grad_norm"]))


def whole(tensor):
    """A copy of all of a tensor that may be sharded."""
    if tensor is None:
        return None
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def plain(name: str) -> str:
    """The name of a parameter without what wrappers add."""
    return name.removeprefix("module.").replace("._checkpoint_wrapped_module", "")


def use_cpus_as_accelerators():
    start = PartialState.__init__

    def start_as_accelerator(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start_as_accelerator


def note_scores(found: set):
    """Adds the dtypes of the pseudo-queries that decoder layers mix by, and of the depth weights."""
    read = depth_mixer.DepthState.read

    def noted(state, query, *arguments):
        mixture, weights = read(state, query, *arguments)
        if query is not None:
            found.update(str(each.dtype) for each in (query.query, weights))
        return mixture, weights

    depth_mixer.DepthState.read = noted


def command(line: list[str]) -> dict:
    """What `attnres` says."""
    with redirect_stderr(io.StringIO()) as said:
        status = cli.main(line)
    assert status == 0, said.getvalue()
    return {"said": said.getvalue()}


def train(name: str, case: dict, out: Path) -> dict:
    """What became of one case."""
    per_device = GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", "1"))
    options = {**OPTIONS, "per_device_train_batch_size": per_device, **case.get("options", {})}
    args = TrainingArguments(output_dir=str(out / name), **options)
    if "load" in case:
        model = AttnResForCausalLM.from_pretrained(case["load"], attn_implementation="eager", dtype=torch.float32)
    else:
        model = random_attnres(case["family"], case["mode"], **case.get("model", {}))
    if case.get("float64"):
        model.double()
        if "moe" in case["family"]:
            model.set_experts_implementation("eager")  # torch groups matrices of up to 32 bits
    if case.get("as_converted"):
        torch.nn.init.zeros_(model.depth_mixer.attention_norm.query)
        torch.nn.init.zeros_(model.depth_mixer.mlp_norm.query)
        torch.nn.init.zeros_(model.depth_mixer.output_norm.query)
    if case.get("freeze_backbone"):
        model.freeze_backbone()
    score_dtypes, mixers = set(), []
    note_scores(score_dtypes)
    if model.depth_mixer is not None:
        model.depth_mixer.register_forward_hook(
            lambda mixer, _, queries: mixers.append(
                (type(mixer.mlp_norm.query).__name__, [len(queries), *queries[0].query.shape])
            )
        )
    notes = Notes()
    trainer = Trainer(model=model, args=args, train_dataset=Data(), callbacks=[notes])
    trainer.train(resume_from_checkpoint=case.get("resume"))
    if case.get("save"):
        trainer.save_model(str(out / name / "final"))
    parameters = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    local = {
        plain(name): list(parameter.to_local().shape)
        for name, parameter in parameters.items()
        if hasattr(parameter, "to_local")
    }
    return {
        "losses": notes.losses,
        "norms": notes.norms,
        "gradients": notes.gradients,
        "weights": {plain(name): whole(parameter) for name, parameter in parameters.items()},
        "wrapper": type(trainer.model_wrapped).__mro__[1].__name__ if local else type(trainer.model_wrapped).__name__,
        "local_shapes": local,
        "score_dtypes": sorted(score_dtypes),
        "mixers": mixers[:1],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # Trainer collects garbage again and again, and modules are none
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        use_cpus_as_accelerators()
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    outcomes = {}
    for name, case in cases.items():
        AcceleratorState._reset_state()
        GradientState._reset_state()
        with patch_environment(**case.get("environment", {})):
            outcomes[name] = command(case["command"]) if "command" in case else train(name, case, out)
    torch.save(outcomes, out / f"rank-{os.environ.get('RANK', '0')}.pt")
