"""Checkpoints: written whole or not at all, and read without running any code.

A run keeps `last.pt` and `previous.pt` for resuming and writes `model.safetensors`, weights with their configuration,
for everything else.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dimaskdino.config import Config, parse_config
from dimaskdino.errors import UserError
from dimaskdino.files import read_pt
from dimaskdino.modeling import Detector

_BY_CLASS = ("heads.label.weight", "heads.label.bias", "denoising.labels.weight")
LAST, PREVIOUS, MODEL = "last.pt", "previous.pt", "model.safetensors"


@dataclass(frozen=True)
class TrainedModel:
    """A model with what is needed to use it."""

    detector: Detector
    config: Config
    classes: list[str]
    step: int


def write_whole(path: Path, write: Callable[[Path], None], keep_as: Path | None = None) -> None:
    """Write beside the target, flush to disk, then rename: a reader sees the old file or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(partial, path)
    # a full disk surfaces as OSError from Python, as RuntimeError or SafetensorError from the writers
    except (OSError, RuntimeError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        kept = (
            "; the checkpoints written before are untouched" if path.exists() or (keep_as and keep_as.exists()) else ""
        )
        raise UserError(f"cannot write {path}: {error}. Is the disk full? Free some space and resume{kept}") from error


def save_resume_point(folder: Path, state: dict[str, Any]) -> None:
    """Write `last.pt`, keeping the one before as `previous.pt`.

    Raises:
        UserError: it cannot be written, a full disk for example; what was there is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / LAST, lambda path: torch.save(state, path), keep_as=folder / PREVIOUS)


def load_resume_point(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The newest readable resume point of a folder, or None, and a remark if the newest was unreadable.

    Raises:
        UserError: there are resume points but none can be read.
    """
    candidates = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    remark = None
    for path in candidates:
        try:
            return _read_resume_point(path), remark
        except UserError as error:
            remark = str(error)
    if candidates:
        raise UserError(f"{remark}; no other resume point is left. Delete {folder} to start again")
    return None, None


def _read_resume_point(path: Path) -> dict[str, Any]:
    state = read_pt(path)
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(
            f"{path} is no checkpoint of this kit; a published one becomes one by 'dimaskdino convert {path} OUTPUT'"
        )
    return state


def save_model(
    path: Path, detector: Detector, config: Config, classes: list[str], step: int, half: bool = False
) -> None:
    """Weights, configuration and class names in one safetensors file.

    Args:
        path: the file.
        detector: what to write.
        config: what it was made and trained with.
        classes: names of the classes.
        step: how long it was trained.
        half: matrices and kernels in float16; vectors such as the statistics of batch norm, which may lie outside its
            range and need little room, stay as they are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"config": config.model_dump_json(), "classes": json.dumps(classes), "step": str(step)}
    state = {key: value.detach().cpu().contiguous() for key, value in detector.state_dict().items()}
    if half:
        state = {key: value.half() if value.ndim > 1 else value for key, value in state.items()}
    write_whole(path, lambda partial: save_file(state, partial, metadata))


def load_model(path: Path, device: torch.device | str = "cpu", overrides: Iterable[str] = ()) -> TrainedModel:
    """A trained model from a run folder, a `model.safetensors` or a resume point (`.pt`).

    Args:
        path: the folder or file.
        device: where the model goes.
        overrides: `key=value` settings that differ from those stored with the model, such as data.root.

    Raises:
        UserError: there is none, it is truncated, or it does not fit the configuration stored with it.
    """
    path = _model_file(path)
    weights, config, classes, step = _read_model(path)
    settings = parse_config(json.loads(config), overrides, str(path))
    untrained = settings.model.model_copy(
        update={"backbone": settings.model.backbone.model_copy(update={"weights": None})}
    )
    detector = Detector(untrained)
    load_weights(detector, weights, str(path))
    return TrainedModel(detector.to(device).eval(), settings, classes, step)


def _model_file(path: Path) -> Path:
    """The file meant by a run folder or file."""
    if path.is_dir():
        candidates = [path / "checkpoints" / name for name in (MODEL, LAST, PREVIOUS)]
        found = [candidate for candidate in candidates if candidate.exists()]
        if not found:
            raise UserError(f"{path} holds no trained model (looked for {', '.join(map(str, candidates))})")
        return found[0]
    if not path.exists():
        raise UserError(f"the model {path} does not exist")
    return path


def _read_model(path: Path) -> tuple[dict[str, Tensor], str, list[str], int]:
    """Weights, configuration as json, class names and step of a file."""
    if path.suffix == ".safetensors":
        weights, metadata = _read_safetensors(path)
        return weights, metadata["config"], json.loads(metadata["classes"]), int(metadata["step"])
    state = _read_resume_point(path)
    return state["model"], state["config"], state["classes"], state["step"]


def start_from(detector: Detector, weights: dict[str, Tensor], source: str) -> list[str]:
    """Put the weights of a trained model into a new one, for fine-tuning.

    Args:
        detector: the new model; it keeps its own weights where they depend on the classes and the number of classes
            differs.
        weights: state dict of the trained model.
        source: names it in errors.

    Returns:
        The parameters that were left as they are.

    Raises:
        UserError: it is of another architecture.
    """
    own = detector.state_dict()
    by_class = [key for key in _BY_CLASS if key in weights and weights[key].shape != own[key].shape]
    load_weights(detector, weights | {key: own[key] for key in by_class}, source)
    return by_class


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read, it may be truncated ({error})") from None
    if "config" not in metadata:
        raise UserError(f"{path} holds tensors but no configuration of this kit")
    return weights, metadata


def load_weights(detector: Detector, weights: dict[str, Tensor], source: str) -> None:
    """Put weights into a model.

    Raises:
        UserError: they are of another number of classes or another architecture; nothing is changed then.
    """
    expected = detector.state_dict()
    classes = weights.get("heads.label.bias")
    if classes is not None and classes.shape != expected["heads.label.bias"].shape:
        raise UserError(
            f"{source} was trained for {len(classes)} classes, the configuration says "
            f"{len(expected['heads.label.bias'])} (model.classes)"
        )
    missing, surplus = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    reshaped = sorted(k for k in set(expected) & set(weights) if expected[k].shape != weights[k].shape)
    problems = [
        f"{len(keys)} parameters {what} (first {keys[0]})"
        for what, keys in (("missing", missing), ("not in the model", surplus), ("of another shape", reshaped))
        if keys
    ]
    if problems:
        raise UserError(
            f"{source} is of another architecture than the configuration: {', '.join(problems)}. "
            "Compare its configuration with yours"
        )
    detector.load_state_dict(weights)
