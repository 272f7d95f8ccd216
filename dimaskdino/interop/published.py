"""State dicts of the published DI-MaskDINO and MaskDINO checkpoints, renamed to this package's parameters."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from dimaskdino.errors import UserError
from dimaskdino.training.checkpoint import read_pt

_PIXEL = r"sem_seg_head\.pixel_decoder"
_HEAD = r"sem_seg_head\.predictor"
_FFN = [(r"linear([12])\.", r"ffn.linear\1.")]

# (pattern of a published key's beginning, what it becomes), the first that matches counts
_RULES: list[tuple[str, str]] = [
    (r"backbone\.stem\.conv1\.norm\.", "backbone.stem.1."),
    (r"backbone\.stem\.conv1\.", "backbone.stem.0."),
    (rf"{_PIXEL}\.input_proj\.", "pixel_decoder.projections."),
    (rf"{_PIXEL}\.transformer\.level_embed", "pixel_decoder.level_embedding"),
    (rf"{_PIXEL}\.adapter_1\.norm\.", "pixel_decoder.lateral.1."),
    (rf"{_PIXEL}\.adapter_1\.", "pixel_decoder.lateral.0."),
    (rf"{_PIXEL}\.layer_1\.norm\.", "pixel_decoder.output.1."),
    (rf"{_PIXEL}\.layer_1\.", "pixel_decoder.output.0."),
    (rf"{_PIXEL}\.mask_features\.", "pixel_decoder.mask_features."),
    (rf"{_HEAD}\.enc_output\.", "first_selection.project."),
    (rf"{_HEAD}\.enc_output_norm\.", "first_selection.norm."),
    (rf"{_HEAD}\.label_enc\.", "denoising.labels."),
    (rf"{_HEAD}\.(?:oldm\.|decoder\.)?class_embed\.", "heads.label."),
    (rf"{_HEAD}\.(?:decoder_norm|decoder\.norm)\.", "heads.norm."),
    (rf"{_HEAD}\.(?:oldm_norm|oldm\.norm)\.", "de_imbalance.0.norm."),
    (rf"{_HEAD}\.decoder\.mask_output_conv\.norm\.", "token_optimization.mask_features.1."),
    (rf"{_HEAD}\.decoder\.mask_output_conv\.", "token_optimization.mask_features.0."),
]

# (pattern of the beginning, new beginning, rules for the rest of the key)
_BLOCKS: list[tuple[str, str, list[tuple[str, str]]]] = [
    (
        r"backbone\.res([2-5])\.(\d+)\.",
        "backbone.stages.{0}.{1}.",
        [
            (r"conv([123])\.norm\.", r"bn\1."),
            (r"conv([123])\.", r"conv\1."),
            (r"shortcut\.norm\.", "downsample.1."),
            (r"shortcut\.", "downsample.0."),
        ],
    ),
    (
        rf"{_PIXEL}\.transformer\.encoder\.layers\.(\d+)\.",
        "pixel_decoder.layers.{0}.",
        [(r"self_attn\.", "attention."), (r"norm1\.", "attention.norm."), (r"norm2\.", "ffn.norm."), *_FFN],
    ),
    (
        rf"{_HEAD}\.decoder\.layers\.(\d+)\.",
        "decoder.layers.{0}.",
        [
            (r"cross_attn\.", "cross_attention."),
            (r"norm1\.", "cross_attention.norm."),
            (r"self_attn\.", "self_attention.attention."),
            (r"norm2\.", "self_attention.norm."),
            (r"norm3\.", "ffn.norm."),
            *_FFN,
        ],
    ),
    (
        rf"{_HEAD}\.oldm\.layers\.(\d+)\.",
        "de_imbalance.0.layers.{0}.",
        [
            (r"self_attn\.", "attention.attention."),
            (r"norm1\.", "attention.norm."),
            (r"norm2\.", "ffn.norm."),
            *_FFN,
        ],
    ),
    (
        rf"{_HEAD}\.(?:decoder\.)?query_guide_feature_update\.",
        "token_optimization.",
        [
            (r"multihead_attn\.", "attention.attention."),
            (r"norm1\.", "attention.norm."),
            (r"norm2\.", "ffn.norm."),
            *_FFN,
        ],
    ),
]

# MLPs: layer i is module 2·i of ours, a ReLU in between
_MLPS: list[tuple[str, str]] = [
    (rf"{_HEAD}\.(?:_bbox_embed|(?:decoder\.)?bbox_embed\.\d+)", "heads.box"),
    (rf"{_HEAD}\.(?:_oldm_bbox_embed|oldm_bbox_embed\.\d+|oldm\.bbox_embed\.\d+)", "de_imbalance.0.box"),
    (rf"{_HEAD}\.(?:decoder\.)?mask_embed", "heads.mask"),
    (rf"{_HEAD}\.oldm\.ref_point_head", "de_imbalance.0.position"),
    (rf"{_HEAD}\.decoder\.ref_point_head", "decoder.position_head"),
]

# held by published checkpoints but no parameter of the model
_WITHOUT_COUNTERPART = re.compile(r"criterion\.empty_weight$|.*\.num_batches_tracked$|pixel_(mean|std)$")


def read_published(path: Path) -> dict[str, Tensor]:
    """The state dict in a published checkpoint (`.pth`), alone or under `model`; no code in the file is run.

    Raises:
        UserError: the file is missing, truncated, or holds something else than tensors.
    """
    content = read_pt(path)
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict: names with tensors, alone or under 'model'")
    return state


def coco_classes() -> list[str]:
    """Names of COCO's 80 classes, in the order of their ids."""
    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # 91 ids, of which some are not in use
    return [name for name in names if name not in ("__background__", "N/A")]


