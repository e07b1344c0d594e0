"""Column names and types of the fifteen data sets as they are on the hub.

A type is a name of a `datasets` value type, `[type]` for a list, a tuple of names for class labels, `{name: type}` for
a struct, or `Columns({name: type})` for a list of structs, which is kept as a struct of lists.
"""


class Columns(dict):
    """A list of structs, in its column form."""


def strings(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "string")


_CHOICES = strings("A", "B", "C", "D")
_TRIVIA_ANSWER = {
    "aliases": ["string"],
    "normalized_aliases": ["string"],
    **strings("matched_wiki_entity_name", "normalized_matched_wiki_entity_name", "normalized_value", "type", "value"),
}


def _gpqa() -> dict[str, str]:
    answers = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    return {
        **strings("Pre-Revision Question", *(f"Pre-Revision {name}" for name in answers), "Pre-Revision Explanation"),
        "Self-reported question-writing time (minutes)": "float64",
        **strings("Question", *answers, "Explanation", "Revision Comments (from Question Writer)", "Subdomain"),
        "Writer's Difficulty Estimate": "string",
        **strings(
            "Extra Revised Question", "Extra Revised Explanation", *(f"Extra Revised {name}" for name in answers)
        ),
        "Non-Expert Validator Accuracy": "float64",
        "Majority Non-Expert Vals Incorrect": "float64",
        "Expert Validator Accuracy": "float64",
        **strings("Record ID", "High-level domain", "Question Writer", "Canary String"),
    }


SCHEMAS = {
    "cais/mmlu": {**strings("question", "subject"), "choices": ["string"], "answer": ("A", "B", "C", "D")},
    "TIGER-Lab/MMLU-Pro": {
        "question_id": "int64",
        "question": "string",
        "options": ["string"],
        "answer": "string",
        "answer_index": "int64",
        **strings("cot_content", "category", "src"),
    },
    # The hub has 30 columns of the reviewers' remarks more, which no task reads.
    "Idavidrein/gpqa": _gpqa(),
    "SaylorTwift/bbh": strings("input", "target"),
    "allenai/ai2_arc": {
        **strings("id", "question"),
        "choices": Columns(strings("text", "label")),
        "answerKey": "string",
    },
    "Rowan/hellaswag": {
        "ind": "int32",
        **strings("activity_label", "ctx_a", "ctx_b", "ctx"),
        "endings": ["string"],
        **strings("source_id", "split", "split_type", "label"),
    },
    "mandarjoshi/trivia_qa": {
        **strings("question", "question_id", "question_source"),
        "entity_pages": Columns(strings("doc_source", "filename", "title", "wiki_context")),
        "search_results": Columns(
            {
                **strings("description", "filename"),
                "rank": "int32",
                **strings("title", "url", "search_context"),
            }
        ),
        "answer": _TRIVIA_ANSWER,
    },
    "openai/gsm8k": strings("question", "answer"),
    "juletxara/mgsm": {
        **strings("question", "answer"),
        "answer_number": "int32",
        "equation_solution": "string",
    },
    "EleutherAI/hendrycks_math": strings("problem", "level", "type", "solution"),
    "weitianwen/cmath": {
        "grade": "int64",
        **strings("question", "golden"),
        "reasoning_step": "int64",
        "num_digits": "int64",
    },
    "openai/openai_humaneval": strings("task_id", "prompt", "canonical_solution", "test", "entry_point"),
    "google-research-datasets/mbpp": {
        "task_id": "int32",
        **strings("text", "code"),
        "test_list": ["string"],
        "test_setup_code": "string",
        "challenge_test_list": ["string"],
    },
    "haonan-li/cmmlu": {"Question": "string", **_CHOICES, "Answer": "string"},
    "ceval/ceval-exam": {"id": "int32", "question": "string", **_CHOICES, **strings("answer", "explanation")},
}


def yaml_features(schema: dict) -> list[dict]:
    """As `dataset_info: features:` of a data set's card has it."""
    return [{"name": name, **_yaml_type(kind)} for name, kind in schema.items()]


def _yaml_type(kind) -> dict:
    if isinstance(kind, str):
        return {"dtype": kind}
    if isinstance(kind, tuple):
        return {"dtype": {"class_label": {"names": {str(index): name for index, name in enumerate(kind)}}}}
    if isinstance(kind, list):
        return {"sequence": kind[0]}
    if isinstance(kind, Columns):
        return {"sequence": yaml_features(kind)}
    return {"struct": yaml_features(kind)}
