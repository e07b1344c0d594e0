"""The model under evaluation and its settings, identified by hashes before anything is loaded."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..messages import one_line, quiet_lm_eval, quiet_transformers
from . import identity as hashes
from .processes import Team


@dataclass(frozen=True)
class Settings:
    """The settings that a score depends on besides model and task; part of every fingerprint."""

    dtype: str
    batch_size: int | str
    limit: int | float | None
    seed: int
    seeds: int | None
    max_length: int | None
    chat_template: bool
    trust_remote_code: bool
    device: str
    device_map: str | None
    load_in_4bit: bool


@dataclass
class Subject:
    """A model that is known by its hashes, and loaded when a row needs it; loading it fills `facts`."""

    name: str
    identity: dict[str, str]
    load: Callable[[], object]
    facts: dict = field(default_factory=dict)

    @cached_property
    def lm(self):
        return self.load()


@dataclass(frozen=True)
class Origin:
    """A model before it is loaded, with its tokenizer."""

    name: str
    model: object  # in memory, or the folder of its checkpoint
    tokenizer: object
    tokenizer_folder: Path | None  # None for a tokenizer in memory

    def load(self, settings: Settings, folder: Path | None, team: Team | None = None):
        """Returns the model for lm-eval, loaded from `folder` instead of its own checkpoint if one is given."""
        from .lm import CausalLM, context_length, load_model

        network = self.model
        if isinstance(network, Path):
            network = load_model(str(folder or network), settings)
        length = context_length(network.config, self.tokenizer, settings.max_length, self.name)
        with quiet_lm_eval():
            return CausalLM(network, self.tokenizer, length, settings.batch_size, team)


def find(model, tokenizer, revision: str | None, settings: Settings) -> Origin:
    """Finds the model and loads its tokenizer."""
    from .lm import load_tokenizer, with_padding

    if isinstance(model, str | os.PathLike):
        if settings.device_map is None:
            _check_device(settings.device)
        if settings.load_in_4bit and find_spec("bitsandbytes") is None:
            raise ValueError("--load-in-4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
        folder = hashes.checkpoint_folder(str(model), revision)
        tokenizer_folder = folder if tokenizer is None else hashes.tokenizer_source(str(tokenizer))
        tokenizer = load_tokenizer(str(tokenizer_folder), settings.trust_remote_code)
        origin = Origin(str(model), folder, tokenizer, tokenizer_folder)
    elif tokenizer is None or revision is not None or settings.load_in_4bit:
        raise ValueError(
            "name a folder or a hub id, or pass a model in memory with its tokenizer= and without revision or 4 bits"
        )
    else:
        origin = Origin(type(model).__name__, model, with_padding(tokenizer), None)
    if settings.chat_template and not getattr(origin.tokenizer, "chat_template", None):
        raise ValueError(f"{origin.name}: its tokenizer has no chat template; leave --apply-chat-template out")
    return origin


def _check_device(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except Exception as error:  # each backend has its own exceptions
        reason = one_line(error)
        raise ValueError(f"--device {name}: torch cannot use it ({reason}); name another one, such as cpu") from None


def describe(
    model, tokenizer, revision: str | None, lm, settings: Settings, out: Path, team: Team | None, say: Callable
) -> Subject:
    """Hashes what is to be evaluated, without loading it; converts a checkpoint in Kimi K3's layout inside `out`."""
    if lm is not None:
        if team is not None:
            raise ValueError("lm= is measured by a single process; start it without accelerate launch")
        identity = getattr(lm, "identity", None) or {"weights": f"unknown-{uuid.uuid4().hex}"}
        return Subject(type(lm).__name__, identity, lambda: lm)
    origin = find(model, tokenizer, revision, settings)
    convert = False
    if origin.tokenizer_folder is None:
        identity = hashes.model_identity(origin.model, origin.tokenizer)
    else:
        convert = _is_kimi_k3(origin.model, settings.trust_remote_code)
        say(f"hashing the weights of {origin.name}")
        identity = hashes.checkpoint_identity(origin.model)
        identity["tokenizer"] = hashes.tokenizer_identity(origin.tokenizer_folder)

    def load():
        with converted(origin.model, out, say) if convert else nullcontext() as folder:
            say(f"loading {origin.name}")
            if team is None:
                loaded = origin.load(settings, folder)
            else:
                payloads = [folder] * team.size
                loaded, *_ = team.call("load", payloads, lambda folder: origin.load(settings, folder, team))
        network = loaded.model
        subject.facts = {
            "model_type": network.config.model_type,
            "parameters": network.num_parameters(),
            "dtype": str(network.dtype).removeprefix("torch."),
            "quantization": _quantization(network.config),
            "device": str(network.device),
            "max_length": loaded.max_length,
            "processes": 1 if team is None else team.size,
        }
        return loaded

    subject = Subject(origin.name, identity, load)
    return subject


def _quantization(config) -> str | None:
    """Returns the name of the quantisation method, such as "bitsandbytes"; None if the weights are not quantised."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _is_kimi_k3(folder: Path, trust_remote_code: bool) -> bool:
    """Returns whether a checkpoint has Kimi K3's layout, which transformers would load without its depth mixer.

    A checkpoint that brings its own model code counts as another layout if that code is trusted.

    Raises:
        ValueError: the checkpoint has this layout but cannot be converted, which is said before hours of hashing.
    """
    from ..conversion import read_checkpoint
    from ..conversion.checkpoint import read_json
    from ..conversion.kimi_k3 import is_k3
    from ..conversion.layouts import KIMI_K3, understand

    config = read_json(folder / "config.json")
    if not is_k3(config) or (trust_remote_code and "AutoModelForCausalLM" in (config.get("auto_map") or {})):
        return False
    understand(read_checkpoint(folder), KIMI_K3)
    return True


@contextmanager
def converted(folder: Path, out: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """Converts a checkpoint in Kimi K3's layout to an AttnRes checkpoint that exists inside the block."""
    from ..conversion import convert

    say(f"converting {folder} from Kimi K3's layout for this run; `attnres convert {folder} DST` makes it permanent")
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".kimi-k3-", dir=out) as temporary:
        target = Path(temporary) / "attnres"
        try:
            convert(folder, target, from_layout="kimi-k3", verify="none", link=True)
        except OSError:
            convert(folder, target, from_layout="kimi-k3", verify="none")  # another file system has no hard links
        yield target


def follow(model, tokenizer, revision: str | None, settings: Settings, team: Team) -> dict:
    """Runs every rank but 0: loads the model and answers its share until rank 0 ends; returns rank 0's outcome."""
    loaded = []

    def load(folder: Path | None):
        loaded[:] = [find(model, tokenizer, revision, settings).load(settings, folder)]

    with quiet_lm_eval(), quiet_transformers():  # rank 0 shows the progress bar
        return team.follow({"load": load, "answer": lambda share: loaded[0].answer(share)})
