"""Every row on the miniature items with models whose score is known beforehand."""

import pytest
from sample_rows import configs
from scripted import guessing, otherwise, right, wrong

from attnres.eval import ROWS, driver, evaluate, sample

# The share that guessing gets, by row: letters or endings to choose from; texts are not guessed.
CHANCE = {
    "mmlu": 25,
    "gpqa_diamond": 25,
    "arc_challenge": 25,
    "hellaswag": 25,
    "cmmlu": 25,
    "ceval": 25,
    "mmlu_pro": 10,
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Results by row of a scripted model, of all rows at once if none are named: loading the tasks takes longest."""
    load, loaded = driver.load_tasks, {}

    def load_once(row, *arguments):
        if row.name not in loaded:
            loaded[row.name] = load(row, *arguments)
        return loaded[row.name]

    def run(make, rows):
        tasks = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "load_tasks", load_once)
            lm = make(tasks)
            describe = driver.describe

            def described(*arguments):  # by now the tasks are loaded
                tasks.update({t.task.config.task: t.task for row in loaded.values() for t in row})
                return describe(*arguments)

            patch.setattr(driver, "describe", described)
            out = tmp_path_factory.mktemp(make.__name__)
            outcome = evaluate(
                suite=rows or "sample", data_dir=sample.root() if rows else None, out=out, lm=lm,
                allow_code_execution=True, progress=False,
            )  # fmt: skip
        assert not outcome["failed"], outcome["failed"]
        return outcome["rows"]

    results = {}

    def cached(make, rows=None):
        if (make, rows) not in results:
            results[make, rows] = run(make, rows)
        return results[make, rows]

    return cached


def test_right_answers_in_the_words_of_real_models_score_100(measured):
    for row, result in measured(right).items():
        assert (row, result["score"]["value"]) == (row, 100)
        assert result["score"]["n"] >= 12, row
        for score in result["secondary"]:
            # acc compares likelihoods before they are normalised.
            if score["metric"] != "acc":
                assert score["value"] == pytest.approx(100 * 10 / 11 if row == "mgsm" else 100), (row, score)


def test_strict_match_of_mgsm_reads_the_phrase_of_every_language_but_bengali(measured):
    """lm-eval looks for the English phrase in Bengali answers: why the row prints flexible-extract."""
    tasks = measured(right, "mgsm")["mgsm"]["tasks"]
    strict = {
        language: tasks[f"mgsm_native_cot_{language}"]["exact_match,strict-match"]["value"]
        for language in configs("juletxara/mgsm")
    }
    assert strict == dict.fromkeys(strict, 100) | {"bn": 0}


@pytest.mark.parametrize(
    ("row", "primary", "second"), [("gsm8k", 0, 100), ("mgsm", 100, 100 * 2 / 11), ("math", 100, 0)]
)
def test_right_answers_in_other_words_are_seen_by_one_of_two_readings(row, primary, second, measured):
    """GSM8K's strict filter, MGSM's and MATH's exact_match want the phrase of the examples, the others do not."""
    result = measured(otherwise, "gsm8k,mgsm,math")[row]
    (secondary,) = result["secondary"]
    assert (result["score"]["value"], secondary["value"]) == pytest.approx((primary, second))


def test_wrong_answers_score_0(measured):
    assert {row: result["score"]["value"] for row, result in measured(wrong).items()} == dict.fromkeys(ROWS, 0)


def test_guesses_score_about_chance(measured):
    found = {row: result["score"] for row, result in measured(guessing).items()}
    assert set(found) == set(ROWS)
    for row, score in found.items():
        if row in CHANCE:
            share = CHANCE[row] / 100
            error = 100 * (share * (1 - share) / score["n"]) ** 0.5
            assert abs(score["value"] - CHANCE[row]) < 3.5 * error, row
        else:
            assert score["value"] <= 25, row  # a guessed letter answers the few questions of BBH that ask for one
