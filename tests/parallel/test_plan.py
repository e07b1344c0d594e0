"""`attnres plan`: its numbers against those of models, optimizers and processes that really exist."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from collectives import Collectives, counted_step
from families import FAMILIES, LINEAR_FAMILIES, MOE_FAMILIES, tiny_config
from helpers import random_tokens, short_config
from launching import HERE
from launching import run as run_command
from once import once
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import DynamicCache, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.integrations import moe

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.bench.memory import saved_bytes
from attnres.cli import main
from attnres.parallel.plan import Options, run
from attnres.parallel.plan_layout import Layout, layouts
from attnres.parallel.plan_memory import Plan, Prefill, Work, in_flight, prefill_memory
from attnres.parallel.plan_model import local_shape, parallel_styles, planned_model, read_config
from attnres.parallel.plan_trace import trace_cache, trace_training
from attnres.parallel.plan_traffic import pipeline_summary, prefill_traffic, sent, training_traffic
from attnres.parallel.sequence import shard_sequence
from attnres.parallel.stage import AttnResStage
from attnres.parallel.traffic import plan_routes
from attnres.training.optimizer import muon_with_adamw

BATCH, TOKENS = 2, 24
# transformers 5.17 divides models and sends tokens to experts in other ways; plans are those of later ones.
DIVIDES_AS_PLANNED = hasattr(DistributedConfig, "efsdp_size")
divides_as_planned = pytest.mark.skipif(not DIVIDES_AS_PLANNED, reason="this transformers divides in another way")


def config_of(
    family: str, residual_mode: str = "block", layers_per_block: int | None = 2, layers: int = 5, **overrides
) -> AttnResConfig:
    return AttnResConfig(
        backbone_config=short_config(family, layers, **overrides),
        residual_mode=residual_mode,
        layers_per_block=layers_per_block,
        attn_implementation="eager" if family in ("gpt_oss", "gemma2") else "sdpa",
    )


@pytest.fixture
def any_size_of_experts(monkeypatch):
    """Grouped products of torch want multiples of 16 bytes; transformers has an operator that does not."""
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *arguments, **options: False)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A config.json of a small dense model: its path and the configuration."""
    config = config_of("qwen3", layers=12, vocab_size=96)
    folder = tmp_path_factory.mktemp("stored")
    config.save_pretrained(folder)
    return str(folder / "config.json"), config


def plan_command(capsys, *arguments) -> dict:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# Parameters


def test_the_default_model_has_49_billion_parameters_of_which_3_5_are_active(capsys):
    model = plan_command(capsys, "--world", 32, "--tensor", 8, "--checkpointing")["model"]
    counts = model["parameters"]
    assert round(counts["total"] / 1e9, 1) == 49.1 and round(counts["active"] / 1e9, 1) == 3.5
    assert counts["embeddings"] == 2 * 163840 * 2304
    assert (model["blocks"], model["layers_per_block"], model["routed_experts"], model["experts_per_token"]) == (
        *(9, 3),
        *(256, 8),
    )
    kinds = {kind["kind"]: kind["layers"] for kind in counts["layer_kinds"]}
    assert kinds == {"linear_attention, dense": 1, "linear_attention, moe": 19, "full_attention, moe": 7}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_parameters_are_those_of_the_model_in_memory(family, tied):
    config = config_of(family, tie_word_embeddings=tied)
    counts = planned_model(config).counts()
    model = AttnResForCausalLM(config)
    assert counts["total"] == model.num_parameters()
    assert counts["depth_mixer"] == sum(each.numel() for each in model.depth_parameters()) > 0
    used = {each: each.weight.numel() for each in (model.model.embed_tokens, model.lm_head)}
    head = sum(each.numel() for each in model.lm_head.parameters())
    assert counts["embeddings"] == used[model.model.embed_tokens] + head - (tied and used[model.lm_head])
    # 2 of 5 routed experts are active in all these families.
    idle = sum(each[:3].numel() for name, each in model.named_parameters() if ".experts." in name)
    assert counts["active"] == counts["total"] - idle and (idle > 0) == (family in MOE_FAMILIES)
    assert sum(kind["layers"] * kind["parameters_each"] for kind in counts["layer_kinds"]) == sum(
        each.numel() for each in model.model.layers.parameters()
    )


