"""Decoder (section 5, Eq. 9–11): queries attend to the feature tokens and refine their boxes, layer by layer."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dimaskdino import config
from dimaskdino.modeling.heads import PredictionHeads
from dimaskdino.modeling.layers import (
    MLP,
    Attention,
    DeformableAttention,
    FeedForward,
    inverse_sigmoid,
    reset_matrices,
    sine_boxes,
)
from dimaskdino.modeling.structures import FeatureLevels, Queries


class DecoderLayer(nn.Module):
    """Self-attention among the queries, deformable attention to the feature tokens, feed-forward block.

        x = LN(x + MHSA(x + p, x + p, x))                (self-attention)
        x = LN(x + MSDeformAttn(x + p, ref, memory))     (MHCA of Eq. 4 and 9)
        x = LN(x + FFN(x))

    `x` is the content of the queries, `p` the position embedding of their boxes `ref`, and `memory` is T_i, or T_bal
    after BATO.
    """

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        C = cfg.hidden_dim
        self.self_attention = Attention(C, cfg.heads)
        self.cross_attention = DeformableAttention(C, cfg.heads, cfg.pixel_decoder.levels, cfg.points)
        self.ffn = FeedForward(C, cfg.decoder.ffn_dim)

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, memory: FeatureLevels, attention_mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        # (B, Q, C)
        x, _ = self.self_attention(x, x + position, x + position, x, attention_mask)
        # an offset of `points` reaches the border of the box
        unit = reference[:, :, None, None, None, 2:] * (0.5 / self.cross_attention.points)
        x, sampling = self.cross_attention(x, x + position, reference[..., :2], unit, memory)
        return self.ffn(x), sampling


@dataclass(frozen=True)
class LayerOutput:
    """The result of one decoder layer.

    Attributes:
        queries: the queries, with refined boxes.
        started_from: boxes (B, Q, 4) that the layer started from, with their gradients.
        reference: the same boxes as the layer's reference, detached except in layer 1.
        sampling: locations (B, Q, heads, levels, points, 2) and weights of the deformable attention.
    """

    queries: Queries
    started_from: Tensor
    reference: Tensor
    sampling: tuple[Tensor, Tensor]


class Decoder(nn.Module):
    """The stack of layers, run one at a time, so that BATO can optimise the tokens in between."""

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.hidden_dim = C = cfg.hidden_dim
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.decoder.layers))
        self.position_head = MLP(2 * C, C, C)
        reset_matrices(self)

    def position(self, reference: Tensor) -> Tensor:
        """Position embedding (B, Q, C) of boxes (B, Q, 4), cxcywh in [0, 1]."""
        return self.position_head(sine_boxes(reference, self.hidden_dim))

    def forward(
        self,
        number: int,
        queries: Queries,
        memory: FeatureLevels,
        heads: PredictionHeads,
        attention_mask: Tensor | None = None,
    ) -> LayerOutput:
        """Run one layer.

        Args:
            number: number of the layer, from 1 as in the stages' names.
            queries: content and boxes to start from. Boxes receive gradients from the predictions of the layer (look
                forward twice) but not through the layer itself, except in layer 1, where De-Imbalance's boxes enter
                undetached.
            memory: T_i, or T_bal after BATO.
            heads: its box head refines the boxes.
            attention_mask: (Q, Q) bool, True where a query must not attend to another.
        """
        reference = queries.boxes if number == 1 else queries.boxes.detach()
        # (B, Q, C)
        position = self.position(reference)
        x, sampling = self.layers[number - 1](queries.content, position, reference, memory, attention_mask)
        # (B, Q, 4)
        boxes = (heads.box(x) + inverse_sigmoid(reference)).sigmoid()
        return LayerOutput(Queries(x, boxes), queries.boxes, reference, sampling)


def random_boxes(like: Tensor) -> Tensor:
    """Table 3's position-token constraint: boxes drawn uniformly from [0, 1]⁴."""
    return torch.rand_like(like)
