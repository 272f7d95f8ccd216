"""AdamW with the paper's parameter groups, and the learning rate as a function of the step (section 9)."""

import torch
from torch import nn

from dimaskdino import config

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)


def build_optimizer(model: nn.Module, settings: config.Optimizer) -> torch.optim.AdamW:
    """AdamW with a learning rate for the backbone, and no weight decay for norm layers and embeddings.

    Frozen parameters are left out.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            undecayed = isinstance(module, (*_NORMS, nn.Embedding)) or "embedding" in name or "position_bias" in name
            factor = settings.backbone_lr_factor if module_name.startswith("backbone") else 1.0
            key = (settings.lr * factor, 0.0 if undecayed else settings.weight_decay)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay}
            for (lr, decay), parameters in groups.items()
        ],
        fused=True,  # one kernel for all parameters, on the CPU too
    )


def rate_factor(step: int, schedule: config.Schedule) -> float:
    """Factor of the base learning rates at a step, counted from 0."""
    warmup = min(1.0, (step + 1) / schedule.warmup) if schedule.warmup else 1.0
    drops = sum(step >= drop for drop in schedule.drops)
    return warmup * schedule.drop_factor**drops


def set_rate(optimizer: torch.optim.Optimizer, step: int, schedule: config.Schedule) -> float:
    """Set the learning rate of every group for a step; returns the highest."""
    factor = rate_factor(step, schedule)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return max(group["lr"] for group in optimizer.param_groups)
