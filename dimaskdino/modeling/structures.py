"""Data structures of a forward pass: batch, feature levels, selected tokens, stages, trace, instances.

Shapes use B images, N feature tokens, C channels, Q queries, K classes, M objects (the most in one image).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
SIZE_DIVISOR = 32


def padded_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(H, W) that images of these (h, w) are padded to: the largest sides, rounded up to multiples of 32."""
    height = max(h for h, _ in sizes)
    width = max(w for _, w in sizes)
    return SIZE_DIVISOR * math.ceil(height / SIZE_DIVISOR), SIZE_DIVISOR * math.ceil(width / SIZE_DIVISOR)


def filled(values: Sequence[float], device: torch.device | str) -> Float[Tensor, " n"]:
    """A tensor of a few numbers, written by the device: unlike a copy from the host, it does not synchronise."""
    return torch.cat([torch.full((1,), value, device=device) for value in values])


@dataclass(frozen=True)
class ImageBatch:
    """Normalised images, zero-padded at the right and the bottom to one size.

    Attributes:
        pixels: (B, 3, H, W), H and W multiples of 32.
        sizes: (h, w) of each image before padding.
    """

    pixels: Float[Tensor, "B 3 H W"]
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def from_images(cls, images: Sequence[Tensor], device: torch.device | str = "cpu") -> "ImageBatch":
        """Normalise and pad RGB images, each (3, h, w) with values 0 to 255, of any dtype."""
        sizes = tuple((image.shape[-2], image.shape[-1]) for image in images)
        height, width = padded_size(sizes)
        mean, std = filled(PIXEL_MEAN, device).view(3, 1, 1), filled(PIXEL_STD, device).view(3, 1, 1)
        pixels = torch.zeros(len(images), 3, height, width, device=device)
        for padded, image, (h, w) in zip(pixels, images, sizes, strict=True):
            padded[:, :h, :w] = (image.to(device, non_blocking=True) - mean) / std
        return cls(pixels, sizes)

    @property
    def padded_size(self) -> tuple[int, int]:
        return self.pixels.shape[-2], self.pixels.shape[-1]


@dataclass(frozen=True)
class Targets:
    """The objects of a batch, padded to the largest number M in one image.

    Attributes:
        labels: (B, M) class indices.
        boxes: (B, M, 4) cxcywh, relative to the padded size.
        masks: (B, M, H, W) uint8, 0 or 1, at the padded size.
        counts: number of objects per image; rows beyond are padding (zeros).
    """

    labels: Int[Tensor, "B M"]
    boxes: Float[Tensor, "B M 4"]
    masks: UInt8[Tensor, "B M H W"]
    counts: tuple[int, ...]

    @property
    def valid(self) -> Bool[Tensor, "B M"]:
        number = torch.arange(self.labels.shape[1], device=self.labels.device)
        return torch.stack([number < count for count in self.counts])

    def pin_memory(self) -> "Targets":
        """Copy to pinned memory."""
        return Targets(self.labels.pin_memory(), self.boxes.pin_memory(), self.masks.pin_memory(), self.counts)

    def to(self, device: torch.device | str) -> "Targets":
        labels = self.labels.to(device, non_blocking=True)
        boxes = self.boxes.to(device, non_blocking=True)
        return Targets(labels, boxes, self.masks.to(device, non_blocking=True), self.counts)


@dataclass(frozen=True)
class FeatureLevels:
    """Feature tokens of several levels, concatenated, with the shapes and strides of the levels.

    Attributes:
        tokens: (B, N, C).
        shapes: (h, w) of each level, in the order of the tokens.
        strides: input pixels per cell of each level, in the same order.
    """

    tokens: Float[Tensor, "B N C"]
    shapes: tuple[tuple[int, int], ...]
    strides: tuple[int, ...]

    @classmethod
    def from_maps(cls, maps: Mapping[int, Tensor]) -> "FeatureLevels":
        """From {stride: (B, C, h, w)}. The order of the mapping is the order of the levels."""
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps.values()], dim=1)
        return cls(tokens, tuple((x.shape[-2], x.shape[-1]) for x in maps.values()), tuple(maps))

    @property
    def sizes(self) -> list[int]:
        """Number of tokens per level."""
        return [h * w for h, w in self.shapes]

    def with_tokens(self, tokens: Float[Tensor, "B N C"]) -> "FeatureLevels":
        return replace(self, tokens=tokens)

    def reversed(self) -> "FeatureLevels":
        """The same levels in reversed order: finest first becomes coarsest first."""
        tokens = torch.cat(self.tokens.split(self.sizes, dim=1)[::-1], dim=1)
        return FeatureLevels(tokens, self.shapes[::-1], self.strides[::-1])

    def map(self, stride: int) -> Float[Tensor, "B C h w"]:
        """The level with this stride as a map."""
        level = self.strides.index(stride)
        tokens = self.tokens.split(self.sizes, dim=1)[level]
        # in this order the strides are those of a channels-last map, which a CPU resizes several times as fast
        return tokens.unflatten(1, self.shapes[level]).permute(0, 3, 1, 2)

    def centres(self) -> Float[Tensor, "N 2"]:
        """(x, y) in [0, 1] of every token's cell centre."""
        centres = []
        for height, width in self.shapes:
            y = (torch.arange(height, device=self.tokens.device) + 0.5) / height
            x = (torch.arange(width, device=self.tokens.device) + 0.5) / width
            centres.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2))
        return torch.cat(centres)

    def cells(self) -> Float[Tensor, "levels 2"]:
        """Width and height of a cell of every level, in parts of the image."""
        sides = []
        for height, width in self.shapes:
            sides += [1 / width, 1 / height]
        return filled(sides, self.tokens.device).view(-1, 2)


