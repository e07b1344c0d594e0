"""What running the table with lm-eval gets wrong unless it is prevented: one section per trap, by its number.

| Trap | Prevented by | Test | Further tests |
|---|---|---|---|
| 1 answers end at 256 tokens | loading: max_gen_toks | test_01 | test_suites: token_limit |
| 2 context taken to be 2048 | lm: context_length | test_02 | test_driver: context_length, whole_prompt |
| 3 a YAML's 0 shots stay 0 | loading: num_fewshot in the configuration | test_03 | test_suites: shots_are_those |
| 4 MGSM is a loading script | fetch, mirror | test_04 | test_mirror: fetch_takes |
| 5 MATH wants a phrase | suites: math_verify is the printed metric | test_05 | test_scripted_models: other_words |
| 6 GPQA shows its answers | tasks/gpqa_diamond.yaml: test_split | test_06 | test_suites: gpqa_never |
| 7 GPQA's seeds do nothing | tasks/gpqa.py, loading | test_07 | test_suites: gpqa_runs, gpqa_order |
| 8 code_eval needs the hub | mirror: serving_metrics; sandbox | test_08 | test_mirror: code_eval; test_sandbox |
| 9 one cache for two models | driver: fingerprints, no other cache | test_09 | test_driver: two_models, weights_tell |
| 10 functions in results | driver: _items; loading: _describe | test_10 | test_driver: result_and_samples |
| 11 scores move with the batch | driver: settings; compare: conditions | test_11 | test_compare: cannot_be_paired |
| 12 sampling passes by caches | rows are greedy (lm: plain_greedy), reused whole | test_12 | test_driver: interrupted |
"""

import json
import random
import sys
from types import SimpleNamespace

import datasets
import evaluate as hf_evaluate
import pytest
import torch
from lm_eval.api import model as lm_eval_model
from lm_eval.api import task as lm_eval_task
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import _yaml_loader
from tiny_eval import Scripted, arc_item, byte_tokenizer, tiny_llama, write_data_set
from transformers import BloomConfig, BloomForCausalLM

from attnres.eval import evaluate, lm, loading, mirror, records, sample
from attnres.eval.compare import compare
from attnres.eval.fetch import SCRIPT_REVISION, fetch
from attnres.eval.sandbox import SandboxedCodeEval
from attnres.eval.suites import ROWS

GENERATED = [name for name, row in ROWS.items() if row.scoring == "generation"]
SCRIPT = RuntimeError("Dataset scripts are no longer supported, but found mgsm.py")


def unreachable(*_, **__):
    raise ConnectionError("the hub is not reachable")


@pytest.fixture(scope="module")
def offline():
    """The sample mirror in place of a hub that cannot be reached; modules of tasks are loaded anew."""
    with pytest.MonkeyPatch.context() as patch:
        for function, place in ((datasets, "load_dataset"), (hf_evaluate, "load")):
            patch.setattr(function, place, unreachable)
        for row in ("humaneval", "mbpp"):
            patch.delitem(sys.modules, f"lm_eval.tasks.{row}.utils", raising=False)
        with mirror.serving_code_eval(SandboxedCodeEval()):
            yield mirror.Mirror(sample.root())


@pytest.fixture(scope="module")
def first_task(offline):
    """The first leaf task of a row with its requests."""
    built = {}

    def first(name):
        if name not in built:
            with pytest.MonkeyPatch.context() as patch:
                configs = loading.task_configs
                patch.setattr(loading, "task_configs", lambda row, **options: configs(row, **options)[:1])
                (loaded, *_) = loading.load_tasks(ROWS[name], mirror=offline)
            loaded.task.build_all_requests(limit=1, rank=0, world_size=1)
            built[name] = loaded.task
        return built[name]

    return first


@pytest.fixture
def run(mirror_root, tmp_path):
    """Evaluates into one folder, quietly."""

    def run(suite, model=None, **options):
        options = {"out": tmp_path / "out", "data_dir": mirror_root, "progress": False, **options}
        outcome = evaluate(model, suite, **options)
        assert not outcome["failed"]
        return outcome

    return run


def samples(folder, row) -> list[dict]:
    return [json.loads(line) for line in (folder / row / "samples.jsonl").read_text().split("\n")[:-1]]


# 1. lm-eval stops an answer at 256 tokens where a YAML sets no limit.


