"""Tests the answers of the miniature items against a second computation."""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

from sample_rows import configs, evaluated, rows


def test_choices_differ_and_the_right_one_is_at_every_place():
    places = {name: Counter() for name in ("cais/mmlu", "haonan-li/cmmlu", "ceval/ceval-exam", "allenai/ai2_arc")}
    places["Rowan/hellaswag"] = Counter()
    for repository, counter in places.items():
        for _, row in evaluated(repository):
            choices = row.get("choices") or row.get("endings") or [row[letter] for letter in "ABCD"]
            choices = choices["text"] if isinstance(choices, dict) else choices
            assert len(choices) == len(set(choices)) == 4
            answer = next(row[name] for name in ("answer", "Answer", "answerKey", "label") if name in row)
            counter["ABCD".index(answer) if str(answer) in "ABCD" else int(answer)] += 1
        assert set(counter) == {0, 1, 2, 3}
        assert max(counter.values()) - min(counter.values()) <= 1
    for row in rows("TIGER-Lab/MMLU-Pro", "default", "validation") + rows("TIGER-Lab/MMLU-Pro", "default", "test"):
        assert len(set(row["options"])) == len(row["options"]) <= 10
        assert row["answer"] == "ABCDEFGHIJ"[row["answer_index"]]
    for row in rows("TIGER-Lab/MMLU-Pro", "default", "validation"):
        assert row["cot_content"].startswith("A: Let's think step by step. ")
        assert row["cot_content"].endswith(f" The answer is ({row['answer']}).")


def test_gsm8k_answers():
    answers = {split: [] for split in ("train", "test")}
    for split, found in answers.items():
        for row in rows("openai/gsm8k", "main", split):
            steps = re.findall(r"<<([^=]+)=([^>]+)>>(\S*\d)", row["answer"])
            assert steps
            for expression, value, shown in steps:
                assert eval(expression) == Fraction(value) and shown == value
            text, _, final = row["answer"].partition("\n#### ")
            assert final == steps[-1][1]
            numbers = re.findall(r"\d+", row["question"] + " ".join(step[1] for step in steps))
            # Words of the question stand for some numbers.
            words = {"Two": 2, "Four": 4, "Five": 5, "twice": 2, "half": 2, "third": 3, "Each": 2}
            known = {*numbers, *(str(number) for word, number in words.items() if word in row["question"] + text)}
            assert {part for step in steps for part in re.findall(r"\d+", step[0])} <= known
            found.append(int(final))
    assert answers["test"] == [17, 240, 11, 8, 40, 360, 90, 50, 125, 60, 77, 1250]
    assert answers["train"] == [9, 26, 34, 9, 8, 13, 30, 75, 20]


def test_cmath_answers():
    expected = ["12", "7", "28", "5", "72", "120", "1200", "720", "50", "5.3", "60", "120"]
    found = rows("weitianwen/cmath", "default", "test")
    assert [row["golden"] for row in found] == expected
    assert {row["grade"] for row in found} == {1, 2, 3, 4, 5, 6}
    assert [row["reasoning_step"] for row in found[-5:]] == [2, 1, 1, 2, 2]
    assert found[6]["num_digits"] == 4  # 25 * 48 = 1200
    expected = ["9", "32", "8", "45", "5.2", "160", "70", "12"]
    assert [row["golden"] for row in rows("weitianwen/cmath", "default", "validation")] == expected


def test_mgsm_answers_follow_from_the_numbers_of_the_question():
    kinds = {"train": [0, 1, 2, 0, 1, 2, 0, 1], "test": [2, 1]}
    finals = {
        "en": "The answer is {}.", "de": "Die Antwort lautet {}.", "es": "La respuesta es {}.",
        "fr": "La réponse est {}.", "ru": "Ответ — {}.", "zh": "答案是 {}。", "ja": "答えは{}です。",
        "th": "คำตอบคือ {}", "sw": "Jibu ni {}.", "bn": "উত্তর হল {}।", "te": "సమాధానం {}.",
    }  # fmt: skip
    for language in configs("juletxara/mgsm"):
        for split, kind in ((split, kind) for split, found in kinds.items() for kind in enumerate(found)):
            row = rows("juletxara/mgsm", language, split)[kind[0]]
            numbers = [int(number) for number in re.findall(r"\d+", row["question"])]
            if language == "ja" and kind[1] == 1:
                numbers = numbers[1:]  # "one box": a digit in Japanese
            first, second, *rest = numbers
            expected = {0: first + second, 1: first * second, 2: first - second - sum(rest)}[kind[1]]
            assert row["answer_number"] == expected
            if split == "test":
                assert row["answer"] is None and row["equation_solution"] is None
                continue
            assert row["answer"].endswith(finals[language].format(expected))
            equations = row["equation_solution"].rstrip(".").split(". ")
            for equation in equations:
                left, _, right = equation.partition(" = ")
                assert eval(left) == int(right)
                assert equation in row["answer"]
            assert int(equations[-1].rpartition(" ")[2]) == expected


