"""Builds the variants for every combination of sizes, checks that they compute the same, and measures them."""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from math import ceil
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .. import AttnResConfig
from ..backbones import check_supported
from ..messages import one_line, quiet_transformers, say
from . import workloads
from .arms import PLAIN, Variant, build, check, convert, random_ids, select
from .machine import describe, load_average
from .memory import peak_bytes, saved_bytes
from .settings import BACKBONE, DTYPES, MEASURES, Settings, check_names
from .timing import compare, interleave

FORMAT = "attnres-bench/1"


def run(settings: Settings) -> dict:
    """Measures what the settings ask for, reports progress on stderr, and returns the content of bench.json."""
    variants = select(settings.arms, settings.implementations)
    check_names("measure", settings.measures, MEASURES)
    check_names("dtype", settings.dtypes, DTYPES)
    device = _device(settings.device)
    config = backbone_config(settings)
    sizes = list(_sizes(config, settings))
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads or threads)
    try:
        with quiet_transformers():
            result = {
                "format": FORMAT,
                "settings": asdict(settings),
                "backbone": config.to_diff_dict(),
                "arms": {name: variant.description for name, variant in variants.items()},
                "left_out": {},
                "check": [],
                "timings": [],
                "memory": [],
                "machine": describe(device),
            }
            measuring = _Run(settings, variants, device, result)
            if set(settings.measures) - {"depth"}:
                for sized, per_block in sizes:
                    measuring.measure_models(sized, per_block)
            if "depth" in settings.measures:
                measuring.measure_depth_alone()
    except torch.OutOfMemoryError as error:
        reason = one_line(error)
        raise ValueError(f"out of memory; choose fewer tokens, depths, batches or variants ({reason})") from None
    finally:
        torch.set_num_threads(threads)
    result["machine"]["load_average_at_end"] = load_average()
    return result


def backbone_config(settings: Settings) -> PreTrainedConfig:
    """Returns the configuration of the backbone: the default one, or that of a checkpoint."""
    if settings.model is None:
        return AutoConfig.for_model(**settings.backbone)
    if not Path(settings.model).exists() and (settings.model.count("/") != 1 or settings.model.startswith((".", "/"))):
        raise ValueError(f"model {settings.model}: no such folder or file")
    try:
        config = AutoConfig.from_pretrained(settings.model)
    except Exception as error:  # hostile or damaged files can fail anywhere in transformers
        reason = one_line(error)
        raise ValueError(f"model {settings.model}: no configuration of a transformers model ({reason})") from None
    config = config.backbone_config if isinstance(config, AttnResConfig) else config
    check_supported(config)
    return config


