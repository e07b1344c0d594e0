"""Running rows: what is reused and what is not, what fails alone and what stops everything."""

import errno
import hashlib
import json
import platform
import shutil
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from tiny_eval import Scripted, byte_tokenizer, tiny_llama
from transformers import PreTrainedConfig

import attnres
from attnres import cli
from attnres.eval import driver, evaluate, identity, records, sample, subject
from attnres.eval import lm as lm_module
from attnres.eval.lm import CausalLM, context_length, with_padding

ROWS = "gsm8k,arc_challenge"


@pytest.fixture
def run(mirror_root, tmp_path):
    """Evaluates into one folder, quietly."""

    def run(model=None, suite=ROWS, **options):
        return evaluate(
            model, suite, **{"out": tmp_path / "out", "data_dir": mirror_root, "progress": False, **options}
        )

    return run


def test_result_and_samples_of_a_row_are_on_disk(run, tmp_path):
    run(lm=Scripted())
    result = json.loads((tmp_path / "out" / "gsm8k" / "result.json").read_text())
    assert (result["score"]["value"], result["score"]["n"], result["shots"]) == (100, 5, 8)
    assert result["tasks"]["gsm8k"]["exact_match,strict-match"]["value"] == 100
    assert result["secondary"][0]["filter"] == "flexible-extract"
    assert {"versions", "seeds", "wall_seconds", "tokens_per_second", "model", "protocol"} <= set(result)
    samples = [json.loads(line) for line in (tmp_path / "out" / "gsm8k" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 10  # five items, two filters
    keys = {"task", "subtask", "seed", "doc_id", "doc_hash", "prompt_hash", "target_hash", "filter", "target"}
    assert keys <= set(samples[0]) and samples[0]["metrics"] == {"exact_match": 1.0}


def test_gpqa_items_keep_their_seed_and_count_once(run, tmp_path):
    result = run(lm=Scripted(choose=lambda doc, index, right: -index), suite="gpqa_diamond")["rows"]["gpqa_diamond"]
    samples = [json.loads(line) for line in (tmp_path / "out/gpqa_diamond/samples.jsonl").read_text().splitlines()]
    assert {sample["seed"] for sample in samples} == set(range(8)) and len(samples) == 240
    assert result["score"]["n"] == 30 and 10 < result["score"]["value"] < 40  # always "(A)" is about chance


def test_finished_rows_are_not_measured_again(run):
    run(lm=Scripted(identity="a"))
    again = Scripted(identity="a")
    outcome = run(lm=again, suite=ROWS + ",gpqa_diamond")
    assert outcome["reused"] == ["arc_challenge", "gsm8k"] and len(again.requests) == 30 * 8 * 4


def test_two_models_never_share_a_result(run, tmp_path):
    run(lm=Scripted(identity="a"))
    outcome = run(lm=Scripted(write=lambda doc: "no", identity="b"))
    assert outcome["reused"] == [] and outcome["rows"]["gsm8k"]["score"]["value"] == 0
    aside = json.loads((tmp_path / "out" / "gsm8k" / "superseded-1" / "result.json").read_text())
    assert aside["score"]["value"] == 100  # nothing that was finished is lost


def test_a_model_without_hashes_is_always_measured(run):
    run(lm=Scripted())
    assert run(lm=Scripted())["reused"] == []


@pytest.mark.parametrize(
    "options", [{"batch_size": 3}, {"dtype": "float32"}, {"limit": 2}, {"seed": 7}, {"max_length": 99}], ids=str
)
def test_other_settings_are_another_result(run, options):
    run(lm=Scripted(identity="a"), suite="gsm8k")
    assert run(lm=Scripted(identity="a"), suite="gsm8k", **options)["reused"] == []


def test_other_package_versions_are_another_result(run, monkeypatch):
    run(lm=Scripted(identity="a"), suite="gsm8k")
    monkeypatch.setattr(driver, "versions", lambda: {"torch": "0"})
    assert run(lm=Scripted(identity="a"), suite="gsm8k")["reused"] == []


def test_other_items_are_another_result(run, mirror_root, tmp_path):
    run(lm=Scripted(identity="a"), suite="gsm8k")
    shutil.copytree(mirror_root, tmp_path / "changed")
    path = tmp_path / "changed/openai/gsm8k/main/test.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:4]))
    outcome = run(lm=Scripted(identity="a"), suite="gsm8k", data_dir=tmp_path / "changed")
    assert outcome["reused"] == [] and outcome["rows"]["gsm8k"]["score"]["n"] == 4


@pytest.mark.parametrize("damage", ["{", "[]", '{"row": "gsm8k"}', ""], ids=repr)
def test_corrupt_result_is_said_and_measured_again(run, tmp_path, capsys, damage):
    run(lm=Scripted(identity="a"), suite="gsm8k")
    (tmp_path / "out" / "gsm8k" / "result.json").write_text(damage)
    outcome = run(lm=Scripted(identity="a"), suite="gsm8k", progress=True)
    assert outcome["reused"] == [] and outcome["rows"]["gsm8k"]["score"]["value"] == 100
    assert "gsm8k/result.json: not" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [lambda text: text[:-1], lambda text: text.replace("1.0", "0.0")], ids=["cut", "other"]
)
def test_samples_that_a_result_was_not_computed_from_are_measured_again(run, tmp_path, capsys, change):
    run(lm=Scripted(identity="a"), suite="gsm8k")
    path = tmp_path / "out" / "gsm8k" / "samples.jsonl"
    whole = path.read_text()
    path.write_text(change(whole))
    assert run(lm=Scripted(identity="a"), suite="gsm8k", progress=True)["reused"] == []
    assert "gsm8k/samples.jsonl: not the samples that result.json" in capsys.readouterr().err
    assert path.read_text() == whole


def test_the_hash_of_samples_is_that_of_the_bytes_that_were_written(tmp_path):
    digest = records.write_lines(tmp_path / "samples.jsonl", [{"text": "\ud800 é"}, {"number": 1}])
    assert digest == hashlib.sha256((tmp_path / "samples.jsonl").read_bytes()).hexdigest()


@pytest.mark.parametrize("taken", ["out", "out/gsm8k"])
def test_a_folder_that_cannot_be_written_is_said_before_any_model_is_loaded(run, tmp_path, monkeypatch, taken):
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("a file")
    monkeypatch.setattr(driver, "load_tasks", None)
    with pytest.raises(OSError, match=f"{taken}: cannot be written, because .* is a file"):
        run(lm=Scripted(), suite="gsm8k")


def test_looking_whether_a_folder_can_be_written_makes_none(run, tmp_path):
    with pytest.raises(ValueError, match="is not in"):
        run(lm=Scripted(), suite="mmlu")
    assert not (tmp_path / "out").exists()


def test_interrupted_run_goes_on_where_it_was(run):
    def interrupt(doc):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lm=Scripted(write=interrupt, identity="a"))  # arc_challenge comes before gsm8k
    assert run(lm=Scripted(identity="a"))["reused"] == ["arc_challenge"]


