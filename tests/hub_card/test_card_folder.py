"""The finished folder: what is in it, and that others can use it."""

import json
import re

import pytest
import torch
import yaml
from helpers import relative_error
from huggingface_hub import ModelCard, parse_eval_result_entries
from safetensors.torch import load_file
from tiny_card import run_elsewhere, save_checkpoint
from tiny_eval import byte_tokenizer, tiny_llama
from transformers import AutoTokenizer

from attnres import AttnResForCausalLM
from attnres.analysis.dynamics_runs import PER_LAYER, layer_name
from attnres.conversion import convert
from attnres.eval import evaluate, sample
from attnres.eval.suites import ROWS
from attnres.hub_card import build
from attnres.hub_card.figures import draw_depth_weights


def section(folder, title: str) -> str:
    """The text below a heading of the card."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f"\n## {title}\n" in text
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def quick(source, out, *results, **options):
    """Without loading the model."""
    return build(source, out, results, execute_snippets=False, **options)


def test_the_folder_has_weights_tokenizer_code_card_and_figure(hub_folder, checkpoint):
    names = {path.name for path in hub_folder.iterdir()}
    assert {"README.md", "LICENSE", "config.json", "tokenizer.json", "depth-weights.png", ".eval_results"} <= names
    assert {"modeling_attnres.py", "configuration_attnres.py", "depth_mixer.py", "backbones.py"} <= names
    stored, copied = (load_file(folder / "model.safetensors") for folder in (checkpoint, hub_folder))
    assert stored.keys() == copied.keys() and all(torch.equal(stored[name], copied[name]) for name in stored)
    assert (hub_folder / "depth-weights.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_has_no_placeholder_and_links_only_to_files_of_the_folder(hub_folder):
    card = (hub_folder / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"\{\{|\}\}|\[More Information Needed\]", card)
    links = re.findall(r"\]\((?!https?://)([^)\s]+)\)", card)
    assert "depth-weights.png" in links and all((hub_folder / link).is_file() for link in links)


def test_the_checkpoint_is_left_alone(hub_folder, checkpoint):
    assert not (checkpoint / "README.md").exists() and not list(checkpoint.glob("*.py"))
    assert not list(hub_folder.parent.glob(".*"))


def test_front_matter_says_what_is_known(hub_folder):
    data = ModelCard.load(hub_folder / "README.md").data.to_dict()
    assert data["license"] == "apache-2.0" and data["language"] == ["en"]
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["base_model"] == ["someone/plain-qwen"] and data["base_model_relation"] == "finetune"
    assert {"attention-residuals", "custom_code", "qwen3_moe"} <= set(data["tags"])


def test_model_index_holds_the_measured_rows_and_nothing_of_the_paper(hub_folder, results):
    card = ModelCard.load(hub_folder / "README.md")
    found = {result.dataset_name: result for result in card.data.eval_results}
    assert list(found) == ["GPQA-Diamond", "ARC-Challenge", "GSM8K"]
    for row, title in (("gpqa_diamond", "GPQA-Diamond"), ("arc_challenge", "ARC-Challenge"), ("gsm8k", "GSM8K")):
        measured = json.loads((results / row / "result.json").read_text())["score"]
        assert found[title].metric_value == round(measured["value"], 2) not in ROWS[row].paper
        assert found[title].metric_type == measured["metric"]
    assert (found["GSM8K"].dataset_type, found["GSM8K"].dataset_split) == ("openai/gsm8k", "test")
    assert card.data.model_name == "tiny-attnres"


def test_registered_benchmarks_have_an_eval_results_file_each(hub_folder):
    found = {}
    for path in (hub_folder / ".eval_results").iterdir():
        (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
        found[path.name] = (entry.dataset_id, entry.task_id, entry.value)
    assert found == {
        "gpqa_diamond.yaml": ("Idavidrein/gpqa", "diamond", 100.0),
        "gsm8k.yaml": ("openai/gsm8k", "gsm8k", 66.67),
    }


def test_evaluation_has_protocol_and_the_paper_is_in_a_table_of_its_own(hub_folder):
    measured = section(hub_folder, "Evaluation")
    assert re.search(r"\| GSM8K \| 66\.67 ± 33\.33 \| 8 \| generation \| exact\\_match, strict-match \| 3 \|", measured)
    assert "25 (not published: our choice)" in measured and "81.7" not in measured and "lm\\_eval 0.4" in measured
    paper = section(hub_folder, "The paper's numbers (another model)")
    assert "| GSM8K | 81.7 | 82.4 |" in paper and "MMLU" not in paper and "not measured here" in paper


def test_architecture_counts_parameters_as_the_model_does(hub_folder):
    model = AttnResForCausalLM.from_pretrained(hub_folder)
    total = sum(parameter.numel() for parameter in model.parameters())
    depth = sum(parameter.numel() for parameter in model.depth_parameters())
    text = section(hub_folder, "Architecture")
    assert f"| Parameters, total | {total:,} |" in text and f"| Parameters, depth mixer | {depth:,}, " in text
    config = model.config.backbone_config
    experts = sum(each.numel() for name, each in model.named_parameters() if ".experts." in name)
    active = total - experts + round(experts * config.num_experts_per_tok / config.num_experts)
    assert active < total and f"| Parameters, active per token | {active:,} |" in text
    assert "3 of up to 2 decoder layers" in text and "11, trained" in text


def test_depth_table_counts_what_the_model_mixes(hub_folder):
    model = AttnResForCausalLM.from_pretrained(hub_folder)
    weights = model(input_ids=torch.tensor([[5, 6]]), output_depth_weights=True).depth_weights
    counts = [each.shape[-1] for each in weights]
    rows = re.findall(r"^\| (\d) \| [\d to]+ \| (\d) \| (\d) \| (\d) \|$", section(hub_folder, "Depth"), re.MULTILINE)
    expected = [count for _, sublayers, first, others in rows for count in [first] + [others] * (int(sublayers) - 1)]
    assert [int(count) for count in expected] == counts[:-1] and len(rows) == 3
    assert f"| output |  |  | {counts[-1]} |  |" in section(hub_folder, "Depth")


def test_without_the_package_the_snippets_run_and_the_folder_computes_the_same(hub_folder, tmp_path):
    """The snippets are extracted from the card and run once more, beside the folder."""
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    with torch.no_grad():
        expected = AttnResForCausalLM.from_pretrained(hub_folder)(input_ids=ids).logits
    text = section(hub_folder, "Usage")
    assert "were run" in text
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert '"tiny-attnres"' in code
    script = tmp_path / "usage.py"
    script.write_text(
        f"import os, sys\nos.chdir({str(hub_folder.parent)!r})\n{code}\nprint(type(model).__module__)\n"
        f"torch.save(model(input_ids=torch.tensor({ids.tolist()})).logits, {str(tmp_path / 'logits')!r})\n"
        "assert 'attnres' not in sys.modules\n"
    )
    done = run_elsewhere([str(script)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("transformers_modules.")
    # There the equation mixes, here the kernels where numba is installed.
    assert relative_error(torch.load(tmp_path / "logits"), expected) < 1e-5
    assert re.search(r"^10 \[[\d., ]+\]$", done.stdout, re.MULTILINE)  # the output's weights, after 5 decoder layers


@pytest.mark.slow
def test_the_stock_lm_eval_command_line_evaluates_the_folder(hub_folder, tmp_path):
    items = [{"question": f"{a} and {a} make", "choices": [str(2 * a), "pears"], "answer": 0} for a in range(4)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "task": "tiny_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_sums.yaml").write_text(yaml.safe_dump(task))
    done = run_elsewhere(
        [
            *("-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={hub_folder},trust_remote_code=True"),
            *("--tasks", "tiny_sums", "--include_path", str(tmp_path / "tasks"), "--device", "cpu"),
            *("--output_path", str(tmp_path / "out.json")),
        ],
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\|tiny_sums\s*\|.*\|acc\s*\|.*\|\s*[\d.]+\|±", done.stdout)


def test_results_of_the_real_model_are_taken(checkpoint, small_mirror, tmp_path):
    evaluate(checkpoint, "arc_challenge", out=tmp_path / "results", data_dir=small_mirror, progress=False)
    folder = quick(checkpoint, tmp_path / "hub", tmp_path / "results")
    measured = json.loads((tmp_path / "results" / "arc_challenge" / "result.json").read_text())
    assert f"| ARC-Challenge | {measured['score']['value']:.2f} ± " in section(folder, "Evaluation")


def test_several_folders_of_results_hold_different_rows(checkpoint, measure, tmp_path):
    folder = quick(checkpoint, tmp_path / "hub", measure("gsm8k"), measure("arc_challenge"))
    assert [result.dataset_name for result in ModelCard.load(folder / "README.md").data.eval_results] == [
        "ARC-Challenge",
        "GSM8K",
    ]


def test_sample_items_are_a_smoke_test_and_never_a_benchmark(checkpoint, measure, tmp_path):
    folder = quick(checkpoint, tmp_path / "hub", measure("gsm8k,arc_challenge", data_dir=sample.root()))
    data = ModelCard.load(folder / "README.md").data
    assert data.eval_results is None and not (folder / ".eval_results").exists()
    assert "Nothing has been measured" in section(folder, "Evaluation")
    smoke = section(folder, "Smoke test (no benchmark)")
    assert "SAMPLE ITEMS" in smoke and "| GSM8K |" in smoke
    assert "The paper's numbers" not in (folder / "README.md").read_text()


def test_without_results_the_card_says_so(checkpoint, tmp_path):
    folder = quick(checkpoint, tmp_path / "hub")
    assert "Nothing has been measured" in section(folder, "Evaluation")
    assert "No benchmark has been run" in section(folder, "Limitations")
    assert "model-index" not in ModelCard.load(folder / "README.md").data.to_dict()


def test_a_card_that_ran_nothing_says_so(checkpoint, tmp_path):
    folder = quick(checkpoint, tmp_path / "hub")
    assert "were not run" in section(folder, "Usage") and "not run" in section(folder, "Limitations")
    assert not (folder / "depth-weights.png").exists()


def test_a_repository_name_is_what_the_snippets_load(checkpoint, tmp_path):
    folder = quick(checkpoint, tmp_path / "hub", repo="someone/tiny")
    assert 'name = "someone/tiny"' in section(folder, "Usage")


def test_a_conversion_is_reported_and_zero_pseudo_queries_are_said(tmp_path):
    plain = tmp_path / "plain"
    tiny_llama().save_pretrained(plain)
    byte_tokenizer(eos_token="<end>").save_pretrained(plain)
    convert(plain, tmp_path / "converted", num_blocks=1)
    folder = quick(tmp_path / "converted", tmp_path / "hub")
    report = json.loads((folder / "conversion_report.json").read_text())
    text = section(folder, "Conversion report")
    assert (
        f"| Largest logit difference | {report['max_logit_difference']:.2e} |" in text and "trained since" not in text
    )
    assert "pseudo-queries are zero" in section(folder, "Limitations")
    assert "name is not recorded" in section(folder, "Licence and origin")


def test_a_baseline_with_plain_residuals_runs_and_has_no_depth_weights(tmp_path):
    folder = build(save_checkpoint(tmp_path / "source", "standard", "llama"), tmp_path / "hub")
    assert "No depth mixing" in section(folder, "Depth") and "depth_weights" not in section(folder, "Usage")
    assert not (folder / "depth-weights.png").exists()


def test_full_depth_mixing_is_said(tmp_path):
    folder = quick(save_checkpoint(tmp_path / "source", "full", "llama"), tmp_path / "hub")
    assert "Sublayer i (from 1) mixes i sources" in section(folder, "Depth")
    assert "11: the embedding and 10 sublayers" in section(folder, "Architecture")


def test_depth_weights_are_those_of_the_text_given(checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("def mean(values):\n" * 20)
    tokens = len(AutoTokenizer.from_pretrained(checkpoint)((tmp_path / "text.txt").read_text())["input_ids"])
    text = draw_depth_weights(tmp_path, checkpoint, "tiny", tmp_path / "text.txt")
    assert f"Mean over {tokens:,} tokens of a text that the author of this card chose" in text
    assert "text.txt" not in text and (tmp_path / "depth-weights.png").is_file()


def test_a_link_shares_the_weight_file_and_a_copy_does_not(checkpoint, tmp_path):
    linked, copied = quick(checkpoint, tmp_path / "a", link=True), quick(checkpoint, tmp_path / "b")
    weights = checkpoint / "model.safetensors"
    assert weights.samefile(linked / weights.name) and not weights.samefile(copied / weights.name)


def test_an_existing_folder_is_replaced_only_when_asked_for(checkpoint, tmp_path):
    out = tmp_path / "hub"
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="--overwrite"):
        quick(checkpoint, out)
    assert (out / "thesis.tex").exists()
    assert not (quick(checkpoint, out, overwrite=True) / "thesis.tex").exists()


def test_a_failed_build_leaves_nothing(source, tmp_path):
    config = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**config, "note": "hf_" + "a" * 30}))
    with pytest.raises(ValueError, match="generation_config.json"):
        quick(source, tmp_path / "hub")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_training_dynamics_are_drawn_where_they_were_logged(checkpoint, tmp_path):
    run = tmp_path / "runs" / "from-scratch"
    run.mkdir(parents=True)
    logged = {layer_name(measure, layer, 5): 0.5 + layer for measure in PER_LAYER for layer in range(5)}
    history = [{"step": 20, **logged}, {"step": 20, "eval_loss": 3.25}]
    (run / "trainer_state.json").write_text(json.dumps({"global_step": 20, "log_history": history}))
    folder = quick(checkpoint, tmp_path / "hub", dynamics=[run])
    text = section(folder, "Training dynamics")
    assert "| from-scratch | 20 | 3.25 (20) | 0.5 to 4.5 | 4.5 | 0.5 to 4.5 |" in text
    assert (folder / "training-dynamics.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in (folder / "README.md").read_text()


def test_runs_without_dynamics_are_refused(checkpoint, tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1, "log_history": []}')
    with pytest.raises(ValueError, match="no depth dynamics were logged"):
        quick(checkpoint, tmp_path / "hub", dynamics=[tmp_path])
