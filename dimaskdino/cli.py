"""The command line: `dimaskdino train|evaluate|predict|run|study|status|export|convert|data|config`."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from dimaskdino.data import commands
from dimaskdino.errors import UserError

Overrides = Annotated[
    tuple[str, ...],
    arg(metavar="KEY=VALUE", help="Settings that differ from the file, such as train.batch_size=8 data.root=my/data."),
]
Arguments = Annotated[
    tuple[str, ...],
    arg(
        metavar="KEY=VALUE",
        help="Settings that differ from the file, such as train.batch_size=8; also in the form of the published code, "
        "SOLVER.IMS_PER_BATCH 8.",
    ),
]
Device = Annotated[str, arg(help="cpu, cuda, or auto: a GPU if there is one.")]
ModelPath = Annotated[Path, arg(help="Run folder, model.safetensors, checkpoint or published .pth.")]
ConfigPath = Annotated[
    Path,
    arg(
        aliases=["--config-file"],
        metavar="FILE",
        help="YAML file, for example configs/shapes/dimaskdino_r18.yaml, or one of the published code.",
    ),
]
OptionalConfigPath = Annotated[
    Path | None,
    arg(
        aliases=["--config-file"],
        metavar="FILE",
        help="YAML file that it was trained with; by default told from the weights.",
    ),
]
Processes = Annotated[
    int, arg(aliases=["--num-gpus"], help="Processes on this machine, one for each GPU; torchrun for several machines.")
]


STUDY_NOTEBOOK = Path("notebooks/runs/study.ipynb")


def train(
    config: ConfigPath, overrides: Positional[Arguments] = (), run: Path | None = None, processes: Processes = 1
) -> int:
    """Train a model, or go on with a run that was interrupted.

    The run folder receives the resolved configuration, metrics, checkpoints and a status. The same command again
    resumes from the last checkpoint. Ctrl-C saves before it stops.

    Args:
        config: YAML file.
        overrides: Settings that differ from the file.
        run: Run folder; OUTPUT_DIR among the settings is the same.
        processes: Training processes on this machine, one for each GPU.
    """
    from dimaskdino.interop.published_config import split_arguments
    from dimaskdino.training.__main__ import main as train_here

    _, pairs = split_arguments(overrides)
    folder = run or pairs.get("OUTPUT_DIR")
    if folder is None:
        raise UserError("name the run folder: --run FOLDER")
    _in_processes(processes)
    return train_here(str(config), str(folder), list(overrides))


def _in_processes(count: int) -> None:
    """Start this very command again under torchrun, once for each GPU; does nothing in a process of torchrun's."""
    if count > 1 and "RANK" not in os.environ:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "dimaskdino")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv[1:]])


