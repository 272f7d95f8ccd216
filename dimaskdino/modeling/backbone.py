"""Backbone: image -> features at strides 4, 8, 16, 32."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision import models
from torchvision.ops import FrozenBatchNorm2d

from dimaskdino import config
from dimaskdino.errors import UserError

STRIDES = (4, 8, 16, 32)


class _ScaledResNet(models.ResNet):
    """A ResNet of torchvision whose stages have `width`, 2·width, … channels instead of 64, 128 and so on."""

    def __init__(self, like: models.ResNet, width: int, norm_layer: type[nn.Module]) -> None:
        self.width = width
        stages = (like.layer1, like.layer2, like.layer3, like.layer4)
        super().__init__(type(like.layer1[0]), [len(stage) for stage in stages], norm_layer=norm_layer)

    def _make_layer(self, block, planes: int, *args, **kwargs) -> nn.Sequential:
        return super()._make_layer(block, planes * self.width // 64, *args, **kwargs)


class Backbone(nn.Module):
    """A ResNet of torchvision without its classifier; every stage is trainable.

    Raises:
        UserError: the name is not a ResNet of torchvision, or the weights cannot be had.
    """

    def __init__(self, settings: config.Backbone) -> None:
        super().__init__()
        names = [name for name in models.list_models(module=models) if name.startswith(("resnet", "resnext", "wide_"))]
        if settings.name not in names:
            raise UserError(f"model.backbone.name: '{settings.name}' is none of {', '.join(names)}")
        norm = FrozenBatchNorm2d if settings.norm == "frozen" else nn.BatchNorm2d
        net = models.get_model(settings.name, weights=None, norm_layer=norm)
        if settings.width != 64:
            if settings.weights:
                raise UserError("model.backbone.width: weights are for width 64; drop one of the two settings")
            net = _ScaledResNet(net, settings.width, norm)
        if settings.weights:
            net.load_state_dict(_backbone_weights(settings), strict=False)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        last = [list(stage[-1].modules()) for stage in self.stages]
        convolutions = [[m for m in modules if isinstance(m, nn.Conv2d)] for modules in last]
        self.channels = {s: convs[-1].out_channels for s, convs in zip(STRIDES, convolutions, strict=True)}

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> dict[int, Tensor]:
        """{stride: (B, channels[stride], H/stride, W/stride)}, finest first."""
        x = self.stem(pixels)
        features = {}
        for stride, stage in zip(STRIDES, self.stages, strict=True):
            x = stage(x)
            features[stride] = x
        return features


def _backbone_weights(settings: config.Backbone) -> dict[str, Tensor]:
    """Weights by torchvision's name (downloaded once) or from a file, checked against the architecture."""
    assert settings.weights is not None
    if Path(settings.weights).suffix in (".pth", ".pt"):
        try:
            state = torch.load(settings.weights, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(
                f"model.backbone.weights: cannot read {settings.weights} as a file of tensors: {error}"
            ) from error
    else:
        try:
            state = models.get_model_weights(settings.name)[settings.weights].get_state_dict()
        except KeyError as error:
            raise UserError(
                f"model.backbone.weights: torchvision has no weights '{settings.weights}' for {settings.name}; a file "
                "must end in .pth or .pt"
            ) from error
        except OSError as error:
            raise UserError(
                f"model.backbone.weights: '{settings.weights}' could not be downloaded ({error}). Download the file on "
                "another machine and give its path (….pth), or train from scratch with "
                "model.backbone.weights=null model.backbone.norm=batch"
            ) from error
    return _checked(state, settings)


def _checked(state: dict[str, Tensor], settings: config.Backbone) -> dict[str, Tensor]:
    expected = {k: v.shape for k, v in models.get_model(settings.name, weights=None).state_dict().items()}
    wrong = [
        key
        for key, shape in expected.items()
        if not key.startswith("fc.") and "num_batches" not in key and (key not in state or state[key].shape != shape)
    ]
    if wrong:
        raise UserError(
            f"model.backbone.weights: {settings.weights} does not hold a torchvision {settings.name}: "
            f"{wrong[0]} is missing or has another shape ({len(wrong)} such)"
        )
    return {key: value for key, value in state.items() if not key.startswith("fc.")}
