"""Backbone: image to features at strides 4, 8, 16 and 32."""

import difflib
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision import models
from torchvision.ops import FrozenBatchNorm2d

from dimaskdino import config
from dimaskdino.modeling.backbone_weights import SUFFIXES, load_timm, packaged_weights, resnets, torchvision_weights
from dimaskdino.modeling.structures import PIXEL_MEAN, PIXEL_STD
from dimaskdino.utils.errors import UserError

STRIDES = (4, 8, 16, 32)
SWIN_DROP_PATH = 0.3  # as detectors with a Swin backbone are trained


def build_backbone(cfg: config.Backbone) -> "ResNet | TimmBackbone":
    """Build the backbone of this name: a ResNet of torchvision, else a model of timm.

    Raises:
        UserError: there is no such backbone, timm is not installed, or the weights are not available.
    """
    return ResNet(cfg) if cfg.name in resnets() else TimmBackbone(cfg)


class _Backbone(nn.Module):
    """What all backbones share: their first stages can be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self._frozen_norms: list[nn.BatchNorm2d] = []

    def freeze(self, stages: int) -> None:
        """Keep everything that the features of the first stages depend on as it is, statistics of batch norm included.

        Args:
            stages: 0 to 4, for strides up to 4, 8, 16 and 32.
        """
        if not stages:
            return
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        was_training, shortest = self.training, STRIDES[-1] * 2
        with torch.enable_grad():
            features = self.eval()(torch.zeros(1, 3, shortest, shortest, device=parameters[0].device))
            last = features[STRIDES[stages - 1]]
            used = torch.autograd.grad(last.sum(), parameters, allow_unused=True)
        self.train(was_training)
        frozen = {id(p) for p, gradient in zip(parameters, used, strict=True) if gradient is not None}
        for module in self.modules():
            own = list(module.parameters(recurse=False))
            if any(id(parameter) in frozen for parameter in own):
                for parameter in own:
                    parameter.requires_grad_(False)
                if isinstance(module, nn.BatchNorm2d):
                    self._frozen_norms.append(module.eval())

    def train(self, mode: bool = True) -> "_Backbone":
        """Set the mode of all modules but frozen batch norm."""
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self


class FrozenBatchNorm(FrozenBatchNorm2d):
    """Batch norm with fixed statistics, in the dtype of its input.

    Under autocast torchvision's gives float32, and the ReLU after it keeps twice the memory for the backward pass.
    """

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        # (C, 1, 1), (C, 1, 1)
        scale = scale.to(x.dtype).view(-1, 1, 1)
        shift = shift.to(x.dtype).view(-1, 1, 1)
        # (B, C, H, W)
        return torch.addcmul(shift, x, scale)


class _ScaledResNet(models.ResNet):
    """A ResNet of torchvision whose stages have `width`, 2·width, … channels instead of 64, 128 and so on."""

    def __init__(self, like: models.ResNet, width: int, norm_layer: type[nn.Module]) -> None:
        self.width = width
        stages = (like.layer1, like.layer2, like.layer3, like.layer4)
        super().__init__(type(like.layer1[0]), [len(stage) for stage in stages], norm_layer=norm_layer)

    def _make_layer(self, block, planes: int, *args, **kwargs) -> nn.Sequential:
        return super()._make_layer(block, planes * self.width // 64, *args, **kwargs)


class ResNet(_Backbone):
    """A ResNet of torchvision without its classifier.

    Raises:
        UserError: the weights are not available.
    """

    def __init__(self, cfg: config.Backbone) -> None:
        super().__init__()
        norm = FrozenBatchNorm if cfg.norm == "frozen" else nn.BatchNorm2d
        net = models.get_model(cfg.name, weights=None, norm_layer=norm)
        if cfg.width != 64:
            if cfg.weights:
                raise UserError("model.backbone.width: weights are for width 64; drop one of the two settings")
            net = _ScaledResNet(net, cfg.width, norm)
        if cfg.weights:
            net.load_state_dict(torchvision_weights(cfg), strict=False)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        self.channels = {}
        for stride, stage in zip(STRIDES, self.stages, strict=True):
            convolutions = [module for module in stage.modules() if isinstance(module, nn.Conv2d)]
            self.channels[stride] = convolutions[-1].out_channels
        self.freeze(cfg.freeze)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> dict[int, Tensor]:
        """{stride: (B, channels[stride], H/stride, W/stride)}, finest first."""
        # (B, C, H/4, W/4), then half the size after each stage
        x = self.stem(pixels)
        features = {}
        for stride, stage in zip(STRIDES, self.stages, strict=True):
            x = stage(x)
            features[stride] = x
        return features


class TimmBackbone(_Backbone):
    """Any backbone of timm that has features at strides 4, 8, 16 and 32.

    The features of a Swin Transformer are layer-normalised, as published checkpoints expect. Batch norm is frozen if
    the settings say so. A backbone that was trained with another mean and standard deviation of pixels than the kit's
    gets them.

    Raises:
        UserError: timm is missing or does not know the name, the strides do not fit, or the weights are not available.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, cfg: config.Backbone) -> None:
        super().__init__()
        if cfg.width != 64:
            raise UserError(f"model.backbone.width is for torchvision's ResNets, not for {cfg.name}")
        file = packaged_weights(cfg)
        if file is None and Path(cfg.weights or "").suffix in SUFFIXES:
            file = Path(str(cfg.weights))
        self.net = _create(cfg, pretrained=cfg.weights is not None and file is None)
        if file is not None:
            load_timm(self.net, cfg, file)
        _pad_by_constants(self.net)  # images are padded to multiples of 32
        _pad_before_rolling(self.net)
        # from pixels normalised as in the kit to pixels normalised as in the backbone's own training
        mean = 255 * torch.tensor(self.net.pretrained_cfg["mean"], dtype=torch.float64)
        std = 255 * torch.tensor(self.net.pretrained_cfg["std"], dtype=torch.float64)
        scale = torch.tensor(PIXEL_STD, dtype=torch.float64) / std
        shift = (torch.tensor(PIXEL_MEAN, dtype=torch.float64) - mean) / std
        self._as_given = bool((scale - 1).abs().max() < 1e-3 and shift.abs().max() < 1e-3)
        self.register_buffer("scale", scale.float().view(3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(3, 1, 1), persistent=False)
        channels = self.net.feature_info.channels()
        self.channels = dict(zip(STRIDES, channels, strict=True))
        swin = cfg.name.startswith("swin")
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels) if swin else None
        self._channels_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        self.freeze(cfg.freeze)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> dict[int, Tensor]:
        """{stride: (B, channels[stride], H/stride, W/stride)}, finest first."""
        # a map per stride, as the backbone's own pixels make them
        features = self.net(pixels if self._as_given else pixels * self.scale + self.shift)
        if self.norms is not None:
            features = [norm(x) for norm, x in zip(self.norms, features, strict=True)]
        if self._channels_last:
            features = [x.permute(0, 3, 1, 2).contiguous() for x in features]
        return dict(zip(STRIDES, features, strict=True))


