"""The commands for trained models: evaluate, predict, export, convert."""

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from tyro.conf import Positional, arg

from dimaskdino.cli.options import (
    SETTING,
    Device,
    ModelSource,
    OptionalConfigPath,
    Plugins,
    PrecisionOption,
    ProcessCount,
    SettingsArguments,
    print_remarks,
    relaunch_distributed,
)
from dimaskdino.utils import plugins
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import read_json_object, refuse_existing, write_atomically
from dimaskdino.utils.terminal import print_lines

if TYPE_CHECKING:
    from dimaskdino.evaluation.detections import DetectionStore
    from dimaskdino.model import Model

RESULTS = ("layers.json", "layers.png", "bootstrap.npz")  # of an evaluation
SHOWN_SCORE = 0.3  # the default threshold of predict


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
    overwrite: bool = False,
    device: Device = "auto",
    precision: PrecisionOption = "fp32",
    processes: ProcessCount = 1,
    plugin: Plugins = (),
) -> int:
    """Compute box and mask AP of a trained model at every stage, in one pass over the data.

    For example: dimaskdino evaluate runs/mine data.root=my/data

    Run the same command again to resume an interrupted evaluation.

    Args:
        model_and_settings: The model (as for predict), then settings that differ from those it was trained with, such
            as data.root=my/data or TEST.DETECTIONS_PER_IMAGE 300.
        config: Configuration of a published checkpoint; inferred from its weights by default.
        split: Split to evaluate on; data.val of the configuration by default.
        stages: Stages to evaluate, such as decoder.1 decoder.6; all by default.
        output: Folder for layers.json and layers.png; evaluation/ beside the model by default.
        keep_detections: Keep the detections of every stage in the output folder.
        bootstrap: Number of bootstrap resamples of the images, such as 1000, for 95 % intervals of the AP of the first
            and the last decoder layer. They are kept in bootstrap.npz, which studies compare models with.
        overwrite: Replace layers.json, layers.png and bootstrap.npz in the output folder, whatever made them.
        device: Device to run on.
        precision: Precision of the forward pass.
        processes: Number of evaluating processes on this machine, one per GPU.
        plugin: Modules of your own that the model needs.
    """
    plugins.allow(plugin)
    from dimaskdino.checkpoints.published_settings import load_settings, starts_settings, translate_pairs
    from dimaskdino.evaluation.layerwise_ap import detect_layers
    from dimaskdino.model import load
    from dimaskdino.runs.folder import locked
    from dimaskdino.utils.distributed import DistributedContext

    named = model_and_settings and not starts_settings(model_and_settings[0])
    arguments = model_and_settings[1:] if named else model_and_settings
    overrides, settings = translate_pairs(arguments) if config is None else ([], load_settings(config, arguments))
    source = model_and_settings[0] if named else settings.weights
    if source is None:
        raise UserError("name the model: dimaskdino evaluate MODEL, or MODEL.WEIGHTS FILE among the settings")
    if bootstrap < 0:
        raise UserError(f"--bootstrap is a number of resamples, such as 1000, got {bootstrap}")
    relaunch_distributed(processes)
    with contextlib.ExitStack() as held:
        with DistributedContext.join() as context:
            trained = load(
                source,
                device=device,
                precision=cast(Any, precision),
                overrides=overrides,
                config=None if config is None else settings.config,
            )
            folder = output or settings.output or _beside(str(source)) / "evaluation"
            is_ours = output is None or "stages" in read_json_object(folder / "layers.json")
            refuse_existing((folder / name for name in RESULTS), overwrite or is_ours)
            if context.is_main:
                busy = f"another evaluation is using {folder}; wait for it to end or choose another --output"
                held.enter_context(locked(folder / "evaluation.lock", busy))
            shard = (context.rank, context.world_size)
            store = detect_layers(trained, split, stages or None, folder / "detections", shard)
            context.barrier()
        if context.is_main:
            print_remarks(settings)
            _score(trained, store, split, folder, bootstrap)
            if not keep_detections:
                store.remove()
    return 0


def _beside(source: str) -> Path:
    """Return the folder of a model: the run folder, the file's folder, or one in runs/ for course and hub models."""
    path = Path(source)
    if path.exists():
        return path if path.is_dir() else path.parent
    return Path("runs", source.replace("/", "_"))