def test_a_row_that_fails_leaves_the_others(run, tmp_path):
    def fail(doc, index, right):
        raise RuntimeError("out of\nmemory")

    outcome = run(lm=Scripted(choose=fail))
    assert outcome["failed"] == {"arc_challenge": "RuntimeError: out of memory"}
    assert outcome["rows"]["gsm8k"]["score"]["value"] == 100
    assert "Traceback" in (tmp_path / "out" / "arc_challenge" / "failure.txt").read_text()
    assert "ARC-Challenge: failed. RuntimeError: out of memory" in (tmp_path / "out" / "results.md").read_text()


def test_full_disk_is_one_line_and_keeps_what_was_finished(run, tmp_path, monkeypatch):
    write = records.write_lines

    def full(path, objects):
        if path.parent.name == "gsm8k":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, objects)

    monkeypatch.setattr(records, "write_lines", full)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\); finished rows are kept"):
        run(lm=Scripted(identity="a"))
    monkeypatch.undo()
    assert run(lm=Scripted(identity="a"))["reused"] == ["arc_challenge"]


def test_missing_data_stops_before_a_model_is_loaded(run, checkpoint, monkeypatch):
    monkeypatch.setattr(subject, "describe", None)
    monkeypatch.setattr(driver, "describe", None)
    with pytest.raises(ValueError, match=r"mmlu: cais/mmlu is not in .*; hellaswag: Rowan/hellaswag is not in"):
        run(str(checkpoint), "mmlu,hellaswag,gsm8k")


def test_code_rows_are_skipped_unless_allowed(run, tmp_path):
    outcome = run(lm=Scripted(), suite="gsm8k,humaneval,mbpp")
    assert set(outcome["skipped"]) == {"humaneval", "mbpp"}
    assert "HumanEval: skipped" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize("limit", [0, -1, 2.5, float("inf"), float("nan")])