@dataclass(frozen=True)
class SelectedTokens:
    """The tokens that one selection keeps: T_s1, T_s2 or T_s3.

    Attributes:
        content: (B, k, C).
        boxes: (B, k, 4) cxcywh in [0, 1].
        indices: (B, k), their rows in `Trace.T_i`.
        scores: (B, k), the highest class logit, by which they were selected.
    """

    content: Float[Tensor, "B k C"]
    boxes: Float[Tensor, "B k 4"]
    indices: Int[Tensor, "B k"]
    scores: Float[Tensor, "B k"]


@dataclass(frozen=True)
class Queries:
    """Decoder queries: content, and boxes as positions, cxcywh in [0, 1]."""

    content: Float[Tensor, "B Q C"]
    boxes: Float[Tensor, "B Q 4"]

    def before(self, others: "Queries") -> "Queries":
        """Concatenate these queries and the others."""
        content = torch.cat([self.content, others.content], dim=1)
        return Queries(content, torch.cat([self.boxes, others.boxes], dim=1))

    def after(self, start: int) -> "Queries":
        """The queries from row `start` on."""
        return Queries(self.content[:, start:], self.boxes[:, start:])


@dataclass(frozen=True)
class Stage:
    """The predictions of one stage. Masks are computed on demand.

    Attributes:
        name: `first_selection`, `token_interaction.i` or `decoder.i` (0: before the first layer).
        class_logits: (B, Q, K).
        boxes: (B, Q, 4) cxcywh in [0, 1] of the padded input.
        mask_embedding: (B, Q, C), None for the stages without masks.
        mask_features: (B, C, H/4, W/4), None for the stages without masks.
    """

    name: str
    class_logits: Float[Tensor, "B Q K"]
    boxes: Float[Tensor, "B Q 4"]
    mask_embedding: Float[Tensor, "B Q C"] | None = None
    mask_features: Float[Tensor, "B C h w"] | None = None

    @property
    def has_masks(self) -> bool:
        return self.mask_embedding is not None

    def mask_logits(self) -> Float[Tensor, "B Q h w"]:
        """Mask logits of all queries at stride 4.

        Raises:
            ValueError: the stage predicts no masks.
        """
        if self.mask_embedding is None or self.mask_features is None:
            raise ValueError(f"stage {self.name} predicts no masks")
        return torch.einsum("bqc,bchw->bqhw", self.mask_embedding, self.mask_features)

    def split(self, rows: int) -> tuple["Stage", "Stage"]:
        """Split into two stages: the first `rows` queries, and the others."""
        return self._rows(slice(rows)), self._rows(slice(rows, None))

    def _rows(self, rows: slice) -> "Stage":
        embedding = None if self.mask_embedding is None else self.mask_embedding[:, rows]
        return replace(
            self, class_logits=self.class_logits[:, rows], boxes=self.boxes[:, rows], mask_embedding=embedding
        )


@dataclass(frozen=True)
class BATOOutput:
    """The output of BATO.

    Attributes:
        T_bal: the optimised feature tokens.
        mask_features: F', (B, C, H/4, W/4).
        T_g_mask, T_g_box: the guiding tokens, (B, G, C).
        guiding_indices: (B, G), the rows of the guide that they come from; None without generation.
        attention: (B, N, G), how much each feature token takes from each guiding token, mean over the heads; None if
            not asked for.
    """

    T_bal: FeatureLevels
    mask_features: Float[Tensor, "B C h w"]
    T_g_mask: Float[Tensor, "B G C"]
    T_g_box: Float[Tensor, "B G C"]
    guiding_indices: Tensor | None
    attention: Tensor | None