def _score(model: "Model", store: "DetectionStore", split: str | None, folder: Path, resamples: int) -> None:
    """Score the detections, write the results to a folder and print them."""
    from dimaskdino.evaluation.bootstrap import bootstrap
    from dimaskdino.evaluation.layerwise_ap import score_layers, truth_of
    from dimaskdino.evaluation.upper_bounds import upper_bounds
    from dimaskdino.modeling.stages import FIRST_LAYER
    from dimaskdino.viz import plot_layerwise_ap

    truth, source = truth_of(model, split)
    result = score_layers(store, truth, source, upper_bounds(truth, model.config))
    print(result.table())
    for line in result.remarks:
        print_lines(f"note: {line}", file=sys.stderr)
    if resamples:
        last = next(reversed(result.stages))
        chosen = {name: store[name] for name in (FIRST_LAYER, last) if name in result.stages}
        resampled = bootstrap(chosen, truth, resamples)
        resampled.save(folder / "bootstrap.npz")
        for name, (low, high) in resampled.intervals().items():
            print(f"{name} AP: {low:.1f} to {high:.1f} (95 % interval, {resamples} resamples of the images)")
    elif read_json_object(folder / "layers.json") != json.loads(json.dumps(result.to_json())):
        (folder / "bootstrap.npz").unlink(missing_ok=True)  # it belongs to other detections
    write_atomically(folder / "layers.png", plot_layerwise_ap({"model": result}).savefig)
    result.save(folder / "layers.json")  # written last: studies take it as the sign of a complete evaluation
    print(f"written: {folder / 'layers.json'}, {folder / 'layers.png'}")


def predict(
    model: Positional[ModelSource],
    images_and_settings: Positional[Annotated[tuple[str, ...], arg(metavar="IMAGE KEY=VALUE")]],
    output: Path = Path("predictions"),
    stage: str | None = None,
    threshold: float = SHOWN_SCORE,
    batch_size: int = 8,
    overwrite: bool = False,
    device: Device = "auto",
    precision: PrecisionOption = "fp32",
    plugin: Plugins = (),
) -> int:
    """Draw masks, boxes, classes and scores on images and videos, and write them in COCO's format.

    For example: dimaskdino predict runs/mine my/photos --threshold 0.5

    The output mirrors the folders of the input. predictions.json has a score per annotation and masks as run lengths.
    A second run replaces what the first one wrote; other files that exist are kept, with an error.

    Args:
        model: The model.
        images_and_settings: Image files, videos (with the extra 'video'), or folders of them; and settings that differ
            from the model's, such as data.resize.shortest=640.
        output: Folder for the drawn images and predictions.json.
        stage: Stage to show, such as decoder.1; the last decoder layer by default.
        threshold: Lowest score that is shown and written.
        batch_size: Number of images per forward pass, at most.
        overwrite: Replace files in the output folder, whatever made them. Inputs are never replaced.
        device: Device to run on.
        precision: Precision of the forward pass.
        plugin: Modules of your own that the model needs.
    """
    plugins.allow(plugin)
    from dimaskdino.cli.predict_files import predict_files
    from dimaskdino.model import load

    overrides = [text for text in images_and_settings if SETTING.match(text) and not Path(text).exists()]
    images = [Path(text) for text in images_and_settings if text not in overrides]
    if not images:
        raise UserError("name the images: dimaskdino predict MODEL IMAGE, a file or a folder")
    trained = load(model, device=device, precision=cast(Any, precision), overrides=overrides)
    report = predict_files(trained, images, output, stage, threshold, batch_size, overwrite)
    print(f"{report.detections} detections in {len(report.pictures)} files, {len(report.skipped)} skipped")
    if report.pictures and not report.detections:
        print(f"note: no detection has a score of {threshold} or more; try a lower --threshold", file=sys.stderr)
    print(f"written: {report.json} and the pictures in {output}")
    return 0 if report.pictures else 1


