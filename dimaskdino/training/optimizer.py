"""AdamW with the paper's parameter groups, and the learning rate as a function of the step (section 9)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dimaskdino import config
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.serialization import is_plain

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)


def build_optimizer(model: nn.Module, settings: config.Optimizer) -> torch.optim.AdamW:
    """AdamW with a learning rate for the backbone, and no weight decay for norm layers and embeddings.

    Frozen parameters are left out. The groups hold the names of their parameters (`param_names`), which stay the same
    when modules are wrapped afterwards.

    Raises:
        UserError: `lr_factors` names a module that the model does not have.
    """
    known = {name for name, _ in model.named_modules()}
    for chosen in settings.lr_factors:
        if not chosen or chosen not in known:
            raise UserError(f"optimizer.lr_factors: the model has no module '{chosen}'")
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            undecayed = isinstance(module, (*_NORMS, nn.Embedding)) or "embedding" in name or "position_bias" in name
            factor = settings.backbone_lr_factor if module_name.startswith("backbone") else 1.0
            for chosen, own in sorted(settings.lr_factors.items()):  # an outer module comes before those inside it
                if f"{module_name}.".startswith(f"{chosen}."):
                    factor = own
            key = (settings.lr * factor, 0.0 if undecayed else settings.weight_decay)
            groups.setdefault(key, []).append((f"{module_name}.{name}" if module_name else name, parameter))
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay}
            for (lr, decay), parameters in groups.items()
        ],
        fused=True,  # one kernel for all parameters, on the CPU too
    )


def moments_by_name(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state of every parameter, by the name of the parameter."""
    moments = {}
    for group in optimizer.param_groups:
        for name, parameter in _parameters(group):
            if parameter in optimizer.state:
                moments[name] = dict(optimizer.state[parameter])
    return moments


def load_moments(optimizer: torch.optim.Optimizer, stored: dict[str, Any], names: Iterable[str]) -> None:
    """Load the state of every parameter that `moments_by_name` returned, or that a file of version 0.2 holds.

    Args:
        optimizer: receives the state; its learning rates and other settings stay.
        stored: the state by the names of parameters; in files of version 0.2 by position, as torch has it.
        names: the names of the stored model's parameters and buffers, in the order of the file. In version 0.2 the
            optimizer counted the parameters of each of its groups in this order.

    Raises:
        UserError: the state belongs to parameters that this training does not have, or is not that of AdamW.
    """
    own = {name: x for group in optimizer.param_groups for name, x in _parameters(group)}
    if "param_groups" in stored:
        stored = _named(stored["state"], optimizer, names)
    unknown = sorted(map(str, stored.keys() - own.keys()))
    if unknown:
        raise UserError(f"the resume point has optimizer states of other parameters, the first {unknown[0]}")
    for name, values in stored.items():
        if not _fits(values, own[name]):  # PyTorch would read and write beyond its memory
            raise UserError(
                f"the resume point has a damaged optimizer state of {name}; delete it to use an earlier one"
            )
    state = optimizer.state_dict()
    state["state"] = {position: stored[name] for position, name in enumerate(own) if name in stored}
    optimizer.load_state_dict(state)


def _parameters(group: dict[str, Any]) -> Iterable[tuple[str, nn.Parameter]]:
    return zip(group["param_names"], group["params"], strict=True)


def _fits(values: Any, parameter: Tensor) -> bool:
    """Whether values are the state that AdamW has of a parameter."""
    shapes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    if not isinstance(values, dict) or values.keys() != shapes.keys() or not all(map(is_plain, values.values())):
        return False
    return all(x.shape == shapes[key] and x.is_floating_point() and x.isfinite().all() for key, x in values.items())


def _named(state: dict[int, Any], optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, Any]:
    """The state of version 0.2, which is by position, by the names of the parameters."""
    group_of = {}
    for number, group in enumerate(optimizer.param_groups):
        group_of.update(dict.fromkeys(group["param_names"], number))
    groups: dict[int, list[str]] = {}
    for name in names:
        if name in group_of:
            groups.setdefault(group_of[name], []).append(name)
    order = [name for group in groups.values() for name in group]
    return {order[position]: values for position, values in state.items()}


def learning_rate_factor(step: int, schedule: config.Schedule) -> float:
    """Factor of the base learning rates at a step, counted from 0."""
    warmup = min(1.0, (step + 1) / schedule.warmup) if schedule.warmup else 1.0
    drops = sum(step >= drop for drop in schedule.drops)
    return warmup * schedule.drop_factor**drops


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, schedule: config.Schedule) -> None:
    """Set the learning rate of every group for a step."""
    factor = learning_rate_factor(step, schedule)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
