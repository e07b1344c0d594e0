"""Every row on the miniature items with models whose score is known beforehand."""

import pytest
from scripted import guessing, right, wrong

from attnres.eval import ROWS, driver, evaluate

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
    """Scores by row of a scripted model, on all rows at once: loading the tasks takes longest."""
    load, loaded = driver.load_tasks, {}

    def load_once(row, *arguments):
        if row.name not in loaded:
            loaded[row.name] = load(row, *arguments)
        return loaded[row.name]

    def run(make):
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
            outcome = evaluate(None, "sample", out=out, lm=lm, allow_code_execution=True, progress=False)
        assert not outcome["failed"], outcome["failed"]
        return outcome["rows"]

    results = {}

    def cached(make):
        if make not in results:
            results[make] = run(make)
        return results[make]

    return cached


@pytest.mark.parametrize("row", ROWS)
def test_right_answers_in_the_words_of_real_models_score_100(row, measured):
    result = measured(right)[row]
    assert result["score"]["value"] == 100
    assert result["score"]["n"] >= 12
    for score in result["secondary"]:
        # acc compares likelihoods before they are normalised; MGSM's strict filter wants the phrase of each language.
        if score["metric"] != "acc" and row != "mgsm":
            assert score["value"] == 100, score


@pytest.mark.parametrize("row", ROWS)
def test_wrong_answers_score_0(row, measured):
    assert measured(wrong)[row]["score"]["value"] == 0


@pytest.mark.parametrize("row", ROWS)
def test_guesses_score_about_chance(row, measured):
    score = measured(guessing)[row]["score"]
    if row not in CHANCE:
        assert score["value"] <= 25  # a guessed letter answers the few questions of BBH that ask for one
        return
    share = CHANCE[row] / 100
    error = 100 * (share * (1 - share) / score["n"]) ** 0.5
    assert abs(score["value"] - CHANCE[row]) < 3.5 * error