def test_the_standard_mode_has_no_depth_mixer():
    assert planned_model(config_of("llama", "standard")).counts()["depth_mixer"] == 0


# Activations


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_activations_are_what_autograd_saves(family, autocast, any_size_of_experts):
    """Here with the CPU's kernels: all back ends of the operator keep the same."""
    config = config_of(family)
    model, ids = AttnResForCausalLM(config).train(), random_tokens(BATCH, TOKENS)
    masks = {layer.layer_type: None for layer in model.model.layers}

    def forward():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return model(input_ids=ids, labels=ids, use_cache=False, attention_mask=masks).loss

    forward()  # the kernels check themselves once, and save what that takes
    counted = saved_bytes(forward, model.parameters())
    trace = trace_training(planned_model(config).module, BATCH, TOKENS, autocast=autocast, kernels=False)
    kept = {}
    for place in (trace.inside, trace.outside, trace.copies):
        for storages in place.values():
            kept |= storages
    # Without autocast to the byte. With it, casts that only a later cast reads may be counted or not.
    assert sum(kept.values()) == (pytest.approx(counted, rel=0.01) if autocast else counted)
    assert bool(trace.copies) == autocast


@pytest.mark.parametrize("mode", ["block", "full", "standard"])
def test_block_representations_are_told_from_other_activations(mode):
    config = config_of("llama", mode, 3, layers=12)
    trace = trace_training(planned_model(config).module, BATCH, TOKENS)
    stream = BATCH * TOKENS * config.hidden_size * 4
    assert set(trace.streams.values()) == {stream}
    # block: the embedding, of 4 blocks the first 3, and 2 partial sums in each; the last is only read by the output.
    assert len(trace.streams) == {"block": 1 + 3 + 8, "full": 1 + 22, "standard": 12}[mode]


def test_kernels_keep_no_attention_matrix_and_no_chunk_matrices():
    for family in ("llama", *LINEAR_FAMILIES):
        module = planned_model(config_of(family)).module
        sizes = {
            tokens: [
                sum(sum(each.values()) for each in trace_training(module, 1, tokens, kernels=kernels).inside.values())
                for kernels in (True, False)
            ]
            for tokens in (64, 128)
        }
        assert sizes[128][0] < 2.01 * sizes[64][0], family  # linear in the tokens
        assert sizes[128][0] <= sizes[128][1] * 1.05, family


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer():
    model = planned_model(config_of("llama", layers_per_block=3, layers=12))
    work = Work(TOKENS, BATCH, dtype="float32")
    kept, less = (
        Plan(model, Layout(1), replace(work, checkpointing=checkpointing)).training(0)
        for checkpointing in (False, True)
    )
    assert less["block representations"] == kept["block representations"]
    assert kept["activations"] / 12 < less["activations"] < kept["activations"] / 4


def test_a_traced_model_leaves_nothing_fake_behind():
    config = config_of("qwen3", rms_norm_eps=3e-9)  # a number that no model has used before
    trace_training(planned_model(config).module, 1, 8)
    logits = AttnResForCausalLM(config)(input_ids=random_tokens(1, 8)).logits
    assert type(logits) is torch.Tensor and logits.isfinite().all()


# Tensor and expert parallelism


