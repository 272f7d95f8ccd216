"""De-Imbalance: residual double-selection of feature tokens (section 3, Eq. 1–4).

In the first decoder layers detection lags behind segmentation: a token describes its own place well, but not the whole
object around it. De-Imbalance first keeps more tokens than the decoder needs (first selection), lets these tokens
exchange information by self-attention (token interaction), and then keeps the best of them (second selection). The
residual connection of Eq. 4 is the first decoder layer, which attends to the original tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dimaskdino import config
from dimaskdino.modeling.heads import PredictionHeads, box_head
from dimaskdino.modeling.layers import (
    MLP,
    Attention,
    FeedForward,
    gather_rows,
    inverse_sigmoid,
    reset_matrices,
    select_top,
    sine_boxes,
    through_logits,
)
from dimaskdino.modeling.stages import FIRST_SELECTION, token_interaction
from dimaskdino.modeling.structures import FeatureLevels, SelectedTokens, Stage

MASK_CHUNK = 64  # number of masks computed at a time, to bound memory


class FirstSelection(nn.Module):
    """Select the k1 feature tokens that look most like an object, and give them boxes from their masks (Eq. 1).

        T_s1 = Top_k1(T_i)                               (scored by the class head)

    `T_i.tokens` are the feature tokens, `indices` the rows of T_s1 in them, `content` the selected tokens.
    """

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        C = cfg.hidden_dim
        self.k, self.mask_to_box = cfg.selection.k[0], cfg.selection.mask_to_box
        self.detach = cfg.selection.detach
        self.project = nn.Linear(C, C)
        self.norm = nn.LayerNorm(C)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(
        self, T_i: FeatureLevels, mask_features: Float[Tensor, "B C h w"], heads: PredictionHeads
    ) -> tuple[SelectedTokens, Stage]:
        """Select tokens.

        Args:
            T_i: the feature tokens, coarsest level first.
            mask_features: F.
            heads: the shared prediction heads.

        Returns:
            T_s1, detached unless `selection.detach` is false, with boxes from its masks; and the stage
            `first_selection`, which is supervised.
        """
        # (N, 4) and (N,): a prior box for every token, and whether it lies inside the image
        proposals = proposal_boxes(T_i)
        valid = ((proposals > 0.01) & (proposals < 0.99)).all(-1)
        # (B, N, C)
        m = self.norm(self.project(T_i.tokens * valid[:, None]))
        # (B, k1), (B, k1); quirk: scored without the heads' norm, although the stage below predicts with it
        scores, indices = select_top(heads.label(m), self.k)
        # (B, k1, C)
        content = gather_rows(m, indices)
        # (B, k1, 4)
        logit = torch.log(proposals / (1 - proposals)).masked_fill(~valid[:, None], torch.inf)
        boxes = (heads.box(content) + logit[indices]).sigmoid()
        stage = heads(FIRST_SELECTION, content, boxes, mask_features)
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
    sides = []
    for level, n in enumerate(levels.sizes):
        sides.append(torch.full((n,), 0.05 * 2.0**level, device=levels.tokens.device))
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
    # (B, Q), (B, Q): argmax finds the first of equal values
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

    def __init__(self, cfg: config.Model) -> None:
        super().__init__()
        self.attention = Attention(cfg.hidden_dim, cfg.heads)
        self.ffn = FeedForward(cfg.hidden_dim, cfg.decoder.ffn_dim)

    def forward(
        self, x: Float[Tensor, "B k C"], position: Float[Tensor, "B k C"], need_weights: bool
    ) -> tuple[Float[Tensor, "B k C"], Tensor | None]:
        # (B, k, C), and with need_weights (B, k, k)
        x, attention = self.attention(x, x + position, x + position, x, need_weights=need_weights)
        return self.ffn(x), attention


@dataclass(frozen=True)
class DeImbalanceOutput:
    """The selected tokens, and the stages predicted on the way.

    Attributes:
        selections: the tokens kept by each selection in order: T_s1, T_s2, and T_s3 in a triple selection. The last
            become the decoder's queries.
        stages: the supervised stages in order: `first_selection`, `token_interaction.0`, …
        attention: per token-interaction layer the attention among the tokens (B, k, k), mean over the heads; empty
            without `need_weights`.
    """

    selections: list[SelectedTokens]
    stages: list[Stage]
    attention: list[Tensor]

    def __add__(self, other: "DeImbalanceOutput") -> "DeImbalanceOutput":
        """The steps of this output followed by those of another."""
        return DeImbalanceOutput(
            self.selections + other.selections, self.stages + other.stages, self.attention + other.attention
        )


class SecondSelection(nn.Module):
    """Token interaction, then a further selection. A triple selection has two of these.

    For the double selection of the paper, with `tokens` = T_s1 and the output's selection T_s2:

        T_s1' = FFN(MHSA(T_s1))                          (Eq. 2, `layers`)
        T_s2  = Top_k2(T_s1')                            (Eq. 3, scored by `score`)

    The residual connection of Eq. 4, Q_bal = MHCA(T_s2, T_i), is the decoder's first layer.

    Args:
        cfg: the settings of the model.
        k: number of tokens to keep.
    """

    def __init__(self, cfg: config.Model, k: int) -> None:
        super().__init__()
        C = cfg.hidden_dim
        self.k = k
        self.layers = nn.ModuleList()
        for _ in range(cfg.selection.token_interaction_layers):
            self.layers.append(TokenInteractionLayer(cfg))
        self.position = MLP(2 * C, C, C)
        self.norm = nn.LayerNorm(C)
        reset_matrices(self)
        self.box = box_head(C)

    def forward(
        self,
        tokens: SelectedTokens,
        mask_features: Float[Tensor, "B C h w"],
        heads: PredictionHeads,
        first_stage: int = 0,
        need_weights: bool = False,
    ) -> DeImbalanceOutput:
        """Let the tokens interact and keep the best k.

        Args:
            tokens: T_s1 (or T_s2 in a triple selection).
            mask_features: F, for selections that look at masks.
            heads: the shared prediction heads.
            first_stage: number of the first token-interaction stage.
            need_weights: also return the attention.
        """
        x, reference = tokens.content, tokens.boxes
        C = x.shape[-1]
        stages: list[Stage] = []
        attention: list[Tensor] = []
        for number, layer in enumerate(self.layers, start=first_stage):
            reference = reference.detach()
            # (B, k1, C), and with need_weights (B, k1, k1)
            x, weights = layer(x, self.position(sine_boxes(reference, C)), need_weights)
            if weights is not None:
                attention.append(weights)
            # (B, k1, 4)
            reference = (self.box(x) + inverse_sigmoid(reference)).sigmoid()
            # quirks: the heads' norm on top of this one; a second step from the already refined, undetached box
            y = self.norm(x)
            boxes = (self.box(y) + inverse_sigmoid(reference)).sigmoid()
            stages.append(heads(token_interaction(number), y, boxes, None))
        # (B, k2), (B, k2)
        scores, rows = select_top(self.score(self.norm(x), mask_features, heads), self.k)
        # (B, k2, C), (B, k2, 4), (B, k2)
        content = gather_rows(x, rows)
        boxes = through_logits(gather_rows(reference, rows))
        indices = tokens.indices.gather(1, rows)
        return DeImbalanceOutput([SelectedTokens(content, boxes, indices, scores.detach())], stages, attention)

    def score(
        self, x: Float[Tensor, "B k C"], mask_features: Float[Tensor, "B C h w"], heads: PredictionHeads
    ) -> Float[Tensor, "B k K"]:
        """Scores by which tokens are kept: the class logits. The highest score of a token counts.

        Override it to select by something else, for example by mask quality: `heads.mask(x)` are mask embeddings,
        whose products with `mask_features` are mask logits.
        """
        return heads.label(x)


class DeImbalance(nn.Module):
    """The first selection, and for each further number in `selection.k` token interaction with another selection.

    With one number in `selection.k` only the first selection is left, which is MaskDINO's token selection.

    Args:
        cfg: the settings of the model.
        second_selection: makes each further selection from the settings and its k; `SecondSelection` by default.
    """

    def __init__(
        self, cfg: config.Model, second_selection: Callable[[config.Model, int], nn.Module] = SecondSelection
    ) -> None:
        super().__init__()
        self.first_selection = FirstSelection(cfg)
        self.second_selections = nn.ModuleList()
        for k in cfg.selection.k[1:]:
            self.second_selections.append(second_selection(cfg, k))

    def forward(
        self,
        T_i: FeatureLevels,
        mask_features: Float[Tensor, "B C h w"],
        heads: PredictionHeads,
        need_weights: bool = False,
    ) -> DeImbalanceOutput:
        """Select the tokens that become decoder queries.

        Args:
            T_i: the feature tokens, coarsest level first.
            mask_features: F.
            heads: the shared prediction heads.
            need_weights: also return the attention of token interaction.
        """
        # Eq. 1: T_s1, (B, k1, C)
        T_s1, first_stage = self.first_selection(T_i, mask_features, heads)
        output = DeImbalanceOutput([T_s1], [first_stage], [])
        # Eq. 2–3: T_s2, (B, k2, C)
        for selection in self.second_selections:
            number = len(output.stages) - 1
            output = output + selection(output.selections[-1], mask_features, heads, number, need_weights)
        return output
