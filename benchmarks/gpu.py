"""What docs/performance.md lists as open for GPUs, measured in one bounded run on one GPU, without a network.

    python benchmarks/gpu.py --minutes 9 --out results        (--tiny: a trial on a CPU, by Triton's interpreter)

Stages run in order of value, each with a share of the time left; one that fails or runs out of time is written down and
the next goes on. OUT/results.jsonl gets every result at once, OUT/table.md all of them, also when the run is stopped.
Needs torch, transformers, Triton and pytest; the package need not be installed. T tokens, D hidden size, n sources.
"""
# ruff: noqa: E402  what is read while modules are imported comes first

import time

STARTED = time.monotonic()  # importing counts
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # fragments left by one must not stop the next

import argparse
import gc
import json
import signal
import subprocess
import threading
import traceback
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from attnres import AttnResForCausalLM
from attnres.bench import arms, workloads
from attnres.bench.arms import ARMS, PLAIN
from attnres.bench.machine import describe
from attnres.bench.memory import peak_bytes
from attnres.bench.runner import with_depth
from attnres.bench.settings import DTYPES, DepthShape, Settings
from attnres.bench.timing import Sample, compare, interleave
from attnres.demo.corpus import read_corpus, standard_library
from attnres.depth_kernels import Norm, fused_backend, fused_mixture
from attnres.kernels import operator

EPS = 1e-6
RESERVE = 5  # seconds for the tables, and for what an alarm has to wait for
PUBLISHED = {  # by others: ms, GiB
    "fused, 32 sublayers, T=16384, D=2048, A100": (184.0, 27.5),
    "stacked, 32 sublayers, T=16384, D=2048, A100": (4061.0, 60.9),
}


class Sizes(NamedTuple):
    hidden_sizes: tuple = (2048, 4096)
    layers: int = 32
    vocab_size: int = 32000
    tokens: tuple = (4096, 16384)
    new_tokens: int = 16
    depth: DepthShape = DepthShape(32, 8, 16384, 2048)
    bandwidth: tuple = (65536, 2048, (2, 5, 9, 16, 33))  # T, D, n
    training: tuple = (768, 24)  # D, decoder layers
    batch: tuple = (16, 1024)
    evaluate_every: int = 25
    steps: int = 10**6  # at most
    rounds: int = 5


TINY = Sizes((64,), 2, 97, (3,), 1, DepthShape(4, 2, 3, 32), (3, 32, (2, 17)), (32, 2), (1, 3), 2, 2, 1)


class OutOfTime(BaseException):
    """A stage's share is used up. No Exception: what catches all of those, such as the self-check, must not take it."""


class Stopped(BaseException):
    """The run is told to end."""


