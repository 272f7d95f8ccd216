"""AdamW with the paper's parameter groups, and the learning rate as a function of the step (section 9)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

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


def moments_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state of every parameter, by the name of the parameter."""
    moments = {}
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            moments[name] = dict(optimizer.state[parameter])
    return moments


def load_moments(
    optimizer: torch.optim.Optimizer, model: nn.Module, stored: dict[str, Any], names: Iterable[str]
) -> None:
    """Load the state of every parameter that `moments_by_name` returned, or that a file of version 0.2 holds.

    Args:
        optimizer: receives the state; its learning rates and other settings stay.
        model: the model that it trains.
        stored: the state by the names of parameters; in files of version 0.2 by position, as torch has it.
        names: the names of the stored model's parameters and buffers, in the order of the file. In version 0.2 the
            optimizer counted the parameters of each of its groups in this order.
    """
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    if "param_groups" in stored:
        group_of = {}
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                group_of[name_of[parameter]] = number
        groups: dict[int, list[str]] = {}
        for name in names:
            if name in group_of:
                groups.setdefault(group_of[name], []).append(name)
        order = [name for group in groups.values() for name in group]
        stored = {order[position]: state for position, state in stored["state"].items()}
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {
        position: stored[name_of[parameter]]
        for position, parameter in enumerate(parameters)
        if name_of[parameter] in stored
    }
    optimizer.load_state_dict(state)


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
