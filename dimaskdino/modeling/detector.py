"""The whole model: figure 2 of the paper, top to bottom."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dimaskdino import config
from dimaskdino.config.sections import Replaceable
from dimaskdino.modeling.backbone import STRIDES, build_backbone
from dimaskdino.modeling.bato import BATO, Guide
from dimaskdino.modeling.de_imbalance import DeImbalance
from dimaskdino.modeling.decoder import Decoder, LayerOutput, random_boxes
from dimaskdino.modeling.denoising import Denoising, DenoisingQueries
from dimaskdino.modeling.heads import PredictionHeads
from dimaskdino.modeling.layers import inverse_sigmoid
from dimaskdino.modeling.pixel_decoder import PixelDecoder
from dimaskdino.modeling.stages import DECODER_INPUT, decoder, is_decoder
from dimaskdino.modeling.structures import (
    BATOOutput,
    ImageBatch,
    Predictions,
    Queries,
    SelectedTokens,
    Stage,
    Targets,
    Trace,
)
from dimaskdino.utils import plugins
from dimaskdino.utils.errors import UserError


class Detector(nn.Module):
    """DI-MaskDINO; with one selection and without BATO its baseline MaskDINO.

    Args:
        cfg: the settings of the model.
        backbone: a module to use instead of the one that the settings name. It has `channels`, {stride: number of
            channels} for strides 4, 8, 16 and 32, and maps (B, 3, H, W) to {stride: (B, channels, H/stride, W/stride)}.
        de_imbalance: a module to use instead of `DeImbalance`, with the same arguments and output.
        bato: a module to use instead of `BATO`, with the same arguments and output.

    Raises:
        UserError: the backbone does not exist, its weights are not available, or a module that the settings name cannot
            be used.
    """

    def __init__(
        self,
        cfg: config.Model,
        backbone: nn.Module | None = None,
        de_imbalance: nn.Module | None = None,
        bato: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        backbone = _own(backbone, cfg.backbone, "model.backbone", cfg)
        self.backbone = build_backbone(cfg.backbone) if backbone is None else backbone
        channels = getattr(self.backbone, "channels", None)
        if not isinstance(channels, dict) or not channels.keys() >= set(STRIDES):
            raise UserError(f"the backbone needs channels, a number for each of the strides {STRIDES}, got {channels}")
        self.pixel_decoder = PixelDecoder(cfg, channels)
        self.heads = PredictionHeads(cfg)
        de_imbalance = _own(de_imbalance, cfg.selection, "model.selection", cfg)
        self.de_imbalance = DeImbalance(cfg) if de_imbalance is None else de_imbalance
        self.denoising = Denoising(cfg)
        self.decoder = Decoder(cfg)
        # with one decoder layer nothing comes after BATO
        uses_bato = cfg.bato.enabled and cfg.decoder.layers > 1
        self.bato = None
        if uses_bato:
            bato = _own(bato, cfg.bato, "model.bato", cfg)
            self.bato = BATO(cfg) if bato is None else bato
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
        # {stride: (B, channels, H/stride, W/stride)}
        features = self.backbone(images.pixels.contiguous(memory_format=torch.channels_last))
        # (B, N, C) and (B, C, H/4, W/4)
        T_i, F = self.pixel_decoder(features)
        # the decoder wants the levels in the opposite order
        T_i = T_i.reversed()

        # De-Imbalance, Eq. 1–3: (B, k, C) for every selection
        selected = self.de_imbalance(T_i, F, self.heads, need_weights=trace)
        stages = list(selected.stages)

        # (B, R + k, C): R denoising queries, then the selected tokens
        queries, denoising = self._decoder_queries(selected.selections[-1], targets)
        start = queries.content.shape[1] - selected.selections[-1].content.shape[1]
        attention_mask = denoising.attention_mask if denoising else None
        stages.append(self.heads(DECODER_INPUT, queries.content, queries.boxes, F))

        # Decoder, Eq. 9–11; its first layer is the residual of Eq. 4, Q_bal = MHCA(T_s2, T_i)
        memory, mask_features = T_i, F
        layers: list[LayerOutput] = []
        optimised: list[BATOOutput] = []
        for number in range(1, self.cfg.decoder.layers + 1):
            # (B, R + k, C)
            layers.append(self.decoder(number, queries, memory, self.heads, attention_mask))
            stages.append(self._predict(decoder(number), layers[-1], mask_features))
            queries = layers[-1].queries
            # BATO, Eq. 5–8: (B, N, C) and (B, C, H/4, W/4)
            if self.bato is not None and number in self.cfg.bato.after:
                guide = self._guide(selected.selections, queries.after(start))
                need_weights = trace and not optimised
                optimised.append(self.bato(memory, mask_features, guide, self.heads, need_weights))
                memory, mask_features = optimised[-1].T_bal, optimised[-1].mask_features

        notes = None
        if trace:
            notes = Trace(
                T_i=T_i,
                T_s=selected.selections,
                interaction_attention=selected.attention,
                Q_bal=layers[0].queries.after(start),
                mask_features=F,
                references=[layer.reference for layer in layers],
                sampling=[layer.sampling for layer in layers],
                bato=optimised[0] if optimised else None,
            )
        return self._collect(stages, start, denoising, notes)

    def _decoder_queries(
        self, tokens: SelectedTokens, targets: Targets | None
    ) -> tuple[Queries, DenoisingQueries | None]:
        """The denoising queries, if any, followed by the selected tokens."""
        # (B, k, 4): those of the selection, or random ones in table 3's experiment
        boxes = random_boxes(tokens.boxes) if self.cfg.decoder.random_positions else tokens.boxes
        matching = Queries(tokens.content, boxes)
        if targets is None or not self.cfg.denoising.queries:
            return matching, None
        denoising = self.denoising(targets, tokens.content.shape[1])
        return denoising.queries.before(matching), denoising

    def _predict(self, name: str, output: LayerOutput, mask_features: Float[Tensor, "B C h w"]) -> Stage:
        # quirk: normalised here and once more in the heads; boxes look forward twice (undetached start)
        y = self.heads.norm(output.queries.content)
        boxes = (self.heads.box(y) + inverse_sigmoid(output.started_from)).sigmoid()
        return self.heads(name, y, boxes, mask_features)

    def _guide(self, selections: list[SelectedTokens], queries: Queries) -> Guide:
        """The source of BATO's guiding tokens that `bato.guidance` names."""
        source: Queries | SelectedTokens = queries
        name = self.cfg.bato.guidance
        if name.startswith("T_s"):
            source = selections[int(name.removeprefix("T_s")) - 1]
        return Guide(source.content, self.decoder.position(source.boxes.detach()))

    @staticmethod
    def _collect(
        stages: list[Stage], start: int, denoising: DenoisingQueries | None, trace: Trace | None
    ) -> Predictions:
        """Separate the denoising queries from the matching queries in the decoder's stages."""
        matching, denoised = {}, {}
        for stage in stages:
            if denoising is not None and is_decoder(stage.name):
                denoised[stage.name], stage = stage.split(start)
            matching[stage.name] = stage
        groups = 0 if denoising is None else denoising.groups
        return Predictions(matching, denoised, groups, trace)


def _own(given: nn.Module | None, section: Replaceable, key: str, cfg: config.Model) -> nn.Module | None:
    """The module to use in place of the paper's: the given one, else one that the settings name; None without either.

    Raises:
        UserError: what the settings name cannot be made, or is no module.
    """
    if given is not None or section.type is None:
        return given
    module = plugins.build(section, key, cfg)
    if not isinstance(module, nn.Module):
        raise UserError(f"{key}: {section.type} returned {type(module).__name__}, expected a torch.nn.Module")
    return module