def test_mgsm_examples_begin_as_lm_eval_cuts_them():
    """The task files drop a fixed number of characters from the answers of the examples."""
    folder = Path(find_spec("lm_eval").origin).parent / "tasks/mgsm/native_cot"
    for language in configs("juletxara/mgsm"):
        text = (folder / f"mgsm_native_cot_{language}.yaml").read_text(encoding="utf-8")
        cut = int(re.search(r"answer\[(\d+):\]", text)[1])
        answers = [row["answer"] for row in rows("juletxara/mgsm", language, "train")]
        assert len({answer[:cut] for answer in answers}) == 1
        assert all(re.search(r"\W $", answer[:cut]) and not answer[cut].isspace() for answer in answers)


def test_bbh_answers():
    items = dict(evaluated("SaylorTwift/bbh"))
    for row in items.values():
        assert not re.search("Q|\n", row["target"])  # where lm-eval cuts an answer off

    def check(name, value):
        assert items[name]["target"] == value

    def body(name):
        return items[name]["input"]

    check("boolean_expressions", str(eval(body("boolean_expressions").removesuffix(" is"))))
    check("multistep_arithmetic_two", str(eval(body("multistep_arithmetic_two").removesuffix(" ="))))
    check("word_sorting", " ".join(sorted(body("word_sorting").partition("List: ")[2].split())))
    closing, stack = dict(zip("([{<", ")]}>", strict=True)), []
    for symbol in body("dyck_languages").partition("Input: ")[2].split():
        if symbol in closing:
            stack.append(closing[symbol])
        else:
            assert stack.pop() == symbol
    check("dyck_languages", " ".join(reversed(stack)))
    for name in (name for name in items if name.startswith("tracking")):
        holds = dict(re.findall(r"(\w+) has a (\w+) hat", body(name)))
        for one, other in re.findall(r"(\w+) and (\w+) swap", body(name)):
            holds[one], holds[other] = holds[other], holds[one]
        asked = re.search(r"At the end of the game, (\w+) has", body(name))[1]
        check(name, re.search(rf"(\([A-G]\)) {holds[asked]} hat", body(name))[1])
    for name, row in items.items():
        options = re.findall(r"^(?:\([A-Z]\)|- \w+)", row["input"], flags=re.MULTILINE)
        if options:
            assert row["target"] in [option.removeprefix("- ") for option in options], name


def test_triviaqa_answers_are_not_cut_off():
    for _, row in evaluated("mandarjoshi/trivia_qa"):
        assert row["answer"]["value"] in row["answer"]["aliases"]
        assert not re.search(r"[\n.,]", "".join(row["answer"]["aliases"]))  # lm-eval stops there


def test_math_solutions_have_one_boxed_answer():
    expected = {
        "algebra": ["10", "7"], "counting_and_probability": [r"\frac{1}{6}", "9"], "geometry": [r"9\pi", "13"],
        "intermediate_algebra": ["5", "5"], "number_theory": ["1", "4"], "prealgebra": ["16", "35"],
        "precalculus": ["7", "11"],
    }  # fmt: skip
    for subject, answers in expected.items():
        solutions = [row["solution"] for row in rows("EleutherAI/hendrycks_math", subject, "test")]
        assert [re.findall(r"\\boxed\{(.*)\}\$", text) for text in solutions] == [[answer] for answer in answers]


def run_programs(programs):
    """Returns whether each program ends without an exception; all run in one separate process."""
    code = "\n".join(
        [
            "import json, sys",
            "ended = []",
            "for program in json.load(sys.stdin):",
            "    try:",
            "        exec(program, {})",
            "        ended.append(True)",
            "    except Exception:",
            "        ended.append(False)",
            "print(json.dumps(ended))",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], input=json.dumps(programs), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_solutions_of_humaneval_pass_and_empty_ones_fail():
    found = rows("openai/openai_humaneval", "openai_humaneval", "test")
    right, wrong = [], []
    for row in found:
        assert not re.search(r"\n(class|def|#|if|print)", row["canonical_solution"])  # lm-eval stops there
        check = f"{row['test']}\ncheck({row['entry_point']})"
        right.append(row["prompt"] + row["canonical_solution"] + check)
        wrong.append(row["prompt"] + "    return None\n" + check)
    assert run_programs(right) == [True] * len(found)
    assert run_programs(wrong) == [False] * len(found)


def test_the_examples_in_the_prompts_of_humaneval_are_right():
    for row in rows("openai/openai_humaneval", "openai_humaneval", "test"):
        examples = re.findall(r">>> (.*)\n    (.*)\n", row["prompt"])
        assert examples
        program = row["prompt"] + row["canonical_solution"]
        program += "".join(f"\nassert {call} == {value}" for call, value in examples)
        assert run_programs([program]) == [True]


def test_the_solutions_of_mbpp_pass_and_empty_ones_fail():
    for split in ("train", "test", "validation", "prompt"):
        right, wrong = [], []
        for row in rows("google-research-datasets/mbpp", "full", split):
            assert len(row["test_list"]) == 3  # the prompt shows three
            name = ast.parse(row["code"]).body[0].name
            assert all(f"{name}(" in test for test in row["test_list"])
            tests = "\n".join(row["test_list"])
            right.append(f"{row['code']}\n{tests}")
            wrong.append(f"def {name}(*arguments):\n    return None\n{tests}")
        assert run_programs(right) == [True] * len(right)
        assert run_programs(wrong) == [False] * len(wrong)