class ConstantPaddingConv2d(nn.Conv2d):
    """A convolution with TensorFlow's padding, for sides that are multiples of its stride s.

    Of max(d·(k − 1) + 1 − s, 0) zeros for a kernel k with dilation d, the smaller half comes first. timm computes the
    padding from the size of every input, which cannot be exported for open sizes.
    """

    @classmethod
    def of(cls, other: nn.Conv2d) -> "ConstantPaddingConv2d":
        """A convolution with the parameters of another one."""
        sizes: dict[str, Any] = {
            "kernel_size": other.kernel_size,
            "stride": other.stride,
            "dilation": other.dilation,
            "groups": other.groups,
        }
        made = cls(other.in_channels, other.out_channels, bias=other.bias is not None, **sizes)
        made.weight, made.bias = other.weight, other.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, h, w)."""
        padding: list[int] = []
        for k, s, d in zip(self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1], strict=True):
            zeros = max(d * (k - 1) + 1 - s, 0)
            padding += [zeros // 2, zeros - zeros // 2]
        return super().forward(nn.functional.pad(x, padding))


def _pad_by_constants(net: nn.Module) -> None:
    from timm.layers import Conv2dSame

    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv2dSame):
                setattr(module, name, ConstantPaddingConv2d.of(child))


def _pad_before_rolling(net: nn.Module) -> None:
    """Let Swin's blocks pad their maps to whole windows before they roll them, as the published detectors do.

    timm rolls first, so that the windows at the lower and right border hold other tokens.
    """
    from timm.models.swin_transformer import SwinTransformerBlock

    class PaddedBlock(SwinTransformerBlock):
        def _attn(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
            height, width = x.shape[1:3]
            down, right = -height % self.window_size[0], -width % self.window_size[1]
            # (B, h + down, w + right, C)
            padded = nn.functional.pad(x, (0, 0, 0, right, 0, down))
            return super()._attn(padded)[:, :height, :width]

    for module in net.modules():
        if type(module) is SwinTransformerBlock:
            module.__class__ = PaddedBlock


def _create(cfg: config.Backbone, pretrained: bool) -> Any:
    try:
        import timm
        from timm.layers import freeze_batch_norm_2d
    except ImportError:
        raise UserError(
            f"model.backbone.name: '{cfg.name}' is none of torchvision's {', '.join(resnets())}; for timm's "
            "backbones install timm: pip install timm"
        ) from None
    name = cfg.name.split(".")[0]
    if name not in timm.list_models():
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0)
        raise UserError(
            f"model.backbone.name: '{cfg.name}' is neither one of torchvision's {', '.join(resnets())} nor one of "
            f"timm's (near it: {', '.join(near)})"
        )
    # Swin computes its attention masks for the size of the input
    options: dict[str, Any] = {}
    if name.startswith("swin_"):
        options = {"strict_img_size": False, "always_partition": True, "drop_path_rate": SWIN_DROP_PATH}
    try:
        with torch.device("meta"):  # only to know its strides
            plain = cast(Any, timm.create_model(cfg.name, features_only=True, **options))
        reductions = plain.feature_info.reduction()
        wanted = [i for i, reduction in enumerate(reductions) if reduction in STRIDES]
        if [reductions[i] for i in wanted] != list(STRIDES):
            raise UserError(
                f"model.backbone.name: {cfg.name} has features at strides {reductions}; the model needs {STRIDES}"
            )
        net = timm.create_model(cfg.name, features_only=True, out_indices=wanted, pretrained=pretrained, **options)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"model.backbone.name: timm cannot extract features from {cfg.name} ({error})") from None
    except OSError as error:
        raise UserError(
            f"model.backbone.weights: timm could not download weights of {cfg.name} ({error}). Download the file "
            "on another machine and give its path"
        ) from None
    return freeze_batch_norm_2d(net) if cfg.norm == "frozen" else net