def with_depth(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Returns the configuration with another number of decoder layers; lists with an entry per layer are extended."""
    if layers == config.num_hidden_layers:
        return config
    options = config.to_dict()
    for name, value in options.items():
        if name.endswith("layer_types") and isinstance(value, list):
            options[name] = [value[layer % len(value)] for layer in range(layers)]
    return type(config).from_dict(options | {"num_hidden_layers": layers})


def _sizes(config: PreTrainedConfig, settings: Settings) -> Iterator[tuple[PreTrainedConfig, int]]:
    """Yields every configuration with every number of decoder layers per block, each combination once."""
    for depth in settings.depths or (config.num_hidden_layers,):
        sized = with_depth(config, depth)
        per_block = settings.layers_per_block or [ceil(depth / blocks) for blocks in settings.num_blocks]
        for layers in dict.fromkeys(per_block):
            AttnResConfig.from_backbone(sized, layers_per_block=layers)  # raises if it is out of range
            yield sized, layers


class _Run:
    """A run in progress, with the results so far."""

    def __init__(self, settings: Settings, variants: dict[str, Variant], device: torch.device, result: dict):
        self.settings, self.variants, self.device, self.result = settings, variants, device, result

    def measure_models(self, config: PreTrainedConfig, per_block: int):
        """Measures whole models of one size, in every dtype."""
        title = f"{config.num_hidden_layers} layers in {ceil(config.num_hidden_layers / per_block)} blocks"
        measures = self.settings.measures
        for dtype in self.settings.dtypes:
            say(f"{title}, {dtype}: building the variants and checking that they compute the same")
            models, size = self._checked_models(config, per_block)
            convert(models, getattr(torch, dtype))
            point = {**size, "hidden_size": config.hidden_size, "dtype": dtype}
            for name, make_workloads in workloads.WORKLOADS.items():
                if name in measures:
                    for workload in make_workloads(models, self.settings):
                        self._time(workload, point, title)
            if "memory" in measures:
                for tokens in self.settings.tokens:
                    measured = self._memory(models, tokens, title)
                    self.result["memory"].append({**point, "batch": 1, "tokens": tokens, "arms": measured})

    def measure_depth_alone(self):
        """Measures the residual path without sublayers and norms, in every dtype."""
        shape = self.settings.depth_shape
        sizes = {
            "vocab_size": 8,
            "hidden_size": shape.hidden_size,
            "intermediate_size": 8,
            "num_hidden_layers": shape.sublayers // 2,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 8,
        }
        config = AutoConfig.for_model(**BACKBONE | sizes)
        for dtype in self.settings.dtypes:
            models, _ = self._checked_models(config, shape.sublayers_per_block // 2)
            for model in models.values():
                workloads.hollow(model)
            convert(models, getattr(torch, dtype))
            for workload in workloads.depth_alone(models, self.settings):
                self._time(workload, {"dtype": dtype}, "depth alone")

    def _checked_models(self, config: PreTrainedConfig, per_block: int) -> tuple[dict[str, PreTrainedModel], dict]:
        """Builds the variants, records how closely they agree, and returns those that run here, with their sizes."""
        models, left_out = build(self.variants, config, per_block, self.device, self.settings.seed)
        errors, cannot_run = check(self.variants, models, self.settings.seed)
        left_out |= cannot_run
        layers = config.num_hidden_layers
        size = {"decoder_layers": layers, "layers_per_block": per_block, "blocks": ceil(layers / per_block)}
        self.result["left_out"] |= left_out
        self.result["check"].append({**size, "relative_errors": errors})
        return {name: models[name] for name in self.variants if name not in left_out}, size

    def _time(self, workload: workloads.Workload, point: dict, title: str):
        rounds, warmup = self.settings.rounds, self.settings.warmup
        what = ", ".join(f"{name} {value}" for name, value in workload.parameters.items())
        title, total = f"{title}: {workload.name} ({what})", (rounds + warmup) * len(workload.samples)
        wait = partial(torch.cuda.synchronize, self.device) if self.device.type == "cuda" else lambda: None
        with tqdm(total=total, desc=title, unit="run", file=sys.stderr, leave=False) as bar:
            seconds = interleave(workload.samples, rounds, warmup, synchronize=wait, after_sample=bar.update)
        arms = compare(seconds, PLAIN, workload.steps)
        timing = {"workload": workload.name, **point, **workload.parameters, "rounds": rounds, "arms": arms}
        self.result["timings"].append(timing)

    def _memory(self, models: dict[str, PreTrainedModel], tokens: int, title: str) -> dict[str, dict]:
        ids = random_ids(models[PLAIN], 1, tokens, self.settings.seed)
        measured = {}
        for name, model in tqdm(models.items(), desc=f"{title}: memory, {tokens} tokens", file=sys.stderr, leave=False):
            model.train()
            workloads.run_train_step(model, ids)  # allocates what is made once and kept, such as tables
            model.zero_grad(set_to_none=True)
            saved = saved_bytes(partial(workloads.loss_of, model, ids), model.parameters())
            peak_train = peak_bytes(partial(workloads.run_train_step, model, ids), self.device)
            workloads.end_training(model)
            measured[name] = {
                "saved_bytes": saved,
                "peak_bytes_train": peak_train,
                "peak_bytes_prefill": peak_bytes(partial(workloads.run_prefill, model, ids), self.device),
            }
        return measured


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: must be cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r} does not exist; torch sees {torch.cuda.device_count()} CUDA devices")
    return device