def test_impossible_limit_is_refused(run, limit):
    with pytest.raises(ValueError, match="limit must be"):
        run(lm=Scripted(), limit=limit)


def test_checkpoint_is_measured_and_its_weights_tell_it_apart(run, checkpoint, tmp_path):
    first = run(str(checkpoint), "arc_challenge", limit=2)["rows"]["arc_challenge"]
    assert first["model"]["max_length"] == 3000 and first["tokens_per_second"] > 0 and first["prompts_cut"] == 0
    assert run(str(checkpoint), "arc_challenge", limit=2)["reused"] == ["arc_challenge"]
    shutil.copytree(checkpoint, tmp_path / "other")
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    assert run(str(tmp_path / "other"), "arc_challenge", limit=2)["reused"] == []


def test_nan_logits_fail_the_row_and_not_the_run(run, mirror_root):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    outcome = run(model, tokenizer=byte_tokenizer(eos_token="<end>"), limit=1)
    assert set(outcome["failed"]) == {"arc_challenge", "gsm8k"}
    assert all("logits are NaN" in reason for reason in outcome["failed"].values())


def test_prompts_longer_than_the_context_are_counted(run, tmp_path):
    model = tiny_llama(length=700)
    outcome = run(model, tokenizer=byte_tokenizer(eos_token="<end>"), limit=2)
    assert outcome["rows"]["arc_challenge"]["prompts_cut"] == 2 * 4  # 25 shots, four choices each
    assert outcome["rows"]["gsm8k"]["prompts_cut"] == 2 == outcome["rows"]["gsm8k"]["answers_short"]
    assert "8 prompts are longer than the model's context" in (tmp_path / "out" / "results.md").read_text()


def test_whole_prompt_is_read_although_the_token_limit_does_not_fit(monkeypatch):
    """lm-eval would cut a prompt of 40 tokens to nothing to make room for 1024."""
    lm = CausalLM(tiny_llama(length=64), byte_tokenizer(eos_token="<end>"), 64, 2)
    seen = []

    def generate(self, context, max_length, stop, **_):
        seen.append((context.shape[1], max_length))
        return SimpleNamespace(sequences=torch.cat([context, context[:, :1].expand(-1, 24)], 1), past_key_values=None)

    monkeypatch.setattr(HFLM, "_model_generate", generate)
    request = type("Request", (), {"args": ("x" * 40, {"until": ["\n"], "max_gen_toks": 1024})})
    lm.generate_until([request])
    assert seen == [(40, 64)] and dict(lm.counts) == {"prompts_cut": 0, "answers_short": 1, "tokens": 64}


@pytest.mark.parametrize("special", [{}, {"eos_token": "<end>"}, {"unk_token": "<what>"}], ids=str)
def test_tokenizer_without_padding_gets_one_from_its_own_tokens(run, special):
    tokenizer = with_padding(byte_tokenizer(**special))
    assert tokenizer.pad_token_id is not None and len(tokenizer) == len(byte_tokenizer(**special))


def test_tokenizer_without_end_token_generates(run):
    outcome = run(tiny_llama(length=300), tokenizer=byte_tokenizer(), suite="gsm8k", limit=1)
    assert outcome["failed"] == {}


@pytest.mark.parametrize("max_length", [2, 3, 40])
def test_a_context_in_which_no_choice_fits_is_a_clear_reason(run, max_length):
    model, tokenizer = tiny_llama(), byte_tokenizer(eos_token="<end>")
    outcome = run(model, tokenizer=tokenizer, suite="gpqa_diamond,gsm8k", limit=1, max_length=max_length, seeds=1)
    fits = max_length == 40
    assert ("gpqa_diamond" in outcome["rows"]) is fits and "gsm8k" in outcome["rows"]
    if not fits:
        assert f"tokens, more than the context of {max_length}: pass a larger" in outcome["failed"]["gpqa_diamond"]


def test_a_revision_of_what_has_none_is_refused(run, checkpoint):
    with pytest.raises(ValueError, match=f"{checkpoint}: a folder has no revisions, got --revision main"):
        run(str(checkpoint), revision="main")
    with pytest.raises(ValueError, match="a model in memory with its tokenizer= and without revision"):
        run(tiny_llama(), tokenizer=byte_tokenizer(eos_token="<end>"), revision="main")