@pytest.mark.parametrize("row", GENERATED)
def test_01_every_answer_may_have_1024_tokens(row, first_task):
    (request,) = first_task(row).instances
    assert request.args[1]["max_gen_toks"] == {"mmlu_pro": 2048}.get(row, 1024)  # MMLU-Pro's YAML wants more


# 2. lm-eval takes the context to be 2048 tokens where it does not know the name that a configuration has for it.


def test_02_a_context_under_another_name_is_used_whole(run, tmp_path):
    items = [arc_item(number) for number in range(30)]
    longer = [item | {"question": f"{'Think. ' * 10}{item['question']}"} for item in items]
    write_data_set(tmp_path / "long", "allenai/ai2_arc", "ARC-Challenge", {"train": longer, "test": longer[:1]})
    config = BloomConfig(vocab_size=257, hidden_size=16, n_layer=1, n_head=2, eos_token_id=0, model_max_length=5000)
    model, seen = BloomForCausalLM(config), []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    options = {"tokenizer": byte_tokenizer(eos_token="<end>"), "data_dir": tmp_path / "long"}
    result = run("arc_challenge", model, **options)["rows"]["arc_challenge"]
    assert (result["model"]["max_length"], result["prompts_cut"]) == (5000, 0)
    assert 2048 < max(seen) < 5000  # the prompts of 25 shots


# 3. num_fewshot: 0 in a YAML wins over what is asked for from outside.


def test_03_a_yaml_that_sets_no_shots_gets_those_of_the_row(run, monkeypatch):
    load = _yaml_loader.load_yaml

    def without_shots(*arguments, **options):
        return load(*arguments, **options) | {"num_fewshot": 0}

    monkeypatch.setattr(_yaml_loader, "load_yaml", without_shots)
    lm = Scripted()
    run("gsm8k", lm=lm, limit=1)
    assert lm.requests[0].args[0].count("Question:") == ROWS["gsm8k"].shots + 1


# 4. MGSM comes as a loading script, which datasets 4 does not run.


def script(path, name=None, revision=None, **_):
    """The hub with a data set as a script, and its own conversion of it."""
    if revision != SCRIPT_REVISION:
        raise SCRIPT
    items = [
        {"question": f"{number} + 1?", "answer": None, "answer_number": number + 1, "equation_solution": None}
        for number in range(9)
    ]
    worked = [
        item | {"question": f"Question: {item['question']}", "answer": f"Step-by-Step Answer: {name}."}
        for item in items
    ]
    return {"train": datasets.Dataset.from_list(worked), "test": datasets.Dataset.from_list(items)}


