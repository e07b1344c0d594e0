"""What is evaluated, and with what settings: known by its hashes before anything is loaded."""

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from .identity import checkpoint_folder, checkpoint_identity, model_identity, tokenizer_identity, tokenizer_source
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
    processes: int


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


def describe(
    model, tokenizer, revision: str | None, device: str | None, lm, settings: Settings, say: Callable[[str], None]
) -> Subject:
    """What is to be evaluated, hashed but not loaded.

    Raises:
        ValueError: no such checkpoint, no tokenizer, or a layout that transformers does not load.
    """
    if lm is not None:
        identity = getattr(lm, "identity", None) or {"weights": f"unknown-{uuid.uuid4().hex}"}
        return Subject(type(lm).__name__, identity, lambda: lm)
    from .lm import context_length, load_model, load_tokenizer, with_padding, wrap

    if model is None:
        raise ValueError("no model: name a folder or a hub id")
    if not isinstance(model, str | os.PathLike):
        if tokenizer is None:
            raise ValueError("a model in memory needs its tokenizer")
        tokenizer = with_padding(tokenizer)
        subject = Subject(type(model).__name__, model_identity(model, tokenizer), lambda: wrapped(model))
    else:
        folder = checkpoint_folder(str(model), revision)
        tokenizer_folder = folder if tokenizer is None else tokenizer_source(str(tokenizer))
        tokenizer = load_tokenizer(str(tokenizer_folder), settings.trust_remote_code)
        say(f"hashing the weights of {model}")
        identity = checkpoint_identity(folder) | {"tokenizer": tokenizer_identity(tokenizer_folder)}

        def load():
            say(f"loading {model}")
            return wrapped(
                load_model(
                    str(folder),
                    settings.dtype,
                    settings.device_map,
                    settings.trust_remote_code,
                    device,
                )
            )

        subject = Subject(str(model), identity, load)

    if settings.chat_template and not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{subject.name}: its tokenizer has no chat template")

    def wrapped(network):
        length = context_length(network.config, tokenizer, settings.max_length, subject.name)
        subject.facts = {
            "model_type": network.config.model_type,
            "parameters": network.num_parameters(),
            "dtype": str(network.dtype).removeprefix("torch."),
            "device": str(network.device),
            "max_length": length,
        }
        with quiet_lm_eval():
            return wrap(network, tokenizer, length, settings.batch_size)

    return subject
