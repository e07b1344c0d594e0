"""Measures whether a conversion computes what its source computes: both run on the same prompts and are compared."""

from collections.abc import Callable
from contextlib import nullcontext
from math import exp, prod
from tempfile import TemporaryDirectory

import psutil
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..messages import one_line
from ..modeling_attnres import AttnResForCausalLM
from .checkpoint import CheckpointError
from .layouts import ATTNRES, PRENORM, Source
from .pieces import TORCH_DTYPES
from .structure import meta_model

# Both models are compared in float32, whatever dtype the checkpoint has: rounding both to bfloat16 would hide more than
# it shows.
EXACT = "exact"  # the same function in another order of summation
EPSILON = "epsilon"  # on one side the norms' epsilon acts on a mean of n sources, which is n^2 times it on their sum
TOLERANCES = {EXACT: (1e-3, 1e-3), EPSILON: (0.02, 0.01)}  # of the logits' standard deviation, of the perplexity
ROUNDING = ("relative_logit_error", "top1_agreement", "result_perplexity")  # reported for the source rounded alone
PROMPTS = (
    "The residual stream of a transformer is a running sum: every sublayer reads it and adds to it.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "In 1687 Newton wrote that every body attracts every other; two centuries passed before anybody weighed the Earth.",
    "Zutaten: 250 g Mehl, 3 Eier, ein halber Liter Milch und eine Prise Salz.",
)
MEMORY_SHARE = 0.8  # of the free memory that both models may take


def verify_conversion(origin: Source, result: Source, how: str, progress: bool, depth_restarts: bool = False) -> dict:
    """Runs source and result on the same prompts in float32, and returns the report.

    Args:
        origin, result: the two checkpoints.
        how: `"full"`: both models in memory. `"auto"`: in memory if both fit in the memory that is free, else with the
            decoder layers on disk until they are called.
        progress: show a bar on stderr.
        depth_restarts: whether the result starts with new pseudo-queries; the source then runs with zero ones too.
    """
    needed = 4 * sum(prod(tensor.shape) for each in (origin, result) for tensor in each.checkpoint.tensors.values())
    in_memory = how == "full" or needed < MEMORY_SHARE * psutil.virtual_memory().available
    prompts, described = _prompts(origin)
    stored = TORCH_DTYPES[origin.checkpoint.float_dtype]
    rounding = {}
    with tqdm(total=(2 if stored is torch.float32 else 3) * len(prompts), desc="verify", disable=not progress) as bar:
        try:
            expected, mean_square = _run(origin, prompts, in_memory, bar.update, depth_restarts)
            logits, _ = _run(result, prompts, in_memory, bar.update)
            if stored is not torch.float32:
                rounded, _ = _run(origin, prompts, in_memory, bar.update, depth_restarts, stored)
                rounding = _differences(expected, rounded, prompts)
        except Exception as error:  # models and memory raise errors of any type
            raise CheckpointError(
                f"verification could not run ({one_line(error, 300)}); --verify none converts without it."
            ) from error
    sources = [_sources(each) for each in (origin, result)]
    options = [(each.config.residual_mode, each.config.layers_per_block) for each in (origin, result)]
    is_exact = sources == [1, 1] or (1 not in sources and options[0] == options[1])
    kind = EXACT if is_exact else EPSILON
    tolerance, perplexity_tolerance = TOLERANCES[kind]
    effective_epsilon = sources[1] ** 2 * result.config.rms_norm_eps
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
        "epsilon_effect": None if mean_square is None else effective_epsilon / mean_square,
        **({"source_rounded_to_stored_dtype": {key: rounding[key] for key in ROUNDING}} if rounding else {}),
        "kind": kind,
        "tolerance_p999_over_std": tolerance,
        "tolerance_perplexity": perplexity_tolerance,
    }
    scaled = report["p999_logit_difference"] / max(report["logit_std"], 1e-30)
    change = abs(report["result_perplexity"] / report["source_perplexity"] - 1)
    if not (scaled <= tolerance and change <= perplexity_tolerance):
        raise CheckpointError(
            "the result does not compute what the source computes: the 99.9 percentile of logit differences is "
            f"{report['p999_logit_difference']:.2e} at a standard deviation of {report['logit_std']:.2e} "
            f"(tolerance {tolerance:g} of it), perplexity {report['source_perplexity']:.4g} -> "
            f"{report['result_perplexity']:.4g} (tolerance {perplexity_tolerance:.1%}); --verify none skips this check."
        )
    return report


def _sources(source: Source) -> int:
    """Returns the n of the largest mean of n sources that a norm's epsilon acts on; 1 where it acts on sums only."""
    config = source.config
    if source.layout == PRENORM or config.residual_mode == "standard" or config.scale_norm_eps:
        return 1
    return 1 + (config.num_sublayers if config.residual_mode == "full" else config.num_blocks)


