"""Measures whether a conversion computes what its source computed: same prompts through both, differences in
numbers."""

from collections.abc import Callable
from contextlib import contextmanager
from math import exp, prod
from tempfile import TemporaryDirectory

import psutil
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..modeling_attnres import AttnResForCausalLM
from .checkpoint import CheckpointError
from .layouts import ATTNRES, PRENORM, Source
from .pieces import TORCH_DTYPES
from .structure import meta_model

# In units of the logits' standard deviation, and of the perplexity; both models in float32, whatever the checkpoint's
# dtype: rounding to bfloat16 on both sides would hide more than it shows.
EXACT = "exact"  # the same function in another order of summation
EPSILON = "epsilon"  # the norms' epsilon acts on a mean of n sources on one side, which is n^2 times it on their sum
TOLERANCE = {EXACT: 1e-3, EPSILON: 0.02}
PERPLEXITY_TOLERANCE = {EXACT: 1e-3, EPSILON: 0.01}
PROMPTS = (
    "The residual stream of a transformer is a running sum: every sublayer reads it and adds to it.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "In 1687 Newton wrote that every body attracts every other; two centuries passed before anybody weighed the Earth.",
    "Zutaten: 250 g Mehl, 3 Eier, ein halber Liter Milch und eine Prise Salz.",
)
RANDOM_PROMPTS, RANDOM_LENGTH = 4, 48  # where there is no tokenizer
MEMORY_SHARE = 0.8  # of what is free may be used


def verify_conversion(origin: Source, result: Source, how: str, progress: bool, depth_restarts: bool = False) -> dict:
    """Runs source and result on the same prompts; returns the report.

    Args:
        origin, result: the two checkpoints.
        how: `"full"`: both models in memory. `"auto"`: so if both fit in the memory that is free, else one decoder
            layer at a time from disk.
        progress: show a bar on stderr.
        depth_restarts: the result starts with new pseudo-queries, so the source is run with zero ones too.

    Raises:
        CheckpointError: the differences are beyond the tolerance, with the figures; or a model cannot be run.
    """
    needed = _bytes_in_memory(origin) + _bytes_in_memory(result)
    free = psutil.virtual_memory().available
    in_memory = how == "full" or needed < MEMORY_SHARE * free
    prompts, described = _prompts(origin)
    stored = TORCH_DTYPES[origin.checkpoint.float_dtype]
    runs = 2 if stored is torch.float32 else 3
    with tqdm(total=runs * len(prompts), desc="verify", disable=not progress) as bar:
        try:
            expected, mean_square = _run(origin, prompts, in_memory, bar.update, depth_restarts)
            logits, _ = _run(result, prompts, in_memory, bar.update)
            rounded = None
            if stored is not torch.float32:
                rounded, _ = _run(origin, prompts, in_memory, bar.update, depth_restarts, stored)
        except Exception as error:  # whatever a model or the memory does
            raise CheckpointError(
                f"verification could not run ({' '.join(str(error).split())[:300] or type(error).__name__}); "
                "--verify none converts regardless."
            ) from error
    report = {
        "source_layout": origin.layout,
        "result_layout": result.layout,
        "residual_mode": result.config.residual_mode if result.layout != PRENORM else "plain",
        "prompts": described,
        "tokens": sum(prompt.shape[1] for prompt in prompts),
        "in_memory": in_memory,
        "dtype": "F32",
        "stored_dtype": origin.checkpoint.float_dtype,
        "source_pseudo_queries": "set to zero" if depth_restarts and origin.layout != PRENORM else "as they are",
        **_differences(expected, logits, prompts),
        "epsilon_effect": None if mean_square is None else _effective_epsilon(result) / mean_square,
    }
    if rounded is not None:
        of_rounding = _differences(expected, rounded, prompts)
        report["source_rounded_to_stored_dtype"] = {
            key: of_rounding[key] for key in ("relative_logit_error", "top1_agreement", "result_perplexity")
        }
    kind = EXACT if _same_epsilon(origin, result) else EPSILON
    report["kind"] = kind
    report["tolerance_p999_over_std"] = TOLERANCE[kind]
    report["tolerance_perplexity"] = PERPLEXITY_TOLERANCE[kind]
    _judge(report)
    return report


