"""De-Imbalance: residual double-selection of feature tokens (section 3, Eq. 1–4).

Detection lags in the first decoder layers because a token describes its own place well but not the object around it.
De-Imbalance keeps more tokens than needed (first selection), lets the tokens of one object exchange information (token
interaction), and keeps the best of the result (second selection). The residual connection of Eq. 4 is the first decoder
layer, which attends to the original tokens.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dimaskdino import config
from dimaskdino.modeling.heads import PredictionHeads, box_head
from dimaskdino.modeling.layers import (
    MLP,
    Attention,
    FeedForward,
    inverse_sigmoid,
    reset_matrices,
    sine_boxes,
    through_logits,
)
from dimaskdino.modeling.structures import FeatureLevels, SelectedTokens, Stage

MASK_CHUNK = 64  # number of masks computed at a time, to bound memory


def gather_rows(x: Float[Tensor, "B N D"], indices: Int[Tensor, "B k"]) -> Float[Tensor, "B k D"]:
    """The rows `indices` of each image."""
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class FirstSelection(nn.Module):
    """The k1 feature tokens that look most like an object, with boxes from their masks (Eq. 1).

        T_s1 = Top_k1(T_i)                               (scored by the class head)

    In the code `T_i.tokens` are the feature tokens, `indices` the rows of T_s1 in them, `content` the selected tokens.
    """

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        C = model.hidden_dim
        self.k, self.mask_to_box = model.selection.k[0], model.selection.mask_to_box
        self.detach = model.selection.detach
        self.project = nn.Linear(C, C)
        self.norm = nn.LayerNorm(C)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(
        self, T_i: FeatureLevels, heads: PredictionHeads, mask_features: Float[Tensor, "B C h w"]
    ) -> tuple[SelectedTokens, Stage]:
        """Select tokens.

        Returns:
            T_s1, detached unless the settings say otherwise, with mask-guided boxes; and the stage `first_selection`,
            which is supervised.
        """
        proposals = proposal_boxes(T_i)
        valid = ((proposals > 0.01) & (proposals < 0.99)).all(-1)
        m = self.norm(self.project(T_i.tokens * valid[:, None]))
        # quirk: scored without the heads' norm; the stage below predicts with it
        scores, indices = heads.label(m).amax(-1).topk(min(self.k, m.shape[1]), dim=1)
        content = gather_rows(m, indices)
        logit = torch.log(proposals / (1 - proposals)).masked_fill(~valid[:, None], torch.inf)
        boxes = (heads.box(content) + logit[indices]).sigmoid()
        stage = heads("first_selection", content, boxes, mask_features)
        if self.mask_to_box != "no":
            boxes = through_logits(mask_guided_boxes(stage, exact=self.mask_to_box == "bitmask"))
        if self.detach:
            content, boxes = content.detach(), boxes.detach()
        return SelectedTokens(content, boxes, indices, scores.detach()), stage


def proposal_boxes(levels: FeatureLevels) -> Float[Tensor, "N 4"]:
    """Prior box of every token: its cell centre and a side of 0.05·2^l.

    **quirk**: l counts the levels in the decoder's order, so in the 4-level models the coarsest level gets the
    smallest prior.
    """
    sides = [torch.full((n,), 0.05 * 2.0**level, device=levels.tokens.device) for level, n in enumerate(levels.sizes)]
    side = torch.cat(sides)[:, None]
    return torch.cat([levels.centres(), side, side], dim=-1)


@torch.no_grad()
def mask_guided_boxes(stage: Stage, exact: bool) -> Float[Tensor, "B Q 4"]:
    """Tight boxes, cxcywh, of a stage's masks at stride 4.

    Args:
        stage: a stage with masks.
        exact: True (`bitmask`): upper bounds include the last cell, an empty mask gives zeros. False (`mask2box`,
            **quirk**): they do not, and an empty mask gives a box that clamps to (1, 1, 0, 0).
    """
    assert stage.mask_embedding is not None
    assert stage.mask_features is not None
    # (B, h·w, C), as the features lie in memory: the other way round a product in bfloat16 copies them for every chunk
    features = stage.mask_features.flatten(2).transpose(1, 2)
    columns, rows = [], []
    for start in range(0, stage.mask_embedding.shape[1], MASK_CHUNK):  # split would export as a sequence
        embedding = stage.mask_embedding[:, start : start + MASK_CHUNK].transpose(1, 2)
        mask = (features @ embedding).unflatten(1, stage.mask_features.shape[-2:])
        columns.append(mask.amax(1) > 0)
        rows.append(mask.amax(2) > 0)
    x0, x1 = _extent(torch.cat(columns, dim=-1).transpose(1, 2), exact)
    y0, y1 = _extent(torch.cat(rows, dim=-1).transpose(1, 2), exact)
    box = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)
    return box.clamp(0, 1)


def _extent(occupied: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """First and last occupied index along the last axis (B, Q, n), divided by n."""
    n = occupied.shape[-1]
    occupied_int = occupied.int()
    empty = ~occupied.any(-1)
    first = occupied_int.argmax(-1).float()
    last = (n - 1 - occupied_int.flip(-1).argmax(-1)).float()
    if exact:
        return first.masked_fill(empty, 0) / n, (last + 1).masked_fill(empty, 0) / n
    return first.masked_fill(empty, 1e8) / n, last.masked_fill(empty, 0) / n


class TokenInteractionLayer(nn.Module):
    """Self-attention among the selected tokens, then a feed-forward block (Eq. 2)."""

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        self.attention = Attention(model.hidden_dim, model.heads)
        self.ffn = FeedForward(model.hidden_dim, model.decoder.ffn_dim)

    def forward(self, x: Tensor, position: Tensor, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        x, attention = self.attention(x, x + position, x + position, x, need_weights=need_weights)
        return self.ffn(x), attention


@dataclass(frozen=True)
class DeImbalanceOutput:
    """What one round of token interaction and selection gives.

    Attributes:
        tokens: the selected tokens, undetached.
        stages: the supervised stages `token_interaction.i`.
        attention: per layer the attention among the tokens (B, k, k), mean over the heads; None if not asked for.
    """

    tokens: SelectedTokens
    stages: list[Stage]
    attention: list[Tensor | None]


class DeImbalance(nn.Module):
    """Token interaction and one further selection. A triple selection uses two of these.

    For the double selection of the paper, with `tokens` = T_s1 and the result's `tokens` = T_s2:

        T_s1' = FFN(MHSA(T_s1))                          (Eq. 2, `layers`)
        T_s2  = Top_k2(T_s1')                            (Eq. 3, scored by the class head)

    The residual connection of Eq. 4, Q_bal = MHCA(T_s2, T_i), is the decoder's first layer.
    """

    def __init__(self, model: config.Model, k: int) -> None:
        super().__init__()
        C = model.hidden_dim
        self.k = k
        self.layers = nn.ModuleList(
            TokenInteractionLayer(model) for _ in range(model.selection.token_interaction_layers)
        )
        self.position = MLP(2 * C, C, C)
        self.norm = nn.LayerNorm(C)
        reset_matrices(self)
        self.box = box_head(C)

    def forward(
        self, tokens: SelectedTokens, heads: PredictionHeads, first_stage: int, need_weights: bool
    ) -> DeImbalanceOutput:
        """Let the tokens interact and keep the best k.

        Args:
            tokens: T_s1 (or T_s2 in a triple selection).
            heads: the shared prediction heads.
            first_stage: number of the first token-interaction stage.
            need_weights: also return the attention.
        """
        x, reference = tokens.content, tokens.boxes
        C = x.shape[-1]
        stages: list[Stage] = []
        attention: list[Tensor | None] = []
        for number, layer in enumerate(self.layers, start=first_stage):
            reference = reference.detach()
            x, weights = layer(x, self.position(sine_boxes(reference, C)), need_weights)
            attention.append(weights)
            reference = (self.box(x) + inverse_sigmoid(reference)).sigmoid()
            # quirks: the heads' norm on top of this one; a second step from the already refined, undetached box
            y = self.norm(x)
            boxes = (self.box(y) + inverse_sigmoid(reference)).sigmoid()
            stages.append(heads(f"token_interaction.{number}", y, boxes, None))
        scores, rows = heads.label(self.norm(x)).amax(-1).topk(min(self.k, x.shape[1]), dim=1)
        selected = SelectedTokens(
            gather_rows(x, rows),
            through_logits(gather_rows(reference, rows)),
            tokens.indices.gather(1, rows),
            scores.detach(),
        )
        return DeImbalanceOutput(selected, stages, attention)