@pytest.fixture(scope="module")
def two_ranks():
    """A process group of two, of which there is one: collectives are issued and nobody answers."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def as_transformers_divides(config, ranks: int) -> AttnResForCausalLM:
    from transformers.distributed.utils import TransformersDeviceMesh

    model = AttnResForCausalLM(config)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    if tied:  # loading ties after it has divided
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    dense = init_device_mesh("cpu", (1, 1, 1, ranks), mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
    expert = init_device_mesh("cpu", (1, 1, ranks, 1), mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep"))
    mesh = TransformersDeviceMesh(dense, expert)
    model = AttnResForCausalLM.maybe_distribute_model(model, DistributedConfig(tp_size=ranks), mesh)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def planned_counts(collectives, backward: bool) -> dict[str, list[int]]:
    mine = [each for each in collectives if each.backward == backward]
    return {
        kind: [
            sum(each.kind == kind for each in mine),
            sum(each.payload for each in mine if each.kind == kind),
        ]
        for kind in sorted({each.kind for each in mine})
    }


@divides_as_planned
@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallel_shapes_and_collectives_are_those_of_transformers(family, two_ranks, any_size_of_experts):
    config = config_of(family, vocab_size=96, tie_word_embeddings=family in ("qwen3", "mixtral"))
    planned = planned_model(config)
    styles = parallel_styles(planned.module, 2, 1)
    trace = trace_training(planned.module, BATCH, 8, tensor=2)
    model = as_transformers_divides(config, 2)
    for each in planned.parameters:
        local = model.get_parameter(each.name)
        local = local.to_local() if hasattr(local, "to_local") else local
        assert local_shape(each.name, each.shape, styles.get(each.name), 2, 1) == local.shape, each.name
    forward, backward = counted_step(model, random_tokens(BATCH, 8, vocab_size=96))
    assert planned_counts(trace.collectives, False) == forward
    assert planned_counts(trace.collectives, True) == backward


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    """What two processes counted, by case."""
    cases = [
        {"kind": "fsdp", "family": "llama", "tied": False, "mixed_precision": "bf16"},
        {"kind": "fsdp", "family": "kimi_linear", "tied": False, "mixed_precision": "no"},
        {"kind": "fsdp", "family": "mixtral", "tied": True, "mixed_precision": "bf16"},
    ]
    if DIVIDES_AS_PLANNED:
        cases += [
            {"kind": "experts", "family": "mixtral", "tensor": 2, "data": 1, "expert": 2},
            {"kind": "experts", "family": "deepseek_v3", "tensor": 1, "data": 2, "expert": 2},
        ]

    def count(folder):
        (folder / "cases.json").write_text(json.dumps(cases))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
        run_command(*launch, HERE / "plan_ranks.py", folder)
        return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]

    ranks = once(tmp_path_factory, "plan-ranks", count)
    return [(case, [rank[number] for rank in ranks]) for number, case in enumerate(cases)]


def test_fsdp2_holds_and_sends_on_two_ranks_what_is_planned(in_two_processes):
    cases = [(case, ranks[0]) for case, ranks in in_two_processes if case["kind"] == "fsdp"]
    assert len(cases) == 3
    for case, counted in cases:
        config = AttnResConfig(backbone_config=tiny_config(case["family"], tie_word_embeddings=case["tied"]))
        dtype = "bfloat16" if case["mixed_precision"] == "bf16" else "float32"
        plan = Plan(planned_model(config), Layout(2, data=2, shard="zero3"), Work(8, dtype=dtype))
        items = plan.training(0)
        for name in ("parameters", "gradients", "optimizer state"):
            assert items[name] == counted[name], (case, name)
        rows = {row["what"].partition(":")[0]: {} for row in training_traffic(plan, 0)}
        for row in training_traffic(plan, 0):
            rows[row["what"].partition(":")[0]][row["operation"]] = [row["calls"], row["payload_bytes"]]
        assert rows == {"FSDP2, forward": counted["forward"], "FSDP2, backward": counted["backward"]}, case


@divides_as_planned
def test_tokens_go_to_experts_on_two_ranks_as_planned(in_two_processes):
    cases = [(case, ranks) for case, ranks in in_two_processes if case["kind"] == "experts"]
    assert len(cases) == 2
    for case, ranks in cases:
        config = AttnResConfig(backbone_config=tiny_config(case["family"], num_local_experts=6, vocab_size=96))
        planned = planned_model(config)
        tensor, expert = case["tensor"], case["expert"]
        styles = parallel_styles(planned.module, tensor, expert)
        for each in planned.parameters:
            if each.routed:
                shape = local_shape(each.name, each.shape, styles[each.name], tensor, expert)
                assert [list(shape)] * 2 == [rank["experts"][each.name] for rank in ranks]
        trace = trace_training(planned.module, BATCH, 8, tensor, expert)
        for direction, backward in (("forward", False), ("backward", True)):
            expected = planned_counts(trace.collectives, backward)
            for kind in ("all_to_all", "all_reduce", "all_gather") if tensor > 1 else ("all_to_all",):
                calls, payload = expected.get(kind, [0, 0])
                found = [rank[direction].get(kind, [0, 0]) for rank in ranks]
                assert [calls] * 2 == [each[0] for each in found], (case, direction, kind)
                # Routing is not balanced: the experts of one rank may get more, those of the other then get less.
                assert 2 * payload == sum(each[1] for each in found), (case, direction, kind)


def test_a_ring_sends_what_its_algorithm_sends():
    assert sent("all_reduce", 4, 1000) == 1500 and sent("all_gather", 4, 1000) == 750
    assert sent("reduce_scatter", 2, 1000) == 500 and sent("all_to_all", 5, 1000) == 800


# Pipeline


@pytest.mark.parametrize(("family", "ranks", "virtual_stages"), [("llama", 4, 1), ("mixtral", 2, 2), ("qwen3", 5, 2)])
def test_pipeline_ranks_have_the_parameters_of_their_stages(family, ranks, virtual_stages):
    config = config_of(family, layers_per_block=5, layers=12, tie_word_embeddings=family == "qwen3")
    layout = Layout(ranks, pipeline=ranks, virtual_stages=virtual_stages)
    plan = Plan(planned_model(config), layout, Work(TOKENS, micro_batches=2 * ranks))
    whole = AttnResForCausalLM(config)
    routes = plan_routes(config, plan.bounds, ranks, caching=True)
    for rank in range(ranks):
        stages = [
            AttnResStage(whole, routes[stage], stage == 0, stage == layout.stages - 1)
            for stage in range(rank, layout.stages, ranks)
        ]
        real = sum(each.numel() for stage in stages for each in stage.parameters())
        assert sum(each.elements for each in plan.parameters(rank)) == real, rank
        assert [len(layers) for layers in plan.layers(rank)] == [len(stage.model["layers"]) for stage in stages]


@pytest.mark.parametrize(("ranks", "virtual_stages", "micro_batches"), [(4, 2, 8), (2, 3, 6), (4, 2, 4), (3, 2, 9)])
def test_micro_batches_in_flight_are_those_of_the_schedule_of_torch(ranks, virtual_stages, micro_batches):
    rounds = max(1, micro_batches // ranks)
    schedule = SimpleNamespace(
        n_local_stages=virtual_stages,
        pp_group_size=ranks,
        _n_microbatches=micro_batches,
        microbatches_per_round=micro_batches // rounds,
    )
    for rank in range(ranks):
        steps = ScheduleInterleaved1F1B._calculate_single_rank_operations(schedule, rank)
        live, most = 0, 0
        for step in filter(None, steps):
            live += 1 if step.computation_type.name == "FORWARD" else -1
            most = max(most, live)
        # Counted by stages: a micro-batch that is in n stages of the rank counts n times.
        planned = in_flight(rank, ranks, virtual_stages, micro_batches)
        assert most == max(sum((n + 1) * times for n, times in enumerate(counts)) for counts in planned)
    assert in_flight(1, 4, 1, 8)[-1] == [3] and in_flight(0, 1, 1, 7) == [[1]]


def test_what_crosses_stages_is_told_beside_the_formulas():
    config = config_of("llama", layers_per_block=3, layers=24)
    plan = Plan(planned_model(config), Layout(4, pipeline=4, virtual_stages=2), Work(8, micro_batches=4))
    summary = pipeline_summary(plan)
    assert summary["decoder_layers_per_stage"] == [3] * 8 and summary["blocks_per_stage"] == 1
    # One block per stage. Not cached: the formula and, at each of 7 crossings, the embedding, which it leaves out.
    # Cached: the embedding and all blocks to three ranks, and then the three that the receiving rank has not.
    naive = summary["naive"]
    assert (naive["sources"], naive["partial_sums"], naive["paper"]) == (28 + 7, 0, 28)
    assert summary["cached"]["paper"] == 6 + 16 and summary["cached"]["partial_sums"] == 0
    assert summary["cached"]["sources"] == (2 + 3 + 4) + 4 * 3
    stream = 8 * config.hidden_size * 4 * plan.work.micro_batches
    assert naive["bytes_per_step"] == 35 * stream and naive["paper_bytes_per_step"] == 28 * stream
    rows = [row for rank in range(4) for row in training_traffic(plan, rank) if row["operation"] == "send"]
    assert sum(row["sent_bytes"] for row in rows) == 2 * summary["cached"]["sources"] * stream


# Memory


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "kimi_linear"])
def test_muon_keeps_one_moment_of_matrices(family, tmp_path):
    config = config_of(family)
    model = AttnResForCausalLM(config)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    decayed = {name for name, each in model.named_parameters() if each.ndim > 1 and "norm" not in name}
    optimizer = muon_with_adamw(model, decayed, arguments)
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    kept = sum(
        each.numel() * 4
        for state in optimizer.state.values()
        for each in state.values()
        if torch.is_tensor(each) and each.ndim
    )
    plan = Plan(planned_model(config), Layout(1), Work(8, dtype="float32", optimizer="muon"))
    assert plan.training(0)["optimizer state"] == kept


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_the_suggested_change_makes_a_plan_fit(share, stored, capsys):
    path, _ = stored
    asked = {"--world": 2, "--data": 2, "--tensor": 1, "--pipeline": 1, "--shard": "none", "--tokens": 64}
    flat = [path, *(part for pair in asked.items() for part in pair)]
    whole = plan_command(capsys, *flat)["memory"]["most"]
    small = ["--device-memory", f"{whole * share / 10**6:.6f}MB"]
    result = plan_command(capsys, *flat, *small)["memory"]
    change, _, size = result["would_fit"].rpartition(" (")
    assert not result["fits"] and float(size.split()[0]) * 1e9 <= result["usable"]
    assert plan_command(capsys, *flat, *change.split(), *small)["memory"]["fits"]


def test_what_no_change_makes_fit_is_said(stored, capsys):
    assert main(["plan", stored[0], "--world", "2", "--data", "2", "--device-memory", "1MB"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_a_world_alone_gets_the_simplest_layout_that_fits(stored, capsys):
    path, _ = stored
    plenty = plan_command(capsys, path, "--world", 4)
    assert (plenty["layout"]["data"], plenty["layout"]["shard"]) == (4, "none")
    replicated, tokens = plenty["memory"]["most"], ["--tokens", 16]
    replicated = plan_command(capsys, path, "--world", 4, *tokens)["memory"]["most"]
    sharded = plan_command(capsys, path, "--world", 4, *tokens, "--device-memory", f"{replicated * 0.9 / 1e6:.6f}MB")
    assert (sharded["layout"]["data"], sharded["layout"]["shard"]) == (4, "zero3") and sharded["memory"]["fits"]
    assert "would need" in sharded["layout"]["why"]


def test_layouts_are_all_divisions_of_the_world():
    found = list(layouts(16, None, None, None))
    assert {(each.data, each.tensor, each.pipeline) for each in found} == {
        (data, tensor, 16 // data // tensor)
        for data in (1, 2, 4, 8, 16)
        for tensor in (1, 2, 4, 8)
        if data * tensor <= 16
    }
    assert all(each.shard == "none" for each in found if each.pipeline > 1 or each.data == 1)
    assert [each.data for each in layouts(None, 2, 4, 3)] == [2] and next(layouts(None, 2, 4, 3)).world == 24


# Prefill


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_of_a_prefill_is_that_of_transformers(family, any_size_of_experts):
    config = config_of(family)
    model = AttnResForCausalLM(config).eval()
    cache = DynamicCache(config=config.backbone_config)
    with torch.no_grad():
        model(input_ids=random_tokens(BATCH, TOKENS), past_key_values=cache, use_cache=True)
    kept = [value for layer in cache.layers for value in vars(layer).values()]
    tensors = [
        each
        for value in kept
        for each in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value])
        if isinstance(each, torch.Tensor)
    ]
    size, _ = trace_cache(planned_model(config).module, BATCH, TOKENS, 1, 1, torch.float32)
    assert size == sum({each.data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values()) > 0


def test_the_papers_block_representations_of_a_long_prefill(tmp_path, capsys):
    """Section 4.2: a context of 128k, 8 blocks: 15 GB; over 8 ranks 1.9 GB; in chunks of 16k below 0.3 GB. That is D =
    7168 in bfloat16, without the embedding, which is a source too."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    config = config_of("llama", hidden_size=7168, intermediate_size=64, layers=16, **heads)
    config.save_pretrained(tmp_path)
    asked = [tmp_path, "--inference", "--tokens", 131072, "--world", 8]
    result = plan_command(capsys, *asked, "--sequence-shards", "--chunk", 16384)
    blocks = result["blocks"]
    assert result["layout"]["tensor"] == blocks["shards"] == 8 and blocks["paper"]["sources"] == 8
    assert round(blocks["paper"]["whole"] / 1e9) == 15
    assert round(blocks["paper"]["sequence_sharded"] / 1e9, 1) == 1.9
    assert blocks["paper"]["sequence_sharded_in_chunks"] < 0.3e9
    assert blocks["here"]["sequence_sharded_in_chunks"] == blocks["paper"]["sequence_sharded_in_chunks"] * 9 / 8
    kept = result["memory"]["devices"][0]["items"]["block representations"]
    assert kept == blocks["here"]["sequence_sharded_in_chunks"]
    whole = plan_command(capsys, *asked)["memory"]["devices"][0]["items"]["block representations"]
    assert whole == blocks["here"]["whole"]


