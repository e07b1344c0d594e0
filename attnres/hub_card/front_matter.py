"""The machine-readable part of a card: its front matter with `model-index`, and `.eval_results/*.yaml`."""

from typing import NamedTuple

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from ..eval.suites import ROWS
from .provenance import OWN_TAG, Provenance


class DataSet(NamedTuple):
    """The Hub data set of a benchmark: arguments of `datasets.load_dataset`, without a config if it uses several."""

    id: str
    config: str | None
    split: str
    task_id: str | None = None  # benchmark that the Hub has registered for the data set, if any


DATA_SETS = {
    "mmlu": DataSet("cais/mmlu", None, "test"),
    "mmlu_pro": DataSet("TIGER-Lab/MMLU-Pro", None, "test", "mmlu_pro"),
    "gpqa_diamond": DataSet("Idavidrein/gpqa", "gpqa_diamond", "train", "diamond"),
    "bbh": DataSet("SaylorTwift/bbh", None, "test"),
    "arc_challenge": DataSet("allenai/ai2_arc", "ARC-Challenge", "test"),
    "hellaswag": DataSet("Rowan/hellaswag", None, "validation"),
    "triviaqa": DataSet("mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
    "gsm8k": DataSet("openai/gsm8k", "main", "test", "gsm8k"),
    "mgsm": DataSet("juletxara/mgsm", None, "test"),
    "math": DataSet("EleutherAI/hendrycks_math", None, "test"),
    "cmath": DataSet("weitianwen/cmath", None, "test"),
    "humaneval": DataSet("openai/openai_humaneval", None, "test"),
    "mbpp": DataSet("google-research-datasets/mbpp", "full", "test"),
    "cmmlu": DataSet("haonan-li/cmmlu", None, "test"),
    "ceval": DataSet("ceval/ceval-exam", None, "val"),
}


def front_matter(name: str, family: str, provenance: Provenance, rows: dict[str, dict]) -> ModelCardData:
    """Returns the front matter of a card with its measured results, given by row."""
    # Without results the card must have neither a model-index nor the name that belongs to it.
    index = {"model_name": name, "eval_results": [_eval_result(result) for result in rows.values()]} if rows else {}
    return ModelCardData(
        language=provenance.language,
        license=provenance.license,
        license_name=provenance.license_name,
        license_link=provenance.license_link,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=provenance.base_model,
        datasets=provenance.datasets,
        tags=[OWN_TAG, "attnres", "custom_code", family],
        **({"base_model_relation": "finetune"} if provenance.base_model else {}),
        **index,
    )


def eval_results(rows: dict[str, dict]) -> dict[str, list[dict]]:
    """Returns the content of `.eval_results/<row>.yaml` for each row that the Hub has registered as a benchmark."""
    found = {}
    for row, result in rows.items():
        data, version = DATA_SETS[row], result["versions"].get("lm_eval", "of unknown version")
        if data.task_id:
            notes = f"{_how(result)}, lm-eval {version}"
            entry = EvalResultEntry(dataset_id=data.id, task_id=data.task_id, value=shown_value(result), notes=notes)
            found[row] = eval_result_entries_to_yaml([entry])
    return found


def shown_value(result: dict) -> float:
    """Returns a score in per cent, rounded in the same way for the front matter and the table."""
    return round(result["score"]["value"], 2)


def _eval_result(result: dict) -> EvalResult:
    data = DATA_SETS[result["row"]]
    return EvalResult(
        task_type="text-generation",
        dataset_type=data.id,
        dataset_name=ROWS[result["row"]].title,
        dataset_config=data.config,
        dataset_split=data.split,
        dataset_args={"num_few_shot": result["shots"]},
        metric_type=result["score"]["metric"],
        metric_name=_how(result),
        metric_value=shown_value(result),
    )


def _how(result: dict) -> str:
    row, score = ROWS[result["row"]], result["score"]
    after = "" if score["filter"] == "none" else f" after {score['filter']}"
    return f"{result['shots']}-shot {score['metric']}{after}, by {row.scoring}, in per cent"