def test_the_version_of_a_package_that_is_not_installed_is_recorded(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(identity, "version", missing)
    assert identity.versions.__wrapped__() == {"python": platform.python_version(), "attnres": attnres.__version__}


def test_context_length_is_never_guessed():
    config = tiny_llama().config
    assert [context_length(config, byte_tokenizer(), given, "m") for given in (None, 77)] == [3000, 77]
    with pytest.raises(ValueError, match="--max-length"):
        context_length(PreTrainedConfig(), byte_tokenizer(), None, "m")  # as of a recurrent model


def test_chat_template_that_is_not_there_is_refused(run, checkpoint):
    with pytest.raises(ValueError, match="no chat template"):
        run(str(checkpoint), chat_template=True)


def test_examples_are_turns_of_the_conversation_in_the_models_template(run, monkeypatch):
    tokenizer = byte_tokenizer(eos_token="<end>")
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}]{{ message.content }}[/]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    prompts = []
    monkeypatch.setattr(
        HFLM, "generate_until", lambda self, requests, **_: [prompts.append(each.args[0]) or "" for each in requests]
    )

    plain = run(tiny_llama(length=9000), tokenizer=tokenizer, suite="gsm8k")["rows"]["gsm8k"]
    asked, prompts[:] = list(prompts), []
    templated = run(tiny_llama(length=9000), tokenizer=tokenizer, suite="gsm8k", chat_template=True)

    assert len(prompts) == len(asked) == 5 and not any("[user]" in prompt for prompt in asked)
    for prompt in prompts:
        assert prompt.count("[user]") == 9 and prompt.count("[assistant]") == 9  # 8 shots and the question
        assert prompt.endswith("[assistant]")
    assert not templated["reused"] and plain["settings"]["chat_template"] is False