@divides_as_planned
@pytest.mark.parametrize("family", ["qwen3", "mixtral", "kimi_linear"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_what_a_prefill_sends_is_what_ranks_issue(family, sharded, two_ranks, any_size_of_experts):
    config = config_of(family, vocab_size=96)
    model = as_transformers_divides(config, 2).eval()
    if sharded:
        shard_sequence(model, dist.group.WORLD)
    with torch.no_grad(), Collectives() as issued:
        model(input_ids=random_tokens(BATCH, 8, vocab_size=96), use_cache=True, logits_to_keep=1)
    plan = Plan(planned_model(config), Layout(2, tensor=2), Work(8, BATCH, dtype="float32"))
    prefill = Prefill(sequence_shards=sharded)
    rows = prefill_traffic(plan, prefill, prefill_memory(plan, prefill)[1])
    counted = {}
    for row in rows:
        calls, payload = counted.get(row["operation"], (0, 0))
        counted[row["operation"]] = [calls + row["calls"], payload + row["payload_bytes"]]
    assert counted == issued.counted()


# The command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--world", 12, "--data", 2, "--tensor", 4, "--pipeline", 2], ["world=12", "= 16"]),
        (["--world", 9, "--tensor", 4], ["world=9", "= 4"]),
        (["--pipeline", 13], ["num_hidden_layers=12", "13 stages"]),
        (["--pipeline", 4, "--virtual-stages", 4], ["num_hidden_layers=12", "16 stages"]),
        (["--tensor", 4], ["tensor=4", "num_key_value_heads=2"]),
        (["--tensor", 3], ["tensor=3", "num_attention_heads=4"]),
        (["--expert", 2, "--data", 2], ["expert=2", "no routed experts"]),
        (["--virtual-stages", 2, "--pipeline", 1], ["virtual_stages=2", "--pipeline"]),
        (["--pipeline", 2, "--virtual-stages", 2, "--micro-batches", 5], ["micro_batches=5", "multiple of 2"]),
        (["--chunk", 16], ["--inference"]),
        (["--inference", "--chunk", 16, "--tokens", 8], ["chunk=16", "tokens=8"]),
        (["--inference", "--sequence-shards"], ["sequence_shards", "--tensor"]),
        (["--inference", "--pipeline", 2], ["--pipeline"]),
        (["--tokens", 0], ["--tokens", "at least 1"]),
        (["--device-memory", "80"], ["--device-memory", "80GB"]),
        (["--residual-mode", "full", "--num-blocks", 99], ["num_blocks", "12"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_in_one_line(arguments, words, stored, capsys):
    try:
        status = main(["plan", stored[0], *map(str, arguments)])
    except SystemExit as stop:
        status = stop.code
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if "error" in line]
    assert status == 2 and not output.out and len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {"data": 2, "expert": 2}, "no routed experts"),
        ("mixtral", {"tensor": 2, "expert": 3}, "expert=3"),
        ("mixtral", {"data": 2, "expert": 2}, "5 routed experts"),
        ("mixtral", {"data": 5, "expert": 5, "shard": "none"}, "--shard zero3"),
        ("qwen3_moe", {"tensor": 5}, "tensor=5"),
        ("mixtral", {"tensor": 8}, "num_attention_heads=4"),
        ("kimi_linear", {"tensor": 3, "data": 1}, "tensor=3 does not divide"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_divisions_that_a_family_does_not_have_are_refused(family, options, words, tmp_path):
    config_of(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        run(Options(config=str(tmp_path), tokens=8, **options))


def test_both_halves_of_a_packed_projection_have_to_divide():
    with pytest.raises(ValueError, match="tensor=8 does not divide 52"):
        local_shape("gate_up_proj", (5, 104, 40), "packed_colwise", 8, 1)
    assert local_shape("gate_up_proj", (5, 104, 40), "packed_colwise", 4, 1) == (5, 26, 40)


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder"])
def test_a_configuration_that_is_not_there_is_named(name, capsys):
    assert main(["plan", name, "--world", "2"]) == 2
    assert f"CONFIG {name}" in capsys.readouterr().err


def test_the_table_says_what_the_json_says(stored, capsys):
    path, _ = stored
    asked = [path, "--data", 2, "--pipeline", 2, "--tokens", 16]
    result = plan_command(capsys, *asked)
    assert main(["plan", *map(str, asked)]) == 0
    output = capsys.readouterr()
    assert f"{result['model']['parameters']['total']:,}" in output.out and "stage rank 1" in output.out
    assert result["layout"]["shown"] in output.out and "paper's formula" in output.out
    assert "fits: " in output.out and "attnres: working out" in output.err
    assert all(name in output.out for device in result["memory"]["devices"] for name in device["items"])
    assert all(device["total"] == sum(device["items"].values()) for device in result["memory"]["devices"])


@pytest.mark.slow
def test_the_documented_plans_are_what_the_command_prints(capsys):
    lines = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    shown, command = {}, None
    for line in lines:
        if line.startswith("    attnres plan ") and "CONFIG" not in line:
            command = line.split()[1:]
            shown[tuple(command)] = []
        elif line.startswith("    ") and command is not None:
            shown[tuple(command)].append(line.strip())
        elif line.strip():
            command = None
    assert len(shown) == 5
    for command, expected in shown.items():
        assert main(list(command)) == 0
        output = capsys.readouterr().out
        assert expected and not [line for line in expected if line not in output], command


def test_kimi_k3_has_the_sizes_of_its_release():
    model = planned_model(AttnResConfig.kimi_k3())
    counts = model.counts()
    assert counts["total"] == 2_779_484_393_568 and (model.experts, model.top_k) == (896, 16)
    kinds = {each["kind"]: each["layers"] for each in counts["layer_kinds"]}
    assert kinds == {"linear_attention, dense": 1, "linear_attention, moe": 68, "full_attention, moe": 24}
    # 92 layers of 896 experts, three matrices of 3072 x 3584 each.
    assert counts["routed_experts"] == 92 * 896 * 3 * 3072 * 3584
    assert read_config("kimi-k3", num_blocks=4).num_blocks == 4
