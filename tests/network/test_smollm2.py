"""Real weights in the clients that people use: SmolLM2-135M-Instruct, plain beside converted.

The weights are downloaded once, to ATTNRES_TEST_WEIGHTS or a temporary folder.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from datasets import Dataset
from helpers import relative_error
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

from attnres import AttnResForCausalLM
from attnres.conversion import convert
from attnres.demo import smollm2

pytestmark = [pytest.mark.network, pytest.mark.filterwarnings("ignore")]  # of all the clients' own

TEXT = "Attention Residuals let every sublayer attend over the outputs of all earlier sublayers of a transformer. " * 40
MODES = ("block", "full")
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}


@pytest.fixture(scope="session")
def gguf(tmp_path_factory):
    folder = os.environ.get("ATTNRES_TEST_WEIGHTS")
    return smollm2.fetch(Path(folder) if folder else tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def folders(gguf, tmp_path_factory):
    """The checkpoint in float32, and its conversions."""
    root = tmp_path_factory.mktemp("smollm2")
    smollm2.save_plain(gguf, root / "plain")
    reports = {mode: convert(root / "plain", root / mode, residual_mode=mode).report for mode in MODES}
    (root / "reports.json").write_text(json.dumps(reports))
    return root


@pytest.fixture(scope="session")
def tokenizer(folders):
    return AutoTokenizer.from_pretrained(folders / "plain")


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


@pytest.mark.parametrize("mode", MODES)
def test_the_conversion_is_exact_in_float32(folders, mode):
    report = json.loads((folders / "reports.json").read_text())[mode]
    assert report["relative_logit_error"] < 2e-6 and report["top1_agreement"] == 1.0


@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_equal_the_plain_models(folders, tokenizer, mode):
    questions = ("What is the capital of France?", "Write a haiku about depth.", "def fibonacci(n):")
    for question in questions:
        plain, ours = (smollm2.answer(folders / name, question, 40) for name in ("plain", mode))
        assert ours == plain


def test_gguf_files_are_read_directly(gguf, folders, tokenizer):
    model = AttnResForCausalLM.from_backbone(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    tokens = tokenizer(TEXT[:400], return_tensors="pt").input_ids
    with torch.no_grad():
        assert relative_error(model(tokens).logits, load(folders / "plain").eval()(tokens).logits) < 2e-6


@pytest.mark.parametrize("mode", MODES)
def test_a_text_alone_and_in_a_batch_of_eight_gets_equal_greedy_tokens(folders, tokenizer, mode):
    model, texts = load(folders / mode).eval(), [TEXT[start : start + 30 + 15 * start] for start in range(8)]
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for text, row in zip(texts, together, strict=True):
        alone = tokenizer(text, return_tensors="pt")
        found = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert found.tolist() == row.tolist()[: len(found)]


def rows(tokenizer):
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    return [{"input_ids": row, "labels": row} for row in ids.split(64) if len(row) == 64]


@pytest.mark.parametrize("mode", MODES)
def test_trainer_trains_as_it_trains_the_plain_model(folders, tokenizer, mode, tmp_path):
    losses = {}
    for name in ("plain", mode):
        arguments = TrainingArguments(tmp_path, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-5, **QUIET)
        trainer = Trainer(load(folders / name), arguments, train_dataset=rows(tokenizer))
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[mode][0] == pytest.approx(losses["plain"][0], rel=1e-5)
    assert losses[mode][-1] < losses[mode][0]


@pytest.mark.parametrize("task", ["lora", "sft", "dpo"])
def test_peft_and_trl_start_where_the_plain_model_starts(folders, tokenizer, task, tmp_path):
    import trl
    from peft import LoraConfig, get_peft_model

    chat = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
    losses = {}
    for name in ("plain", "block"):
        model, options = load(folders / name), {"max_steps": 2, "per_device_train_batch_size": 2, **QUIET}
        if task == "lora":
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
            trainer = Trainer(model, TrainingArguments(tmp_path, **options), train_dataset=rows(tokenizer))
        elif task == "sft":
            arguments = trl.SFTConfig(tmp_path, assistant_only_loss=True, bf16=False, **options)
            trainer = trl.SFTTrainer(
                model,
                args=arguments,
                train_dataset=Dataset.from_list([{"messages": chat}] * 8),
                processing_class=chat_tokenizer(folders),
                peft_config=LoraConfig(),
            )
        else:
            rejected = [{"role": "assistant", "content": "It is 5."}]
            pairs = [{"prompt": chat[:1], "chosen": chat[1:], "rejected": rejected}] * 8
            arguments = trl.DPOConfig(tmp_path, bf16=False, **options)
            trainer = trl.DPOTrainer(
                model,
                args=arguments,
                train_dataset=Dataset.from_list(pairs),
                processing_class=tokenizer,
                peft_config=LoraConfig(task_type="CAUSAL_LM"),
            )
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses["block"][0] == pytest.approx(losses["plain"][0], rel=1e-4)


def chat_tokenizer(folders):
    """With the assistant's tokens marked in the template, which this model's own does not do."""
    tokenizer = AutoTokenizer.from_pretrained(folders / "plain")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return tokenizer


def quantisations():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return {
        "4 bits": BitsAndBytesConfig(load_in_4bit=True),
        "8 bits": BitsAndBytesConfig(load_in_8bit=True),
        "torchao": TorchAoConfig(Int8WeightOnlyConfig()),
    }


@torch.no_grad()
def sensitivity(model, tokens):
    """How far logits move when the embeddings are off by 1e-5, the median of five draws: with 8 bits by some per cent,
    because bitsandbytes rounds activations to 8 bits and handles those above a threshold apart."""
    embedding, expected = model.get_input_embeddings()(tokens), model(tokens).logits
    errors = []
    for seed in range(5):
        noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(seed))
        moved = model(inputs_embeds=embedding * (1 + 1e-5 * noise)).logits
        errors.append(relative_error(moved, expected))
    return median(errors)


@pytest.mark.parametrize("kind", ["4 bits", "8 bits", "torchao"])
def test_quantised_while_it_is_loaded_it_computes_what_the_quantised_plain_model_does(folders, tokenizer, kind):
    quantisation = quantisations()[kind]
    plain, ours = (load(folders / name, quantization_config=quantisation).eval() for name in ("plain", "block"))
    tokens = tokenizer(TEXT[:200], return_tensors="pt").input_ids
    tolerance = sensitivity(plain, tokens) if kind == "8 bits" else 1e-4
    with torch.no_grad():
        assert relative_error(ours(tokens).logits, plain(tokens).logits) < tolerance
    for parameter in ours.depth_parameters():
        assert type(parameter) is torch.nn.Parameter and parameter.dtype == torch.float32
    direct = AttnResForCausalLM.from_backbone(folders / "plain", quantization_config=quantisation, dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(direct.eval()(tokens).logits, ours(tokens).logits) < max(tolerance, 2e-2)
    if kind == "torchao":  # its tensors are copied like any other
        assert AttnResForCausalLM.from_backbone(plain)
    else:
        with pytest.raises(ValueError, match=r"is torch\.u?int8: this LlamaForCausalLM is quantised"):
            AttnResForCausalLM.from_backbone(plain)


def test_the_qlora_example_trains(folders, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    script = Path(__file__).parents[2] / "examples" / "qlora.py"
    command = [sys.executable, script, folders / "block", tmp_path / "text.txt", "--out", tmp_path / "out"]
    options = ["--steps", "2", "--length", "32", "--batch-size", "1"]
    done = subprocess.run([*map(str, command), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_accelerate_dispatches_a_checkpoint_to_memory_and_disk(folders, tokenizer, tmp_path):
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    expected = load(folders / "block").eval()
    expected.save_pretrained(tmp_path / "model", save_original_format=False)
    with init_empty_weights():
        model = AttnResForCausalLM(expected.config)
    model.tie_weights()
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.depth_mixer": "cpu", "model.mixed_output": "cpu", "model.depth_weights": "cpu"}
    places |= {f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(len(expected.model.layers))}
    model = load_checkpoint_and_dispatch(
        model, str(tmp_path / "model"), device_map=places, offload_folder=str(tmp_path / "offload"), dtype=torch.float32
    ).eval()
    tokens = tokenizer(TEXT[:100], return_tensors="pt").input_ids
    with torch.no_grad():
        assert relative_error(model(tokens).logits, expected(tokens).logits) < 1e-5


def test_lm_eval_gives_both_the_same_score(folders, tokenizer, tmp_path):
    from attnres.demo.evaluation import evaluate_with_lm_eval

    (tmp_path / "documents.jsonl").write_text(json.dumps({"text": TEXT[:1500]}) + "\n")
    settings = smollm2.QUICK
    bits = {
        name: evaluate_with_lm_eval(load(folders / name), tokenizer, tmp_path / "documents.jsonl", settings, name)
        for name in ("plain", *MODES)
    }
    for mode in MODES:
        assert bits[mode]["bits_per_byte"] == pytest.approx(bits["plain"]["bits_per_byte"], rel=1e-5)


def test_the_demo_runs_to_its_card(gguf, tmp_path):
    home = tmp_path / "home" / "attnres" / "smollm2"
    home.mkdir(parents=True)
    (home / gguf.name).symlink_to(gguf)
    command = [sys.executable, "-m", "attnres", "demo", "--model", "smollm2", "--quick", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HOME": str(tmp_path / "home")})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the same most likely token for 100.0%" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["conversion"]["relative_logit_error"] < 2e-6
    assert results["answers"]["converted"] == results["answers"]["plain"]
    assert {path.name for path in (tmp_path / "out" / "card").iterdir()} >= {"README.md", "model.safetensors"}


@pytest.mark.parametrize("option", ["--apply-chat-template", "--load-in-4bit"])
def test_attnres_eval_gives_both_the_same_answers_in_a_chat_and_in_4_bits(folders, tmp_path, option):
    """The rows' own tasks over miniature items: a likelihood row and, in a chat, one that generates."""
    from attnres.eval import sample

    rows, items = ("hellaswag,humaneval", 2) if option == "--apply-chat-template" else ("hellaswag", 6)
    command = [sys.executable, "-m", "attnres", "eval", "--data-dir", sample.root(), "--suite", rows]
    command += ["--limit", items, "--dtype", "float32", "--batch-size", "4", "--allow-code-execution", option]
    answers = {}
    for name in ("plain", "block"):
        out = tmp_path / name
        done = subprocess.run(
            [*map(str, command), str(folders / name), "--out", str(out)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        lines = [path.read_text().splitlines() for path in sorted(out.glob("*/samples.jsonl"))]
        answers[name] = [json.loads(line)["resps"] for file in lines for line in file]
    assert len(answers["plain"]) == items * len(rows.split(","))
    for plain, ours in zip(answers["plain"], answers["block"], strict=True):
        if isinstance(plain[0][0], str):
            assert ours == plain
        else:
            # On CPUs bitsandbytes multiplies in bfloat16: the plain model's own logits move by 1.5 % with the length.
            tolerance = 1e-4 if option == "--apply-chat-template" else 2e-2
            for ((expected, _),), ((found, _),) in zip(plain, ours, strict=True):
                assert found == pytest.approx(expected, rel=tolerance)
