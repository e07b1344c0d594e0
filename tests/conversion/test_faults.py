"""Broken, hostile and interrupted conversions: one clear line, the result absent or complete, the source untouched."""

import contextlib
import errno
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conversion.disk import bytes_of
from helpers import random_attnres, short_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from attnres import AttnResForCausalLM, folders
from attnres.conversion import CheckpointError, convert
from attnres.conversion.checkpoint import read_checkpoint
from attnres.conversion.inspection import inspect_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture
def plain(tmp_path):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(short_config("llama"))
    model.save_pretrained(tmp_path / "plain", max_shard_size="60KB")
    return tmp_path / "plain"


def shards_of(folder):
    return sorted(Path(folder).glob("*.safetensors"))


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def edit_header(path, change):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def first_tensor(header):
    return next(value for name, value in header.items() if name != "__metadata__")


def point_to(target):
    def change(folder):
        edit_index(folder, lambda index: index["weight_map"].update({"model.norm.weight": target}))

    return change


def cut_in_half(folder):
    path = shards_of(folder)[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lie_about_size(folder):
    edit_header(shards_of(folder)[0], lambda header: first_tensor(header).update(shape=[10**9, 10**9]))


def lie_about_header_length(folder):
    path = shards_of(folder)[0]
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def make_pickle(folder):
    tensors = {}
    for path in shards_of(folder):
        tensors.update(load_file(path))
        path.unlink()
    (folder / INDEX).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def misshape(folder):
    path = shards_of(folder)[-1]
    tensors = load_file(path)
    tensors[next(iter(tensors))] = torch.ones(3, 7)
    save_file(tensors, path)


def drop_tensor(folder):
    path = shards_of(folder)[0]
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors.pop(name)
    save_file(tensors, path)
    edit_index(folder, lambda index: index["weight_map"].pop(name))


def add_tensor(folder):
    path = shards_of(folder)[0]
    save_file({**load_file(path), "model.surplus": torch.ones(2)}, path)


FAULTS = {
    "missing shard": (lambda folder: shards_of(folder)[1].unlink(), "missing weight file"),
    "truncated shard": (cut_in_half, "not a complete safetensors file"),
    "sizes that lie": (lie_about_size, "not a complete safetensors file"),
    "header length that lies": (lie_about_header_length, "not a complete safetensors file"),
    "index outside": (point_to("../outside.safetensors"), "not a plain file name"),
    "absolute index": (point_to("/etc/passwd"), "not a plain file name"),
    "index of another kind of file": (point_to("config.json"), r"only \.safetensors files"),
    "index with a number": (point_to(3), "weight_map must be"),
    "index without a map": (lambda folder: (folder / INDEX).write_text("{}"), "weight_map must be"),
    "index that is no JSON": (lambda folder: (folder / INDEX).write_text("{"), "not valid JSON"),
    "index that is deep": (lambda folder: (folder / INDEX).write_text("[" * 10**5), "not valid JSON"),
    "pickle": (make_pickle, "pickle checkpoints .* are not opened.*save_pretrained"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
    "config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "must be a JSON object"),
    "no weights": (lambda folder: [path.unlink() for path in [*shards_of(folder), folder / INDEX]], "has neither"),
    "wrong shape": (misshape, "misshapen: .* instead of"),
    "two sets of weights": (
        lambda folder: save_file({"x": torch.ones(1)}, folder / "model.safetensors"),
        "has both model.safetensors, which transformers reads, and",
    ),
    "missing tensor": (drop_tensor, "missing: "),
    "surplus tensor": (add_tensor, r"surplus: model\.surplus"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_source_is_one_clear_line_and_no_result(fault, plain, tmp_path):
    make, message = FAULTS[fault]
    make(plain)
    before = bytes_of(plain)
    with pytest.raises(CheckpointError, match=message) as error:
        convert(plain, tmp_path / "attnres", verify="none")
    assert "\n" not in str(error.value)
    assert bytes_of(plain) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_depth_tensors_with_nan_or_inf_are_refused(value, tmp_path):
    model = random_attnres("llama")
    with torch.no_grad():
        model.depth_mixer.mlp_norm.weight[1, 3] = value
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp_res_norm\.weight has NaN or Inf"):
        convert(tmp_path / "trained", tmp_path / "result", verify="none")


def test_places_that_would_destroy_the_source_are_refused(plain, tmp_path):
    for result in (plain, plain / "inside", tmp_path):
        with pytest.raises(CheckpointError, match="must be a different folder"):
            convert(plain, result, overwrite=True)
    assert len(shards_of(plain)) > 1


def test_a_link_out_of_the_checkpoint_is_not_followed(plain, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (plain / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="link that leads out"):
        convert(plain, tmp_path / "attnres", verify="none")
    assert not (tmp_path / "attnres").exists()


def test_an_existing_result_needs_overwrite_and_survives_a_failure(plain, tmp_path):
    result = tmp_path / "attnres"
    result.mkdir()
    (result / "precious").write_text("work of days")
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(plain, result, verify="none")
    assert (result / "precious").read_text() == "work of days"
    shard = shards_of(plain)[0]
    content = shard.read_bytes()
    cut_in_half(plain)
    with pytest.raises(CheckpointError):
        convert(plain, result, verify="none", overwrite=True)
    assert (result / "precious").exists()
    shard.write_bytes(content)
    convert(plain, result, verify="none", overwrite=True)
    assert not (result / "precious").exists()
    AttnResForCausalLM.from_pretrained(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attnres", "plain"]


def test_an_unknown_layout_is_refused_and_none_is_the_default(plain, tmp_path):
    with pytest.raises(CheckpointError, match="--to must be attnres, prenorm or kimi-k3, got 'plain'"):
        convert(plain, tmp_path / "other", to="plain", verify="none")
    assert not (tmp_path / "other").exists()
    assert convert(plain, tmp_path / "default", to=None, verify="none").to_layout == "attnres"
    AttnResForCausalLM.from_pretrained(tmp_path / "default")


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
def test_a_folder_is_replaced_as_a_whole(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with folders.replaced_folder(tmp_path / "folder", overwrite=True) as new:
        (new / "new").write_text("new")
        assert (tmp_path / "folder" / "old").exists()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_space_that_runs_out_half_way_leaves_nothing_behind(plain, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("attnres.conversion.converter.copy_file", full)
    with pytest.raises(OSError, match="No space left"):
        convert(plain, tmp_path / "attnres", verify="none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


# Converts in a forked child per line of standard input, so that all of them cost one start of the interpreter.
KILLED = """
import os, sys, time
import attnres.conversion.converter as module
copy = module.copy_file
def slow(*args):
    copy(*args)
    time.sleep(0.01)
module.copy_file = slow
for line in sys.stdin:
    source, result = line.rstrip().split(chr(9))
    child = os.fork()
    if child == 0:
        module.convert(source, result, verify="none", overwrite=True)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def test_a_killed_conversion_leaves_the_result_absent_or_complete(plain, tmp_path):
    """Sends SIGKILL at twelve random points; half of the conversions replace an old result."""
    attempts = 12
    before = bytes_of(plain)
    started = time.monotonic()
    convert(plain, tmp_path / "reference", verify="none")
    duration = time.monotonic() - started
    complete = bytes_of(tmp_path / "reference")
    old = {"old": b"old"}
    generator = random.Random(0)
    places = tmp_path / "places"
    places.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    states = []
    with server:
        for attempt in range(attempts):
            place = places / f"attnres{attempt}"
            if attempt % 2:
                place.mkdir()
                (place / "old").write_bytes(b"old")
            server.stdin.write(f"{plain}\t{place}\n")
            server.stdin.flush()
            child = int(server.stdout.readline())
            time.sleep(generator.uniform(0, 1.5 * duration))
            with contextlib.suppress(ProcessLookupError):  # it may be done
                os.kill(child, signal.SIGKILL)
            assert server.stdout.readline() == "ended\n"
            state = bytes_of(place) if place.exists() else None
            assert state in (old if attempt % 2 else None, complete), f"attempt {attempt}: half a result"
            states.append(state == complete)
            assert bytes_of(plain) == before
        server.stdin.close()
    assert not all(states)
    for attempt in range(attempts):
        convert(plain, places / f"attnres{attempt}", verify="none", overwrite=True)
        assert bytes_of(places / f"attnres{attempt}") == complete
    assert len(list(places.iterdir())) == attempts, (
        "what a killed conversion leaves is cleared by the next to that place"
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
HEADER = st.dictionaries(
    st.sampled_from(["model.norm.weight", "../x", "model.layers.0.self_attn.q_proj.weight", "__metadata__", ""]),
    JSON
    | st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "F4", "X", 3]),
            "shape": st.lists(st.integers(-2, 2**64), max_size=3),
            "data_offsets": st.lists(st.integers(-2, 2**64), min_size=0, max_size=3),
        }
    ),
    max_size=4,
)
FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def only_clear_errors(folder, tmp_path):
    before = bytes_of(folder)
    for action in (
        lambda: convert(folder, tmp_path / "result", verify="none"),
        lambda: inspect_checkpoint(folder),
    ):
        try:
            action()
        except (CheckpointError, FileExistsError) as error:
            assert "\n" not in str(error)
    assert bytes_of(folder) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"fuzz", "result"}


@FUZZ
@given(header=HEADER, body=st.binary(max_size=64), length=st.none() | st.integers(0, 2**64 - 1))
def test_no_header_leads_to_anything_but_a_clear_error(header, body, length, tmp_path):
    folder = tmp_path / "fuzz"
    folder.mkdir(exist_ok=True)
    short_config("llama").save_pretrained(folder)
    encoded = json.dumps(header).encode()
    prefix = struct.pack("<Q", len(encoded) if length is None else length)
    (folder / "model.safetensors").write_bytes(prefix + encoded + body)
    only_clear_errors(folder, tmp_path)


@FUZZ
@given(
    index=JSON
    | st.fixed_dictionaries(
        {
            "weight_map": st.dictionaries(
                st.text(max_size=10),
                st.sampled_from(["a.safetensors", "../a.safetensors", "/a", "", ".", "\x00"]) | JSON,
            )
        }
    )
)
def test_no_index_leads_to_anything_but_a_clear_error(index, tmp_path):
    folder = tmp_path / "fuzz"
    folder.mkdir(exist_ok=True)
    short_config("llama").save_pretrained(folder)
    save_file({"model.norm.weight": torch.ones(40)}, folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    only_clear_errors(folder, tmp_path)


@FUZZ
@given(config=JSON | st.dictionaries(st.sampled_from(list(short_config("llama").to_dict())), JSON, max_size=5))
def test_no_configuration_leads_to_anything_but_a_clear_error(config, tmp_path):
    folder = tmp_path / "fuzz"
    folder.mkdir(exist_ok=True)
    base = short_config("llama").to_dict()
    (folder / "config.json").write_text(json.dumps({**base, **config} if isinstance(config, dict) else config))
    save_file({"model.norm.weight": torch.ones(40)}, folder / "model.safetensors")
    only_clear_errors(folder, tmp_path)


def test_a_header_that_promises_a_lot_allocates_little(plain):
    lie_about_size(plain)
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        read_checkpoint(plain)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    assert os.path.exists(plain)


@pytest.mark.parametrize("place", ["current", "home"])
def test_the_current_and_the_home_folder_are_never_replaced(place, plain, tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    (precious / "inside").mkdir(parents=True)
    (precious / "thesis.tex").write_text("mine")
    if place == "current":
        monkeypatch.chdir(precious / "inside")
    else:
        monkeypatch.setenv("HOME", str(precious))
    with pytest.raises(FileExistsError, match=f"holds the {place} folder"):
        convert(plain, precious, overwrite=True, verify="none")
    assert (precious / "thesis.tex").read_text() == "mine"
