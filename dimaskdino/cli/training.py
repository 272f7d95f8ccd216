"""The commands for training runs: new, train, status, share."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from dimaskdino.cli.options import (
    Plugins,
    ProcessCount,
    SettingsArguments,
    TrainingConfig,
    print_remarks,
    relaunch_distributed,
)
from dimaskdino.utils import plugins
from dimaskdino.utils.errors import UserError, writing
from dimaskdino.utils.files import new_folder, read_json_object, write_text
from dimaskdino.utils.terminal import print_lines

DIGITS = 5  # of the metrics in a shared run, of which they are the largest part besides the weights


def new(
    data: Positional[Path],
    run: Positional[Path],
    weights: str | None = None,
    minutes: float | None = None,
    plugin: Plugins = (),
) -> int:
    """Write a complete, commented config.yaml for a dataset and this machine to a new run folder.

    For example: dimaskdino new data/animals runs/animals

    Image size, number of tokens, learning rate and length follow from the data; a comment beside each setting gives the
    rule. A few steps are run to fit the settings to the memory and to measure the time.

    Args:
        data: COCO-format folder with a training and a validation split, such as 'dimaskdino data import' makes.
        run: Run folder to make.
        weights: Trained model to start from (as for predict): its architecture is kept, its class heads re-initialised.
            By default a small backbone with ImageNet weights.
        minutes: How long the training may take on this machine.
        plugin: Modules of your own that the weights need.
    """
    plugins.allow(plugin)
    from dimaskdino.training.recipe import Machine, propose, try_out

    if run.exists():
        raise UserError(f"{run} exists already; choose another folder or delete it")
    if minutes is not None and not minutes > 0:
        raise UserError(f"--minutes must be positive, got {minutes:g}")
    machine = Machine.here()
    recipe, cost = try_out(propose(data, machine, weights), machine, minutes)
    with writing(run):
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(recipe.text(), encoding="utf-8")
    print(recipe.summary())
    print(f"{cost}\nwritten: {run / 'config.yaml'}; next: dimaskdino train --run {run}")
    return 0


def train(
    overrides: Positional[SettingsArguments] = (),
    config: TrainingConfig = None,
    run: str | None = None,
    processes: ProcessCount = 1,
    plugin: Plugins = (),
) -> int:
    """Train a model, or resume a training.

    For example: dimaskdino train --config shapes/dimaskdino_r18 --run runs/mine

    The run folder receives the complete configuration, metrics, checkpoints and a status. Run the same command again
    to resume from the last checkpoint. Ctrl-C finishes the step, saves and stops.

    Args:
        overrides: Settings that differ from the configuration.
        config: Configuration; by default the config.yaml in the run folder, as 'dimaskdino new' writes it.
        run: Run folder; OUTPUT_DIR among the settings is the same.
        processes: Number of training processes on this machine, one per GPU.
        plugin: Modules of your own that the configuration names and that may run (docs/extend.md).
    """
    plugins.allow(plugin)
    from dimaskdino.checkpoints.published_settings import load_settings, split_arguments

    if run is None:
        _, pairs = split_arguments(overrides)
        run = pairs.get("OUTPUT_DIR")
    if not run or not str(run).strip():
        raise UserError("name the run folder: --run FOLDER")
    if config is None and not (Path(run) / "config.yaml").is_file():
        raise UserError(f"name the configuration: --config CONFIG, or make {run} with 'dimaskdino new DATA {run}'")
    relaunch_distributed(processes)
    import ms_deform_attn

    from dimaskdino.runs.folder import RunFolder
    from dimaskdino.training import trainer

    folder = RunFolder(run)
    first = int(os.environ.get("RANK", 0)) == 0
    with folder.running(keep_finished=True) if first else nullcontext():
        settings = load_settings(config or run, overrides)
        chosen = settings.config
        if settings.weights is not None:  # the model that MODEL.WEIGHTS names
            weighted = chosen.train.model_copy(update={"weights": settings.weights})
            chosen = chosen.model_copy(update={"train": weighted})
        if first:
            print_remarks(settings)
            folder.write_config(chosen)
            print(ms_deform_attn.status())
        trainer.train(chosen, folder)
    if first:
        print(f"finished: {run}; next: dimaskdino evaluate {run}")
    return 0


def status(run: Positional[Path]) -> int:
    """Show the state of a run, the reason if it failed, its latest results and its files.

    For example: dimaskdino status runs/mine

    Args:
        run: Run folder.
    """
    from dimaskdino.runs.folder import RunFolder

    folder = RunFolder(run)
    current = folder.status()
    parts = ("state", "reason", "note", "started", "ended")
    shown = ", ".join(f"{key} {current[key]}" for key in parts if key in current)
    print_lines(f"{run}: {shown}")
    latest = validated = ""
    for record in folder.read_metrics():
        step = record["step"]
        if "loss" in record:
            latest = f"step {step}, loss {record['loss']:.2f}"
        if "validation" in record:
            scored = record["validation"]
            box, mask = ("–" if scored[key] is None else f"{scored[key]:.1f}" for key in ("box_AP", "mask_AP"))
            validated = f"validation at step {step}: box AP {box}, mask AP {mask}; "
            validated += f"the best was at step {record.get('best_step', step)}"
    print("".join(f"{line}\n" for line in (latest, validated) if line), end="")
    evaluation = run / "evaluation" / "layers.json"
    if evaluation.exists():
        from dimaskdino.evaluation.layerwise_ap import LayerwiseAP  # imports PyTorch

        result = LayerwiseAP.load(evaluation)
        print_lines(f"AP on {result.images} images, {result.source}", *result.table().splitlines())
    print("files:")
    written = [*run.rglob("*.ipynb"), *run.rglob("figures/*.png"), *run.rglob("layers.*"), folder.model, folder.best]
    written += sorted(folder.samples.glob("*.png"))[-1:]
    figures = []
    for path in dict.fromkeys(written):
        if path.exists() and ".ipynb_checkpoints" not in path.parts:
            print_lines(f"  {path}")
            if path.name == "layers.png":
                figures.append(path)
    if figures:
        print_lines(f"figure, box and mask AP of every stage: {figures[0]}")
    return 1 if current["state"] == "failed" else 0


def share(run: Positional[Path], target: Positional[Path], plugin: Plugins = ()) -> int:
    """Copy a finished run for sharing: weights in half precision, and its records.

    For example: dimaskdino share runs/mine shared/mine

    Rounding changes results slightly, so the evaluation is not copied: evaluate the copy. Metrics are rounded to five
    digits. Of paths in the settings and in the recorded command only the last part is copied, unless they are relative.

    Args:
        run: Run folder.
        target: Folder to create, a run folder that evaluate, predict and the notebooks accept.
        plugin: Modules of your own that the model needs.
    """
    plugins.allow(plugin)
    from dimaskdino.checkpoints import load_checkpoint, save_model
    from dimaskdino.config import dump_config, shared_config, without_folders
    from dimaskdino.runs.folder import RunFolder

    folder = RunFolder(run)
    status = folder.status()
    if status["state"] != "finished":
        raise UserError(f"{run} is not a finished run ({status.get('reason', 'still running')})")
    trained = load_checkpoint(run)
    config = shared_config(trained.config)
    versions = without_folders(read_json_object(run / "versions.json"))
    records = [json.dumps(_rounded(record)) + "\n" for record in folder.read_metrics()]
    with new_folder(target) as path:
        save_model(RunFolder(path).model, trained.detector, config, trained.classes, trained.step, half=True)
        shutil.copyfile(run / "status.json", path / "status.json")
        write_text(path / "config.yaml", dump_config(config))
        write_text(path / "metrics.jsonl", "".join(records))
        write_text(path / "versions.json", json.dumps(versions, indent=1))
    size = RunFolder(target).model.stat().st_size / 1e6
    data = "" if config.data.root == trained.config.data.root else f" data.root={trained.config.data.root}"
    print(f"written: {target}, {size:.1f} MB; next: dimaskdino evaluate {target}{data}")
    return 0


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