def test_4_bit_is_asked_of_transformers_with_nf4_on_the_device(checkpoint, monkeypatch, tmp_path):
    seen = {}
    load = lm_module.AutoModelForCausalLM.from_pretrained

    def from_pretrained(folder, quantization_config=None, **options):
        seen.update(options, quantization=quantization_config)
        return load(folder, **options)

    monkeypatch.setattr(lm_module.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(lm_module, "BitsAndBytesConfig", dict)
    settings = subject.Settings("auto", 8, None, 0, None, None, False, False, "cpu", None, load_in_4bit=True)
    lm_module.load_model(str(checkpoint), settings)
    assert seen["quantization"] == {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert seen["device_map"] == {"": "cpu"}
    lm_module.load_model(str(checkpoint), replace(settings, load_in_4bit=False))
    assert seen["quantization"] is None


def test_4_bit_without_bitsandbytes_is_one_line_before_anything_is_loaded(checkpoint, mirror_root, monkeypatch, capsys):
    monkeypatch.setattr(subject, "find_spec", lambda name: None)
    error = error_of(capsys, checkpoint, "--suite", "gsm8k", "--data-dir", mirror_root, "--load-in-4bit")
    assert "pip install bitsandbytes" in error


def test_sample_items_are_marked_where_their_folder_is_named(tmp_path):
    options = {"out": tmp_path / "out", "data_dir": sample.root(), "progress": False}
    assert evaluate(suite="gsm8k", lm=Scripted(), **options)["rows"]["gsm8k"]["suite"] == "sample"
    assert "SAMPLE ITEMS" in (tmp_path / "out" / "results.csv").read_text()


def test_detected_batch_size_is_in_the_result(run, monkeypatch):
    monkeypatch.setattr(HFLM, "_detect_batch_size", lambda *_: 5)
    outcome = run(tiny_llama(), tokenizer=byte_tokenizer(eos_token="<end>"), suite="arc_challenge", batch_size="auto")
    assert outcome["rows"]["arc_challenge"]["batch_sizes_found"] == [5]


def error_of(capsys, *arguments) -> str:
    assert cli.main(["eval", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("attnres: error: ")]
    assert captured.out == "" and captured.err.rstrip().endswith(line)
    return line


def test_model_without_tokenizer_is_one_line(mirror_root, checkpoint, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, tmp_path)
    error = error_of(capsys, tmp_path, "--suite", "gsm8k", "--data-dir", mirror_root, "--out", tmp_path / "out")
    assert "no tokenizer" in error and "--tokenizer" in error


def without_head(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def of_another_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))


def cut(name, length):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def rewritten(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_head, "lack 1 tensors of a LlamaForCausalLM, such as lm_head.weight"),
        (of_another_architecture, "tensors of a GPTNeoXForCausalLM, such as "),
        (cut("model.safetensors", 2000), "transformers cannot load it as a causal language model"),
        (cut("model.safetensors", 3), "transformers cannot load it as a causal language model"),
        (rewritten("config.json", '{"model_type": "llama", "num_attention_heads": "x"}'), "num_attention_heads"),
        (rewritten("config.json", '{"model_type": 5}'), "transformers cannot load it"),
        (rewritten("config.json", '{"model_type": "no-such"}'), "no-such"),
        (rewritten("tokenizer.json", "{}"), "no tokenizer can be loaded"),
        (rewritten("tokenizer.json", '{"model": {"type": "BPE", "vocab": 5}}'), "no tokenizer can be loaded"),
        (rewritten("tokenizer_config.json", "[]"), "no tokenizer can be loaded"),
    ],
    ids=[
        "no-head", "architecture", "weights", "header", "heads", "type", "unknown", "tokenizer", "vocabulary", "list",
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_one_line_and_never_scored(damage, message, checkpoint, mirror_root, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    options = ["--suite", "arc_challenge", "--data-dir", mirror_root, "--out", tmp_path / "out", "--limit", "1"]
    error = error_of(capsys, folder, *options)
    assert str(folder) in error and message in error
    assert not (tmp_path / "out" / "arc_challenge").exists()


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "privateuseone"])
def test_a_device_that_is_not_there_is_said_before_hashing(device, checkpoint, mirror_root, monkeypatch, capsys):
    monkeypatch.setattr(identity, "checkpoint_identity", None)
    error = error_of(capsys, checkpoint, "--suite", "gsm8k", "--data-dir", mirror_root, "--device", device)
    assert f"--device {device}: torch cannot use it" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-folder", "--suite", "gsm8k"], "no such folder"),
        (["x", "--suite", "gsm9k"], "Did you mean 'gsm8k'"),
        (["x", "--data-dir", "no-such-mirror"], "no-such-mirror: no such folder"),
        (["x", "--suite", "sample", "--data-dir", "."], "brings its own items"),
        (["x", "--max-length", "1"], "--max-length 1: must be at least 2"),
        ([], "name a MODEL"),
        (["--fetch-only"], "needs --data-dir"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_status_2(arguments, message, mirror_root, capsys):
    if arguments[:1] == ["no-such-folder"]:
        arguments = [*arguments, "--data-dir", mirror_root]
    assert message in error_of(capsys, *arguments)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_the_first_says_what_ends_the_command(rank, monkeypatch, capsys):
    lost = {"writes": rank == "0", "failed": {"gsm8k": "out of memory"}}

    def end(*_, **options):
        if options["seed"] == 1:
            raise KeyboardInterrupt
        if options["seed"] == 2:
            raise ValueError("a mistake")
        return lost

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(attnres.eval, "evaluate", end)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "the table")
    statuses = [cli.main(["eval", "m", "--seed", seed]) for seed in "123"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", "m", "--limit", "0"])
    assert [*statuses, stop.value.code] == [130, 2, 1, 2]
    said = capsys.readouterr()
    if rank == "1":
        assert said.out == said.err == ""
    else:
        *lines, last = said.err.splitlines()
        assert lines == ["attnres: interrupted", "attnres: error: a mistake", "attnres: gsm8k failed: out of memory"]
        assert last.startswith("attnres eval: error: Invalid value for '--limit'") and said.out == "the table\n"


def test_command_prints_the_table_and_status_1_where_a_row_failed(run, mirror_root, checkpoint, tmp_path, capsys):
    options = ["--data-dir", mirror_root, "--out", tmp_path, "--limit", "1"]
    assert cli.main(["eval", *map(str, [checkpoint, "--suite", "arc_challenge", *options])]) == 0
    assert capsys.readouterr().out.startswith("> **LIMITED RUN")
    shutil.copytree(checkpoint, tmp_path / "nan")
    weights = {name: tensor * torch.nan for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    save_file(weights, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    assert cli.main(["eval", *map(str, [tmp_path / "nan", "--suite", "arc_challenge", *options])]) == 1
    assert "arc_challenge failed: ArithmeticError" in capsys.readouterr().err
