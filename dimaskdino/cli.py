"""The command line: `dimaskdino train|evaluate|predict|run|study|status|export|convert|data|config`."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

from tqdm import tqdm
from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from dimaskdino.errors import UserError

Overrides = Annotated[
    tuple[str, ...],
    arg(metavar="KEY=VALUE", help="Settings that differ from the file, such as train.batch_size=8 data.root=my/data."),
]


Device = Annotated[str, arg(help="cpu, cuda, or auto: a GPU if there is one.")]
ModelPath = Annotated[Path, arg(help="Run folder, model.safetensors or checkpoint.")]
ConfigPath = Annotated[Path, arg(help="YAML file, for example configs/shapes/dimaskdino_r18.yaml.")]


def train(config: ConfigPath, run: Path, overrides: Positional[Overrides] = (), processes: int = 1) -> int:
    """Train a model, or go on with a run that was interrupted.

    The run folder receives the resolved configuration, metrics, checkpoints and a status. The same command again
    resumes from the last checkpoint. Ctrl-C saves before it stops.

    Args:
        config: YAML file.
        run: Run folder.
        overrides: Settings that differ from the file.
        processes: Training processes on this machine, one for each GPU.
    """
    from dimaskdino.runs.launch import training_command
    from dimaskdino.training.__main__ import main as train_here

    if processes == 1:
        return train_here(str(config), str(run), list(overrides))
    command = training_command(str(config), run, overrides, processes)
    os.execv(command[0], command)


def evaluate(
    model: Positional[ModelPath],
    overrides: Positional[Overrides] = (),
    split: str | None = None,
    stages: tuple[str, ...] = (),
    output: Path | None = None,
    device: Device = "auto",
) -> int:
    """Box and mask AP of a trained model, at every stage, in one pass over the data.

    Args:
        model: Run folder, model.safetensors or checkpoint.
        overrides: Settings that differ from those the model was trained with, such as data.root.
        split: Split to evaluate on; the configuration's data.val by default.
        stages: Only these stages, such as decoder.1 decoder.6; all by default.
        output: Folder for layers.json and layers.png; by default evaluation/ beside the model.
        device: Where to run.
    """
    from dimaskdino.evaluation.layers import evaluate_layers
    from dimaskdino.training.checkpoint import load_model
    from dimaskdino.viz import layerwise_ap

    trained = load_model(model, _device(device), overrides)
    result = evaluate_layers(trained, _device(device), split, stages or None)
    folder = output or (model if model.is_dir() else model.parent) / "evaluation"
    result.save(folder / "layers.json")
    layerwise_ap({"model": result}).savefig(folder / "layers.png")
    print(result.table())
    print(f"written: {folder / 'layers.json'}, {folder / 'layers.png'}")
    return 0


def predict(
    model: Positional[ModelPath],
    images: Positional[tuple[Path, ...]],
    output: Path = Path("predictions"),
    stage: str | None = None,
    threshold: float = 0.3,
    device: Device = "auto",
) -> int:
    """Draw masks, boxes, classes and scores on your own images.

    Args:
        model: Run folder, model.safetensors or checkpoint.
        images: Image files, or folders of them.
        output: Folder for the drawn images and predictions.json.
        stage: Stage to show, such as decoder.1; the last decoder layer by default.
        threshold: Lowest score that is shown and written.
        device: Where to run.
    """
    from dimaskdino.data.coco import load_image
    from dimaskdino.evaluation.predict import find_images, predict_stages
    from dimaskdino.training.checkpoint import load_model
    from dimaskdino.viz import draw_instances

    files = find_images(list(images))
    trained = load_model(model, _device(device))
    output.mkdir(parents=True, exist_ok=True)
    records, failed = [], 0
    for path in files:
        try:
            image = load_image(path)
            instances = next(reversed(predict_stages(trained, image, [stage] if stage else None).values()))
        except UserError as error:
            if len(files) == 1:
                raise
            print(f"skipped: {error}", file=sys.stderr)
            failed += 1
            continue
        target = output / f"{path.stem}.png"
        draw_instances(image, instances, trained.classes, threshold).savefig(target)
        kept = (instances.scores >= threshold).nonzero().flatten().tolist()
        records += [
            {
                "image": str(path),
                "class": trained.classes[int(instances.labels[i])],
                "score": float(instances.scores[i]),
                "box_xyxy": instances.boxes[i].tolist(),
            }
            for i in kept
        ]
        print(f"{path}: {len(kept)} detections, drawn to {target}")
    (output / "predictions.json").write_text(json.dumps(records, indent=1))
    return 1 if failed == len(files) else 0


def run(
    notebook: Positional[Path],
    folder: Positional[Path],
    parameters: Positional[Annotated[tuple[str, ...], arg(metavar="NAME=VALUE")]] = (),
) -> int:
    """Run a parameterised notebook with papermill; the executed notebook goes into a folder.

    For example: dimaskdino run notebooks/runs/train.ipynb runs/mine config=configs/shapes/dimaskdino_r18.yaml

    Args:
        notebook: The notebook; 'papermill --help-notebook NOTEBOOK' lists its parameters.
        folder: Run folder; also the value of the notebook's parameter `run`.
        parameters: Parameters of the notebook.
    """
    from dimaskdino.runs.launch import project_root
    from dimaskdino.runs.notebooks import parse_parameters, run_notebook

    # notebooks take relative paths from the project's folder, wherever they are started
    values = {"run": os.path.relpath(folder, project_root())} | parse_parameters(notebook, parameters)
    print(f"written: {run_notebook(notebook, folder, values)}")
    return 0


def study(
    file: Positional[Path],
    folder: Positional[Path],
    overrides: Positional[Overrides] = (),
    scale: str = "shapes",
    seeds: tuple[int, ...] = (0, 1, 2),
) -> int:
    """Run the rows of a table of the paper, each with several seeds, and compare them.

    For example: dimaskdino study configs/ablations/table_4.yaml runs/ablations

    Runs that have a result are not run again, so an interrupted study goes on where it was, and studies that share a
    row share its runs.

    Args:
        file: YAML file of the study.
        folder: Folder of the runs.
        overrides: Settings for every row, after its own.
        scale: One of the study's scales; shapes takes about ten minutes a run on one core, coco days on eight GPUs.
        seeds: Seeds of the training.
    """
    from dimaskdino.runs.study import load_study, run_study

    chosen = load_study(file)
    run_study(chosen, scale, seeds, folder, overrides)
    print(f"{chosen.title}, means of the seeds ± standard deviation\n{chosen.table(chosen.measured(folder))}")
    return 0


def status(run: Positional[Path]) -> int:
    """Tell whether a run is running, finished or failed and why, what it has reached and where its files are.

    Args:
        run: Run folder.
    """
    from dimaskdino.evaluation.layers import LayerwiseAP
    from dimaskdino.runs.folder import RunFolder

    folder = RunFolder(run)
    found = folder.status()
    print(
        f"{run}: " + ", ".join(f"{key} {found[key]}" for key in ("state", "reason", "started", "ended") if key in found)
    )
    latest = next((record for record in reversed(folder.read_metrics()) if "loss" in record), None)
    if latest:
        print(f"step {latest['step']}, loss {latest['loss']:.2f}")
    evaluation = run / "evaluation" / "layers.json"
    if evaluation.exists():
        result = LayerwiseAP.load(evaluation)
        print(f"AP on {result.images} images, {result.source}\n{result.table()}")
    written = [*run.rglob("*.ipynb"), *run.rglob("figures/*.png"), *run.rglob("layers.json"), folder.model]
    shown = [path for path in written if path.exists() and ".ipynb_checkpoints" not in path.parts]
    print("\n".join(["files:", *(f"  {path}" for path in shown)]))
    return 1 if found["state"] == "failed" else 0


def export(run: Positional[Path], target: Positional[Path]) -> int:
    """Make a finished run small enough to share: weights in half precision, and its records.

    Args:
        run: Run folder.
        target: Folder to make; it is a run folder itself, for evaluate, predict and the notebooks.
    """
    from dimaskdino.runs.folder import RunFolder
    from dimaskdino.training.export import export as write

    made = RunFolder(target)
    write(RunFolder(run), made)
    print(f"written: {target}, {made.model.stat().st_size / 1e6:.1f} MB; next: dimaskdino evaluate {target}")
    return 0


def convert(
    checkpoint: Positional[Path],
    output: Positional[Path],
    overrides: Positional[Overrides] = (),
    config: ConfigPath = Path("configs/coco/instance-segmentation/dimaskdino_r50_4scale_bs16_12ep.yaml"),
) -> int:
    """Make a published DI-MaskDINO or MaskDINO checkpoint into a model of this kit.

    Every key of the checkpoint is accounted for; a file that does not fit the configuration is refused.

    Args:
        checkpoint: The published file, .pth.
        output: File to write, .safetensors; it holds the configuration and the class names too.
        overrides: Settings that differ from the configuration.
        config: YAML file of the model that it was trained as.
    """
    from dimaskdino.config import load_config
    from dimaskdino.interop.published import coco_classes, convert_state, read_published
    from dimaskdino.modeling import Detector
    from dimaskdino.training.checkpoint import load_weights, save_model

    settings = load_config(config, ["model.backbone.weights=null", *overrides])
    published = convert_state(read_published(checkpoint))
    detector = Detector(settings.model)
    load_weights(detector, published.state, str(checkpoint))
    classes, count = coco_classes(), settings.model.classes
    names = classes if count == len(classes) else [f"class {i + 1}" for i in range(count)]
    save_model(output, detector, settings, names, 0)
    print(f"{len(published.renamed)} keys became {len(published.state)} parameters and buffers")
    print(f"no part of the model: {', '.join(published.ignored) or 'none'}")
    print(f"written: {output}")
    return 0


def data_shapes(root: Positional[Path], train: int = 4000, val: int = 200, size: int = 128, seed: int = 0) -> int:
    """Generate the built-in shapes data in COCO format.

    Args:
        root: Folder to make.
        train: Training images.
        val: Validation images.
        size: Side of the images, pixels.
        seed: The same seed gives the same data.
    """
    from dimaskdino import config
    from dimaskdino.data.shapes import generate

    generate(root, config.Shapes(train=train, val=val, size=size, seed=seed))
    print(f"written: {root}; use it with data.root={root} data.train=train data.val=val")
    return 0


def config_show(config: Positional[ConfigPath], overrides: Positional[Overrides] = ()) -> int:
    """Print a configuration with everything it extends and every default filled in.

    Args:
        config: YAML file.
        overrides: Settings that differ from the file.
    """
    from dimaskdino.config import dump_config, load_config

    print(dump_config(load_config(config, overrides)), end="")
    return 0


def config_keys() -> int:
    """List every setting by its key."""
    from dimaskdino.config import keys_of

    print("\n".join(keys_of()))
    return 0


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def data_check(root: Positional[Path], split: Positional[str]) -> int:
    """Read every image and annotation of a COCO-format split and report what is wrong with them.

    Args:
        root: Dataset folder.
        split: Name of the split, such as train2017.
    """
    from dimaskdino.data.coco import CocoDataset

    data = CocoDataset(root, split)
    objects, problems = dict.fromkeys(data.classes, 0), 0
    for i in tqdm(range(len(data)), f"reading {split}", mininterval=1):
        try:
            for label in data[i].labels.tolist():
                objects[data.classes[label]] += 1
        except UserError as error:
            problems += 1
            print(error, file=sys.stderr)
    print(f"{len(data)} images, {problems} with problems, {sum(objects.values())} objects with a mask")
    print("\n".join(f"  {name}: {count}" for name, count in objects.items()))
    return 1 if problems else 0


app = SubcommandApp()
for function in (train, evaluate, predict, run, study, status, export, convert):
    app.command(function)
_data = SubcommandApp()
_data.command(data_shapes, name="shapes")
_data.command(data_check, name="check")
app.command(_data, name="data", help="Generate the built-in data, or check a dataset.")
_config = SubcommandApp()
_config.command(config_show, name="show")
_config.command(config_keys, name="keys")
app.command(_config, name="config", help="Show a configuration, or list all settings.")


def main() -> None:
    """Entry point of `dimaskdino`: errors that a person can mend are one line, without a traceback."""
    try:
        description = "DI-MaskDINO: joint object detection and instance segmentation."
        sys.exit(app.cli(prog="dimaskdino", description=description))
    except UserError as error:
        print(f"dimaskdino: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("dimaskdino: interrupted", file=sys.stderr)
        sys.exit(130)
