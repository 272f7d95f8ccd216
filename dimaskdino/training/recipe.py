"""A configuration for a dataset and a machine, with the reason of each choice.

The rules:

* Starting point: a given model, whose architecture is then kept; otherwise a small backbone with ImageNet weights, and
  the other modules of the model that ships with the kit.
* Image size: 95 % of the objects shall be at least `OBJECT_PIXELS` wide (√area), which are three cells of the masks;
  at most `LARGEST[device]` pixels, since the time grows with the area.
* Augmentation: scales and flips of the small configuration for photographs, whatever the starting point.
* Tokens and detections: more than the most crowded image has objects.
* Learning rate: that of the starting configuration, times √(batch size / its batch size) as AdamW needs it.
* Length: `EPOCHS` passes over the images, at least `LEAST_STEPS` steps; the rate drops at 75 and 90 % of it.
* Memory: a few steps are tried; as long as they need more than `MEMORY_SHARE` of the memory, each process splits its
  batch into more parts.
"""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import BaseModel

from dimaskdino.checkpoints import load_checkpoint
from dimaskdino.config import Config, Validation, as_yaml, load_config
from dimaskdino.data.annotations import read_annotations
from dimaskdino.data.check import Statistics, describe
from dimaskdino.data.coco import find_split, find_splits
from dimaskdino.runs.folder import RunFolder
from dimaskdino.training.trainer import train
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.threads import available_cores, available_memory

FROM_IMAGENET = "photographs/dimaskdino_lite0"
OBJECT_PIXELS = 12
SMALLEST = 160
LARGEST = {"cpu": 320, "cuda": 1024}
MOST_TOKENS = 300  # published
EPOCHS = 20
LEAST_STEPS = 1000
MEMORY_SHARE = 0.7
TRIED_STEPS = 12  # steps take longer with more objects, so a few say little


@dataclass(frozen=True)
class Machine:
    """What a training can use: `device` is cpu or cuda; memory in bytes is that of the device."""

    device: str
    name: str
    cores: int
    memory: int
    bf16: bool

    @classmethod
    def here(cls) -> "Machine":
        cores = available_cores()
        if torch.cuda.is_available():
            found = torch.cuda.get_device_properties(0)
            return cls("cuda", found.name, cores, found.total_memory, torch.cuda.is_bf16_supported())
        return cls("cpu", f"{cores} CPU cores", cores, available_memory(), False)


@dataclass(frozen=True)
class Recipe:
    """A configuration, and the reason of each setting that was chosen for the dataset or the machine."""

    config: Config
    reasons: Mapping[str, str]

    def summary(self) -> str:
        """The chosen settings with their reasons, one per line."""
        values = {key: self.config for key in self.reasons}
        for key in self.reasons:
            for name in key.split("."):
                values[key] = getattr(values[key], name)
        return "\n".join(f"{key}={as_yaml(values[key])}  ({reason})" for key, reason in self.reasons.items())

    def text(self) -> str:
        """The configuration as YAML. Each setting has its reason or its meaning beside it."""
        lines = ["# Written by 'dimaskdino new'. Settings marked with * were chosen for this dataset and this machine."]
        return "\n".join([*lines, *_commented(self.config, self.reasons)]) + "\n"


def _commented(section: BaseModel, reasons: Mapping[str, str], prefix: str = "") -> list[str]:
    lines, indent = [], "  " * prefix.count(".")
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            lines += [f"{indent}{name}:", *_commented(value, reasons, f"{key}.")]
            continue
        written = as_yaml(values[name])
        comment = f"* {reasons[key]}" if key in reasons else field.description
        lines.append(f"{indent}{name}: {written}" + (f"  # {comment}" if comment else ""))
    return lines