def _sums(source: Source) -> bool:
    """Whether the norms' epsilon acts on the sum of the sources, as in a plain model."""
    config = source.config
    return source.layout == PRENORM or config.residual_mode == "standard" or config.scale_norm_eps


def _same_epsilon(origin: Source, result: Source) -> bool:
    options = [(each.config.residual_mode, each.config.layers_per_block) for each in (origin, result)]
    return _sums(origin) == _sums(result) and (_sums(origin) or options[0] == options[1])


def _effective_epsilon(result: Source) -> float:
    """The norms' epsilon as it acts on a mean of n sources: n^2 times what it is on their sum."""
    config = result.config
    if _sums(result):
        return config.rms_norm_eps
    sources = 1 + (config.num_sublayers if config.residual_mode == "full" else config.num_blocks)
    return sources**2 * config.rms_norm_eps


def _epsilon_text(report: dict) -> str:
    return "-" if report["epsilon_effect"] is None else f"{report['epsilon_effect']:.1e}"


def _judge(report: dict):
    scaled = report["p999_logit_difference"] / max(report["logit_std"], 1e-30)
    change = abs(report["result_perplexity"] / report["source_perplexity"] - 1)
    if not (scaled <= report["tolerance_p999_over_std"] and change <= report["tolerance_perplexity"]):
        raise CheckpointError(
            "the result does not compute what the source computes: 99.9 % of logit differences are below "
            f"{report['p999_logit_difference']:.2e} at a standard deviation of {report['logit_std']:.2e} "
            f"(tolerance {report['tolerance_p999_over_std']:g} of it), perplexity {report['source_perplexity']:.4g} -> "
            f"{report['result_perplexity']:.4g} (tolerance {report['tolerance_perplexity']:.0%}); the effective "
            f"epsilon of the norms over the hidden states' mean square is {_epsilon_text(report)}. "
            "--verify none converts regardless."
        )


def _differences(expected: list[torch.Tensor], logits: list[torch.Tensor], prompts: list[torch.Tensor]) -> dict:
    difference = torch.cat([(b - a).abs().flatten() for a, b in zip(expected, logits, strict=True)])
    top1 = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in zip(expected, logits, strict=True)])
    # torch.quantile has a limit on its input; the k-th largest has none.
    rank = max(1, int(difference.numel() * 0.999))
    return {
        "max_logit_difference": difference.max().item(),
        "mean_logit_difference": difference.mean().item(),
        "relative_logit_error": _relative_error(expected, logits),
        "p999_logit_difference": difference.kthvalue(rank).values.item(),
        "logit_std": torch.cat([a.flatten() for a in expected]).std().item(),
        "top1_agreement": top1.float().mean().item(),
        "source_perplexity": _perplexity(expected, prompts),
        "result_perplexity": _perplexity(logits, prompts),
    }


def _relative_error(expected: list[torch.Tensor], logits: list[torch.Tensor]) -> float:
    squares = sum((b - a).double().square().sum() for a, b in zip(expected, logits, strict=True))
    return (squares / sum(a.double().square().sum() for a in expected)).sqrt().item()


def _perplexity(logits: list[torch.Tensor], prompts: list[torch.Tensor]) -> float:
    losses = [
        torch.nn.functional.cross_entropy(a[0, :-1], prompt[0, 1:], reduction="sum").item()
        for a, prompt in zip(logits, prompts, strict=True)
    ]
    return exp(min(sum(losses) / sum(prompt.shape[1] - 1 for prompt in prompts), 700.0))


def _prompts(origin: Source) -> tuple[list[torch.Tensor], str]:
    """Token ids `[1, T]` per prompt: texts by the checkpoint's own tokenizer, random ids where it has none."""
    vocab_size = origin.config.vocab_size
    try:
        tokenizer = AutoTokenizer.from_pretrained(origin.checkpoint.folder, local_files_only=True)
        prompts = [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
        if all(prompt.shape[1] > 1 and prompt.max() < vocab_size for prompt in prompts):
            return prompts, "texts"
    except Exception:
        pass
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (RANDOM_PROMPTS, RANDOM_LENGTH), generator=generator)
    return list(ids.split(1)), "random token ids (no tokenizer could be loaded)"


