"""Builds the variants for every combination of sizes, checks that they compute the same, and measures them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import ceil
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from .. import AttnResConfig
from ..backbones import check_supported
from .arms import PLAIN, build, check, convert, select
from .machine import describe, load_average
from .memory import peak_bytes, saved_bytes
from .settings import BACKBONE, DTYPES, MEASURES, Settings
from .timing import compare, interleave
from .workloads import WORKLOADS, Workload, depth_alone, hollow, loss_of, random_ids

FORMAT = "attnres-bench/1"


def run(settings: Settings) -> dict:
    """Measures everything that the settings ask for; progress on stderr.

    Returns:
        The content of bench.json.

    Raises:
        ValueError: an option is out of range, or a variant computes something else than it should.
    """
    arms = select(settings.arms, settings.implementations)
    _check_names("measure", settings.measures, MEASURES)
    _check_names("dtype", settings.dtypes, DTYPES)
    device = _device(settings.device)
    config = backbone_config(settings)
    sizes = list(_sizes(config, settings))
    result = {
        "format": FORMAT,
        "settings": asdict(settings),
        "backbone": config.to_diff_dict(),
        "arms": {name: arm.description for name, arm in arms.items()},
        "left_out": {},
        "check": [],
        "timings": [],
        "memory": [],
    }
    with _threads(settings.threads), _quiet_transformers(), _memory_errors():
        result["machine"] = describe(device)
        if set(settings.measures) - {"depth"}:
            for sized, per_block in sizes:
                _measure_models(result, arms, sized, per_block, device, settings)
        if "depth" in settings.measures:
            _measure_depth_alone(result, arms, device, settings)
    result["machine"]["load_average_at_end"] = load_average()
    return result


def backbone_config(settings: Settings) -> PreTrainedConfig:
    """The backbone's configuration: the default one, or that of a checkpoint.

    Raises:
        ValueError: it cannot be read, or its family is not supported.
    """
    if settings.model is None:
        return AutoConfig.for_model(**settings.backbone)
    if not Path(settings.model).exists() and (settings.model.count("/") != 1 or settings.model.startswith((".", "/"))):
        raise ValueError(f"model {settings.model}: no such folder or file")
    try:
        config = AutoConfig.from_pretrained(settings.model)
    except Exception as error:  # hostile or damaged files can fail anywhere in transformers
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model {settings.model}: no configuration of a transformers model ({reason})") from None
    config = config.backbone_config if isinstance(config, AttnResConfig) else config
    check_supported(config)
    return config


def with_depth(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The configuration with another number of decoder layers; lists with an entry per layer are repeated or cut."""
    if layers == config.num_hidden_layers:
        return config
    options = config.to_dict()
    for name, value in options.items():
        if name.endswith("layer_types") and isinstance(value, list):
            options[name] = [value[layer % len(value)] for layer in range(layers)]
    return type(config).from_dict(options | {"num_hidden_layers": layers})


def _sizes(config: PreTrainedConfig, settings: Settings) -> Iterator[tuple[PreTrainedConfig, int]]:
    """Every configuration with every number of decoder layers per block, each once."""
    for depth in settings.depths or (config.num_hidden_layers,):
        sized = with_depth(config, depth)
        per_block = settings.layers_per_block or [ceil(depth / blocks) for blocks in settings.num_blocks]
        for layers in dict.fromkeys(per_block):
            AttnResConfig.from_backbone(sized, layers_per_block=layers)  # refuses what is out of range
            yield sized, layers


