"""Denoising queries (section 6): noised objects that the decoder learns to restore, in training only."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dimaskdino import config
from dimaskdino.modeling.layers import through_logits
from dimaskdino.modeling.structures import Queries, Targets


@dataclass(frozen=True)
class DenoisingQueries:
    """Noised objects: query g·M + j is object j of its image in group g (zeros where it has no object j)."""

    queries: Queries
    groups: int
    attention_mask: Bool[Tensor, "R R"]


class Denoising(nn.Module):
    """Generates denoising queries. Holds the embedding of the class labels."""

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.cfg = cfg.denoising
        self.labels = nn.Embedding(cfg.classes, cfg.hidden_dim)

    def forward(self, targets: Targets, matching: int) -> DenoisingQueries:
        """Generate noised objects.

        Args:
            targets: the objects.
            matching: number of matching queries, which come after the denoising queries.

        Returns:
            (B, groups·M) queries, and the attention mask over all R = groups·M + matching queries: matching queries do
            not attend to denoising queries, and groups do not attend to each other.
        """
        M = targets.labels.shape[1]
        most = max(targets.counts, default=0)
        groups = self.cfg.queries // most if most else 0
        # (B, groups·M), (B, groups·M, 4), (B, groups·M)
        labels = targets.labels.repeat(1, groups)
        boxes = targets.boxes.repeat(1, groups, 1)
        valid = targets.valid.repeat(1, groups)

        flip = torch.rand(labels.shape, device=labels.device) < self.cfg.label_noise
        labels = torch.where(flip, torch.randint_like(labels, self.labels.num_embeddings), labels)
        # centre ± noise·(w, h)/2, size ± noise·(w, h)
        extent = torch.cat([boxes[..., 2:] / 2, boxes[..., 2:]], dim=-1)
        boxes = boxes + self.cfg.box_noise * extent * (2 * torch.rand_like(boxes) - 1)

        # (B, groups·M, C)
        content = self.labels(labels) * valid.unsqueeze(-1)
        # 0.5 (a logit of 0) where there is no object
        boxes = torch.where(valid.unsqueeze(-1), through_logits(boxes), 0.5)
        return DenoisingQueries(
            Queries(content, boxes), groups, self._attention_mask(groups, M, matching, labels.device)
        )

    @staticmethod
    def _attention_mask(groups: int, M: int, matching: int, device: torch.device) -> Bool[Tensor, "R R"]:
        group = torch.arange(groups * M, device=device) // max(M, 1)
        group = torch.cat([group, torch.full((matching,), -1, device=device)])
        # a query may attend to its own group and to the matching queries (-1)
        return (group[None, :] != group[:, None]) & (group[None, :] >= 0)
