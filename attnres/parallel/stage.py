"""One stage of a pipelined model: its part of the modules, and its forward pass on the sources that reach it.

Shapes: B rows of a micro-batch, T tokens, D hidden size, V vocabulary.
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
    """A copy of the depth mixer's parameters for some decoder layers and, on the last stage, for the output."""

    def __init__(self, whole: DepthMixer, layers: range, is_last: bool):
        super().__init__(len(layers), whole.output_norm.weight.shape[-1])
        if not is_last:
            del self.output_norm
        for name, module in self.named_children():
            rows = slice(None) if name == "output_norm" else slice(layers.start, layers.stop)
            for own_name, parameter in getattr(whole, name).named_parameters():
                copy = nn.Parameter(parameter.detach()[rows].clone(), requires_grad=parameter.requires_grad)
                setattr(module, own_name, copy)


class AttnResStage(AttnResPreTrainedModel):
    """The modules of one stage, under their names in `AttnResForCausalLM`, and their forward pass.

    Only the parameters of the depth mixer differ: they are stacked over the decoder layers of this stage.

    Args:
        model: whole model, in memory or on the meta device; its modules are used, not copied.
        route: decoder layers of the stage, and the sources that it receives and sends.
        is_first: whether the stage has the embedding.
        is_last: whether the stage has the norm, the head and the output's pseudo-query.
        store: store of the rank.
    """

    _tied_weights_keys = None  # the two copies may be on different ranks: see Pipeline

    def __init__(self, model: AttnResForCausalLM, route: Route, is_first: bool, is_last: bool, store: BlockStore):
        super().__init__(model.config)
        self.route, self.is_first, self.is_last, self.store = route, is_first, is_last, store
        whole = model.model
        parts = {"layers": nn.ModuleDict({str(layer): whole.layers[layer] for layer in route.layers})}
        if is_first:
            parts["embed_tokens"] = whole.embed_tokens
        if whole.rotary_emb is not None:
            parts["rotary_emb"] = whole.rotary_emb
        if whole.depth_mixer is not None:
            parts["depth_mixer"] = StageDepthMixer(whole.depth_mixer, route.layers, is_last)
        if is_last:
            parts["norm"] = whole.norm
            self.lm_head = model.lm_head
        self.model = nn.ModuleDict(parts)
        self.micro_batch = 0

    def forward(
        self,
        *received: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> tuple[torch.Tensor, ...] | torch.Tensor:
        """Runs one micro-batch through the stage.

        Args:
            received: token ids `[B, T]` on the first stage; on others the sources and then the partial sum, if one
                crosses, each `[B, T, D]` (in `"standard"` mode the hidden states).
            attention_mask: `[B, T]`, as in `AttnResModel.forward`.
            position_ids: `[B, T]`, as in `AttnResModel.forward`.

        Returns:
            The tensors for the next stage; on the last stage the logits `[B, T, V]`.
        """
        route, backbone = self.route, self.config.backbone_config
        mixing = Mixing.of(self.config)
        hidden = self.model["embed_tokens"](received[0]) if self.is_first else received[-1]
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        inputs = self._layer_inputs(hidden, attention_mask, position_ids)
        if self.is_first:
            multiplier = get_family(backbone).embedding_multiplier
            if multiplier is not None:
                hidden = hidden * getattr(backbone, multiplier)
            if torch.is_grad_enabled() and not hidden.requires_grad:
                hidden.requires_grad_()  # a frozen embedding: all stages exchange gradients nevertheless
            received = (hidden,)

        queries, count = None, 0
        if mixing.layers_per_block is not None:
            queries, count = self.model["depth_mixer"](), len(route.received) + self.is_first
        fetched = [self.store.fetch(self.micro_batch, index) for index in route.fetched]
        partial = received[count] if len(received) > count else None
        depth = DepthState(mixing, (*fetched, *received[:count]), partial)
        published = len(fetched)

        def call(layer_idx: int, layer: nn.Module, *state):
            nonlocal published
            published = self._publish(depth.sources, published)
            row = 2 * (layer_idx - route.layers.start)
            own = None if queries is None else LayerQueries(*queries[row : row + 2])
            return layer(own, *state, mixing=mixing, **inputs[layer.layer_type])

        depth.walk(((index, self.model["layers"][str(index)]) for index in route.layers), call)
        self._publish(depth.sources, published)
        if self.is_last:
            mixture = depth.read(queries and queries[-1])[0]
            return scale_logits(backbone, self.lm_head(self.model["norm"](mixture)))
        crossing = () if depth.partial is None else (depth.partial,)
        return (*depth.sources[route.sent.start :], *crossing)

    def enable_input_require_grads(self):
        """Does nothing: everything that a stage mixes requires gradients already, as checkpointing needs it."""

    def _layer_inputs(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor):
        """Returns the keyword arguments of decoder layers by their type, for inputs like `hidden`."""
        backbone = self.config.backbone_config
        kinds = sorted({layer.layer_type for layer in self.model["layers"].values()})
        inputs = {"past_key_values": None, "position_ids": position_ids}
        masks = create_masks(backbone, kinds, attention_mask, inputs_embeds=hidden, **inputs)
        rotary = rotary_inputs(backbone, kinds, getattr(self.model, "rotary_emb", None), hidden, position_ids)
        return {kind: {"attention_mask": masks[kind], "use_cache": False, **inputs, **rotary[kind]} for kind in kinds}

    def _publish(self, sources: tuple[torch.Tensor, ...], start: int) -> int:
        """Puts the sources from index `start` on, which are new to the rank, into its store; returns their number."""
        for index, source in enumerate(sources[start:], start):
            if index in self.route.completed:  # received ones are watched since they were received
                self.store.watch(source)
            if self.route.later_readers:
                self.store.publish(self.micro_batch, index, source, self.route.later_readers)
        return len(sources)
