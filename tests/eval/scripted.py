"""lm-eval models that know the answers: right, wrong, at random, and right in the words of real models."""

# ruff: noqa: RUF001 - answers in Chinese have full-width punctuation.

import random
import re

from lm_eval.api.model import LM
from sample_rows import rows

WRONG_TEXT = "I would not know."


class ScriptedModel(LM):
    """Answers each request by a script.

    Args:
        tasks: lm-eval's task objects by the name that requests carry; may be filled later.
        likes: for a choice, given whether it is right and its number: the log-likelihood.
        writes: for an item, given the data set's folder name, its config and the item: the text.
    """

    def __init__(self, tasks, likes, writes):
        super().__init__()
        self.tasks, self.likes, self.writes = tasks, likes, writes

    def loglikelihood(self, requests):
        return [(self.likes(self._right(request), request.idx), False) for request in requests]

    def generate_until(self, requests):
        answers = []
        for request in requests:
            config = self.tasks[request.task_name].config
            text = self.writes(config.dataset_path.split("/")[-1], config.dataset_name, request.doc)
            # As every backend does: the stop sequence and what follows it are not part of the answer.
            for stop in request.args[1].get("until", ()):
                text = text.split(stop)[0]
            answers.append(text)
        return answers

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def _right(self, request) -> bool:
        task = self.tasks[request.task_name]
        target, choices = task.doc_to_target(request.doc), task.doc_to_choice(request.doc)
        return request.idx == (target if isinstance(target, int) else choices.index(target))


def right(tasks) -> ScriptedModel:
    return ScriptedModel(tasks, lambda is_right, _: float(is_right), phrased)


def wrong(tasks) -> ScriptedModel:
    return ScriptedModel(tasks, lambda is_right, _: -float(is_right), lambda *_: WRONG_TEXT)


def guessing(tasks, seed=0) -> ScriptedModel:
    """Choices at random; of ten lettered options, the letter at random."""
    generator = random.Random(seed)
    return ScriptedModel(
        tasks, lambda *_: generator.random(), lambda *_: f"So the answer is ({generator.choice('ABCDEFGHIJ')})."
    )


def otherwise(tasks) -> ScriptedModel:
    """Right, in words that the examples do not have; of GSM8K, MGSM and MATH only."""
    return ScriptedModel(tasks, None, lambda data_set, _, doc: OTHER_PHRASES[data_set](doc))


def phrased(data_set: str, config: str | None, doc: dict) -> str:
    """The right answer as a base model puts it after the examples, running on where real models do."""
    return PHRASES[data_set](doc, config)


def boxed(solution: str) -> str:
    return re.search(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}", solution).group(1)


def mathematics(doc, _):
    answer = boxed(doc["solution"])
    return (
        f"We work it out step by step and find $\\boxed{{{answer}}}$.\n"
        f"Final Answer: The final answer is ${answer}$. I hope it is correct.\n\nProblem:\nWhat is $1+1$?"
    )


def school_mathematics(doc, language):
    """An example's answer with the number of this one, followed by another question."""
    example = rows("juletxara/mgsm", language, "train")[0]
    solution = re.split("[:：] ", example["answer"], maxsplit=1)[1]
    before, _, after = solution.rpartition(str(example["answer_number"]))
    return f" {before}{doc['answer_number']}{after}\n\n{example['question']}"


PHRASES = {
    "MMLU-Pro": lambda doc, _: (
        f" Only one option fits, not (C) nor (D). The answer is ({doc['answer']}).\n\nQuestion: more"
    ),
    "bbh": lambda doc, _: f" We look at each part in turn. So the answer is {doc['target']}.\n\nQ: another question",
    "trivia_qa": lambda doc, _: f" {doc['answer']['aliases'][0]}\nQuestion: and who",
    "gsm8k": lambda doc, _: f" {doc['answer']}\n\nQuestion: Tom has 12 pens.",
    "mgsm": school_mathematics,
    "hendrycks_math": mathematics,
    "cmath": lambda doc, _: f"先算一步，3+4=7。所以答案是{doc['golden']}。\n\n问题：1+1=？",
    "openai_humaneval": lambda doc, _: f"{doc['canonical_solution']}\n\ndef more(x):\n    return unfinished(",
    "mbpp": lambda doc, _: f"{doc['code']}\n[DONE]\nYou are an expert",
}
OTHER_PHRASES = {
    "gsm8k": lambda doc: f" It costs 12 at first. The answer is ${doc['answer'].split('#### ')[1]}.",
    "mgsm": lambda doc: f" 7 + 5 = 12. The answer is {doc['answer_number']}.",
    "hendrycks_math": lambda doc: f" Hence the result is $\\boxed{{{boxed(doc['solution'])}}}$.",
}
