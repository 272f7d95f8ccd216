"""Feature tokens extractor (section 2): backbone features to feature tokens T_i and mask features F."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dimaskdino import config
from dimaskdino.modeling.layers import DeformableAttention, FeedForward, group_norm, reset_matrices, sine_positions
from dimaskdino.modeling.structures import FeatureLevels, resize_to

MASK_STRIDE = 4


class EncoderLayer(nn.Module):
    """Deformable self-attention among the feature tokens, then a feed-forward block."""

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        C, levels = cfg.hidden_dim, cfg.pixel_decoder.levels
        self.attention = DeformableAttention(C, cfg.heads, levels, cfg.points)
        self.ffn = FeedForward(C, cfg.pixel_decoder.ffn_dim)

    def forward(self, levels: FeatureLevels, position: Tensor, centre: Tensor, cell: Tensor) -> FeatureLevels:
        # (B, N, C), twice
        x = levels.tokens
        x, _ = self.attention(x, x + position, centre, cell, levels)
        return levels.with_tokens(self.ffn(x))


class PixelDecoder(nn.Module):
    """Projects the backbone's levels to C channels and lets them exchange information by deformable attention.

    **quirk**: the published models hold the levels finest first, those with 3 levels coarsest first; the numbering of
    projections and level embeddings follows.
    """

    def __init__(self, cfg: config.Model, channels: dict[int, int]) -> None:
        super().__init__()
        C, settings = cfg.hidden_dim, cfg.pixel_decoder
        self.strides = settings.strides
        self.projections = nn.ModuleList(self._projection(stride, channels, C) for stride in self.strides)
        self.level_embedding = nn.Parameter(torch.empty(len(self.strides), C))
        self.layers = nn.ModuleList(EncoderLayer(cfg) for _ in range(settings.layers))
        self.lateral = nn.Sequential(nn.Conv2d(channels[MASK_STRIDE], C, kernel_size=1, bias=False), group_norm(C))
        self.output = nn.Sequential(
            nn.Conv2d(C, C, kernel_size=3, padding=1, bias=False), group_norm(C), nn.ReLU(inplace=True)
        )
        self.mask_features = nn.Conv2d(C, C, kernel_size=1)
        nn.init.normal_(self.level_embedding)
        reset_matrices(self.layers)
        projection: Any
        for projection in self.projections:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)

    @staticmethod
    def _projection(stride: int, channels: dict[int, int], C: int) -> nn.Sequential:
        if stride in channels:
            convolution = nn.Conv2d(channels[stride], C, kernel_size=1)
        else:  # res6, from res5
            convolution = nn.Conv2d(channels[max(channels)], C, kernel_size=3, stride=2, padding=1)
        return nn.Sequential(convolution, group_norm(C))

    def forward(self, features: dict[int, Tensor]) -> tuple[FeatureLevels, Float[Tensor, "B C h w"]]:
        """Extract feature tokens.

        Args:
            features: {stride: (B, channels, H/stride, W/stride)} of the backbone.

        Returns:
            T_i, with the levels in the encoder's order, and the mask features F at stride 4.
        """
        coarsest = features[max(features)]
        # {stride: (B, C, h, w)}, then (B, N, C)
        maps, embeddings = {}, []
        for stride, projection in zip(self.strides, self.projections, strict=True):
            maps[stride] = projection(features.get(stride, coarsest))
        levels = FeatureLevels.from_maps(maps)
        # (N, C)
        for level_embedding, size in zip(self.level_embedding, levels.sizes, strict=True):
            embeddings.append(level_embedding.expand(size, -1))
        embedding = torch.cat(embeddings)
        position = sine_positions(levels) + embedding
        centre, cell = levels.centres().expand(levels.tokens.shape[0], -1, -1), levels.cells()[:, None]
        # (B, N, C)
        for layer in self.layers:
            levels = layer(levels, position, centre, cell)
        # (B, C, H/4, W/4)
        lateral = self.lateral(features[MASK_STRIDE])
        fused = self.output(lateral + resize_to(levels.map(min(self.strides)), lateral))
        return levels, self.mask_features(fused)
