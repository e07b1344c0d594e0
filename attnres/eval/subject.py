"""The model under evaluation and its settings, identified by hashes before anything is loaded."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from .identity import (
    checkpoint_folder,
    checkpoint_identity,
    is_kimi_k3,
    model_identity,
    read_config,
    tokenizer_identity,
    tokenizer_source,
)
from .processes import Team
from .progress import quiet_lm_eval


@dataclass(frozen=True)
class Settings:
    """What a score depends on besides model and task; part of every fingerprint."""

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
    """What is evaluated: known by its hashes from the start, loaded when a row needs it.

    Attributes:
        name: as the user gave it.
        identity: hashes of weights, configuration and tokenizer.
        load: gives lm-eval's LM; called at most once.
    """

    name: str
    identity: dict[str, str]
    load: Callable[[], object]
    facts: dict = field(default_factory=dict)
    _lm: object = None

    @property
    def lm(self):
        if self._lm is None:
            self._lm = self.load()
        return self._lm


@dataclass(frozen=True)
class Origin:
    """A model and its tokenizer, found but not loaded.

    Attributes:
        name: as the user gave it.
        model: in memory, or the folder of its checkpoint.
        tokenizer: in memory, ready.
        tokenizer_folder: where it came from, None for one in memory.
    """

    name: str
    model: object
    tokenizer: object
    tokenizer_folder: Path | None

    def load(self, settings: Settings, folder: Path | None, team: Team | None = None):
        """The model for lm-eval.

        Args:
            folder: of a checkpoint to load instead, which computes the same.
            team: if several processes share the work.
        """
        from .lm import context_length, load_model, wrap

        network = self.model
        if isinstance(network, Path):
            network = load_model(
                str(folder or network),
                settings.dtype,
                settings.device_map,
                settings.trust_remote_code,
                settings.device,
                settings.load_in_4bit,
            )
        length = context_length(network.config, self.tokenizer, settings.max_length, self.name)
        with quiet_lm_eval():
            return wrap(network, self.tokenizer, length, settings.batch_size, team)


def find(model, tokenizer, revision: str | None, settings: Settings) -> Origin:
    """Where the model is; its tokenizer.

    Raises:
        ValueError: no such checkpoint, device or tokenizer.
    """
    from .lm import check_device, load_tokenizer, with_padding

    if model is None:
        raise ValueError("no model: name a folder or a hub id")
    if isinstance(model, str | os.PathLike):
        if settings.device_map is None:
            check_device(settings.device)
        folder = checkpoint_folder(str(model), revision)
        if settings.load_in_4bit:
            check_quantizable(folder)
        tokenizer_folder = folder if tokenizer is None else tokenizer_source(str(tokenizer))
        tokenizer = load_tokenizer(str(tokenizer_folder), settings.trust_remote_code)
        origin = Origin(str(model), folder, tokenizer, tokenizer_folder)
    elif settings.load_in_4bit:
        raise ValueError("--load-in-4bit: a model in memory is loaded already; leave it out")
    elif revision is not None:
        raise ValueError(f"a model in memory has no revisions, got {revision!r}; leave it out")
    elif tokenizer is None:
        raise ValueError("a model in memory needs its tokenizer")
    else:
        origin = Origin(type(model).__name__, model, with_padding(tokenizer), None)
    if settings.chat_template and not getattr(origin.tokenizer, "chat_template", None):
        raise ValueError(f"{origin.name}: its tokenizer has no chat template")
    return origin


def check_quantizable(folder: Path) -> None:
    """Says before a model is hashed that it cannot be quantised.

    Raises:
        ValueError: so it is, and why.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError("--load-in-4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if quantization := read_config(folder).get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"{folder}: is quantised already ({method}); leave --load-in-4bit out")


def describe(
    model,
    tokenizer,
    revision: str | None,
    lm,
    settings: Settings,
    out: Path,
    team: Team | None,
    say: Callable[[str], None],
) -> Subject:
    """What is to be evaluated, hashed but not loaded.

    Args:
        out: folder of results, where a checkpoint is converted that cannot be loaded as it is.

    Raises:
        ValueError: as in `find`, or a checkpoint that cannot be converted.
    """
    if lm is not None:
        if team is not None:
            raise ValueError("lm= is measured by one process: start it without accelerate launch")
        identity = getattr(lm, "identity", None) or {"weights": f"unknown-{uuid.uuid4().hex}"}
        return Subject(type(lm).__name__, identity, lambda: lm)
    origin = find(model, tokenizer, revision, settings)
    convert = False
    if origin.tokenizer_folder is None:
        identity = model_identity(origin.model, origin.tokenizer)
    else:
        convert = is_kimi_k3(origin.model, settings.trust_remote_code)
        if convert:
            check_kimi_k3(origin.model)
        say(f"hashing the weights of {origin.name}")
        identity = checkpoint_identity(origin.model) | {"tokenizer": tokenizer_identity(origin.tokenizer_folder)}

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
    """The method, such as "bitsandbytes"; None where the weights are as `dtype` says."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def check_kimi_k3(folder: Path) -> None:
    """Says before hours of hashing that a checkpoint cannot be converted.

    Raises:
        ValueError: so it is, and why.
    """
    from ..conversion import read_checkpoint
    from ..conversion.layouts import KIMI_K3, understand

    understand(read_checkpoint(folder), KIMI_K3)


@contextmanager
def converted(folder: Path, out: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """An AttnRes checkpoint of a Kimi K3-style one, for as long as the block lasts."""
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
    """What all processes but the first do: load when told, answer their share; the outcome that the first had."""
    from transformers.utils.logging import disable_progress_bar

    from .lm import answer

    disable_progress_bar()  # the first shows one
    loaded = []

    def load(folder: Path | None):
        loaded[:] = [find(model, tokenizer, revision, settings).load(settings, folder, team)]

    with quiet_lm_eval():
        return team.follow({"load": load, "answer": lambda work: answer(loaded[0], work)})
