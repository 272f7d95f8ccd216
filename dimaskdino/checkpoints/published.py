"""Published DI-MaskDINO and MaskDINO checkpoints: their parameters renamed, their architecture inferred."""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from dimaskdino import config
from dimaskdino.checkpoints.model_files import TrainedModel, load_weights
from dimaskdino.config import parse_config
from dimaskdino.modeling import Detector
from dimaskdino.modeling.backbone_weights import recognise_resnet
from dimaskdino.utils.errors import UserError, first_line
from dimaskdino.utils.files import write_atomically
from dimaskdino.utils.serialization import read_state_dict

_PIXEL = r"sem_seg_head\.pixel_decoder"
_HEAD = r"sem_seg_head\.predictor"
_SECOND_SELECTION = "de_imbalance.second_selections.0"
_FFN = [(r"linear([12])\.", r"ffn.linear\1.")]

# (pattern at the beginning of a published key, replacement); the first match applies
_RULES: list[tuple[str, str]] = [
    (r"backbone\.stem\.conv1\.norm\.", "backbone.stem.1."),
    (r"backbone\.stem\.conv1\.", "backbone.stem.0."),
    (r"backbone\.patch_embed\.", "backbone.net.patch_embed."),
    (r"backbone\.norm([0-3])\.", r"backbone.norms.\1."),
    (rf"{_PIXEL}\.input_proj\.", "pixel_decoder.projections."),
    (rf"{_PIXEL}\.transformer\.level_embed", "pixel_decoder.level_embedding"),
    (rf"{_PIXEL}\.adapter_1\.norm\.", "pixel_decoder.lateral.1."),
    (rf"{_PIXEL}\.adapter_1\.", "pixel_decoder.lateral.0."),
    (rf"{_PIXEL}\.layer_1\.norm\.", "pixel_decoder.output.1."),
    (rf"{_PIXEL}\.layer_1\.", "pixel_decoder.output.0."),
    (rf"{_PIXEL}\.mask_features\.", "pixel_decoder.mask_features."),
    (rf"{_HEAD}\.enc_output\.", "de_imbalance.first_selection.project."),
    (rf"{_HEAD}\.enc_output_norm\.", "de_imbalance.first_selection.norm."),
    (rf"{_HEAD}\.label_enc\.", "denoising.labels."),
    (rf"{_HEAD}\.(?:oldm\.|decoder\.)?class_embed\.", "heads.label."),
    (rf"{_HEAD}\.(?:decoder_norm|decoder\.norm)\.", "heads.norm."),
    (rf"{_HEAD}\.(?:oldm_norm|oldm\.norm)\.", f"{_SECOND_SELECTION}.norm."),
    (rf"{_HEAD}\.decoder\.mask_output_conv\.norm\.", "bato.mask_features.1."),
    (rf"{_HEAD}\.decoder\.mask_output_conv\.", "bato.mask_features.0."),
]

# (pattern at the beginning, new beginning, rules for the rest of the key)
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
    # timm's Swin Transformer has the downsampling at the beginning of a stage, the original at its end
    (r"backbone\.layers\.(\d+)\.(?=blocks\.)", "backbone.net.layers_{0}.", [(r"", "")]),
    (r"backbone\.layers\.(\d+)\.(?=downsample\.)", "backbone.net.layers_{0}.", [(r"", "")]),
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
        "de_imbalance.second_selections.0.layers.{0}.",
        [
            (r"self_attn\.", "attention.attention."),
            (r"norm1\.", "attention.norm."),
            (r"norm2\.", "ffn.norm."),
            *_FFN,
        ],
    ),
    (
        rf"{_HEAD}\.(?:decoder\.)?query_guide_feature_update\.",
        "bato.",
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
    (
        rf"{_HEAD}\.(?:_oldm_bbox_embed|oldm_bbox_embed\.\d+|oldm\.bbox_embed\.\d+)",
        f"{_SECOND_SELECTION}.box",
    ),
    (rf"{_HEAD}\.(?:decoder\.)?mask_embed", "heads.mask"),
    (rf"{_HEAD}\.oldm\.ref_point_head", f"{_SECOND_SELECTION}.position"),
    (rf"{_HEAD}\.decoder\.ref_point_head", "decoder.position_head"),
]

# keys of published checkpoints that are no parameters of the model
_WITHOUT_COUNTERPART = re.compile(
    r"criterion\.empty_weight$|.*\.num_batches_tracked$|pixel_(mean|std)$|backbone\..*\.relative_position_index$"
)


@dataclass(frozen=True)
class Conversion:
    """A renamed state dict, and what became of every published key.

    Attributes:
        state: values by this package's parameter names.
        renamed: published key to this package's; several names of one tensor have one target.
        ignored: published keys that are no parameters of the model.
    """

    state: dict[str, Tensor]
    renamed: dict[str, str]
    ignored: list[str]


def our_name(key: str) -> str | None:
    """This package's name of a published key; None if it is unknown."""
    for pattern, name in _MLPS:
        if match := re.match(pattern + r"\.layers\.(\d+)\.", key):
            return f"{name}.{2 * int(match[1])}.{key[match.end() :]}"
    for pattern, name, rest in _BLOCKS:
        if match := re.match(pattern, key):
            numbers = list(match.groups())
            if name.startswith("backbone"):
                numbers[0] = str(int(numbers[0]) + (-2 if ".stages." in name else key.count(".downsample.")))
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
        UserError: a key is unknown, or two names of one tensor hold different values.
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


