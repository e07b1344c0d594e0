"""The stages of a pipeline on disk: what is read from a checkpoint folder."""

import json

import pytest
import torch
from helpers import random_attnres

from attnres.parallel.stage import AttnResStage
from attnres.parallel.stage_files import empty_model, load_stage
from attnres.parallel.store import BlockStore
from attnres.parallel.traffic import plan_routes


def test_a_stage_reads_no_file_outside_the_checkpoint(tmp_path):
    model = random_attnres("llama", "block", 2, layers=4)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    names = json.dumps({"weight_map": dict.fromkeys(model.state_dict(), "../model.safetensors")})
    (folder / "model.safetensors.index.json").write_text(names)
    route, _ = plan_routes(model.config, [0, 2, 4], 2, caching=True)
    stage = AttnResStage(empty_model(model.config), route, True, False, BlockStore())
    with pytest.raises(ValueError, match="not a plain file name"):
        load_stage(stage, folder, torch.device("cpu"))
