"""Rows of the fifteen data sets, made of items/*.json: {repository: {config: {split: [row]}}}."""

import json
from pathlib import Path

from .arithmetic import digits, evaluate, number, operators, with_annotations
from .schemas import SCHEMAS

ITEMS = Path(__file__).parent / "items"
LETTERS = "ABCDEFGHIJ"
Table = dict[str, dict[str, list[dict]]]


def tables() -> dict[str, Table]:
    return {
        "cais/mmlu": _mmlu(_items("mmlu")),
        "TIGER-Lab/MMLU-Pro": _mmlu_pro(_items("mmlu_pro")),
        "Idavidrein/gpqa": _gpqa(_items("gpqa")),
        "SaylorTwift/bbh": _bbh(_items("bbh")),
        "allenai/ai2_arc": _arc(_items("arc")),
        "Rowan/hellaswag": _hellaswag(_items("hellaswag")),
        "mandarjoshi/trivia_qa": _triviaqa(_items("triviaqa")),
        "openai/gsm8k": _gsm8k(_items("gsm8k")),
        "juletxara/mgsm": _mgsm(_items("mgsm")),
        "EleutherAI/hendrycks_math": _math(_items("hendrycks_math")),
        "weitianwen/cmath": _cmath(_items("cmath")),
        "openai/openai_humaneval": _humaneval(_items("humaneval")),
        "google-research-datasets/mbpp": _mbpp(_items("mbpp")),
        "haonan-li/cmmlu": _cmmlu(_items("cmmlu")),
        "ceval/ceval-exam": _ceval(_items("ceval")),
    }


def _items(name: str):
    return json.loads((ITEMS / f"{name}.json").read_text(encoding="utf-8"))


def _placed(right: str, wrong: list[str], index: int) -> tuple[list[str], int]:
    """The choices with the right one moved by the item's index: a model that always says A is right for one in four."""
    position = index % (len(wrong) + 1)
    return [*wrong[:position], right, *wrong[position:]], position


def _mmlu(items) -> Table:
    def row(subject, index, item):
        choices, answer = _placed(item[1], item[2:], index)
        return {"question": item[0], "subject": subject, "choices": choices, "answer": answer}

    return {
        subject: {
            "test": [row(subject, place, item)],
            "validation": [row(subject, index, each) for index, each in enumerate(items["validation"])],
            "dev": [row(subject, index, each) for index, each in enumerate(items["dev"])],
        }
        for place, (subject, item) in enumerate(items["test"].items())
    }


def _mmlu_pro(items) -> Table:
    def row(identity, category, index, item):
        options, answer = _placed(item["answer"], item["wrong"], index)
        reasoning = item.get("reasoning", "")
        if reasoning:
            reasoning = f"A: Let's think step by step. {reasoning} The answer is ({LETTERS[answer]})."
        return {
            "question_id": identity,
            "question": item["question"],
            "options": options,
            "answer": LETTERS[answer],
            "answer_index": answer,
            "cot_content": reasoning,
            "category": category,
            "src": "attnres-sample",
        }

    categories = list(items["test"])
    # One set of worked examples for all categories, which the tasks tell apart by the column alone.
    worked = [(category, index, item) for category in categories for index, item in enumerate(items["validation"])]
    return {
        "default": {
            "test": [row(100 + i, category, 3 * i, items["test"][category]) for i, category in enumerate(categories)],
            "validation": [row(i, category, 2 * index + 1, item) for i, (category, index, item) in enumerate(worked)],
        }
    }


def _gpqa(items) -> Table:
    def row(index, item):
        domain, subdomain, question, right, *wrong, explanation = item
        filled = {
            "Question": question,
            "Correct Answer": right,
            **{f"Incorrect Answer {i}": text for i, text in enumerate(wrong, 1)},
            "Explanation": explanation,
            "Subdomain": subdomain,
            "High-level domain": domain,
            "Record ID": f"attnres-{index}",
        }
        return {name: filled.get(name) for name in SCHEMAS["Idavidrein/gpqa"]}

    return {config: {"train": [row(i, item) for i, item in enumerate(rows)]} for config, rows in items.items()}


def _bbh(items) -> Table:
    return {subtask: {"test": [{"input": text, "target": target}]} for subtask, (text, target) in items.items()}


def _arc(items) -> Table:
    def row(split, index, item):
        choices, answer = _placed(item[1], item[2:], index)
        return {
            "id": f"attnres_{split}_{index}",
            "question": item[0],
            "choices": {"text": choices, "label": list(LETTERS[: len(choices)])},
            "answerKey": LETTERS[answer],
        }

    return {"ARC-Challenge": {split: [row(split, i, item) for i, item in enumerate(items[split])] for split in items}}


def _hellaswag(items) -> Table:
    def row(split, index, item):
        activity, before, start, *endings = item
        endings, answer = _placed(endings[0], endings[1:], index)
        # Endings go on where ctx_b stops, as on the hub; the labels of the test split are withheld there.
        return {
            "ind": index,
            "activity_label": activity,
            "ctx_a": before,
            "ctx_b": start,
            "ctx": f"{before} {start}",
            "endings": endings,
            "source_id": f"attnres~{split}_{index}",
            "split": {"validation": "val"}.get(split, split),
            "split_type": "indomain",
            "label": "" if split == "test" else str(answer),
        }

    return {"default": {split: [row(split, i, item) for i, item in enumerate(items[split])] for split in items}}