def evaluate(
    model_and_settings: Positional[
        Annotated[
            tuple[str, ...],
            arg(metavar="MODEL KEY=VALUE", help="The model, unless MODEL.WEIGHTS names it, and settings as for train."),
        ]
    ],
    config: OptionalConfigPath = None,
    split: str | None = None,
    stages: tuple[str, ...] = (),
    output: Path | None = None,
    keep_detections: bool = False,
    bootstrap: int = 0,
    device: Device = "auto",
    processes: Processes = 1,
) -> int:
    """Box and mask AP of a trained model, at every stage, in one pass over the data.

    For example: dimaskdino evaluate runs/mine data.root=my/data

    An interrupted evaluation goes on where it was when the same command is given again.

    Args:
        model_and_settings: Run folder, model.safetensors, checkpoint or published .pth, then settings that differ from
            those the model was trained with, such as data.root=my/data or TEST.DETECTIONS_PER_IMAGE 300.
        config: YAML file that a published checkpoint belongs to; told from its weights by default.
        split: Split to evaluate on; the configuration's data.val by default.
        stages: Only these stages, such as decoder.1 decoder.6; all by default.
        output: Folder for layers.json and layers.png; by default evaluation/ beside the model.
        keep_detections: Leave the detections of every stage in the output folder.
        bootstrap: How often to draw the images again, 1000 for example, for 95 % intervals of the first and the last
            decoder layer's AP; the draws go into bootstrap.npz, from which studies compare models.
        device: Where to run.
        processes: Evaluating processes on this machine, one for each GPU.
    """
    from dimaskdino.evaluation.bootstrap import bootstrap as draw_again
    from dimaskdino.evaluation.layers import FIRST_LAYER, annotations_of, detect_layers, score_layers
    from dimaskdino.interop.published import load_any
    from dimaskdino.interop.published_config import load_settings, starts_settings, translate_pairs
    from dimaskdino.processes import Processes
    from dimaskdino.viz import layerwise_ap

    given = model_and_settings and not starts_settings(model_and_settings[0])
    arguments = model_and_settings[1:] if given else model_and_settings
    overrides, told = translate_pairs(arguments) if config is None else ([], load_settings(config, arguments))
    path = Path(model_and_settings[0]) if given else told.weights
    if path is None:
        raise UserError("name the model: dimaskdino evaluate MODEL, or MODEL.WEIGHTS FILE among the settings")
    _in_processes(processes)
    trained = load_any(path, _device(device), overrides, None if config is None else told.config)
    folder = output or told.output or (path if path.is_dir() else path.parent) / "evaluation"
    with Processes.joined() as mine:
        shard = (mine.rank, mine.world)
        store = detect_layers(trained, _device(device), split, stages or None, folder / "detections", shard)
        mine.wait()
    if mine.rank:
        return 0
    _print_remarks(told.remarks)
    result = score_layers(store, *annotations_of(trained, split))
    result.save(folder / "layers.json")
    layerwise_ap({"model": result}).savefig(folder / "layers.png")
    print(result.table())
    if bootstrap:
        chosen = dict.fromkeys(name for name in (FIRST_LAYER, next(reversed(result.stages))) if name in result.stages)
        drawn = draw_again({name: store[name] for name in chosen}, annotations_of(trained, split)[0], bootstrap)
        drawn.save(folder / "bootstrap.npz")
        for name, (low, high) in drawn.intervals().items():
            print(f"{name} AP: {low:.1f} to {high:.1f} on 95 % of {bootstrap} draws of the images")
    if not keep_detections:
        store.remove()
    print(f"written: {folder / 'layers.json'}, {folder / 'layers.png'}")
    return 0