@dataclass(frozen=True)
class Conversion:
    """A renamed state dict, and where every published key went.

    Attributes:
        state: our parameter names and their values.
        renamed: published key -> our key; aliases of one tensor go to one key.
        ignored: published keys that are no parameter of the model.
    """

    state: dict[str, Tensor]
    renamed: dict[str, str]
    ignored: list[str]


def our_name(key: str) -> str | None:
    """This package's name of a published key, None if there is none."""
    for pattern, name in _MLPS:
        if match := re.match(pattern + r"\.layers\.(\d+)\.", key):
            return f"{name}.{2 * int(match[1])}.{key[match.end() :]}"
    for pattern, name, rest in _BLOCKS:
        if match := re.match(pattern, key):
            numbers = list(match.groups())
            if name.startswith("backbone"):
                numbers[0] = str(int(numbers[0]) - 2)
            tail = _first(rest, key[match.end() :])
            return None if tail is None else name.format(*numbers) + tail
    return _first(_RULES, key)


def _first(rules: list[tuple[str, str]], key: str) -> str | None:
    for pattern, replacement in rules:
        if re.match(pattern, key):
            return re.sub("^" + pattern, replacement, key)
    return None


def convert_state(published: Mapping[str, Tensor]) -> Conversion:
    """Rename a published state dict.

    Raises:
        UserError: a key that is not known, or two names of one tensor that hold different values.
    """
    state: dict[str, Tensor] = {}
    renamed, ignored, unknown = {}, [], []
    for key, value in published.items():
        if _WITHOUT_COUNTERPART.match(key):
            ignored.append(key)
            continue
        name = our_name(key)
        if name is None:
            unknown.append(key)
            continue
        if name in state and not torch.equal(state[name], value):
            raise UserError(f"{key} should be another name of the tensor {name}, but its values differ")
        state[name] = value
        renamed[key] = name
    if unknown:
        raise UserError(
            f"{len(unknown)} keys are not known from published DI-MaskDINO or MaskDINO checkpoints, "
            f"first {', '.join(unknown[:5])}"
        )
    return Conversion(state, renamed, ignored)
