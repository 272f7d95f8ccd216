"""Settings of the published implementations, detectron2's YAML files and `KEY VALUE` pairs, as settings of this kit.

Every published key belongs to one of three groups: keys that set something here; keys without effect on the model, in
the published code either; and keys with values that this kit does not implement, which are errors. Unknown keys are
reported.
"""

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from dimaskdino.checkpoints.published_keys import (
    ALWAYS,
    DATASETS,
    DINO,
    HEAD,
    MODEL,
    NAMES,
    NO_EFFECT,
    RESNET_WEIGHTS,
    SAME,
    SWIN,
)
from dimaskdino.config import Config, load_config, parse_config, read_tree
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.resources import find_config

LARGEST = 2**63 - 1  # of the integers that a setting may have
_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.\w+)*$")


@dataclass(frozen=True)
class PublishedConfig:
    """A configuration file with its arguments, translated.

    Attributes:
        config: every setting.
        output: `OUTPUT_DIR`, if given.
        weights: a trained model that `MODEL.WEIGHTS` names, if it does.
        remarks: differences from the published code, one line each.
        without_effect: published keys that do not change the model.
    """

    config: Config
    output: Path | None = None
    weights: Path | None = None
    remarks: tuple[str, ...] = ()
    without_effect: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """The remarks, and one line with the keys without effect."""
        no_effect = [f"no effect on the model, in the published code either: {', '.join(self.without_effect)}"]
        return [*self.remarks, *(no_effect if self.without_effect else [])]


@dataclass
class _Translation:
    """Published settings while they are translated."""

    values: dict[str, Any] = field(default_factory=dict)
    output: Path | None = None
    weights: Path | None = None
    remarks: list[str] = field(default_factory=list)
    without_effect: list[str] = field(default_factory=list)


def load_settings(path: str | Path, arguments: Iterable[str] = ()) -> PublishedConfig:
    """Read a configuration, of this kit's or of the published form, and apply arguments of both forms to it.

    Args:
        path: YAML file, or the name of one of the kit's configurations.
        arguments: `key=value` (this kit's settings) and pairs `KEY`, `VALUE` (the published ones, such as
            `SOLVER.IMS_PER_BATCH`, `8`); this kit's win.

    Raises:
        UserError: a file or value that cannot be used.
    """
    path = find_config(path)
    overrides, pairs = split_arguments(arguments)
    published = is_published(path)
    base = Config() if published else load_config(path, overrides)
    keys = (flatten(read_tree(path, "_BASE_")) if published else {}) | pairs
    translation = _translate(keys, base.model.selection.k)
    if published:
        _choose_model(keys, path, translation)
    changes = [*_as_overrides(translation.values), *overrides]
    config = parse_config(base.model_dump(mode="json"), changes, str(path))
    return PublishedConfig(
        config,
        translation.output,
        translation.weights,
        tuple(translation.remarks),
        tuple(translation.without_effect),
    )


def translate_pairs(arguments: Iterable[str]) -> tuple[list[str], PublishedConfig]:
    """Arguments of both forms as `key=value`, for a model whose configuration is stored with it.

    Raises:
        UserError: a value that cannot be used, or a setting of the architecture.
    """
    overrides, pairs = split_arguments(arguments)
    translation = _translate(pairs, None)
    changes = [*_as_overrides(translation.values), *overrides]
    return changes, PublishedConfig(Config(), translation.output, translation.weights, tuple(translation.remarks))


def translate_changes(changes: Mapping[str, Any]) -> tuple[list[str], tuple[str, ...]]:
    """Published settings that differ from the published model's, as `key=value`, and remarks on the others."""
    translation = _translate(changes, Config().model.selection.k)
    return _as_overrides(translation.values), tuple(translation.remarks)


def known_keys() -> dict[str, Any]:
    """The published keys with a single counterpart, or none that varies, and their values in this kit's default."""
    known: dict[str, Any] = dict(ALWAYS)
    for key, ours in SAME.items():
        value: Any = Config()
        for name in ours.split("."):
            value = getattr(value, name)
        known[key] = list(value) if isinstance(value, tuple) else value
    k1, k2 = Config().model.selection.k
    known |= dict(zip(_LEVELS, (4, 3, "low2high", ["res3", "res4", "res5"]), strict=True))
    return known | dict(zip(_TOGETHER, (k1, k2), strict=True))


def is_published(path: Path) -> bool:
    """Whether a YAML file is of the published form: its sections are in capitals."""
    return any(key == "_BASE_" or _KEY.match(str(key)) for key in read_tree(path))