@dataclass(frozen=True)
class Trace:
    """The paper's intermediates by the paper's names, assembled by `Detector.forward(trace=True)`.

    Attributes:
        T_i: feature tokens from the extractor, as De-Imbalance and the decoder see them.
        T_s: the selections in order; T_s[0] is T_s1.
        interaction_attention: per token-interaction layer (B, k, k), mean over the heads.
        Q_bal: output of the first decoder layer for the matching queries.
        mask_features: F, (B, C, H/4, W/4).
        references: per decoder layer the boxes (B, Q, 4) that it starts from, cxcywh.
        sampling: per decoder layer the sampling locations (B, Q, heads, levels, points, 2) and weights.
        bato: guiding tokens, attention, T_bal and F' of the first use of BATO; None without BATO.
    """

    T_i: FeatureLevels
    T_s: list[SelectedTokens]
    interaction_attention: list[Tensor]
    Q_bal: Queries
    mask_features: Float[Tensor, "B C h w"]
    references: list[Tensor]
    sampling: list[tuple[Tensor, Tensor]]
    bato: BATOOutput | None

    @property
    def T_s1(self) -> SelectedTokens:
        return self.T_s[0]

    @property
    def T_s2(self) -> SelectedTokens:
        return self.T_s[1]

    @property
    def T_g_mask(self) -> Tensor | None:
        return None if self.bato is None else self.bato.T_g_mask

    @property
    def T_g_box(self) -> Tensor | None:
        return None if self.bato is None else self.bato.T_g_box

    @property
    def guiding_indices(self) -> Tensor | None:
        return None if self.bato is None else self.bato.guiding_indices

    @property
    def guidance_attention(self) -> Tensor | None:
        return None if self.bato is None else self.bato.attention

    @property
    def T_bal(self) -> FeatureLevels | None:
        return None if self.bato is None else self.bato.T_bal

    @property
    def mask_features_bal(self) -> Tensor | None:
        return None if self.bato is None else self.bato.mask_features


@dataclass(frozen=True)
class Predictions:
    """The result of one forward pass.

    Attributes:
        stages: by name, in the order of the model.
        denoising: predictions of the denoising queries by decoder stage; empty outside training.
        denoising_groups: number of denoising groups; each holds every object once.
        trace: the intermediates, with `trace=True`.
    """

    stages: dict[str, Stage]
    denoising: dict[str, Stage] = field(default_factory=dict)
    denoising_groups: int = 0
    trace: Trace | None = None

    @property
    def last(self) -> Stage:
        return next(reversed(self.stages.values()))


@dataclass(frozen=True)
class CroppedMasks:
    """Masks of one size, each stored only where it has pixels.

    Attributes:
        size: (h, w) of every mask.
        corners: (top, left) of each crop.
        crops: (h', w') of each mask; outside of its crop it is False.
    """

    size: tuple[int, int]
    corners: tuple[tuple[int, int], ...]
    crops: tuple[Bool[Tensor, "_ _"], ...]

    @classmethod
    def of(cls, masks: Bool[Tensor, "u h w"]) -> "CroppedMasks":
        """Whole masks."""
        return cls((masks.shape[-2], masks.shape[-1]), ((0, 0),) * len(masks), tuple(masks))

    def __len__(self) -> int:
        return len(self.crops)

    def only(self, chosen: Sequence[int]) -> "CroppedMasks":
        """Some of the masks, in this order."""
        return CroppedMasks(self.size, tuple(self.corners[i] for i in chosen), tuple(self.crops[i] for i in chosen))

    def whole(self) -> Bool[Tensor, "u h w"]:
        """All masks at their full size."""
        device = self.crops[0].device if self.crops else None
        masks = torch.zeros(len(self), *self.size, dtype=torch.bool, device=device)
        for mask, (top, left), crop in zip(masks, self.corners, self.crops, strict=True):
            mask[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
        return masks

    def cpu(self) -> "CroppedMasks":
        """The masks in the memory of the CPU, in one transfer."""
        if not self.crops or self.crops[0].device.type == "cpu":
            return self
        return CroppedMasks.of(self.whole().cpu())


@dataclass(frozen=True)
class Instances:
    """The detections in one image, best first.

    Attributes:
        boxes: (n, 4) xyxy in pixels of the output size.
        scores: (n,) in [0, 1].
        labels: (n,) class indices.
        query_masks: masks of the u distinct queries among the detections, at the output size; None without masks.
        mask_index: (n,), the row in `query_masks` of each detection.
    """

    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, " n"]
    labels: Int[Tensor, " n"]
    query_masks: CroppedMasks | None
    mask_index: Int[Tensor, " n"]

    @property
    def masks(self) -> Bool[Tensor, "n h w"]:
        """The masks of the detections. Each has the size of the image, so many in a large image need much memory.

        Raises:
            ValueError: the stage predicts no masks.
        """
        if self.query_masks is None:
            raise ValueError("these detections have no masks")
        return self.query_masks.only(self.mask_index.tolist()).whole()


def resize_to(features: Float[Tensor, "B C h w"], like: Tensor) -> Tensor:
    """Bilinear resize to the height and width of `like`."""
    return functional.interpolate(features, size=like.shape[-2:], mode="bilinear", align_corners=False)
