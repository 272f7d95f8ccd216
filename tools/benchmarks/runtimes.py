"""An exported model in other runtimes: PyTorch, ONNX Runtime and OpenVINO.

The runtimes take turns on the same images, one at a time, with the same number of threads: the kit with its compiled
operator, PyTorch with plain operators as in the exported graph, ONNX Runtime, and OpenVINO with 32-bit numbers and with
its own choice (16-bit numbers where the processor has them). Missing packages are skipped.
"""

import importlib.metadata
import importlib.util
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

from dimaskdino.data.images import SUFFIXES, find_files, load_image
from dimaskdino.data.transforms import resize_image
from dimaskdino.interop.export import Exportable, export, well_separated
from dimaskdino.model import load
from dimaskdino.utils.progress import progress_bar
from tools.benchmarks.measuring import save

ROUNDS = 3
EQUAL = 1e-4  # tolerance of the scores

Run = Callable[[Tensor], Sequence[Tensor]]


def runtimes(module: Exportable, file: Path) -> dict[str, Run]:
    """The installed runtimes by name. Each maps (1, 3, h, w) to boxes, scores, labels and masks."""

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
        print("note: ONNX Runtime is skipped: pip install onnxruntime")
    try:
        import openvino

        options = {"INFERENCE_NUM_THREADS": threads}
        exact = openvino.Core().compile_model(str(file), "CPU", options | {"INFERENCE_PRECISION_HINT": "f32"})
        found["OpenVINO, 32 bits"] = lambda images: _tensors(exact(images.numpy()).values())
        fast = openvino.Core().compile_model(str(file), "CPU", options)
        found["OpenVINO, as it chooses"] = lambda images: _tensors(fast(images.numpy()).values())
    except ImportError:
        print("note: OpenVINO is skipped: pip install openvino")
    return found


def _tensors(arrays: Any) -> list[Tensor]:
    return [torch.from_numpy(np.array(array)) for array in arrays]


def measure(module: Exportable, file: Path, images: Sequence[Tensor]) -> dict[str, Any]:
    """Time each runtime, and count the images on which its scores equal those of the first one.

    Args:
        module: the model.
        file: its ONNX file.
        images: (3, h, w), RGB, resized as in testing.

    Returns:
        By runtime: seconds per image (median, `low`, `high`), and `equal`.
    """
    seconds: dict[str, list[float]] = {}
    with torch.inference_mode():
        runs = runtimes(module, file)
        equal = dict.fromkeys(runs, 0)
        for image in progress_bar(images, "images"):
            batch = image[None].float()
            wanted = module(batch)
            for name, run in runs.items():  # the first call prepares kernels for the size
                equal[name] += _same(run(batch), wanted)
            for _ in range(ROUNDS):
                for name, run in runs.items():
                    started = time.perf_counter()
                    run(batch)
                    seconds.setdefault(name, []).append(time.perf_counter() - started)
    return {
        name: {"seconds": median(values), "low": min(values), "high": max(values), "equal": equal[name]}
        for name, values in seconds.items()
    }


def _same(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether scores are equal, and labels where rounding cannot exchange two detections."""
    rows = well_separated(wanted[1][0], EQUAL)
    scores = bool((outputs[1] - wanted[1]).abs().max() < EQUAL)
    return scores and torch.equal(outputs[2][0][rows], wanted[2][0][rows].to(outputs[2].dtype))


def main(
    model: Positional[str], images: Positional[tuple[Path, ...]], count: int = 20, output: Path | None = None
) -> None:
    """Time a model on photographs in every runtime that is installed.

    Example: python -m tools.benchmarks.runtimes dimaskdino-solids notebooks/scenes

    Args:
        model: Model file, run folder or name of a shipped model.
        images: Image files, or folders of them.
        count: Number of images, spread over those found; at least 1.
        output: JSON file to write.
    """
    loaded = load(model, device="cpu")
    files = [path for path, _ in find_files(images, SUFFIXES)]
    chosen = files[:: max(1, len(files) // count)][:count]
    resize = loaded.config.data.resize
    module = Exportable(loaded.detector, loaded.stages[-1], loaded.config.evaluation.detections).eval()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export(loaded, file)
        results = measure(module, file, [resize_image(load_image(path), resize) for path in chosen])
    packages = {}
    for name in ("onnxruntime", "openvino"):
        if importlib.util.find_spec(name):
            packages[name] = importlib.metadata.version(name)
    print(f"| {len(chosen)} images | median | fastest to slowest | equal scores |\n|---|---|---|---|")
    for name, row in results.items():
        milliseconds = f"{1000 * row['seconds']:.0f} ms | {1000 * row['low']:.0f} to {1000 * row['high']:.0f} ms"
        print(f"| {name} | {milliseconds} | {row['equal']} |")
    record = {
        "runtimes": results,
        "packages": packages,
        "backbone": loaded.config.model.backbone.name,
        "shortest": resize.shortest,
        "longest": resize.longest,
        "images": len(chosen),
        "threads": torch.get_num_threads(),
    }
    save(record, output)


if __name__ == "__main__":
    tyro.cli(main)