def starts_settings(argument: str) -> bool:
    """Whether an argument is a setting of either form, not the name of a file."""
    return bool(_KEY.match(argument)) or bool(re.match(r"[a-z_.]+=", argument))


def split_arguments(arguments: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """`key=value` arguments, and the others as pairs of a published key and its value.

    Raises:
        UserError: an argument that is neither, or a key without a value.
    """
    overrides, pairs, rest = [], {}, iter(arguments)
    for argument in rest:
        if _KEY.match(argument):
            value = next(rest, None)
            if value is None:
                raise UserError(f"{argument} needs a value after it: {argument} VALUE")
            pairs[argument] = _literal(value)
        elif "=" in argument:
            overrides.append(argument)
        else:
            raise UserError(
                f"'{argument}' is neither key=value, such as train.batch_size=8, nor a published KEY followed by its "
                "VALUE, such as SOLVER.IMS_PER_BATCH 8"
            )
    return overrides, pairs


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"A": {"B": 1}}` as `{"A.B": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _literal(value)
    return flat


def _literal(value: Any) -> Any:
    """A value as detectron2 reads it: texts such as `(1, 2)` are Python literals where they can be."""
    if not isinstance(value, str):
        return value
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return value
    return list(parsed) if isinstance(parsed, tuple) else parsed


def _as_overrides(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _translate(keys: Mapping[str, Any], k: tuple[int, ...] | None) -> _Translation:
    made = _Translation()
    for key, value in keys.items():
        kinds = _KINDS.get(key, (object,))
        if not isinstance(value, kinds) or (isinstance(value, int) and abs(value) > LARGEST):
            expected = " or ".join(kind.__name__ for kind in kinds if kind is not NoneType)
            raise UserError(f"{key} = {str(value)[:40]}: expected {expected}")
        if key in SAME:
            made.values[SAME[key]] = list(value) if isinstance(value, tuple) else value
        elif key in ALWAYS:
            if not _equal(value, ALWAYS[key]):
                raise UserError(f"{key} = {value} is an unsupported value; this kit implements only {ALWAYS[key]}")
        elif key in _SPECIAL:
            _SPECIAL[key](value, keys, made)
        elif key in NO_EFFECT:
            made.without_effect.append(key)
        elif key not in (*NAMES, *_TOGETHER, *_LEVELS):
            made.remarks.append(f"{key} = {value}: not a setting of the published files; ignored")
    _selections(keys, k, made)
    _feature_levels(keys, made)
    return made


def _equal(a: Any, b: Any) -> bool:
    return list(a) == list(b) if isinstance(a, list | tuple) and isinstance(b, list) else a == b


_TOGETHER = (f"{DINO}.FIRST_SELECTED_QUERIES", f"{DINO}.NUM_OBJECT_QUERIES")


def _selections(keys: Mapping[str, Any], k: tuple[int, ...] | None, made: _Translation) -> None:
    """k1 and k2 come from two keys."""
    first, last = (keys.get(key) for key in _TOGETHER)
    if first is None and last is None:
        return
    if k is None:
        raise UserError(
            f"{' and '.join(_TOGETHER)} belong to the architecture: name its configuration with --config, or set "
            "model.selection.k=[…]"
        )
    double = len(k) > 1 or first is not None
    made.values["model.selection.k"] = [first or k[0], last or k[-1]] if double else [last]


_LEVELS = tuple(
    f"{HEAD}.{name}"
    for name in (
        *("TOTAL_NUM_FEATURE_LEVELS", "NUM_FEATURE_LEVELS", "FEATURE_ORDER"),
        "DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES",
    )
)


def _feature_levels(keys: Mapping[str, Any], made: _Translation) -> None:
    """The encoder's levels come from four keys: their number, the backbone's among them, and the order."""
    total, count, order, names = (keys.get(key) for key in _LEVELS)
    finest = {("res3", "res4", "res5"): "res3", ("res2", "res3", "res4", "res5"): "res2"}
    if names is not None:
        chosen = finest.get(tuple(map(str, names)))
        if chosen is None:
            raise UserError(f"{_LEVELS[3]} = {names}: the encoder reads {' or '.join(map(str, map(list, finest)))}")
        made.values["model.pixel_decoder.finest"] = chosen
        count = len(names)  # a published file says 3 and names 4: the names count
    elif count is not None:
        made.values["model.pixel_decoder.finest"] = "res2" if count == 4 else "res3"
    if total is None:
        return
    if count is not None and total - count > 1:
        raise UserError(
            f"{_LEVELS[0]} = {total} with {count} levels of the backbone means {total - count} extra levels; this "
            "kit's models have at most one"
        )
    if order is not None and (order == "low2high") == (total == 3):
        raise UserError(
            f"{_LEVELS[2]} = {order} with {total} levels: 3 levels are held coarsest first (high2low), more finest "
            "first (low2high)"
        )
    made.values["model.pixel_decoder.levels"] = total


def _choose_model(keys: Mapping[str, Any], path: Path, made: _Translation) -> None:
    """Tell DI-MaskDINO from the baseline, which the published files do by code, not by settings."""
    own = [key for key in (f"{DINO}.FIRST_SELECTED_QUERIES", f"{DINO}.NUM_GUIDING_TOKENS") if key in keys]
    named = [str(keys[key]) for key in NAMES if key in keys]
    di = bool(own) or any(re.match(r"di[-_]?mask", name, re.IGNORECASE) for name in [*named, path.name])
    if not di:
        made.values["model.bato.enabled"] = False
        made.values["model.selection.k"] = [keys.get(f"{DINO}.NUM_OBJECT_QUERIES", 300)]
    made.remarks.append(f"{path.name} is read as {'DI-MaskDINO' if di else 'the baseline MaskDINO'}")


def _resnet_depth(value: Any, keys: Mapping[str, Any], made: _Translation) -> None:
    if keys.get(f"{MODEL}.BACKBONE.NAME") != "D2SwinTransformer":  # the published Swin files keep the key
        made.values["model.backbone.name"] = f"resnet{value}"


def _resnet_norm(value: Any, keys: Mapping[str, Any], made: _Translation) -> None:
    kinds = {"FrozenBN": "frozen", "BN": "batch"}
    if value in kinds:
        made.values["model.backbone.norm"] = kinds[value]
    else:
        raise UserError(f"{MODEL}.RESNETS.NORM = {value}: this kit has {' and '.join(kinds)}")


def _swin(value: Any, keys: Mapping[str, Any], made: _Translation) -> None:
    size = (keys.get(f"{MODEL}.SWIN.EMBED_DIM"), keys.get(f"{MODEL}.SWIN.WINDOW_SIZE"))
    if size in SWIN:
        made.values["model.backbone.name"] = SWIN[size]
    else:
        raise UserError(f"{MODEL}.SWIN with EMBED_DIM, WINDOW_SIZE = {size} is none of the known {list(SWIN)}")


def _swin_detail(key: str) -> Callable[[Any, Mapping[str, Any], _Translation], None]:
    def check(value: Any, keys: Mapping[str, Any], made: _Translation) -> None:
        expected = {"DROP_PATH_RATE": 0.3, "PATCH_SIZE": 4, "MLP_RATIO": 4.0, "QKV_BIAS": True, "PATCH_NORM": True}
        if key in expected and value != expected[key]:
            raise UserError(
                f"{MODEL}.SWIN.{key} = {value} is an unsupported value; this kit implements only {expected[key]}"
            )

    return check


def _backbone(value: Any, keys: Mapping[str, Any], made: _Translation) -> None:
    if value == "D2SwinTransformer":
        _swin(value, keys, made)
    elif value != "build_resnet_backbone":
        raise UserError(
            f"{MODEL}.BACKBONE.NAME = {value} is not known; set model.backbone.name to one of torchvision's or timm's"
        )


def _freeze(value: Any, keys: Mapping[str, Any], made: _Translation) -> None:
    """detectron2 counts the stem as a stage of its own."""
    if value == 1:
        raise UserError(
            f"{MODEL}.BACKBONE.FREEZE_AT = 1: this kit freezes the stem only together with res2; set it to 0 or 2"
        )
    made.values["model.backbone.freeze"] = max(0, value - 1)


def _weights(value: Any, keys: Mapping[str, Any], made: _Translation) -> None:
    """A backbone to start from, or a whole model."""
    if not value:
        made.values["model.backbone.weights"] = None
    elif RESNET_WEIGHTS in str(value) and "://" in str(value):
        made.values["model.backbone.weights"] = "IMAGENET1K_V1"
    elif "://" in str(value):
        made.remarks.append(f"{MODEL}.WEIGHTS = {value}: download the file and give its path")
    elif str(value).endswith(".pkl"):
        made.values["model.backbone.weights"] = str(value)
    else:
        made.weights = Path(str(value))


def _output(value: Any, keys: Mapping[str, Any], made: _Translation) -> None:
    made.output = Path(str(value))


def _datasets(split: str) -> Callable[[Any, Mapping[str, Any], _Translation], None]:
    def chosen(value: Any, keys: Mapping[str, Any], made: _Translation) -> None:
        names = [value] if isinstance(value, str) else list(map(str, value))
        if len(names) == 1 and names[0] in DATASETS:
            made.values["data.root"] = f"data/{DATASETS[names[0]][0]}"
            made.values[f"data.{split}"] = DATASETS[names[0]][1]
        elif names:
            made.remarks.append(
                f"DATASETS.{split.upper()} = {names}: name a folder with data.root and a split with data.{split}; "
                "'dimaskdino data import detectron2:NAME FOLDER' makes a folder of a registered dataset"
            )

    return chosen


def _warmup(value: Any, keys: Mapping[str, Any], made: _Translation) -> None:
    made.values["schedule.warmup"] = 0 if keys.get("SOLVER.WARMUP_FACTOR") == 1 else value


def _silent(value: Any, keys: Mapping[str, Any], made: _Translation) -> None:
    """Read together with another key."""


def _mixed_precision(value: Any, keys: Mapping[str, Any], made: _Translation) -> None:
    made.values["train.precision"] = "bf16" if value else "fp32"
    if value:
        made.remarks.append(
            "SOLVER.AMP.ENABLED = True is train.precision=bf16 here; detectron2 uses fp16 (train.precision=fp16)"
        )


def _noise(value: Any, keys: Mapping[str, Any], made: _Translation) -> None:
    made.values["model.denoising.box_noise"] = value
    made.values["model.denoising.label_noise"] = value / 2


def _flip(value: Any, keys: Mapping[str, Any], made: _Translation) -> None:
    if value in ("horizontal", "none"):
        made.values["data.jitter.flip"] = 0.5 if value == "horizontal" else 0.0
    else:
        raise UserError(f"INPUT.RANDOM_FLIP = {value}: this kit flips horizontally or not at all")


def _seed(value: Any, keys: Mapping[str, Any], made: _Translation) -> None:
    if value >= 0:  # below 0 means any
        made.values["train.seed"] = value


def _mapper(value: Any, keys: Mapping[str, Any], made: _Translation) -> None:
    if not str(value).endswith("instance_lsj"):
        raise UserError(f"INPUT.DATASET_MAPPER_NAME = {value}: this kit trains with large-scale jitter")


# types of the keys that are computed with
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys((*_TOGETHER, *_LEVELS[:2]), (int, NoneType)),
    _LEVELS[3]: (list, NoneType),
    **{f"{MODEL}.{key}": (int,) for key in ("BACKBONE.FREEZE_AT", "SWIN.EMBED_DIM", "SWIN.WINDOW_SIZE")},
    **{f"{MODEL}.{key}": (str,) for key in ("BACKBONE.NAME", "RESNETS.NORM")},
    **dict.fromkeys(("SEED", "SOLVER.WARMUP_ITERS", f"{MODEL}.RESNETS.DEPTH"), (int,)),
    **dict.fromkeys(("DATASETS.TRAIN", "DATASETS.TEST"), (str, list)),
    f"{DINO}.DN_NOISE_SCALE": (int, float),
}

_SPECIAL: dict[str, Callable[[Any, Mapping[str, Any], _Translation], None]] = {
    f"{MODEL}.BACKBONE.NAME": _backbone,
    f"{MODEL}.BACKBONE.FREEZE_AT": _freeze,
    f"{MODEL}.RESNETS.DEPTH": _resnet_depth,
    f"{MODEL}.RESNETS.NORM": _resnet_norm,
    **{
        f"{MODEL}.SWIN.{key}": _swin_detail(key)
        for key in (
            *("EMBED_DIM", "WINDOW_SIZE", "DEPTHS", "NUM_HEADS", "PRETRAIN_IMG_SIZE", "USE_CHECKPOINT", "PATCH_SIZE"),
            *("MLP_RATIO", "QKV_BIAS", "PATCH_NORM", "DROP_PATH_RATE"),
        )
    },
    f"{MODEL}.WEIGHTS": _weights,
    f"{DINO}.DN_NOISE_SCALE": _noise,
    "OUTPUT_DIR": _output,
    "DATASETS.TRAIN": _datasets("train"),
    "DATASETS.TEST": _datasets("val"),
    "INPUT.DATASET_MAPPER_NAME": _mapper,
    "INPUT.RANDOM_FLIP": _flip,
    "SOLVER.AMP.ENABLED": _mixed_precision,
    "SOLVER.WARMUP_ITERS": _warmup,
    "SOLVER.WARMUP_FACTOR": _silent,
    "SEED": _seed,
}