class Run:
    """What the stages share: sizes, device, time and results."""

    def __init__(self, out: Path, ends: float, sizes: Sizes, device: torch.device):
        self.out, self.ends, self.sizes, self.device, self.cuda = out, ends, sizes, device, device.type == "cuda"
        self.stage, self.stage_ends, self.rows, self.children = "", ends, [], []
        self.lines = (out / "results.jsonl").open("x", encoding="utf-8")

    def emit(self, **row):
        row = {"stage": self.stage, **row}
        self.rows.append(row)
        self.lines.write(json.dumps(row) + "\n")
        self.lines.flush()
        print(f"[{time.monotonic() - STARTED:.0f} s] {_shown(row)}", file=sys.stderr, flush=True)

    def left(self) -> float:
        return self.stage_ends - time.monotonic()

    def start(self, *command: str, **options) -> subprocess.Popen:
        """A process in the checkout that ends with its stage."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.children.append(subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **options))
        return self.children[-1]

    def kill_children(self):
        for process in self.children:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def free_memory(self):
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize()

    def finish(self):
        (self.out / "table.part").write_text(tables(self.rows), encoding="utf-8")
        (self.out / "table.part").replace(self.out / "table.md")
        print(tables(self.rows), flush=True)


def tables(rows: list[dict]) -> str:
    """Markdown: per stage a table for each kind of row, then what was left out and why."""
    text, kinds = ["# GPU measurements"], {}
    for row in rows:
        columns = ("left_out",) if "left_out" in row else tuple(row)
        kinds.setdefault(row["stage"], {}).setdefault(columns, []).append(row)
    for stage, of_stage in kinds.items():
        text += ["", f"## {stage}"]
        for row in of_stage.pop(("left_out",), []):
            place = _shown({name: value for name, value in row.items() if name not in ("stage", "left_out")})
            text += ["", f"Left out: {place}{place and ': '}{row['left_out']}"]
        for (_, *columns), entries in of_stage.items():
            lines = [[name.replace("_", " ") for name in columns], ["---"] * len(columns)]
            lines += [[_shown(row[name]).replace("|", "/") for name in columns] for row in entries]
            text += ["", *(f"| {' | '.join(line)} |" for line in lines)]
    return "\n".join(text) + "\n"


def _shown(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {_shown(error)[:300]}"


def timed(run: Run, samples: dict[str, Sample], steps: int = 1, **facts) -> bool:
    """Emits a row per variant that fits into memory: medians over the completed rounds, peak memory above that before.

    Returns whether all variants fit.
    """
    peaks, seconds = {}, {}
    for name, sample in samples.items():

        def once(sample=sample):
            try:
                sample.run(sample.prepare())
            finally:
                sample.finish()

        try:
            once()  # compiles
            peaks[name] = peak_bytes(once, run.device) / 2**30
        except torch.OutOfMemoryError as error:
            run.emit(**facts, arm=name, left_out=_reason(error))
        run.free_memory()
    names = list(peaks)
    try:
        for number in range(run.sizes.rounds if PLAIN in peaks else 0):
            first = number % len(names)
            turn = {name: samples[name] for name in names[first:] + names[:first]}
            for name, values in interleave(turn, 1, warmup=0, synchronize=run.synchronize).items():
                seconds.setdefault(name, []).extend(values)
    finally:  # also where time runs out
        rounds = min(len(seconds.get(name, ())) for name in names) if names else 0
        complete = {name: seconds[name][:rounds] for name in names} if rounds else {}
        for name, result in compare(complete, PLAIN, steps).items():
            ms, over_plain = 1e3 * result["seconds"]["median"], result["ratio"]["median"]
            run.emit(**facts, arm=name, ms=ms, over_plain=over_plain, peak_gib=peaks[name], rounds=rounds)
    return len(names) == len(samples)


def kernels(run: Run):
    """The self-check, the tests that need a GPU, and meanwhile the compilation of what later stages launch."""
    run.emit(**describe(run.device))
    # Triton compiles every number of sources on its own: here some 200 pairs of kernels. All cores fill its cache.
    count, started = max(1, os.cpu_count() - 2) if run.cuda else 0, time.monotonic()
    workers = [run.start(sys.executable, __file__, "--compile", f"{index}/{count}") for index in range(count)]
    for name in DTYPES:
        run.emit(self_check=name, result=operator.problem("triton", run.device, getattr(torch, name)) or "passed")
    log = run.out / "tests.log"
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels"]
        command += [] if run.cuda else ["--collect-only"]
        tests = run.start(*command, stdout=file, stderr=subprocess.STDOUT)
        while (tests.poll() is None or any(worker.poll() is None for worker in workers)) and run.left() > 1:
            time.sleep(0.1)
    lines, status = log.read_text(encoding="utf-8").split("\n"), tests.poll()
    last = next((line for line in reversed(lines) if line.strip()), "")
    run.emit(tests="-m gpu tests/kernels", exit_status="out of time" if status is None else status, last_line=last)
    done = sum(worker.poll() == 0 for worker in workers)
    run.emit(compiling_processes=count, of_them_done=done, seconds=time.monotonic() - started)


def compile_share(share: str):
    """Compiles one share, INDEX/COUNT, of the kernels that the stages launch, those of block mode first."""
    index, count = map(int, share.split("/"))
    sizes, float32, half = Sizes(), torch.float32, torch.bfloat16
    jobs = [(n, size, half, True) for size in sizes.hidden_sizes for n in range(1, 2 * sizes.layers + 2)]
    jobs += [(n, sizes.depth.hidden_size, half, False) for n in range(1, sizes.depth.sublayers + 2)]
    jobs += [(n, sizes.training[0], float32, True) for n in range(1, 2 * sizes.training[1] + 2)]
    for n, size, dtype, norm in sorted(jobs, key=lambda job: job[0] > 9)[index::count]:
        sources = [torch.randn(1, 16, size, device="cuda", dtype=dtype, requires_grad=True) for _ in range(n)]
        gain = torch.ones(size, device="cuda", dtype=dtype, requires_grad=True)
        query = torch.zeros(size, device="cuda", requires_grad=True)
        fused_mixture("triton", sources, query, EPS, Norm(gain, 0.0, EPS) if norm else None, 1.0)[0].sum().backward()


def llama(hidden_size: int, layers: int, vocab_size: int, **options):
    heads, intermediate_size = max(2, hidden_size // 128), -(-8 * hidden_size // 768) * 256
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "vocab_size": vocab_size}
    return AutoConfig.for_model("llama", **sizes | {"max_position_embeddings": 32768} | options)


def build(run: Run, chosen: dict, config, layers_per_block: int) -> dict:
    """bfloat16 models that share their weights, after a check of the variants in float32 on models of two layers."""

    def make(config, layers_per_block):
        models, left_out = arms.build(chosen, config, layers_per_block, run.device, seed=0)
        for name in {"block", "full"} & set(models):
            models[name].set_depth_implementation("triton")
        return models, left_out

    models, left_out = make(with_depth(config, 2), 1)
    errors, failed = arms.check(chosen, models, seed=0)
    run.emit(check="relative error of the logits, float32", hidden_size=config.hidden_size, **errors)
    for name, reason in (left_out | failed).items():
        run.emit(arm=name, left_out=reason)
        chosen = {other: arm for other, arm in chosen.items() if other != name}
    models = None
    run.free_memory()
    models, _ = make(config, layers_per_block)
    models = {name: models[name] for name in chosen}
    arms.convert(models, torch.bfloat16)
    run.free_memory()
    return models


def overhead(run: Run):
    """Prefill, training step (forward and backward) and decoding over the plain transformers model."""
    sizes = run.sizes
    for hidden_size in sizes.hidden_sizes:
        config = llama(hidden_size, sizes.layers, sizes.vocab_size)
        models = build(run, arms.select(("block", "full")), config, -(-sizes.layers // 8))
        backend = fused_backend("triton", models["block"].lm_head.weight) or "eager"
        for tokens in sizes.tokens:
            settings = Settings((), tokens=(tokens,), batches=(1,), context=tokens, new_tokens=sizes.new_tokens)
            fits = True
            for name, make in WORKLOADS.items():
                if make is recomputed_train and fits:
                    continue
                facts = {"mixed_by": backend, "hidden_size": hidden_size, "tokens": tokens, "workload": name}
                try:
                    workload = next(make(models, settings))
                    fits = timed(run, workload.samples, workload.steps, **facts)
                except Exception as error:
                    run.emit(**facts, left_out=_reason(error))
                workload = None
                if make is recomputed_train:
                    for model in models.values():
                        model.gradient_checkpointing_disable()
                run.free_memory()
        models = model = None
        run.free_memory()


def recomputed_train(models, settings: Settings):
    """The training step with activation checkpointing, where that of some variant does not fit otherwise."""
    for model in models.values():
        model.gradient_checkpointing_enable()
    yield from workloads.train(models, settings)


def graphed_decode(models, settings: Settings):
    """Decoding with a static cache, replayed from a CUDA graph (on a CPU: called).

    What the cache holds does not matter to the time: every slot is attended to, and the context is left empty.
    """
    steps, samples = settings.new_tokens, {}
    length = settings.context + steps * 16
    for name, model in models.items():
        inputs = {
            "input_ids": torch.ones(1, 1, dtype=torch.long, device=model.device),
            "position_ids": torch.full((1, 1), settings.context, device=model.device),
            "attention_mask": torch.ones(1, 1, 1, length, dtype=torch.bool, device=model.device),
            "past_key_values": StaticCache(config=model.config, max_cache_len=length),
            "use_cache": True,
        }
        step = torch.no_grad()(partial(model, **inputs))
        if model.device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
        samples[name] = Sample(lambda _, step=step: [step() for _ in range(steps)])
    yield workloads.Workload("graphed decode", {}, samples, steps)


WORKLOADS = {
    "prefill": workloads.prefill,
    "training step": workloads.train,
    "training step, checkpointed": recomputed_train,
    "decode": workloads.decode,
    "decode, CUDA graph": graphed_decode,
}


def depth(run: Run):
    """The depth part alone, forward and backward: models whose sublayers and norms are the identity."""
    shape = run.sizes.depth
    for name, (ms, gib) in PUBLISHED.items():
        run.emit(published=name, ms=ms, peak_gib=gib)
    chosen = arms.select(("full", "block", "fla-fused", "stacked"))
    chosen["fla-fused-full"] = replace(ARMS["fla-fused"], residual_mode="full", reference="stacked-full")
    chosen["stacked-full"] = ARMS["stacked-full"]  # the largest
    small = {"intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    config = llama(shape.hidden_size, shape.sublayers // 2, 8, **small)
    models = build(run, chosen, config, shape.sublayers_per_block // 2)
    for model in models.values():
        workloads.hollow(model)
    _, both = workloads.depth_alone(models, Settings((), depth_shape=shape))
    timed(run, both.samples, sublayers=shape.sublayers, tokens=shape.tokens, hidden_size=shape.hidden_size)


def bandwidth(run: Run):
    """Bytes per second over those of a copy on the device. What must be moved counts, whatever is read twice:
    n + 1 states `[T, D]` forward, 2 n + 1 backward."""
    tokens, hidden_size, counts = run.sizes.bandwidth

    def state(copies: int = 1):
        return torch.randn(copies, tokens, hidden_size, device=run.device).to(torch.bfloat16)

    def gb_per_s(states: int, function, *inputs) -> float:
        if run.cuda:
            from triton.testing import do_bench  # with a cold cache

            seconds = do_bench(partial(function, *inputs), warmup=25, rep=150, return_mode="median") / 1e3
        else:
            seconds = interleave({"": Sample(lambda _: function(*inputs))}, 1)[""][0]
        return states * tokens * hidden_size * 2 / seconds / 1e9

    copied = gb_per_s(8, torch.Tensor.copy_, state(4), state(4))
    run.emit(copy="device to device", gb_per_s=copied)
    query, gain = torch.randn(2, hidden_size, device=run.device) * 2 / hidden_size**0.5
    query, gain = query.requires_grad_(), gain.to(torch.bfloat16).requires_grad_()
    for n in counts:
        sources = [state().requires_grad_() for _ in range(n)]
        inputs = ("triton", sources, query, EPS, Norm(gain, 0.0, EPS), 1.0)
        forward = gb_per_s(n + 1, torch.no_grad()(fused_mixture), *inputs)
        output, _ = fused_mixture(*inputs)
        gradients = partial(torch.autograd.grad, retain_graph=True)
        backward = gb_per_s(2 * n + 1, gradients, output, [*sources, query, gain], state())
        over_copy = {"forward_over_copy": forward / copied, "backward_over_copy": backward / copied}
        run.emit(sources=n, forward_gb_per_s=forward, backward_gb_per_s=backward, **over_copy)


def training(run: Run):
    """plain, block and full from the same weights on the same bytes of the standard library's sources; one seed.

    Variants take turns step by step, so that all have seen the same when the time is up, with which the learning rate
    decays; it is not tuned. Losses are on held-out files, in nats per byte.
    """
    sizes, generator = run.sizes, torch.Generator().manual_seed(0)
    corpus, (batch, length), peak = read_corpus(standard_library()), sizes.batch, 6e-4

    def text_of(documents) -> torch.Tensor:
        return torch.frombuffer(bytearray("\0".join(each.text for each in documents), "utf-8"), dtype=torch.uint8)

    def windows(text: torch.Tensor) -> torch.Tensor:
        starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
        return text[starts + torch.arange(length)].long().to(run.device)

    def loss(model, ids) -> torch.Tensor:
        with torch.autocast(run.device.type, torch.bfloat16):
            return workloads.loss_of(model, ids)

    torch.manual_seed(0)
    models = {PLAIN: AutoModelForCausalLM.from_config(llama(*sizes.training, 256)).float().to(run.device)}
    for mode in ("block", "full"):
        models[mode] = AttnResForCausalLM.from_backbone(models[PLAIN], residual_mode=mode, scale_norm_eps=False)
        models[mode].set_depth_implementation("triton")
    optimizers = {
        name: torch.optim.AdamW(model.train().parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=run.cuda)
        for name, model in models.items()
    }
    text, held_out = text_of(corpus.train), [windows(text_of(corpus.held_out)) for _ in range(4)]
    seconds, budget, reserve = dict.fromkeys(models, 0.0), run.left(), min(5.0, run.left() / 5)
    for step in range(sizes.steps + 1):
        last = step == sizes.steps or run.left() < reserve
        if last or step % sizes.evaluate_every == 0:
            with torch.no_grad():
                losses = {name: sum(loss(model, ids).item() for ids in held_out) / 4 for name, model in models.items()}
            times = {f"{name}_s": value for name, value in seconds.items()}
            run.emit(steps=step, bytes=step * batch * length, **losses, **times)
        if last:
            break
        ids = windows(text)
        learning_rate = peak * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * max(0.0, run.left()) / budget)
        for name, model in models.items():
            started = time.perf_counter()
            loss(model, ids).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].param_groups[0]["lr"] = learning_rate
            optimizers[name].step()
            optimizers[name].zero_grad()
            run.synchronize()
            seconds[name] += time.perf_counter() - started


# In order of value. A stage may use its weight over those of the stages that are left, itself included.
STAGES = {
    "kernels": (20, kernels),
    "overhead": (40, overhead),
    "depth": (12, depth),
    "bandwidth": (6, bandwidth),
    "training": (22, training),
}


def run_stages(run: Run, names: list[str]):
    for index, name in enumerate(names):
        started, weights = time.monotonic(), [STAGES[each][0] for each in names[index:]]
        run.stage, run.stage_ends = name, started + (run.ends - started) * weights[0] / sum(weights)
        try:
            signal.setitimer(signal.ITIMER_REAL, max(0.01, run.left()), 5)  # again, if a finaliser swallows the first
            STAGES[name][1](run)
        except OutOfTime:
            signal.setitimer(signal.ITIMER_REAL, 0)
            run.emit(left_out=f"the rest, as the stage's {time.monotonic() - started:.0f} s were used up")
        except Exception as error:
            traceback.print_exc()
            run.emit(left_out=f"the rest, {_reason(error)}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            run.kill_children()
            run.free_memory()


def _raise(kind: type[BaseException], *_):
    raise kind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together (default: 9)")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for results.jsonl and table.md")
    parser.add_argument("--stages", default=",".join(STAGES), help="which of them, by commas (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU, by Triton's interpreter: a trial")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        return compile_share(options.compile)
    chosen = options.stages.split(",")
    for name in chosen:
        if name not in STAGES:
            parser.error(f"--stages must be some of {','.join(STAGES)}; got {name!r}")
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive; got {options.minutes}")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --tiny tries the script without one")
    if (options.out / "results.jsonl").exists():
        parser.error(f"--out {options.out} has the results.jsonl of another run; choose another folder")
    options.out.mkdir(parents=True, exist_ok=True)
    ends, device = STARTED + 60 * options.minutes - RESERVE, torch.device("cpu" if options.tiny else "cuda")
    run = Run(options.out.resolve(), ends, TINY if options.tiny else Sizes(), device)

    def give_up():  # the main thread is where no signal reaches it
        run.kill_children()
        run.finish()
        os._exit(3)

    watchdog = threading.Timer(ends + RESERVE / 2 - time.monotonic(), give_up)
    watchdog.daemon = True
    watchdog.start()
    for number, kind in ((signal.SIGALRM, OutOfTime), (signal.SIGTERM, Stopped), (signal.SIGINT, Stopped)):
        signal.signal(number, partial(_raise, kind))
    try:
        run_stages(run, [name for name in STAGES if name in chosen])
    except Stopped:
        run.emit(left_out="the rest, as the run was stopped")
        return 128 + signal.SIGTERM
    finally:
        watchdog.cancel()
        run.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
