"""Building blocks shared by several modules: embeddings, MLP, feed-forward block, attention."""

import contextlib
import itertools
import math

import torch
from jaxtyping import Bool, Float, Int
from ms_deform_attn import ms_deform_attn
from torch import Tensor, nn
from torch.nn import functional

from dimaskdino.modeling.structures import FeatureLevels

TEMPERATURE = 10000.0
CACHED_TOKENS = 2048


def inverse_sigmoid(x: Tensor, epsilon: float = 1e-5) -> Tensor:
    """σ⁻¹ of x clamped to [0, 1], finite at both ends."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=epsilon) / (1 - x).clamp(min=epsilon))


def through_logits(boxes: Tensor) -> Tensor:
    """σ(σ⁻¹(boxes)), which keeps them away from 0 and 1. The published code passes boxes on as logits."""
    return inverse_sigmoid(boxes).sigmoid()


def sine_features(x: Tensor, features: int) -> Tensor:
    """Sine embedding of positions, in periods of the slowest wave.

    Args:
        x: (...), positions, usually in [0, 1].
        features: number of features, even; sine and cosine alternate.

    Returns:
        (..., features) in float32, also under autocast: the fast waves need the precision.
    """
    pair = torch.arange(features // 2, device=x.device, dtype=torch.float32)
    # (..., features / 2): an angle per wave
    angle = x.float().unsqueeze(-1) * 2 * math.pi / TEMPERATURE ** (2 * pair / features)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def sine_positions(levels: FeatureLevels) -> Float[Tensor, "N C"]:
    """Position embedding of every feature token: C/2 features of y, then C/2 of x (specification, section 2)."""
    C, device = levels.tokens.shape[-1], levels.tokens.device
    embeddings = []
    for h, w in levels.shapes:
        y = torch.arange(1, h + 1, device=device) / (h + 1e-6)
        x = torch.arange(1, w + 1, device=device) / (w + 1e-6)
        # (h, w, C/2), (h, w, C/2)
        along_y = sine_features(y, C // 2)[:, None].expand(h, w, C // 2)
        along_x = sine_features(x, C // 2)[None].expand(h, w, C // 2)
        embeddings.append(torch.cat([along_y, along_x], dim=-1).reshape(h * w, C))
    return torch.cat(embeddings)


def sine_boxes(boxes: Float[Tensor, "B Q 4"], C: int) -> Float[Tensor, "B Q D"]:
    """`sine4` of the specification: C/2 features each of y, x, w, h, so D = 2·C."""
    # (B, Q, 4), y first
    yxwh = torch.cat([boxes[..., 1:2], boxes[..., :1], boxes[..., 2:]], dim=-1)
    return sine_features(yxwh, C // 2).flatten(-2)


def gather_rows(x: Float[Tensor, "B N D"], indices: Int[Tensor, "B k"]) -> Float[Tensor, "B k D"]:
    """The rows `indices` of each image."""
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def select_top(scores: Float[Tensor, "B N K"], k: int) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"]]:
    """The k rows of each image with the highest score of any class, or all rows if there are fewer.

    Returns:
        Their highest scores in descending order, and their row numbers.
    """
    # (B, N), then twice (B, k)
    best = scores.amax(-1)
    top = best.topk(min(k, best.shape[1]), dim=1)
    return top.values, top.indices


def group_norm(C: int) -> nn.GroupNorm:
    """Group norm with 32 groups, fewer for narrow models: one channel cannot normalise a level of one cell."""
    return nn.GroupNorm(min(32, C // 2), C)


class MLP(nn.Sequential):
    """Linear layers of the given widths with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers[:-1])