def _triviaqa(items) -> Table:
    def row(split, index, item):
        question, value, others = item
        aliases = [value, *others]
        schema = SCHEMAS["mandarjoshi/trivia_qa"]
        known = split != "test"  # withheld on the hub
        return {
            "question": f"{question}?",
            "question_id": f"attnres_{split}_{index}",
            "question_source": "attnres",
            "entity_pages": {name: [] for name in schema["entity_pages"]},
            "search_results": {name: [] for name in schema["search_results"]},
            "answer": {
                "aliases": aliases if known else [],
                "normalized_aliases": [alias.lower() for alias in aliases] if known else [],
                "matched_wiki_entity_name": "",
                "normalized_matched_wiki_entity_name": "",
                "normalized_value": value.lower() if known else "<unk>",
                "type": "WikipediaEntity" if known else "",
                "value": value if known else "<unk>",
            },
        }

    return {"rc.nocontext": {split: [row(split, i, item) for i, item in enumerate(items[split])] for split in items}}


def _gsm8k(items) -> Table:
    def row(question, answer):
        text, last = with_annotations(answer)
        return {"question": question, "answer": f"{text}\n#### {last}"}

    return {"main": {split: [row(*item) for item in items[split]] for split in items}}


def _mgsm(items) -> Table:
    def equations(kind, numbers):
        if kind == 0:
            return [f"{numbers[0]} + {numbers[1]}"]
        if kind == 1:
            return [f"{numbers[0]} * {numbers[1]}"]
        return [f"{numbers[0]} - {numbers[1]}", f"{numbers[0] - numbers[1]} - {numbers[2]}"]

    def row(language, split, kind, *numbers):
        text, explanation = language["templates"][kind]
        named = dict(zip("abc", numbers, strict=False))
        solved = [f"{equation} = {evaluate(equation)}" for equation in equations(kind, numbers)]
        result = int(evaluate(equations(kind, numbers)[-1]))
        if split == "test":  # the hub's test split has the bare question and the number only
            return {
                "question": text.format(**named),
                "answer": None,
                "answer_number": result,
                "equation_solution": None,
            }
        steps = "".join(f"{language['gap']}{step}{language['stop']}" for step in solved)
        return {
            "question": language["question"] + text.format(**named),
            "answer": language["answer"] + explanation.format(**named) + steps + language["final"].format(r=result),
            "answer_number": result,
            "equation_solution": "".join(f"{step}. " for step in solved).strip(),
        }

    return {
        name: {split: [row(language, split, *entry) for entry in items["numbers"][split]] for split in items["numbers"]}
        for name, language in items["languages"].items()
    }


def _math(items) -> Table:
    return {
        subject: {
            split: [
                {"problem": problem, "level": "Level 1", "type": entry["type"], "solution": solution}
                for problem, solution in entry[split]
            ]
            for split in ("train", "test")
        }
        for subject, entry in items.items()
    }


def _cmath(items) -> Table:
    def row(grade, question, expression):
        return {
            "grade": grade,
            "question": question,
            "golden": number(evaluate(expression)),
            "reasoning_step": operators(expression),
            "num_digits": digits(expression),
        }

    return {"default": {split: [row(*item) for item in items[split]] for split in items}}


def _humaneval(items) -> Table:
    def row(index, name, prompt, solution, checks):
        head = "\n\nMETADATA = {\n    'author': 'attnres',\n    'dataset': 'test'\n}\n\n\ndef check(candidate):\n"
        return {
            "task_id": f"HumanEval/{index}",
            "prompt": prompt,
            "canonical_solution": solution,
            "test": head + "".join(f"    assert {check}\n" for check in checks) + "\n",
            "entry_point": name,
        }

    return {"openai_humaneval": {"test": [row(index, *item) for index, item in enumerate(items)]}}


def _mbpp(items) -> Table:
    def row(identity, text, code, tests):
        return {
            "task_id": identity,
            "text": text,
            "code": code,
            "test_list": tests,
            "test_setup_code": "",
            "challenge_test_list": [],
        }

    splits: dict[str, list[dict]] = {"train": [], "test": [], "validation": [], "prompt": []}
    for identity, (split, *rest) in enumerate(items, 1):
        splits[split].append(row(identity, *rest))
    return {"full": splits}


def _lettered(right: str, wrong: list[str], index: int) -> tuple[dict[str, str], str]:
    choices, answer = _placed(right, wrong, index)
    return dict(zip("ABCD", choices, strict=True)), LETTERS[answer]


def _cmmlu(items) -> Table:
    def row(index, item):
        choices, answer = _lettered(item[1], item[2:5], index)
        return {"Question": item[0], **choices, "Answer": answer}

    return {
        subject: {"test": [row(place, item)], "dev": [row(i, each) for i, each in enumerate(items["dev"])]}
        for place, (subject, item) in enumerate(items["test"].items())
    }


def _ceval(items) -> Table:
    def row(index, item, identity=0, known=True):
        choices, answer = _lettered(item[1], item[2:5], index)
        explanation = item[5] if len(item) > 5 else ""
        return {
            "id": identity,
            "question": item[0],
            **choices,
            "answer": answer if known else "",  # the hub's test split withholds them
            "explanation": explanation,
        }

    return {
        subject: {
            "val": [row(place, item)],
            "test": [row(0, items["test"], known=False)],
            "dev": [row(i, each, i) for i, each in enumerate(items["dev"])],
        }
        for place, (subject, item) in enumerate(items["val"].items())
    }