def export(
    model: Positional[ModelSource],
    file: Positional[Path],
    stage: str | None = None,
    detections: int | None = None,
    overwrite: bool = False,
    plugin: Plugins = (),
) -> int:
    """Write a model as an ONNX file, for ONNX Runtime, OpenVINO or TensorRT, or as a file of torch.export.

    For example: dimaskdino export runs/mine mine.onnx

    The file takes images (batch, 3, height, width), RGB from 0 to 255, of any size from 64 to 2048 pixels, and returns
    boxes, scores, labels and masks. The command compares it with the model on random images. A .pt2 file needs PyTorch
    only, and takes sides from 96 pixels that are multiples of 32.

    Args:
        model: The model.
        file: File to write, .onnx or .pt2.
        stage: Stage to take the detections from, such as decoder.1; the last decoder layer by default.
        detections: Number of detections per image; evaluation.detections of the model by default.
        overwrite: Replace the file if it exists.
        plugin: Modules of your own that the model needs.
    """
    plugins.allow(plugin)
    from dimaskdino.interop.export import export as write
    from dimaskdino.model import load

    refuse_existing([file], overwrite)
    differences = write(load(model, device="cpu"), file, stage, detections)
    print(f"written: {file}, {file.stat().st_size / 1e6:.1f} MB")
    if differences is None:
        print("note: not compared with the model, since ONNX Runtime is missing: pip install 'dimaskdino[onnx]'")
        return 0
    boxes, scores, labels, masks = differences.values()
    print(
        f"compared with the model: boxes differ by at most {boxes:.1e} pixels, scores by {scores:.1e}; {labels:.2%} of "
        f"the labels and {masks:.2%} of the mask pixels differ"
    )
    return 0


def convert(
    file: Positional[Path],
    output: Positional[Path],
    overrides: Positional[SettingsArguments] = (),
    config: OptionalConfigPath = None,
    overwrite: bool = False,
) -> int:
    """Convert a published checkpoint, or the weights of a backbone, to a file of this kit.

    For example: dimaskdino convert dimaskdino_r50_12ep.pth coco.safetensors

    A DI-MaskDINO or MaskDINO checkpoint becomes a model that every command takes; each of its keys is accounted for.
    A ResNet of torchvision (.pth) or detectron2 (.pkl) becomes a file for model.backbone.weights.

    Args:
        file: The published file, .pth or .pkl. No code in it is run.
        output: File to write, .safetensors. A model's file also holds its configuration and class names.
        overrides: Settings that differ from the configuration.
        config: Configuration of the model, this kit's or the published one; inferred from the weights by default.
        overwrite: Replace the output if it exists.
    """
    from dimaskdino.checkpoints import save_model
    from dimaskdino.checkpoints.published import convert_backbone, is_published, load_published
    from dimaskdino.checkpoints.published_settings import load_settings, translate_pairs
    from dimaskdino.utils.serialization import read_state_dict

    refuse_existing([output], overwrite and output.resolve() != file.resolve())
    if not is_published(read_state_dict(file)):
        name, count = convert_backbone(file, output)
        print(f"a {name} with {count} parameters and buffers; use it with model.backbone.weights={output}")
        print(f"written: {output}")
        return 0
    changes, settings = translate_pairs(overrides) if config is None else ([], load_settings(config, overrides))
    print_remarks(settings)
    model, conversion = load_published(file, changes, None if config is None else settings.config)
    save_model(output, model.detector, model.config, model.classes, 0)
    architecture = model.config.model
    print(
        f"{'DI-MaskDINO' if architecture.bato.enabled else 'MaskDINO'}, {architecture.backbone.name}, "
        f"{architecture.pixel_decoder.levels} levels, {architecture.decoder.layers} decoder layers, "
        f"{architecture.classes} classes"
    )
    if config is None:
        print(
            f"not stored in the file, so the published values are used: "
            f"model.selection.k={list(architecture.selection.k)}, "
            f"model.selection.mask_to_box={architecture.selection.mask_to_box}, "
            f"model.bato.guiding_tokens={architecture.bato.guiding_tokens}"
        )
    print(f"{len(conversion.renamed)} keys became {len(conversion.state)} parameters and buffers")
    print_lines(f"ignored, not part of the model: {', '.join(conversion.ignored) or 'none'}")
    print(f"written: {output}")
    return 0


def list_models(remove: tuple[str, ...] = ()) -> int:
    """List the models that have a name, which every command takes in place of a file.

    For example: dimaskdino models; dimaskdino predict dimaskdino-r50-coco-12ep photo.jpg

    A published model is downloaded from its authors' link when it is first used, and kept in the user's cache.

    Args:
        remove: Names of downloaded models to delete from the cache.
    """
    from dimaskdino.checkpoints import catalogue
    from dimaskdino.utils.markdown import table

    for name in remove:
        files = catalogue.remove(name)
        print(f"deleted: {', '.join(map(str, files))}" if files else f"{name} was not in the cache")
    if remove:
        return 0
    print(table(catalogue.catalogue()))
    print(f"AP: box / mask, in percent. Downloaded models: {catalogue.cache_folder()}")
    return 0