@torch.no_grad()
def _run(
    source: Source,
    prompts: list[torch.Tensor],
    in_memory: bool,
    progress: Callable[[int], None],
    zero_queries: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[torch.Tensor], float | None]:
    """Logits `[1, T, V]` in float32 per prompt; of a plain model also the smallest hidden states' mean square, which is
    the median over the tokens of the layer where it is smallest."""
    logits, mean_squares = [], []
    with _loaded(source, in_memory, dtype) as model:
        if zero_queries and getattr(model, "depth_mixer", None) is not None:
            for name, parameter in model.depth_mixer.named_parameters():
                if name.endswith(".query"):
                    parameter.zero_()
        for prompt in prompts:
            output = model(prompt, use_cache=False, output_hidden_states=source.layout == PRENORM)
            logits.append(output.logits.float())
            for state in (output.hidden_states or ())[:-1]:
                mean_squares.append(state.float().square().mean(-1).median().item())
            progress(1)
    return logits, min(mean_squares, default=None)


@contextmanager
def _loaded(source: Source, in_memory: bool, dtype: torch.dtype):
    """The model of a checkpoint; without room for it, its decoder layers stay on disk until they are called."""
    folder = source.checkpoint.folder
    model_class = AutoModelForCausalLM if source.layout == PRENORM else AttnResForCausalLM
    if (
        source.layout not in (PRENORM, ATTNRES) or source.packed
    ):  # names, shapes or data are not those of any model class
        yield _load_translated(source, dtype)
    elif in_memory:
        yield model_class.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True).eval()
    else:
        with TemporaryDirectory(dir=folder.parent, prefix=".attnres-offload-") as offload_folder:
            yield model_class.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                device_map=_layers_on_disk(source),
                offload_folder=offload_folder,
            ).eval()


def _layers_on_disk(source: Source) -> dict[str, str]:
    places = {f"model.layers.{layer}": "disk" for layer in range(source.config.num_hidden_layers)}
    model = meta_model(source)
    others = [f"model.{name}" for name, _ in model.model.named_children() if name != "layers"]
    return {**dict.fromkeys(others, "cpu"), **places, "lm_head": "cpu"}


def _load_translated(source: Source, dtype: torch.dtype) -> AttnResForCausalLM:
    tensors = {piece.name: piece.tensor(source.checkpoint) for piece in source.pieces(ATTNRES)}
    return AttnResForCausalLM.from_pretrained(None, config=source.config, state_dict=tensors, dtype=dtype).eval()


def _bytes_in_memory(source: Source) -> int:
    """In float32."""
    return 4 * sum(prod(tensor.shape) for tensor in source.checkpoint.tensors.values())


def report_table(report: dict) -> str:
    """The report as a short table for the terminal."""
    rows = (
        ("relative logit error, in float32", f"{report['relative_logit_error']:.1e}"),
        ("logit difference, largest", f"{report['max_logit_difference']:.2e}"),
        ("logit difference, mean", f"{report['mean_logit_difference']:.2e}"),
        ("logit difference, 99.9 percentile", f"{report['p999_logit_difference']:.2e}"),
        ("logits, standard deviation", f"{report['logit_std']:.2e}"),
        ("same most likely token", f"{report['top1_agreement']:.1%}"),
        ("perplexity, source", f"{report['source_perplexity']:.4f}"),
        ("perplexity, result", f"{report['result_perplexity']:.4f}"),
        *_rounding_rows(report),
        *_epsilon_rows(report),
        ("prompts", f"{report['prompts']}, {report['tokens']} tokens"),
    )
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _rounding_rows(report: dict) -> list[tuple[str, str]]:
    rounding = report.get("source_rounded_to_stored_dtype")
    if rounding is None:
        return []
    error, agreement = rounding["relative_logit_error"], rounding["top1_agreement"]
    label = f"source rounded to {report['stored_dtype']}"
    return [(label, f"relative logit error {error:.1e}, same most likely token {agreement:.1%}")]


def _epsilon_rows(report: dict) -> list[tuple[str, str]]:
    if report["kind"] == EXACT:
        return []
    accepted = f"relative logit error {report['relative_logit_error']:.1e} accepted"
    return [
        ("norm epsilon", f"acts on the mean of n sources instead of their sum: {accepted}"),
        ("effective epsilon / hidden states' mean square", _epsilon_text(report)),
    ]