def _differences(expected: list[torch.Tensor], logits: list[torch.Tensor], prompts: list[torch.Tensor]) -> dict:
    pairs = list(zip(expected, logits, strict=True))
    difference = torch.cat([(b - a).abs().flatten() for a, b in pairs])
    top1 = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in pairs])
    squares = sum((b - a).double().square().sum() for a, b in pairs)
    rank = max(1, int(difference.numel() * 0.999))  # torch.quantile limits the size of its input, kthvalue does not
    return {
        "max_logit_difference": difference.max().item(),
        "mean_logit_difference": difference.mean().item(),
        "relative_logit_error": (squares / sum(a.double().square().sum() for a in expected)).sqrt().item(),
        "p999_logit_difference": difference.kthvalue(rank).values.item(),
        "logit_std": torch.cat([a.flatten() for a in expected]).std().item(),
        "top1_agreement": top1.float().mean().item(),
        "source_perplexity": _perplexity(expected, prompts),
        "result_perplexity": _perplexity(logits, prompts),
    }


def _perplexity(logits: list[torch.Tensor], prompts: list[torch.Tensor]) -> float:
    losses = [
        torch.nn.functional.cross_entropy(a[0, :-1], prompt[0, 1:], reduction="sum").item()
        for a, prompt in zip(logits, prompts, strict=True)
    ]
    return exp(min(sum(losses) / sum(prompt.shape[1] - 1 for prompt in prompts), 700.0))


def _prompts(origin: Source) -> tuple[list[torch.Tensor], str]:
    """Returns token ids `[1, T]` per prompt: of `PROMPTS` if the checkpoint has a tokenizer that loads, else random."""
    vocab_size = origin.config.vocab_size
    try:
        tokenizer = AutoTokenizer.from_pretrained(origin.checkpoint.folder, local_files_only=True)
        prompts = [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
        if all(prompt.shape[1] > 1 and prompt.max() < vocab_size for prompt in prompts):
            return prompts, "texts"
    except Exception:
        pass
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (4, 48), generator=generator)
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
    """Returns the logits `[1, T, V]` in float32 of every prompt and, for a plain model, the mean square of the hidden
    states: the median over the tokens, in the layer and prompt where it is smallest."""
    logits, mean_squares = [], []
    place = source.checkpoint.folder.parent
    with nullcontext() if in_memory else TemporaryDirectory(dir=place, prefix=".attnres-offload-") as offload_folder:
        model = _load(source, dtype, offload_folder)
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


def _load(source: Source, dtype: torch.dtype, offload_folder: str | None) -> PreTrainedModel:
    """Returns the model of a checkpoint, with its decoder layers in the offload folder, if there is one."""
    if source.layout not in (PRENORM, ATTNRES) or source.packed:
        # No model class has these names, shapes or packed weights.
        tensors = {piece.name: piece.tensor(source.checkpoint) for piece in source.pieces(ATTNRES)}
        return AttnResForCausalLM.from_pretrained(None, config=source.config, state_dict=tensors, dtype=dtype).eval()
    model_class = AutoModelForCausalLM if source.layout == PRENORM else AttnResForCausalLM
    options = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    if offload_folder is not None:
        modules = dict.fromkeys((f"model.{name}" for name, _ in meta_model(source).model.named_children()), "cpu")
        device_map = {**modules, "model.layers": "disk", "lm_head": "cpu"}
        options |= {"device_map": device_map, "offload_folder": offload_folder}
    return model_class.from_pretrained(source.checkpoint.folder, **options).eval()


def report_table(report: dict) -> str:
    """Returns the report as a short table for the terminal."""
    relative_error = f"{report['relative_logit_error']:.1e}"
    rows = {
        "relative logit error, in float32": relative_error,
        "logit difference, largest": f"{report['max_logit_difference']:.2e}",
        "logit difference, mean": f"{report['mean_logit_difference']:.2e}",
        "logit difference, 99.9 percentile": f"{report['p999_logit_difference']:.2e}",
        "logits, standard deviation": f"{report['logit_std']:.2e}",
        "same most likely token": f"{report['top1_agreement']:.1%}",
        "perplexity, source": f"{report['source_perplexity']:.4f}",
        "perplexity, result": f"{report['result_perplexity']:.4f}",
    }
    if (rounding := report.get("source_rounded_to_stored_dtype")) is not None:
        rows[f"source rounded to {report['stored_dtype']}"] = (
            f"relative logit error {rounding['relative_logit_error']:.1e}, same most likely token "
            f"{rounding['top1_agreement']:.1%}"
        )
    if report["kind"] == EPSILON:
        rows["norm epsilon"] = (
            f"acts on the mean of n sources instead of their sum: relative logit error {relative_error} accepted"
        )
        effect = report["epsilon_effect"]
        rows["effective epsilon / hidden states' mean square"] = "-" if effect is None else f"{effect:.1e}"
    rows["prompts"] = f"{report['prompts']}, {report['tokens']} tokens"
    width = max(map(len, rows))
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows.items())
