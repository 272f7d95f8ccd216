"""Prediction heads, shared by every stage, the first selection and BATO (section 5)."""

import math

from jaxtyping import Float
from torch import Tensor, nn

from dimaskdino import config
from dimaskdino.modeling.layers import MLP
from dimaskdino.modeling.structures import Stage


def box_head(C: int) -> MLP:
    """MLP(C, C, 4, 3) whose last layer starts at zero, so that it changes no box."""
    head = MLP(C, C, C, 4)
    for parameter in head[-1].parameters():
        nn.init.zeros_(parameter)
    return head


class PredictionHeads(nn.Module):
    """Class, box and mask heads with the norm before them (`decoder_norm` of the published code)."""

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        C = cfg.hidden_dim
        self.norm = nn.LayerNorm(C)
        self.label = nn.Linear(C, cfg.classes)
        if cfg.class_prior is not None:  # σ⁻¹ of the prior, arXiv 1708.02002, section 4.1
            nn.init.constant_(self.label.bias, math.log(cfg.class_prior / (1 - cfg.class_prior)))
        self.box = box_head(C)
        self.mask = MLP(C, C, C, C)

    def forward(
        self, name: str, x: Float[Tensor, "B Q C"], boxes: Float[Tensor, "B Q 4"], mask_features: Tensor | None
    ) -> Stage:
        """Predict classes and mask embeddings from the normalised x. Without mask features there are no masks."""
        # (B, Q, C), then (B, Q, K) and, as mask embeddings, (B, Q, C)
        y = self.norm(x)
        if mask_features is None:
            return Stage(name, self.label(y), boxes)
        return Stage(name, self.label(y), boxes, self.mask(y), mask_features)
