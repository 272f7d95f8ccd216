"""The whole model: figure 2 of the paper, top to bottom."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dimaskdino import config
from dimaskdino.modeling.backbone import build_backbone
from dimaskdino.modeling.bato import BATO, Guide
from dimaskdino.modeling.de_imbalance import DeImbalance, FirstSelection
from dimaskdino.modeling.decoder import Decoder, LayerOutput, random_boxes
from dimaskdino.modeling.denoising import Denoising, DenoisingQueries
from dimaskdino.modeling.heads import PredictionHeads
from dimaskdino.modeling.layers import inverse_sigmoid
from dimaskdino.modeling.pixel_decoder import PixelDecoder
from dimaskdino.modeling.structures import (
    ImageBatch,
    Predictions,
    Queries,
    SelectedTokens,
    Stage,
    Targets,
    Trace,
)


class Detector(nn.Module):
    """DI-MaskDINO; with one selection and without BATO its baseline MaskDINO.

    Args:
        model: the settings of the model.

    Raises:
        UserError: the backbone does not exist, or its weights are not available.
    """

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        self.settings = model
        self.backbone = build_backbone(model.backbone)
        self.pixel_decoder = PixelDecoder(model, self.backbone.channels)
        self.heads = PredictionHeads(model)
        self.first_selection = FirstSelection(model)
        self.de_imbalance = nn.ModuleList(DeImbalance(model, k) for k in model.selection.k[1:])
        self.denoising = Denoising(model)
        self.decoder = Decoder(model)
        # with one decoder layer nothing comes after BATO
        uses_bato = model.bato.enabled and model.decoder.layers > 1
        self.token_optimization = BATO(model) if uses_bato else None
        # faster convolutions; feature tokens (B, N, C) are channels-last maps already
        self.to(memory_format=torch.channels_last)

    def forward(self, images: ImageBatch, targets: Targets | None = None, trace: bool = False) -> Predictions:
        """Predict classes, boxes and masks at every stage.

        Args:
            images: the batch.
            targets: its objects; given in training, they add denoising queries.
            trace: also return the paper's intermediates.

        Returns:
            The stages `first_selection`, `token_interaction.i`, `decoder.0` (before the first layer) to `decoder.L`.
        """
        features = self.backbone(images.pixels.contiguous(memory_format=torch.channels_last))
        T_i, F = self.pixel_decoder(features)
        T_i = T_i.reversed()  # the decoder wants the levels in the opposite order

        # De-Imbalance, Eq. 1-3
        tokens, first = self.first_selection(T_i, self.heads, F)
        selections, stages, interactions = [tokens], [first], []
        for block in self.de_imbalance:
            interactions.append(block(selections[-1], self.heads, len(stages) - 1, need_weights=trace))
            selections.append(interactions[-1].tokens)
            stages += interactions[-1].stages

        queries, denoising = self._decoder_queries(selections[-1], targets)
        start = queries.content.shape[1] - selections[-1].content.shape[1]  # the matching queries come last
        attention_mask = denoising.attention_mask if denoising else None
        stages.append(self.heads("decoder.0", queries.content, queries.boxes, F))

        # Decoder, Eq. 9-11; its first layer is the residual of Eq. 4, Q_bal = MHCA(T_s2, T_i)
        memory, mask_features = T_i, F
        layers, optimized = [], []
        for number in range(1, self.settings.decoder.layers + 1):
            layers.append(self.decoder(number, queries, memory, self.heads, attention_mask))
            stages.append(self._predict(f"decoder.{number}", layers[-1], mask_features))
            queries = layers[-1].queries
            # BATO, Eq. 5-8
            if self.token_optimization is not None and number in self.settings.bato.after:
                guide = self._guide(selections, queries.after(start))
                need_weights = trace and not optimized
                optimized.append(self.token_optimization(memory, mask_features, guide, self.heads, need_weights))
                memory, mask_features = optimized[-1].T_bal, optimized[-1].mask_features

        notes = None
        if trace:
            notes = Trace(
                T_i=T_i,
                T_s=selections,
                interaction_attention=[attention for output in interactions for attention in output.attention],
                Q_bal=layers[0].queries.after(start),
                mask_features=F,
                references=[layer.reference for layer in layers],
                sampling=[layer.sampling for layer in layers],
                bato=optimized[0] if optimized else None,
            )
        return self._collect(stages, start, denoising, notes)

    def _decoder_queries(
        self, tokens: SelectedTokens, targets: Targets | None
    ) -> tuple[Queries, DenoisingQueries | None]:
        """The denoising queries, if any, followed by the selected tokens."""
        random = self.settings.decoder.random_positions
        matching = Queries(tokens.content, random_boxes(tokens.boxes) if random else tokens.boxes)
        if targets is None or not self.settings.denoising.queries:
            return matching, None
        denoising = self.denoising(targets, tokens.content.shape[1])
        return denoising.queries.before(matching), denoising

    def _predict(self, name: str, output: LayerOutput, mask_features: Float[Tensor, "B C h w"]) -> Stage:
        # quirk: normalised here and once more in the heads; boxes look forward twice (undetached start)
        y = self.heads.norm(output.queries.content)
        boxes = (self.heads.box(y) + inverse_sigmoid(output.started_from)).sigmoid()
        return self.heads(name, y, boxes, mask_features)

    def _guide(self, selections: list[SelectedTokens], queries: Queries) -> Guide:
        """The source of BATO's guiding tokens, by its name in the settings."""
        guides = {"T_i": queries, "Q_bal": queries}
        guides |= {f"T_s{i}": Queries(s.content, s.boxes) for i, s in enumerate(selections, start=1)}
        source = guides[self.settings.bato.guidance]
        return Guide(source.content, self.decoder.position(source.boxes.detach()))

    @staticmethod
    def _collect(
        stages: list[Stage], start: int, denoising: DenoisingQueries | None, trace: Trace | None
    ) -> Predictions:
        """Separate the denoising queries from the matching queries in the decoder's stages."""
        if denoising is None:
            return Predictions({s.name: s for s in stages}, trace=trace)
        parts = {s.name: s.split(start) for s in stages if s.name.startswith("decoder.")}
        matching = {s.name: parts[s.name][1] if s.name in parts else s for s in stages}
        return Predictions(matching, {name: part[0] for name, part in parts.items()}, denoising.groups, trace)