def is_published(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a whole published model, rather than of a backbone."""
    return any(key.startswith("sem_seg_head.") for key in state)


def architecture(state: Mapping[str, Tensor], path: Path) -> config.Model:
    """The model that renamed weights belong to, inferred from their names and shapes.

    The weights do not say, so the published values are used: the numbers of selected and guiding tokens, eight heads,
    and `bitmask` boxes for three levels and for encoders that read res2, `mask2box` for the others.

    Raises:
        UserError: the backbone is not recognised.
    """

    def count(prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})

    levels, double = count("pixel_decoder.projections."), count("de_imbalance.second_selections.0.layers.")
    # the encoder reads res2 if its first projection has as many input channels as the lateral convolution on res2
    first, lateral = (state[f"pixel_decoder.{name}.0.weight"].shape[1] for name in ("projections.0", "lateral"))
    finest = "res2" if first == lateral else "res3"
    bato = any(key.startswith("bato.") for key in state)
    published = config.Model()
    return config.Model(
        classes=len(state["heads.label.bias"]),
        hidden_dim=state["heads.label.weight"].shape[1],
        backbone=config.Backbone(name=_backbone_name(state, path)),
        pixel_decoder=config.PixelDecoder(
            levels=levels,
            finest=finest,
            layers=count("pixel_decoder.layers."),
            ffn_dim=len(state["pixel_decoder.layers.0.ffn.linear1.bias"]),
        ),
        selection=config.Selection(
            k=published.selection.k if double else published.selection.k[-1:],
            token_interaction_layers=double or published.selection.token_interaction_layers,
            mask_to_box="bitmask" if levels == 3 or finest == "res2" else "mask2box",
        ),
        decoder=config.Decoder(
            layers=count("decoder.layers."), ffn_dim=len(state["decoder.layers.0.ffn.linear1.bias"])
        ),
        bato=config.BATO(enabled=bato, guidance="T_i" if bato and not double else "Q_bal"),
    )


# levels, finest level and boxes of the recorded cases in tests/fixtures/golden, all with ResNet-50
_COMPARED = {(4, "res3", "mask2box"), (3, "res3", "bitmask"), (5, "res2", "bitmask")}


def not_compared(model: config.Model) -> list[str]:
    """The parts of an architecture whose outputs no recorded case of the published code covers (docs/model.md)."""
    parts = []
    if model.backbone.name.startswith("swin"):
        parts.append(f"{model.backbone.name} in a whole model (its features are compared with Swin-T and Swin-L)")
    elif model.backbone.name != "resnet50":
        parts.append(f"the backbone {model.backbone.name}")
    levels, finest, boxes = model.pixel_decoder.levels, model.pixel_decoder.finest, model.selection.mask_to_box
    if (levels, finest, boxes) not in _COMPARED:
        parts.append(f"{levels} levels from {finest} with mask_to_box={boxes}")
    return parts


def _backbone_name(state: Mapping[str, Tensor], path: Path) -> str:
    width = state.get("backbone.net.patch_embed.proj.bias")
    if width is not None:
        window = state["backbone.net.layers_0.blocks.0.attn.relative_position_bias_table"].shape[0]
        names = {(96, 13**2): "tiny_patch4_window7_224", (128, 23**2): "base_patch4_window12_384"}
        names |= {(192, 23**2): "large_patch4_window12_384"}
        if (len(width), window) in names:
            return f"swin_{names[len(width), window]}"
    blocks = tuple(
        len({key.split(".")[3] for key in state if key.startswith(f"backbone.stages.{i}.")}) for i in range(4)
    )
    depths = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
    if blocks in depths and "backbone.stages.0.0.conv3.weight" in state:
        return f"resnet{depths[blocks]}"
    raise UserError(f"{path} has a backbone that is not recognised; name a configuration with --config")


def load_published(
    path: Path, overrides: Iterable[str] = (), settings: config.Config | None = None
) -> tuple[TrainedModel, Conversion]:
    """Load a published checkpoint as a model of this kit.

    Args:
        path: `.pth`, or `.pkl` from detectron2.
        overrides: `key=value` settings.
        settings: the configuration it was trained with, overrides applied; inferred from the weights by default.

    Raises:
        UserError: it cannot be read, holds unknown keys, or does not fit the configuration.
    """
    conversion = convert_state(read_state_dict(path))
    if settings is None:
        try:
            found = config.Config(model=architecture(conversion.state, path))
        except (LookupError, TypeError, ValueError) as error:  # the last: pydantic's
            raise UserError(
                f"{path} is no whole published model ({first_line(error)}); name a configuration with --config"
            ) from None
        settings = parse_config(found.model_dump(mode="json"), overrides, str(path))
    model = settings.model
    if parts := not_compared(model):
        print(f"note: not compared with outputs of the published code: {'; '.join(parts)}", file=sys.stderr)
    untrained = model.without_backbone_weights()
    detector = Detector(untrained)
    load_weights(detector, conversion.state, str(path))
    known, count = coco_classes(), model.classes
    names = known if count == len(known) else config.unnamed_classes(count)
    return TrainedModel(detector.eval(), settings.model_copy(update={"model": untrained}), names, 0), conversion


def convert_backbone(path: Path, output: Path) -> tuple[str, int]:
    """Write the weights of a ResNet under torchvision's names, for `model.backbone.weights`.

    Args:
        path: torchvision's `.pth` or detectron2's `.pkl`.
        output: `.safetensors`.

    Returns:
        The name of the ResNet and the number of its tensors.

    Raises:
        UserError: it is no ResNet of torchvision.
    """
    name, state = recognise_resnet(path)
    write_atomically(
        output, lambda partial: save_file({key: value.contiguous() for key, value in state.items()}, partial)
    )
    return name, len(state)


def coco_classes() -> list[str]:
    """Names of the 80 classes of COCO, in the order of their ids."""
    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # 91 ids, of which some are not in use
    return [name for name in names if name not in ("__background__", "N/A")]