def _measure_models(result: dict, arms: dict, config: PreTrainedConfig, per_block: int, device, settings: Settings):
    blocks = ceil(config.num_hidden_layers / per_block)
    size = {"decoder_layers": config.num_hidden_layers, "layers_per_block": per_block, "blocks": blocks}
    title = f"{config.num_hidden_layers} layers in {blocks} blocks"
    for dtype in settings.dtypes:
        _say(f"{title}, {dtype}: building the variants and checking that they compute the same")
        models, left_out = build(arms, config, per_block, device, settings.seed)
        errors, cannot_run = check(arms, models, settings.seed)
        result["left_out"] |= left_out | cannot_run
        result["check"].append({**size, "relative_errors": errors})
        models = {name: models[name] for name in arms if name not in left_out | cannot_run}
        convert(models, getattr(torch, dtype))
        point = {**size, "hidden_size": config.hidden_size, "dtype": dtype}
        for measure, workloads in WORKLOADS.items():
            if measure in settings.measures:
                for workload in workloads(models, settings):
                    result["timings"].append(_time(workload, point, title, device, settings))
        if "memory" in settings.measures:
            result["memory"] += [
                {**point, "batch": 1, "tokens": tokens, "arms": _memory(models, tokens, device, title, settings)}
                for tokens in settings.tokens
            ]


def _measure_depth_alone(result: dict, arms: dict, device: torch.device, settings: Settings):
    shape = settings.depth_shape
    config = AutoConfig.for_model(
        **BACKBONE
        | {
            "vocab_size": 8,
            "hidden_size": shape.hidden_size,
            "intermediate_size": 8,
            "num_hidden_layers": shape.sublayers // 2,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 8,
        }
    )
    per_block = shape.sublayers_per_block // 2
    size = {
        "decoder_layers": config.num_hidden_layers,
        "layers_per_block": per_block,
        "blocks": ceil(config.num_hidden_layers / per_block),
    }
    for dtype in settings.dtypes:
        models, left_out = build(arms, config, per_block, device, settings.seed)
        errors, cannot_run = check(arms, models, settings.seed)
        result["left_out"] |= left_out | cannot_run
        result["check"].append({**size, "relative_errors": errors})
        models = {name: models[name] for name in arms if name not in left_out | cannot_run}
        for model in models.values():
            hollow(model)
        convert(models, getattr(torch, dtype))
        for workload in depth_alone(models, settings):
            result["timings"].append(_time(workload, {"dtype": dtype}, "depth alone", device, settings))


def _time(workload: Workload, point: dict, title: str, device: torch.device, settings: Settings) -> dict:
    runs = (settings.rounds + settings.warmup) * len(workload.samples)
    what = ", ".join(f"{name} {value}" for name, value in workload.parameters.items())
    with tqdm(total=runs, desc=f"{title}: {workload.name} ({what})", unit="run", file=sys.stderr, leave=False) as bar:
        seconds = interleave(
            workload.samples,
            settings.rounds,
            settings.warmup,
            synchronize=_synchronize(device),
            after_sample=bar.update,
        )
    return {
        "workload": workload.name,
        **point,
        **workload.parameters,
        "rounds": settings.rounds,
        "arms": compare(seconds, PLAIN, workload.steps),
    }


def _memory(models: dict, tokens: int, device: torch.device, title: str, settings: Settings) -> dict[str, dict]:
    ids = random_ids(models[PLAIN], 1, tokens, settings.seed)
    measured = {}
    for name, model in tqdm(models.items(), desc=f"{title}: memory, {tokens} tokens", file=sys.stderr, leave=False):

        def step(model=model):
            loss_of(model, ids).backward()

        def forward(model=model):
            with torch.no_grad():
                model(input_ids=ids, use_cache=True, logits_to_keep=1)

        model.train()
        step()  # what is made once and kept, such as tables, is no part of it
        model.zero_grad(set_to_none=True)
        saved = saved_bytes(lambda model=model: loss_of(model, ids), model.parameters())
        peak_train = peak_bytes(step, device)
        model.zero_grad(set_to_none=True)
        model.eval()
        measured[name] = {
            "saved_bytes": saved,
            "peak_bytes_train": peak_train,
            "peak_bytes_prefill": peak_bytes(forward, device),
        }
    return measured


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _synchronize(device: torch.device):
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def _check_names(kind: str, given, known):
    for name in given:
        if name not in known:
            raise ValueError(f"{kind} must be one of {', '.join(known)}; got {name!r}")


@contextmanager
def _threads(number: int | None):
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_transformers():
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def _memory_errors():
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"out of memory; choose fewer tokens, depths, batches or variants ({error})") from None


def _say(text: str):
    print(f"attnres: {text}", file=sys.stderr)
