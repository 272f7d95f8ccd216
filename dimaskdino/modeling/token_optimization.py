"""BATO: balance-aware tokens optimisation (section 4, Eq. 5–8).

The queries after decoder layer 0 know boxes and masks in balance. BATO makes guiding tokens of the best of them and
lets every feature token take from them what concerns it; the later decoder layers then see T_bal instead of T_i.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from dimaskdino import config
from dimaskdino.modeling.de_imbalance import gather_rows
from dimaskdino.modeling.heads import PredictionHeads
from dimaskdino.modeling.layers import Attention, FeedForward, group_norm, reset_matrices, sine_positions
from dimaskdino.modeling.pixel_decoder import FINEST_STRIDE
from dimaskdino.modeling.records import FeatureLevels, Trace, resize_to


@dataclass(frozen=True)
class Guide:
    """What guides the feature tokens: T_s1, T_s2 or the queries, content (B, Q, C) and position (B, Q, C)."""

    content: Float[Tensor, "B Q C"]
    position: Float[Tensor, "B Q C"]


class TokenOptimization(nn.Module):
    """Cross-attention from feature tokens to guiding tokens, and refreshed mask features."""

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        C = model.hidden_dim
        self.guiding_tokens, self.generation = model.bato.guiding_tokens, model.bato.generation
        self.attention = Attention(C, model.heads)
        self.ffn = FeedForward(C, model.decoder.ffn_dim)
        self.mask_features = nn.Sequential(
            nn.Conv2d(C, C, kernel_size=3, padding=1, bias=False), group_norm(C), nn.ReLU(inplace=True)
        )
        reset_matrices(self)

    def forward(
        self,
        T_i: FeatureLevels,
        mask_features: Float[Tensor, "B C h w"],
        guide: Guide,
        heads: PredictionHeads,
        trace: Trace | None = None,
    ) -> tuple[FeatureLevels, Float[Tensor, "B C h w"]]:
        """Optimise the tokens.

        Args:
            T_i: feature tokens.
            mask_features: F.
            guide: what the guiding tokens are made of.
            heads: scores the guide (**quirk**: without the heads' norm) and turns it into T_g^mask.
            trace: where to note the guiding tokens, or None.

        Returns:
            T_bal and F'.
        """
        key, value, indices = self._guiding_tokens(guide, heads)
        query = T_i.tokens + sine_positions(T_i)
        x, attention = self.attention(T_i.tokens, query, key, value, weights=trace is not None)
        T_bal = T_i.with_tokens(self.ffn(x))
        # F' = ReLU(GN(conv(F + T_bal at stride 8, enlarged)))
        refreshed = self.mask_features(mask_features + resize_to(T_bal.map(FINEST_STRIDE), mask_features))
        if trace is not None:
            trace.T_g_mask, trace.T_g_box, trace.guiding_indices = value, key - value, indices
            trace.guidance_attention, trace.T_bal, trace.mask_features_bal = attention, T_bal, refreshed
        return T_bal, refreshed

    def _guiding_tokens(self, guide: Guide, heads: PredictionHeads) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (B, G, C) of the attention, and which rows of the guide they are."""
        if not self.generation:
            return guide.content, guide.content, None
        scores = heads.label(guide.content).amax(-1)
        indices = scores.topk(min(self.guiding_tokens, scores.shape[1]), dim=1).indices
        T_g_mask = heads.mask(gather_rows(guide.content, indices))
        return T_g_mask + gather_rows(guide.position, indices), T_g_mask, indices
