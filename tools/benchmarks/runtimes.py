"""An exported model in other runtimes: `python -m tools.benchmarks.runtimes MODEL IMAGES`.

The runtimes take turns on the same images, one at a time, with the same number of threads: the kit with its compiled
operator, PyTorch with plain operators as in the exported graph, ONNX Runtime, and OpenVINO with 32-bit numbers and as
it chooses (16-bit ones where the processor has them). Where a package is missing, its rows are left out.
"""

import contextlib
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import ms_deform_attn
import numpy as np
import torch
import tyro
from torch import Tensor
from tyro.conf import Positional

from dimaskdino.config import Resize
from dimaskdino.data.images import SUFFIXES, find_files, load_image
from dimaskdino.data.transforms import resize_image
from dimaskdino.interop.export import Exportable, export, told_apart
from dimaskdino.model import load
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.progress import progress_bar
from tools.benchmarks.record import save

ROUNDS = 3
EQUAL = 1e-4  # of the scores

Run = Callable[[Tensor], Sequence[Tensor]]


def runtimes(module: Exportable, file: Path) -> dict[str, Run]:
    """What runs the model, by name; each takes (1, 3, h, w) and gives boxes, scores, labels and masks."""

    def plain(images: Tensor) -> Sequence[Tensor]:
        with ms_deform_attn.backend("reference"):
            return module(images)

    found: dict[str, Run] = {"PyTorch, compiled operator": module, "PyTorch, plain operators": plain}
    threads = torch.get_num_threads()
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        found["ONNX Runtime"] = lambda images: _tensors(session.run(None, {"images": images.numpy()}))
    except ImportError:
        print("note: without ONNX Runtime: pip install onnxruntime")
    try:
        import openvino

        for name, hint in (("OpenVINO, 32 bits", {"INFERENCE_PRECISION_HINT": "f32"}), ("OpenVINO, as it chooses", {})):
            network = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_NUM_THREADS": threads, **hint})
            found[name] = lambda images, network=network: _tensors(network(images.numpy()).values())
    except ImportError:
        print("note: without OpenVINO: pip install openvino")
    return found


def _tensors(arrays: Any) -> list[Tensor]:
    return [torch.from_numpy(np.array(array)) for array in arrays]


def measure(module: Exportable, file: Path, images: Sequence[Tensor]) -> dict[str, Any]:
    """Seconds per image of each runtime, and how many images have the scores of the first one.

    Args:
        module: the model.
        file: its ONNX file.
        images: (3, h, w), RGB, resized as in testing.
    """
    seconds: dict[str, list[float]] = {}
    equal: dict[str, int] = {}
    with torch.inference_mode():
        runs = runtimes(module, file)
        for image in progress_bar(images, "images"):
            batch, wanted = image[None].float(), None
            for number in range(ROUNDS + 1):
                for name, run in runs.items():
                    started = time.perf_counter()
                    outputs = run(batch)
                    if number:  # the first time prepares kernels for the size
                        seconds.setdefault(name, []).append(time.perf_counter() - started)
                    elif wanted is None:
                        wanted, equal[name] = outputs, equal.get(name, 0) + 1
                    else:
                        equal[name] = equal.get(name, 0) + _same(outputs, wanted)
    return {
        name: {"seconds": median(values), "low": min(values), "high": max(values), "equal": equal[name]}
        for name, values in seconds.items()
    }


def _same(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Equal scores, and equal labels where no rounding can exchange two detections."""
    rows = told_apart(wanted[1][0], EQUAL)
    scores = bool((outputs[1] - wanted[1]).abs().max() < EQUAL)
    return scores and torch.equal(outputs[2][0][rows], wanted[2][0][rows].to(outputs[2].dtype))


def main(
    model: Positional[str], images: Positional[tuple[Path, ...]], count: int = 20, output: Path | None = None
) -> None:
    """Time a model on photographs in every runtime that is installed.

    Args:
        model: as for predict.
        images: image files, or folders of them.
        count: number of images, spread over those found.
        output: json file to write.
    """
    loaded = load(model, device="cpu")
    files = [path for path, _ in find_files(images, SUFFIXES)]
    if count < 1:
        raise UserError(f"--count must be at least 1, got {count}")
    chosen = files[:: max(1, len(files) // count)][:count]
    resize: Resize = loaded.config.data.resize
    module = Exportable(loaded.detector, loaded.stages[-1], loaded.config.evaluation.detections).eval()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export(loaded, file)
        results = measure(module, file, [resize_image(load_image(path), resize) for path in chosen])
    packages = {}
    for name in ("onnxruntime", "openvino"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    record = {
        "runtimes": results,
        "packages": packages,
        "backbone": loaded.config.model.backbone.name,
        "shortest": resize.shortest,
        "longest": resize.longest,
        "images": len(chosen),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(record, indent=1))
    save(record, output)


if __name__ == "__main__":
    tyro.cli(main)