def _print_remarks(remarks: tuple[str, ...]) -> None:
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)


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
    from dimaskdino.interop.published import load_any
    from dimaskdino.viz import draw_instances

    files = find_images(list(images))
    trained = load_any(model, _device(device))
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
    name: Positional[str],
    folder: Positional[Path | None] = None,
    overrides: Positional[Overrides] = (),
    scale: str = "shapes",
    seeds: tuple[int, ...] = (),
    parallel: int | None = None,
    plan: bool = False,
) -> int:
    """Train and evaluate the variants of a study, such as a table of the paper, with several seeds; compare them.

    For example: dimaskdino study table_4

    Runs that have a result are not run again, so an interrupted study goes on where it was, and studies that share a
    variant share its runs. A run that fails does not stop the others. FOLDER/NAME receives the executed notebook
    study.ipynb, table.md, table.json and figures; FOLDER/runs the runs.

    Args:
        name: A study of configs/ablations (table_3 to table_9, figure_1, …) or a YAML file.
        folder: Folder of the runs and reports; by default runs/studies/SCALE.
        overrides: Settings for every row, after its own.
        scale: One of the study's scales; shapes takes about ten minutes a run on one core, coco days on eight GPUs.
        seeds: Seeds of the training; by default the study's.
        parallel: How many runs go at once; by default one for each GPU, and one without any.
        plan: Only show what there is to run and what it costs.
    """
    from dimaskdino.runs.launch import project_root
    from dimaskdino.runs.notebooks import run_notebook
    from dimaskdino.runs.study import find_study, load_study
    from dimaskdino.runs.study_runs import plan_study

    file = find_study(name)
    target = folder or Path("runs", "studies", scale)
    todo = plan_study(load_study(file), scale, seeds, target, overrides, parallel)
    print(todo.describe())
    if plan:
        return 0
    report = target / file.stem
    parameters = {
        "study": os.path.relpath(file, project_root()),
        "run": os.path.relpath(report, project_root()),
        "scale": scale,
        "seeds": list(seeds),
        "changes": list(overrides),
        "parallel": parallel or 0,
    }
    print(f"written: {run_notebook(project_root() / STUDY_NOTEBOOK, report, parameters, echo=True)}")
    print((report / "table.md").read_text())
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
    file: Positional[Path],
    output: Positional[Path],
    overrides: Positional[Arguments] = (),
    config: OptionalConfigPath = None,
) -> int:
    """Make a published checkpoint, or weights of a backbone, into a file of this kit.

    For example: dimaskdino convert dimaskdino_r50_12ep.pth coco.safetensors

    A DI-MaskDINO or MaskDINO checkpoint becomes a model that every command takes; each of its keys is accounted for.
    A ResNet of torchvision (.pth) or detectron2 (.pkl) becomes a file for model.backbone.weights.

    Args:
        file: The published file, .pth or .pkl. No code in it is run.
        output: File to write, .safetensors; a model's holds its configuration and class names too.
        overrides: Settings that differ from the configuration.
        config: YAML file of the model that it was trained as, this kit's or the published one; told from the weights
            by default.
    """
    from dimaskdino.files import read_state_dict
    from dimaskdino.interop.published import convert_backbone, is_published, load_published
    from dimaskdino.interop.published_config import load_settings, translate_pairs
    from dimaskdino.training.checkpoint import save_model

    if not is_published(read_state_dict(file)):
        name, count = convert_backbone(file, output)
        print(f"a {name} of {count} parameters and buffers; use it with model.backbone.weights={output}")
        print(f"written: {output}")
        return 0
    changes, told = translate_pairs(overrides) if config is None else ([], load_settings(config, overrides))
    _print_remarks(told.remarks)
    model, conversion = load_published(file, changes, None if config is None else told.config)
    save_model(output, model.detector, model.config, model.classes, 0)
    settings = model.config.model
    print(
        f"{'DI-MaskDINO' if settings.bato.enabled else 'MaskDINO'}, {settings.backbone.name}, "
        f"{settings.pixel_decoder.levels} levels, {settings.decoder.layers} decoder layers, {settings.classes} classes"
    )
    if config is None:
        print(
            f"not stored in the file, so taken as published: model.selection.k={list(settings.selection.k)}, "
            f"model.selection.mask_to_box={settings.selection.mask_to_box}, "
            f"model.bato.guiding_tokens={settings.bato.guiding_tokens}"
        )
    print(f"{len(conversion.renamed)} keys became {len(conversion.state)} parameters and buffers")
    print(f"no part of the model: {', '.join(conversion.ignored) or 'none'}")
    print(f"written: {output}")
    return 0


def config_show(config: Positional[Path], overrides: Positional[Arguments] = ()) -> int:
    """Print a configuration with everything it extends and every default filled in.

    A file of the published code is shown as this kit's; what has no counterpart is listed.

    Args:
        config: YAML file.
        overrides: Settings that differ from the file.
    """
    from dimaskdino.config import dump_config
    from dimaskdino.interop.published_config import load_settings

    settings = load_settings(config, overrides)
    _print_remarks(settings.remarks)
    print(dump_config(settings.config), end="")
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
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


app = SubcommandApp()
for function in (train, evaluate, predict, run, study, status, export, convert):
    app.command(function)
_data = SubcommandApp()
for function in (commands.shapes, commands.check, commands.bdd100k, commands.detectron2):
    _data.command(function)
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
