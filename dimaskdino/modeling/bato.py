"""BATO: balance-aware tokens optimization (section 4, Eq. 5–8).

After the first decoder layer the queries describe boxes and masks in balance. BATO makes guiding tokens from the best
of them, and every feature token attends to these. The later decoder layers then read T_bal instead of T_i.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from dimaskdino import config
from dimaskdino.modeling.heads import PredictionHeads
from dimaskdino.modeling.layers import (
    Attention,
    FeedForward,
    gather_rows,
    group_norm,
    reset_matrices,
    select_top,
    sine_positions,
)
from dimaskdino.modeling.structures import BATOOutput, FeatureLevels, resize_to


@dataclass(frozen=True)
class Guide:
    """The source of the guiding tokens: content and position embedding of T_s1, T_s2 or the queries."""

    content: Float[Tensor, "B Q C"]
    position: Float[Tensor, "B Q C"]


class BATO(nn.Module):
    """Cross-attention from feature tokens to guiding tokens, and refreshed mask features.

        T_g^mask = MLP(Top(Q_bal)),  T_g^box = the same queries' box embeddings             (Eq. 5, 6)
        T_bal    = FFN(MHCA(q = T_i + p, k = T_g^mask + T_g^box, v = T_g^mask))             (Eq. 7, 8)

    with a residual connection and LN around each block. The box embeddings are `Guide.position`, the number of guiding
    tokens is `guiding_tokens`, and p is the sine position without level embedding.
    """

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        C = cfg.hidden_dim
        self.guiding_tokens, self.generation = cfg.bato.guiding_tokens, cfg.bato.generation
        self.attention = Attention(C, cfg.heads)
        self.ffn = FeedForward(C, cfg.decoder.ffn_dim)
        self.mask_features = nn.Sequential(
            nn.Conv2d(C, C, kernel_size=3, padding=1, bias=False), group_norm(C), nn.ReLU(inplace=True)
        )
        reset_matrices(self)
        self.requires_grad_(not cfg.bato.freeze)

    def forward(
        self,
        T_i: FeatureLevels,
        mask_features: Float[Tensor, "B C h w"],
        guide: Guide,
        heads: PredictionHeads,
        need_weights: bool,
    ) -> BATOOutput:
        """Optimise the tokens.

        Args:
            T_i: the feature tokens.
            mask_features: F.
            guide: the source of the guiding tokens.
            heads: scores the guide (**quirk**: without the heads' norm) and turns it into T_g^mask.
            need_weights: also return the attention.
        """
        # Eq. 5, 6: (B, G, C), (B, G, C), (B, G)
        key, value, indices = self._guiding_tokens(guide, heads)
        # Eq. 7: (B, N, C), and with need_weights (B, N, G)
        query = T_i.tokens + sine_positions(T_i)
        x, attention = self.attention(T_i.tokens, query, key, value, need_weights=need_weights)
        # Eq. 8: (B, N, C)
        T_bal = T_i.with_tokens(self.ffn(x))
        # F' = ReLU(GN(conv(F + the finest level of T_bal, enlarged))), (B, C, h, w)
        finest = T_bal.map(min(T_bal.strides))
        refreshed = self.mask_features(mask_features + resize_to(finest, mask_features))
        # a GPU normalises in float32 under autocast; masks are products with F' in the dtype of F
        refreshed = refreshed.to(mask_features.dtype)
        return BATOOutput(T_bal, refreshed, value, key - value, indices, attention)

    def _guiding_tokens(self, guide: Guide, heads: PredictionHeads) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (B, G, C) of the attention, and the rows of the guide that they come from."""
        if not self.generation:
            return guide.content, guide.content, None
        _, indices = select_top(heads.label(guide.content), self.guiding_tokens)
        T_g_mask = heads.mask(gather_rows(guide.content, indices))
        return T_g_mask + gather_rows(guide.position, indices), T_g_mask, indices
