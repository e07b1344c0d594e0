"""Starts runs of `attnres train`, each in its own process, and kills them at a given point.

    python killed_runs.py '[{"arguments": ["MODEL", "--data", ...], "at": "step", "number": 3}]'

Runs are forked before torch computes anything, because importing it for each run would take most of the time.
"""

import json
import os
import signal
import sys

from attnres.training import command, run_folder, trainer


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(number: int):
    """Kills a run in the middle of a step, before its gradients are used."""
    usual = trainer.RunTrainer.training_step

    def step(self, *args, **kwargs):
        loss = usual(self, *args, **kwargs)
        if self.state.global_step == number - 1:
            die()
        return loss

    trainer.RunTrainer.training_step = step


def _in_saving(method: str, number: int):
    usual = getattr(trainer.RunTrainer, method)

    def save(self, *args, **kwargs):
        if self.state.global_step == number:
            die()
        return usual(self, *args, **kwargs)

    setattr(trainer.RunTrainer, method, save)


def before_optimizer(number: int):
    """Kills a run when the weights of a checkpoint are saved but not the optimizer."""
    _in_saving("_save_optimizer_and_scheduler", number)


def before_generators(number: int):
    """Kills a run when everything but the random number generators and the state is saved."""
    _in_saving("_save_rng_state", number)


def before_rename(number: int):
    """Kills a run when a checkpoint is complete but not yet renamed."""
    usual = os.rename

    def rename(source, target):
        if target.name == f"checkpoint-{number}":
            die()
        usual(source, target)

    run_folder.os.rename = rename


def at_the_end(number: int):
    """Kills a run when the trained model is written but not yet in its place."""
    run_folder.put_in_place = die


WHERE = {
    "step": at_step,
    "before optimizer": before_optimizer,
    "before generators": before_generators,
    "before rename": before_rename,
    "end": at_the_end,
}

if __name__ == "__main__":
    for killed in json.loads(sys.argv[1]):
        process = os.fork()
        if process == 0:
            WHERE[killed["at"]](killed.get("number"))
            command.run(killed["arguments"])
            os._exit(0)
        _, status = os.waitpid(process, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(f"{killed['at']}: ended by itself with {status}")
