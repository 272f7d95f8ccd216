"""Models in this kit's own format: weights, configuration and class names in one safetensors file."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dimaskdino.config import Config, parse_config
from dimaskdino.config.sections import RENAMED_MODULES
from dimaskdino.modeling import Detector, ImageBatch, Predictions
from dimaskdino.modeling.precision import Precision, autocast
from dimaskdino.modeling.warm_start import start_as_identity
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import is_text, write_atomically
from dimaskdino.utils.serialization import is_plain, read_pt, read_safetensors
from dimaskdino.utils.threads import adaptive_threads

MODEL = "model.safetensors"
_POINT = re.compile(r"step_(\d+)\.pt")
_POINTS_BEFORE_0_2 = ("last.pt", "previous.pt")
# parameters whose shape depends on the number of classes
CLASS_PARAMETERS = ("heads.label.weight", "heads.label.bias", "denoising.labels.weight")
# their shape depends on the backbone's channels
BACKBONE_PARAMETERS = ("pixel_decoder.projections.", "pixel_decoder.lateral.0.")


def current_name(stored: str) -> str:
    """The name of a parameter in this version, from its name in a file of any version of the kit."""
    module, dot, rest = stored.partition(".")
    if module == "de_imbalance" and rest[:1].isdigit():  # version 0.2 numbered the selections after the first
        module = "de_imbalance.second_selections"
    return RENAMED_MODULES.get(module, module) + dot + rest


@dataclass(frozen=True)
class TrainedModel:
    """A detector with what is needed to use it.

    Attributes:
        detector: the network.
        config: the settings that it was trained with.
        classes: class names, in the order of the class indices.
        step: number of optimizer steps that it was trained for.
        precision: precision of the forward pass.
    """

    detector: Detector
    config: Config
    classes: list[str]
    step: int
    precision: Precision = "fp32"

    @property
    def device(self) -> torch.device:
        """The device that the detector is on."""
        return next(self.detector.parameters()).device

    def forward(self, images: ImageBatch, trace: bool = False) -> Predictions:
        """Predictions of every stage, without gradients, computed by the free cores (`dimaskdino.utils.threads`).

        Args:
            images: the batch, on the detector's device.
            trace: also return the paper's intermediates.
        """
        with adaptive_threads(), torch.inference_mode(), autocast(self.device, self.precision):
            return self.detector(images, trace=trace)


def save_model(
    path: Path, detector: Detector, config: Config, classes: list[str], step: int, half: bool = False
) -> None:
    """Write weights, configuration and class names to one safetensors file.

    Args:
        path: the file.
        detector: the model to write.
        config: the configuration that it was built and trained with.
        classes: class names.
        step: number of optimizer steps that it was trained for.
        half: store matrices and kernels in float16. Vectors stay in float32: they need little room, and the statistics
            of batch norm may lie outside float16's range.

    Raises:
        UserError: the file cannot be written.
    """
    metadata = {"config": config.model_dump_json(), "classes": json.dumps(classes), "step": str(step)}
    # copies, since safetensors refuses tensors that share memory, as weights that two modules of a user's own share do
    state = {key: value.detach().cpu().clone().contiguous() for key, value in detector.state_dict().items()}
    if half:
        state = {key: value.half() if value.ndim > 1 else value for key, value in state.items()}
    write_atomically(path, lambda partial: save_file(state, partial, metadata))


def load_model_file(path: Path, overrides: Iterable[str] = ()) -> TrainedModel:
    """Load a model of this kit from a run folder, a `model.safetensors` or a resume point (`.pt`).

    Args:
        path: the folder or file.
        overrides: `key=value` settings that differ from those stored with the model, such as `data.root=my/data`.

    Raises:
        UserError: there is no model, it is truncated, or it does not fit the configuration stored with it.
    """
    path = _model_path(path)
    weights, config, classes, step = _read_model(path)
    settings = parse_stored(config, path, overrides)
    detector = Detector(settings.model.without_backbone_weights())
    load_weights(detector, weights, str(path))
    if len(classes) != settings.model.classes:
        raise UserError(f"{path} names {len(classes)} classes, its model has {settings.model.classes} (model.classes)")
    return TrainedModel(detector.eval(), settings, classes, step)


def parse_stored(text: str, path: Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration that a file stores as json.

    Raises:
        UserError: it is damaged.
    """
    try:
        return parse_config(json.loads(text), overrides, str(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"the configuration in {path} is damaged ({error}); take another copy of the file") from None


def _model_path(path: Path) -> Path:
    """The file that a run folder or a path to a file stands for."""
    if path.is_dir():
        folder = path / "checkpoints"
        existing = [file for file in (folder / MODEL, *resume_points(folder), path / MODEL) if file.exists()]
        if not existing:
            raise UserError(
                f"{path} holds no trained model (looked for {MODEL} and for resume points in {folder}, and for "
                f"{path / MODEL})"
            )
        return existing[0]
    if not path.exists():
        raise UserError(f"the model {path} does not exist")
    return path


def resume_point_path(folder: Path, step: int) -> Path:
    """The resume point of a step in a folder of checkpoints."""
    return folder / f"step_{step:07d}.pt"


def resume_points(folder: Path) -> list[Path]:
    """The resume points in a folder of checkpoints, newest first; those of earlier versions of the kit come last."""
    numbered = {int(match[1]): file for file in folder.glob("step_*.pt") if (match := _POINT.fullmatch(file.name))}
    earlier = [folder / name for name in _POINTS_BEFORE_0_2]
    return [numbered[step] for step in sorted(numbered, reverse=True)] + [file for file in earlier if file.exists()]


def _read_model(path: Path) -> tuple[dict[str, Tensor], str, list[str], int]:
    """Weights, configuration as json, class names and step of a file."""
    if path.suffix == ".safetensors":
        weights, metadata = read_safetensors(path)
        if "config" not in metadata:
            raise UserError(f"{path} holds tensors but no configuration of this kit")
        try:
            classes, step = json.loads(metadata["classes"]), int(metadata["step"])
        except (KeyError, ValueError, RecursionError) as error:
            raise UserError(f"{path} has damaged metadata ({error}); take another copy of the file") from None
        weights = {current_name(key): value for key, value in weights.items()}
        return weights, metadata["config"], _class_names(classes, path), step
    state = read_resume_point(path)
    return state["model"], state["config"], _class_names(state["classes"], path), state["step"]


def _class_names(classes: Any, path: Path) -> list[str]:
    if not isinstance(classes, list) or not all(map(is_text, classes)):
        raise UserError(f"{path} has damaged metadata: its classes are not a list of names; take another copy")
    return classes


_CONTENT = {"model": dict, "optimizer": dict, "scaler": dict, "step": int, "config": str, "classes": list}
_LATER_CONTENT = {"validation": dict, "average": dict | None}  # missing in files of earlier versions


def read_resume_point(path: Path) -> dict[str, Any]:
    """Read a file that a training writes to resume from.

    Raises:
        UserError: it cannot be read or is no resume point of this kit.
    """
    state = read_pt(path)
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(
            f"{path} is not a checkpoint of this kit. To convert a published one: dimaskdino convert {path} OUTPUT"
        )
    damaged = [name for name, kind in _CONTENT.items() if not isinstance(state.get(name), kind)]
    damaged += [name for name, kind in _LATER_CONTENT.items() if name in state and not isinstance(state[name], kind)]
    for part in ("model", "average"):
        if not damaged and not all(isinstance(k, str) and is_plain(v) for k, v in (state.get(part) or {}).items()):
            damaged.append(part)
    if not damaged and not all(isinstance(value, int | float) for value in state.get("validation", {}).values()):
        damaged.append("validation")
    if damaged or not 0 <= state["step"] < 2**53:
        raise UserError(
            f"{path} is no resume point: {', '.join(damaged) or 'step'} is missing or damaged; take an earlier one"
        )
    state["model"] = {current_name(key): value for key, value in state["model"].items()}
    if state.get("average"):  # of torch's AveragedModel: `module.` before the names, and the number of averages
        average = {}
        for key, value in state["average"].items():
            prefix, dot, name = key.partition(".")
            average[prefix + dot + current_name(name)] = value
        state["average"] = average
    return state


def first_non_finite(state: Mapping[str, Tensor]) -> str | None:
    """Name of a tensor with infinite or NaN values, None if there is none."""
    return next((name for name, x in state.items() if x.is_floating_point() and not bool(x.isfinite().all())), None)


def recorded_config(run: Path) -> Config | None:
    """The configuration that the newest readable checkpoint of a run folder holds; None if there is none."""
    folder = run / "checkpoints"
    for path in (*resume_points(folder), folder / MODEL):
        try:
            return parse_stored(_read_model(path)[1], path)
        except UserError:
            continue
    return None


def matching_classes(trained: Sequence[str], wanted: Sequence[str], by_order: bool) -> list[int] | None:
    """For every wanted class the number of the trained class of that name; None if there are other classes.

    Args:
        trained: names of the trained model's classes.
        wanted: names of the new model's classes.
        by_order: classes of the same number are the same, whatever their names.
    """
    if len(trained) == len(wanted) and (by_order or list(trained) == list(wanted)):
        return list(range(len(wanted)))
    if sorted(trained) != sorted(wanted) or len(set(trained)) < len(trained):
        return None
    return [list(trained).index(name) for name in wanted]


def initialize_from(
    detector: Detector,
    weights: dict[str, Tensor],
    source: str,
    modules: Collection[str] = (),
    classes: Sequence[int] | None = None,
) -> tuple[list[str], list[str]]:
    """Initialise a new model with the weights of a trained one, for fine-tuning.

    De-Imbalance's further selections and BATO start close to the identity (`modeling.warm_start`) where the trained
    model has none.

    Args:
        detector: the new model. Where the number of classes or the backbone's channels differ, it keeps its own random
            weights.
        weights: state dict of the trained model.
        source: where the weights come from, for error messages.
        modules: names of the detector's modules to initialise, such as `backbone` or `de_imbalance.first_selection`;
            all if empty.
        classes: the result of `matching_classes`; None keeps the new model's own weights of the classes.

    Returns:
        Names of the parameters that stay re-initialised for other classes or another backbone, and names of the modules
        that the trained model lacks.

    Raises:
        UserError: the trained model has another architecture, or there is no such module.
    """
    own = detector.state_dict()
    by_class = [key for key in CLASS_PARAMETERS if key in weights]
    if classes is not None:
        weights = weights | {key: weights[key][list(classes)] for key in by_class}
    if modules:
        known = {name for name, _ in detector.named_modules()}
        prefixes = []
        for name in modules:
            if name not in known:
                children = ", ".join(child for child, _ in detector.named_children())
                raise UserError(f"train.weights_of: the model has no module '{name}', only {children}")
            prefixes.append(f"{name}.")
        chosen = {key: value for key, value in weights.items() if key.startswith(tuple(prefixes))}
        weights = chosen | {key: value for key, value in own.items() if not key.startswith(tuple(prefixes))}
    lacking = []
    for name in () if modules else ("de_imbalance.second_selections", "bato"):
        added = {key: value for key, value in own.items() if key.startswith(f"{name}.")}
        if added and not any(key.startswith(f"{name}.") for key in weights):
            weights = weights | added
            lacking.append(name)
    fresh = sorted(by_class) if classes is None else []
    for key in sorted(weights.keys() & own.keys()):
        if key.startswith(BACKBONE_PARAMETERS) and weights[key].shape != own[key].shape:
            fresh.append(key)
    load_weights(detector, weights | {key: own[key] for key in fresh}, source)
    start_as_identity(detector, lacking)
    return fresh, lacking


def load_weights(detector: Detector, weights: dict[str, Tensor], source: str) -> None:
    """Load a state dict into a model.

    Raises:
        UserError: it has another number of classes or another architecture, or values that are not finite. The model is
            unchanged then.
    """
    expected = detector.state_dict()
    classes = weights.get("heads.label.bias")
    if classes is not None and classes.shape != expected["heads.label.bias"].shape:
        raise UserError(
            f"{source} was trained for {classes.numel()} classes, the configuration says "
            f"{len(expected['heads.label.bias'])} (model.classes)"
        )
    missing, unexpected = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    reshaped = sorted(k for k in set(expected) & set(weights) if expected[k].shape != weights[k].shape)
    problems = [
        f"{len(keys)} parameters {what} (first {keys[0]})"
        for what, keys in (("missing", missing), ("not in the model", unexpected), ("of another shape", reshaped))
        if keys
    ]
    if problems:
        raise UserError(
            f"{source} has another architecture than the configuration: {', '.join(problems)}. "
            "Compare its configuration with yours"
        )
    for key, value in weights.items():
        eight_bits = value.is_floating_point() and value.element_size() == 1
        if value.is_floating_point() != expected[key].is_floating_point() or eight_bits:
            raise UserError(f"{source}: {key} has the type {value.dtype}, expected {expected[key].dtype}")
    broken = first_non_finite(weights)
    if broken is not None:
        raise UserError(f"{source}: {broken} contains NaN or inf; use an earlier checkpoint")
    detector.load_state_dict(weights)