def propose(data: Path, machine: Machine, weights: str | None = None) -> Recipe:
    """A configuration by the rules of this module, before it is tried.

    Args:
        data: COCO-format folder with a training and a validation split.
        machine: where the training will run.
        weights: a trained model to start from, instead of ImageNet weights.

    Raises:
        UserError: the folder lacks a split, its annotations cannot be used, or the model cannot be read.
    """
    if not data.is_dir():
        raise UserError(f"the dataset folder {data} does not exist")
    splits = find_splits(data)
    train_split = next((name for name in splits if name.startswith("train")), None)
    val_split = next((name for name in splits if name.startswith("val")), None)
    if train_split is None or val_split is None:
        raise UserError(
            f"{data} has no {'validation' if train_split else 'training'} split, only {', '.join(splits) or 'none'}; "
            f"'dimaskdino data import {data} FOLDER' makes a folder that has both"
        )
    file, folder = find_split(data, train_split)
    annotations = read_annotations(file)
    found = describe(annotations, folder)
    if not found.objects:
        raise UserError(f"{file} has no objects to learn from")
    base = _starting_point(weights)
    choices = _choices(base, found, machine, weights)
    choices |= {
        "data.root": (str(data), "the dataset"),
        "data.train": (train_split, f"{found.images:,} images, {found.objects:,} objects"),
        "data.val": (val_split, "its validation split"),
        "data.shapes": (None, "these data exist already"),
    }
    return _chosen(base, choices)


def _starting_point(weights: str | None) -> Config:
    if weights is None:
        return load_config(FROM_IMAGENET)
    trained = load_checkpoint(weights)
    # its architecture and its recipe; what the file does not record has the defaults
    config = trained.config
    train = config.train.model_copy(update={"weights": Path(weights), "weights_of": ()})
    return config.model_copy(update={"model": config.model.without_backbone_weights(), "train": train})


