"""How users call the public names, for the type checker (`make check`): never run."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from typing_extensions import assert_type

import attnres
from attnres import AttnResConfig, AttnResForCausalLM, AttnResModel, DepthDynamicsCallback
from attnres.analysis.depth_weights import DepthWeights
from attnres.conversion import Conversion, convert
from attnres.depth_mixer import DepthMixer, DepthState, Mixing, PseudoQuery, attention_residual
from attnres.hub_card import build


def use(model: AttnResForCausalLM, base: AttnResModel, config: AttnResConfig, sources: list[torch.Tensor]) -> None:
    assert_type(attnres.__version__, str)
    assert_type(AttnResConfig.from_backbone(config, num_blocks=8), AttnResConfig)
    assert_type(model.depth_mixer, DepthMixer | None)
    depth: Iterable[nn.Parameter] = model.depth_parameters()
    rest: Iterable[nn.Parameter] = model.backbone_parameters()
    print(len([*depth, *rest]))
    assert_type(AttnResForCausalLM.from_backbone("plain", residual_mode="full"), AttnResForCausalLM)
    assert_type(model.freeze_backbone(), AttnResForCausalLM)
    model.set_depth_implementation("eager")
    mixture, weights = attention_residual(sources, torch.zeros(8), 1e-6)
    assert_type(mixture, torch.Tensor)
    assert_type(weights, torch.Tensor)
    state = Mixing.of(config).start(sources[0])
    assert_type(state, DepthState)
    assert_type(state.read(PseudoQuery(torch.zeros(8))), tuple[torch.Tensor, torch.Tensor | None])
    assert_type(convert("plain", Path("converted"), num_blocks=8), Conversion)
    assert_type(build("converted", "card"), Path)
    print(DepthDynamicsCallback(100), iter([base]))


def read(folder: Path) -> Iterator[DepthWeights]:
    yield DepthWeights.load(folder)