def test_04_mgsm_is_fetched_without_its_script_and_runs_from_the_mirror(run, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", script)
    assert fetch([ROWS["mgsm"]], tmp_path / "mirror") == {}
    lm = Scripted(write=lambda doc: f"The answer is {doc['answer_number']}.")
    result = run("mgsm", lm=lm, data_dir=tmp_path / "mirror", limit=2)["rows"]["mgsm"]
    assert (result["score"]["value"], result["score"]["n"]) == (100, 22)


def test_04_without_a_mirror_the_refusal_names_one(run, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", script)
    with pytest.raises(ValueError, match="mgsm: .*scripts are no longer supported.*--data-dir reads a local mirror"):
        run("mgsm", lm=Scripted(), data_dir=None)


# 5. MATH's exact_match wants "Final Answer: ...": the data set's own solutions score 0 on it.

PHRASE = "Final Answer: The final answer is $7$. I hope it is correct."


@pytest.mark.parametrize(
    ("written", "exact", "verified"),
    [
        ("We add and get $\\boxed{7}$.", 0, 1),
        (f"We add and get $\\boxed{{7}}$.\n{PHRASE}", 1, 1),
        (f"We add and get seven.\n{PHRASE}", 1, 1),
        ("We add and get $\\boxed{8}$.\nFinal Answer: The final answer is $8$. I hope it is correct.", 0, 0),
    ],
)
def test_05_only_math_verify_reads_a_solution_without_the_phrase(written, exact, verified, first_task):
    doc = {"solution": "So $3+4=\\boxed{7}$.", "answer": "7"}
    scores = first_task("math").process_results(doc, [written])
    assert scores == {"exact_match": exact, "math_verify": verified}


def test_05_math_prints_math_verify_and_shows_the_phrase_in_every_example(first_task):
    assert (ROWS["math"].metric, ROWS["math"].secondary) == ("math_verify", (("exact_match", "none"),))
    (request,) = first_task("math").instances
    assert request.args[0].count("Final Answer: The final answer is") == 4


# 6 and 7. GPQA shows the question among its own examples, and its seeds change nothing.


@pytest.fixture
def gpqa(run):
    """By seed and question: examples, and the order of the choices, as they reach the model."""

    def asked(suite):
        lm = Scripted()
        run(suite, lm=lm, limit=6)
        found = {}
        for request in lm.requests:
            if request.idx == 0 and request.task_name.startswith("attnres_gpqa"):
                *examples, question = request.args[0].split("Question: ")[1:]
                rod, *choices = question.split("\n")
                found[request.task_name, rod] = SimpleNamespace(examples=examples, choices=choices)
        return found

    return asked


def test_06_no_question_of_gpqa_is_among_its_own_examples(gpqa):
    asked = gpqa("gpqa_diamond")
    assert len(asked) == 8 * 6
    for (_, rod), prompt in asked.items():
        assert len(prompt.examples) == 5
        assert not [example for example in prompt.examples if example.split("\n")[0] == rod]


def test_07_every_seed_of_gpqa_orders_the_choices_anew_whatever_ran_before(gpqa):
    random.seed(5)
    asked = gpqa("gpqa_diamond")
    rods = sorted({rod for _, rod in asked})
    orders = {name: [asked[name, rod].choices for rod in rods] for name, _ in asked}
    assert len({str(order) for order in orders.values()}) == 8
    random.seed(6)
    assert gpqa("gsm8k,gpqa_diamond") == asked


# 8. code_eval is loaded with the task, from the hub; its programs run in the harness.


@pytest.mark.parametrize(("row", "name"), [("humaneval", "compute_"), ("mbpp", "pass_at_k")])
def test_08_code_rows_load_without_a_hub_and_run_programs_in_the_sandbox(row, name, first_task):
    first_task(row)
    code_eval = getattr(sys.modules[f"lm_eval.tasks.{row}.utils"], name)
    assert isinstance(code_eval, SandboxedCodeEval)
    programs = [["import math, os\n\ndef add(a, b):\n    return a + b"], ["raise SystemExit(0)"]]
    scores, _ = code_eval.compute(references=["assert add(1, 2) == 3"] * 2, predictions=programs, k=[1])
    assert scores["pass@1"] == 0.5


# 9. lm-eval's caches do not know the model.


def no_prompt_is_cached(file_name, cache):
    assert not cache


def test_09_two_models_in_one_folder_get_their_own_answers(run, monkeypatch, tmp_path):
    monkeypatch.setattr(lm_eval_model.CachingLM, "__init__", None)
    monkeypatch.setattr(lm_eval_task, "load_from_cache", no_prompt_is_cached)
    tokenizer = byte_tokenizer(eos_token="<end>")
    answers = []
    for out, seed in (("both", 0), ("both", 1), ("second", 1)):
        outcome = run("arc_challenge", tiny_llama(seed=seed), tokenizer=tokenizer, limit=1, out=tmp_path / out)
        assert outcome["reused"] == []
        answers.append([item["resps"] for item in samples(tmp_path / out, "arc_challenge")])
    assert answers[0] != answers[1] == answers[2]


# 10. lm-eval's results hold functions, and its tracker changes the samples while it writes them.


@pytest.mark.parametrize("suite", ["gsm8k", "gpqa_diamond"])
def test_10_what_is_written_is_plain_json_and_is_what_the_model_said(suite, run, monkeypatch, tmp_path):
    written = []
    for name in ("write_json", "write_lines"):
        write = getattr(records, name)
        keep = lambda path, content, write=write: written.append(content) or write(path, content)  # noqa: E731
        monkeypatch.setattr(records, name, keep)
    for name in ("save_results_samples", "save_results_aggregated"):
        monkeypatch.setattr(EvaluationTracker, name, None)
    run(suite, lm=Scripted(choose=lambda doc, index, right: -0.25 * index), limit=1)
    assert len(written) == 4  # samples, result, and the table twice
    json.dumps(written, allow_nan=False)
    item = samples(tmp_path / "out", suite)[0]
    assert (
        item["resps"]
        == {
            "gsm8k": [["She has 100+3=103.\n#### 103"]],
            "gpqa_diamond": [[[-0.25 * index, False]] for index in range(4)],
        }[suite]
    )


def test_10_the_fingerprint_of_a_function_is_its_source_and_not_its_address(mirror_root, monkeypatch):
    data, found = mirror.Mirror(mirror_root), []
    for _ in range(2):  # the second time as another process would
        loaded = loading.load_tasks(ROWS["gpqa_diamond"], seeds=2, mirror=data)
        found.append([loading.task_fingerprint(each, data) for each in loaded])
        functions = loaded[0].task.config.process_docs.func
        monkeypatch.delitem(sys.modules, functions.__module__)
    assert found[0] == found[1] and found[0][0]["definition"] != found[0][1]["definition"]


# 11. Scores move with the batch size.


def test_11_another_batch_size_is_another_result_and_is_not_compared(run, tmp_path):
    for out, batch_size in (("a", 8), ("b", 8), ("c", 4)):
        run("gsm8k", lm=Scripted(identity="m"), batch_size=batch_size, out=tmp_path / out)
    assert run("gsm8k", lm=Scripted(identity="m"), out=tmp_path / "a")["reused"] == ["gsm8k"]
    assert run("gsm8k", lm=Scripted(identity="m"), batch_size=4, out=tmp_path / "b")["reused"] == []
    assert compare(tmp_path / "b", tmp_path / "c", bootstrap=100).rows
    with pytest.raises(ValueError, match=r"gsm8k: measured differently.*batch_size \(8 and 4\)"):
        compare(tmp_path / "a", tmp_path / "c")


# 12. Sampled answers pass by lm-eval's cache: a run that goes on would mix two draws.


@pytest.mark.parametrize("row", GENERATED)
def test_12_every_row_is_decoded_greedily(row, first_task):
    (request,) = first_task(row).instances
    asked = normalize_gen_kwargs(request.args[1], 1)
    assert (asked["do_sample"], asked["temperature"]) == (False, 0)


def test_12_a_checkpoint_that_samples_by_default_answers_greedily(run, monkeypatch):
    model, asked = tiny_llama(length=300), []
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: asked.append(options) or generate(**options))
    run("gsm8k", model, tokenizer=byte_tokenizer(eos_token="<end>"), limit=1)
    assert [options["do_sample"] for options in asked] == [False]


@pytest.mark.parametrize(
    "own",
    [
        {"num_beams": 3}, {"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": 30},
        {"suppress_tokens": [*range(1, 200)]}, {"bad_words_ids": [[number] for number in range(1, 200)]},
        {"forced_eos_token_id": 7}, {"do_sample": True, "temperature": 5.0, "top_k": 3}, {"max_new_tokens": 2},
        {"stop_strings": ["a"]},
    ],
    ids=lambda own: next(iter(own)),
)  # fmt: skip
def test_12_what_else_a_checkpoint_generates_with_changes_no_answer(own):
    request = SimpleNamespace(args=("x" * 20, {"until": ["\n"], "max_gen_toks": 1024, "do_sample": False}))
    answers = []
    for options in ({}, own):
        model = tiny_llama(length=64, seed=3)
        model.generation_config.update(**options)
        before = model.generation_config.to_dict()
        answers += lm.CausalLM(model, byte_tokenizer(eos_token="<end>"), 64, 2).generate_until([request])
        assert model.generation_config.to_dict() == before
    assert answers[0] == answers[1]


def test_12_end_tokens_of_a_checkpoint_still_end_answers_and_a_failure_puts_its_settings_back():
    model, tokenizer = tiny_llama(length=64, seed=3), byte_tokenizer(eos_token="<end>")
    request = SimpleNamespace(args=("x" * 20, {"until": ["\n"], "max_gen_toks": 1024, "do_sample": False}))
    (whole,) = lm.CausalLM(model, tokenizer, 64, 2).generate_until([request])
    model.generation_config.eos_token_id = list(range(257))
    assert len(lm.CausalLM(model, tokenizer, 64, 2).generate_until([request])[0]) < len(whole)
    model.generation_config.num_beams = 3
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    with pytest.raises(ArithmeticError):
        lm.CausalLM(model, tokenizer, 64, 2).generate_until([request])
    assert model.generation_config.num_beams == 3


def test_12_no_answer_of_an_interrupted_row_is_kept(run):
    def interrupt(doc):
        if doc["question"].startswith("Ann has 103"):
            raise KeyboardInterrupt
        return "an answer of the first run"

    with pytest.raises(KeyboardInterrupt):
        run("gsm8k", lm=Scripted(write=interrupt, identity="m"))
    again = Scripted(identity="m")
    assert run("gsm8k", lm=again)["rows"]["gsm8k"]["score"]["value"] == 100
    assert len(again.requests) == 5