class FeedForward(nn.Module):
    """x = LN(x + FFN(x))."""

    def __init__(self, C: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(C, hidden)
        self.linear2 = nn.Linear(hidden, C)
        self.norm = nn.LayerNorm(C)

    def forward(self, x: Float[Tensor, "B Q C"]) -> Float[Tensor, "B Q C"]:
        # many tokens in parts, so that what lies between the layers stays in a CPU's cache
        if x.device.type != "cpu" or x.shape[1] <= CACHED_TOKENS or torch.compiler.is_compiling():
            return self.norm(x + self._change(x))
        return self.norm(x + torch.cat([self._change(part) for part in x.split(CACHED_TOKENS, dim=1)], dim=1))

    def _change(self, x: Tensor) -> Tensor:
        # in place, a gradient of this view would be copied as a whole
        return self.linear2(functional.relu(self.linear1(x), inplace=not torch.is_grad_enabled()))


class MultiHeadAttention(nn.Module):
    """MHA(q, k, v), arXiv 1706.03762, section 3.2.2, with the parameters of `nn.MultiheadAttention`.

    Batches come first throughout. PyTorch's module puts them second for its projections, and copies them for that.
    """

    def __init__(self, C: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * C, C))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * C))
        self.out_proj = nn.Linear(C, C)
        nn.init.zeros_(self.out_proj.bias)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(
        self,
        query: Float[Tensor, "B Q C"],
        key: Float[Tensor, "B R C"],
        value: Float[Tensor, "B R C"],
        attention_mask: Bool[Tensor, "Q R"] | None = None,
        need_weights: bool = False,
    ) -> tuple[Float[Tensor, "B Q C"], Float[Tensor, "B Q R"] | None]:
        """Attend; see `Attention.forward`."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        # (B, heads, Q, C/heads), then twice (B, heads, R, C/heads)
        q = self._split(functional.linear(query, weights[0], biases[0]))
        k = self._split(functional.linear(key, weights[1], biases[1]))
        v = self._split(functional.linear(value, weights[2], biases[2]))
        allowed = None if attention_mask is None else ~attention_mask
        # on a CPU the backward pass of narrow heads takes several times as long in bfloat16 as in float32
        slow = q.device.type == "cpu" and q.requires_grad
        if slow:
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(q.device.type, enabled=False) if slow else contextlib.nullcontext():
            attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        # (B, Q, C)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not need_weights:
            return output, None
        # (B, heads, Q, R)
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        return output, logits.softmax(-1).mean(1)

    def _split(self, x: Float[Tensor, "B Q C"]) -> Float[Tensor, "B H Q D"]:
        """(B, Q, C) as one part of the channels for every head."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """x = LN(x + MHA(q, k, v)), post-norm multi-head attention."""

    def __init__(self, C: int, heads: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(C, heads)
        self.norm = nn.LayerNorm(C)

    def forward(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Float[Tensor, "B Q C"], Tensor | None]:
        """Attend and normalise.

        Args:
            x: (B, Q, C), input of the residual connection.
            query: (B, Q, C).
            key: (B, R, C).
            value: (B, R, C).
            attention_mask: (Q, R) bool, True where attention is forbidden.
            need_weights: also return the attention (B, Q, R), mean over the heads.
        """
        # (B, Q, C), and with need_weights (B, Q, R)
        attended, attention = self.attention(query, key, value, attention_mask, need_weights)
        return self.norm(x + attended), attention


class DeformableAttention(nn.Module):
    """x = LN(x + MSDeformAttn(query, reference, value)), Deformable DETR, Eq. 3."""

    def __init__(self, C: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(C, heads * levels * points * 2)
        self.attention_weights = nn.Linear(C, heads * levels * points)
        self.value_proj = nn.Linear(C, C)
        self.output_proj = nn.Linear(C, C)
        self.norm = nn.LayerNorm(C)

    def reset_parameters(self) -> None:
        """Initialise offsets to one direction per head, 1 to `points` long, and attention to uniform."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        length = torch.arange(1, self.points + 1)
        offsets = direction.view(self.heads, 1, 1, 2) * length.view(1, 1, self.points, 1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.sampling_offsets.weight)
        for parameter in self.attention_weights.parameters():
            nn.init.zeros_(parameter)
        nn.init.zeros_(self.value_proj.bias)
        nn.init.zeros_(self.output_proj.bias)

    def sampling(
        self, query: Float[Tensor, "B Q C"], centre: Tensor, unit: Tensor
    ) -> tuple[Float[Tensor, "B Q heads levels points 2"], Float[Tensor, "B Q heads levels points"]]:
        """Sampling locations and attention weights, in float32 also under autocast."""
        B, Q, _ = query.shape
        offsets = self.sampling_offsets(query).view(B, Q, self.heads, self.levels, self.points, 2).float()
        weights = self.attention_weights(query).view(B, Q, self.heads, self.levels * self.points).float()
        weights = weights.softmax(-1).view(B, Q, self.heads, self.levels, self.points)
        return centre[:, :, None, None, None] + offsets * unit, weights

    def forward(
        self,
        x: Float[Tensor, "B Q C"],
        query: Float[Tensor, "B Q C"],
        centre: Float[Tensor, "B Q 2"],
        unit: Tensor,
        memory: FeatureLevels,
    ) -> tuple[Float[Tensor, "B Q C"], tuple[Tensor, Tensor]]:
        """Attend and normalise.

        Args:
            x: input of the residual connection.
            query: determines the sampling locations and weights.
            centre: (x, y) in [0, 1], where the offsets start.
            unit: what an offset of 1 is, in parts of the image; broadcasts to (B, Q, heads, levels, points, 2). Feature
                tokens count in cells of each level, decoder queries in parts of their boxes.
            memory: the feature tokens that are sampled.

        Returns:
            The new x, and the sampling locations and weights.
        """
        # (B, Q, heads, levels, points, 2), (B, Q, heads, levels, points)
        locations, weights = self.sampling(query, centre, unit)
        # (B, N, heads, C/heads), then (B, Q, C)
        value = self.value_proj(memory.tokens).unflatten(-1, (self.heads, -1))
        attended = ms_deform_attn(value, memory.shapes, locations, weights)
        return self.norm(x + self.output_proj(attended)), (locations, weights)


def reset_matrices(module: nn.Module) -> None:
    """Initialise every matrix Xavier-uniform, then the deformable attentions with their own initialisation."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for child in module.modules():
        if isinstance(child, DeformableAttention):
            child.reset_parameters()
