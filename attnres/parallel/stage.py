"""One stage of a pipelined model: its part of the modules, and what it computes from the sources that reach it.

Shapes: B rows of a micro-batch, T tokens, D hidden size, V vocabulary, Q pseudo-queries, n decoder layers of the stage.
"""

import torch
from torch import nn

from ..backbones import create_masks, get_family, rotary_inputs, scale_logits
from ..decoder_layer import LayerQueries
from ..depth_mixer import DepthMixer, DepthState, Mixing
from ..modeling_attnres import AttnResForCausalLM, AttnResPreTrainedModel
from .store import BlockStore
from .traffic import Route


class StageDepthMixer(DepthMixer):
    """The depth mixer of a stage's decoder layers; the output's pseudo-query is there on the last stage only."""

    def __init__(self, layers: range, hidden_size: int, is_last: bool):
        super().__init__(len(layers), hidden_size)
        if not is_last:
            del self.output_norm


class StageState(DepthState):
    """The depth state of a stage: the sources it fetches, receives and completes. Those that are new to its rank go to
    the store.

    Args:
        mixing: how the model mixes.
        publish: is called with the index and the value of each source that is new to the rank.
    """

    def __init__(self, mixing: Mixing, publish):
        super().__init__(mixing)
        self._publish = publish

    def adopt(self, source: torch.Tensor):
        """Adds a source `[B, T, D]` that the rank has already."""
        self.sources = (*self.sources, source)

    def receive(self, source: torch.Tensor):
        """Adds a source `[B, T, D]` that is new to the rank."""
        self._publish(len(self.sources), source)
        self.adopt(source)

    def complete(self):
        super().complete()
        self._publish(len(self.sources) - 1, self.sources[-1])

    def _take(self, new, layer):
        count = len(self.sources)
        super()._take(new, layer)
        for index in range(count, len(self.sources)):
            self._publish(index, self.sources[index])


class AttnResStage(AttnResPreTrainedModel):
    """The modules of one stage under the names that they have in `AttnResForCausalLM`, and their forward pass.

    Only the parameters of the depth mixer differ: they are stacked over the decoder layers of this stage.

    Args:
        model: the whole model, in memory or on the meta device; this stage's modules are taken from it, not copied.
        route: which sources come and go.
        is_first, is_last: whether this stage has the embedding; the norm, the head and the output's pseudo-query.
    """

    _tied_weights_keys = None  # the two copies may be on different ranks: see Pipeline

    def __init__(self, model: AttnResForCausalLM, route: Route, is_first: bool, is_last: bool):
        super().__init__(model.config)
        self.route = route
        self.is_first, self.is_last = is_first, is_last
        whole = model.model
        parts = {"layers": nn.ModuleDict({str(layer): whole.layers[layer] for layer in route.layers})}
        if is_first:
            parts["embed_tokens"] = whole.embed_tokens
        if whole.rotary_emb is not None:
            parts["rotary_emb"] = whole.rotary_emb
        if whole.depth_mixer is not None:
            parts["depth_mixer"] = _depth_mixer_of(whole.depth_mixer, route.layers, is_last)
        if is_last:
            parts["norm"] = whole.norm
            self.lm_head = model.lm_head
        self.model = nn.ModuleDict(parts)
        self.store: BlockStore | None = None
        self.micro_batch = 0

    def forward(
        self,
        *received: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> tuple[torch.Tensor, ...] | torch.Tensor:
        """One micro-batch.

        Args:
            received: first stage: token ids `[B, T]`. Others: sources, then a partial sum if one crosses, each
                `[B, T, D]`; in `"standard"` mode the hidden states.
            attention_mask, position_ids: as in `AttnResModel.forward`, `[B, T]`.

        Returns:
            What the next stage receives; last stage: logits `[B, T, V]`.
        """
        route, backbone = self.route, self.config.backbone_config
        if self.is_first:
            embedding = self.model["embed_tokens"](received[0])
            received = ()
        else:
            embedding = received[-1]  # as good as the embedding where shape, dtype and device matter
        if position_ids is None:
            position_ids = torch.arange(embedding.shape[1], device=embedding.device).unsqueeze(0)
        call_layer = self._layer_caller(embedding, attention_mask, position_ids)
        if self.is_first:
            multiplier = get_family(backbone).embedding_multiplier
            if multiplier is not None:
                embedding = embedding * getattr(backbone, multiplier)
            if torch.is_grad_enabled() and not embedding.requires_grad:
                embedding.requires_grad_()  # frozen: gradients cross all the same, as every stage expects them

        mixing = Mixing.of(self.config)
        depth = StageState(mixing, self._publish)
        queries = None
        if mixing.layers_per_block is None:
            depth.partial = embedding if self.is_first else received[0]
        else:
            queries = self.model["depth_mixer"]()
            for index in route.fetched:
                depth.adopt(self.store.fetch(self.micro_batch, index))
            for source in received[: len(route.received)]:
                depth.receive(source)
            if self.is_first:
                depth.receive(embedding)
            depth.partial = next(iter(received[len(route.received) :]), None)

        def call(layer_idx: int, layer: nn.Module, *state):
            row = 2 * (layer_idx - route.layers.start)
            own = None if queries is None else LayerQueries(*queries[row : row + 2])
            return call_layer(layer, own, *state, mixing=mixing)

        depth.walk(((index, self.model["layers"][str(index)]) for index in route.layers), call)
        if self.is_last:
            return self._logits(depth.read(queries and queries[-1])[0])
        crossing = () if depth.partial is None else (depth.partial,)
        return crossing if queries is None else (*depth.sources[route.sent.start :], *crossing)

    def enable_input_require_grads(self):
        """Nothing to do for checkpointing: all that a stage mixes requires gradients already."""

    def _layer_caller(self, embedding: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor):
        backbone, layers = self.config.backbone_config, self.model["layers"]
        kinds = sorted({layer.layer_type for layer in layers.values()})
        inputs = {"inputs_embeds": embedding, "past_key_values": None, "position_ids": position_ids}
        masks = create_masks(backbone, kinds, attention_mask, **inputs)
        rotary_emb = getattr(self.model, "rotary_emb", None)
        rotary = rotary_inputs(backbone, kinds, rotary_emb, embedding, position_ids)

        def call_layer(layer: nn.Module, *state, **options):
            return layer(
                *state,
                attention_mask=masks[layer.layer_type],
                position_ids=position_ids,
                past_key_values=None,
                use_cache=False,
                **rotary[layer.layer_type],
                **options,
            )

        return call_layer

    def _publish(self, index: int, source: torch.Tensor):
        if index in self.route.completed:
            self.store.watch(source)  # received ones have been since they were received
        if self.route.later_readers:
            self.store.publish(self.micro_batch, index, source, self.route.later_readers)

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return scale_logits(self.config.backbone_config, self.lm_head(self.model["norm"](hidden_states)))


def _depth_mixer_of(whole: DepthMixer, layers: range, is_last: bool) -> StageDepthMixer:
    """A copy of the parameters of some decoder layers, on the device and in the dtype that they have."""
    part = StageDepthMixer(layers, whole.output_norm.weight.shape[-1], is_last)
    for name, parameter in whole.named_parameters():
        rows = parameter.detach()
        if name.startswith("output_norm."):
            if not is_last:
                continue
        else:
            rows = rows[layers.start : layers.stop]
        module, _, own_name = name.rpartition(".")
        copy = nn.Parameter(rows.clone(), requires_grad=parameter.requires_grad)
        setattr(part.get_submodule(module), own_name, copy)
    return part