def _choices(base: Config, found: Statistics, machine: Machine, weights: str | None) -> dict[str, tuple[Any, str]]:
    small, most = found.relative_sizes[0], found.objects_per_image[2]
    wanted = OBJECT_PIXELS / max(small, 1e-3)
    size = 32 * round(min(max(wanted, SMALLEST), LARGEST[machine.device]) / 32)
    reached = f"5 % of the objects are smaller than {small:.1%} of the image, {small * size:.0f} pixels at this size"
    kept = min(max(base.model.selection.k[-1], 10 * math.ceil(1.2 * most / 10)), MOST_TOKENS)
    selected = (*(max(k, 2 * kept) for k in base.model.selection.k[:-1]), kept)
    detections = max(base.evaluation.detections, 10 * math.ceil(1.2 * most / 10))
    batch = base.train.batch_size if weights is None else min(base.train.batch_size, 4)
    rate = float(f"{base.optimizer.lr * math.sqrt(batch / base.train.batch_size):.2g}")
    steps = _rounded(max(LEAST_STEPS, EPOCHS * found.images / batch))
    choices: dict[str, tuple[Any, str]] = {
        "model.classes": (len(found.classes), ", ".join(c.name for c in found.classes[:8])),
        "data.jitter.size": (size, reached),
        "data.resize.shortest": (size, "as in training"),
        "data.resize.longest": (32 * round(1.5 * size / 32), "for images that are not square"),
        "data.workers": (max(1, min(4, machine.cores // 2)), f"for {machine.cores} cores"),
        "optimizer.lr": (rate, f"{base.optimizer.lr:g} x √({batch} / {base.train.batch_size})"),
        **_of_length(steps, f"{steps * batch / found.images:.0f} passes over {found.images:,} images"),
        "train.batch_size": (batch, "of the starting point" if weights is None else "small, for few images"),
        "train.precision": ("bf16" if machine.bf16 else "fp32", machine.name),
    }
    if selected != base.model.selection.k:
        choices["model.selection.k"] = (selected, f"the most crowded image has {most} objects")
    if detections != base.evaluation.detections:
        choices["evaluation.detections"] = (detections, f"the most crowded image has {most} objects")
    if weights is not None:
        jitter = load_config(FROM_IMAGENET).data.jitter
        for key in ("min_scale", "max_scale", "flip"):
            choices[f"data.jitter.{key}"] = (getattr(jitter, key), "variety for few images")
        choices["train.weights"] = (Path(weights), "the class heads are re-initialised if the classes differ")
    return choices


def _of_length(steps: int, reason: str) -> dict[str, tuple[Any, str]]:
    """What follows from the number of steps, and the reason for that number."""
    return {
        "schedule.steps": (steps, reason),
        "schedule.drops": ((round(0.75 * steps), round(0.9 * steps)), "at 75 and 90 % of the steps"),
        "schedule.warmup": (min(100, steps // 10), "a tenth of the steps, at most 100"),
        "train.checkpoint_every": (max(50, steps // 12), "about twelve resume points per training"),
        "train.validation.every": (max(100, steps // 8), "about eight validations; the best weights are kept"),
    }


def _rounded(steps: float) -> int:
    return 50 * math.ceil(steps / 50)


def _chosen(base: Config, choices: Mapping[str, tuple[Any, str]]) -> Recipe:
    tree = base.model_dump(mode="json")
    for key, (value, _) in choices.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[name] = value
    return Recipe(Config.model_validate(tree), {key: reason for key, (_, reason) in choices.items()})


def try_out(recipe: Recipe, machine: Machine, minutes: float | None = None) -> tuple[Recipe, str]:
    """Train a few steps in a temporary folder, and adapt memory and length.

    Args:
        recipe: what `propose` has made.
        machine: this machine.
        minutes: how long the training may take; by default as long as the rules want.

    Returns:
        The recipe, and a sentence about time and memory.

    Raises:
        UserError: the training does not work with these data, or does not fit the memory.
    """
    while True:
        config = recipe.config
        seconds, used = _measure(config, machine)
        if used <= MEMORY_SHARE * machine.memory:
            break
        parts = 2 * config.train.accumulate
        if parts > config.train.batch_size:
            raise UserError(
                f"one image of {config.data.jitter.size} pixels needs {used / 2**30:.1f} GiB, more than "
                f"{MEMORY_SHARE:.0%} of the {machine.memory / 2**30:.0f} GiB here; take a smaller model"
            )
        why = f"{used / 2**30:.1f} GiB were used with {config.train.accumulate}"
        recipe = _with(recipe, {"train.accumulate": (parts, why)})
    steps = config.schedule.steps
    if minutes is not None and steps * seconds > 60 * minutes:
        steps = max(50, 50 * math.floor(60 * minutes / seconds / 50))
        why = f"the most that {minutes:g} minutes allow at {seconds:.2f} s per step"
        recipe = _with(recipe, _of_length(steps, why))
    return recipe, (
        f"a step takes about {seconds:.2f} s on {machine.name}: {steps:,} steps in {steps * seconds / 60:.1f} minutes "
        f"and some more for the validations, with {used / 2**30:.1f} GiB of memory"
    )


def _with(recipe: Recipe, choices: Mapping[str, tuple[Any, str]]) -> Recipe:
    changed = _chosen(recipe.config, choices)
    return Recipe(changed.config, {**recipe.reasons, **changed.reasons})


def _measure(config: Config, machine: Machine) -> tuple[float, float]:
    """Seconds per step, and bytes of the device's memory, of a training's first steps."""
    few = config.schedule.model_copy(update={"steps": TRIED_STEPS, "drops": ()})
    changes = {"log_every": TRIED_STEPS // 2, "checkpoint_every": TRIED_STEPS, "validation": Validation()}
    settings = config.train.model_copy(update=changes)
    if machine.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(prefix="dimaskdino-") as folder:
        run = RunFolder(folder)
        train(config.model_copy(update={"schedule": few, "train": settings}), run)
        seconds = run.read_metrics()[-1]["seconds_per_step"]  # of the second half: the first steps prepare kernels
    if machine.device == "cuda":
        return seconds, torch.cuda.max_memory_reserved()
    return seconds, psutil.Process().memory_info().rss
