"""Measure what BATO does and when: `python tools/records/measure_bato.py RUN [RUN …]`.

Writes measurements/bato.json from trainings of DI-MaskDINO that kept all their resume points (`train.keep=1000`): AP of
every stage with BATO, and with its tokens, its mask features or both left out, at test time only; and over the training
the effective rank and the entropy of its attention.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

from dimaskdino import load
from dimaskdino.data.shapes import ensure
from dimaskdino.evaluation.layerwise_ap import evaluate_layers
from dimaskdino.inspection.diagnostics import survey
from dimaskdino.model import Model
from dimaskdino.modeling.structures import BATOOutput
from tools.records.sources import MEASUREMENTS

IMAGES = 100  # for rank and entropy
LEFT_OUT = {"nothing": (), "tokens": ("tokens",), "mask features": ("features",), "both": ("tokens", "features")}


@contextmanager
def without(model: Model, parts: tuple[str, ...]) -> Iterator[None]:
    """Let the decoder's later layers see T_i in place of T_bal, and F in place of the refreshed mask features."""

    def put_back(module: nn.Module, inputs: tuple, output: BATOOutput) -> BATOOutput:
        T_i, mask_features = inputs[:2]
        if "tokens" in parts:
            output = replace(output, T_bal=T_i)
        return replace(output, mask_features=mask_features) if "features" in parts else output

    handle = model.detector.bato.register_forward_hook(put_back)
    try:
        yield
    finally:
        handle.remove()


def ablated(run: Path) -> dict[str, dict[str, dict[str, float | None]]]:
    """AP of every stage by what is left out."""
    model, found = load(run, device="cpu"), {}
    ensure(model.config.data)
    for name, parts in LEFT_OUT.items():
        with without(model, parts):
            stages = evaluate_layers(model).stages
        found[name] = {
            stage: {kind: ap and ap.AP for kind, ap in (("box", scores.box), ("mask", scores.mask))}
            for stage, scores in stages.items()
        }
    return found


def over_training(run: Path) -> list[dict[str, float]]:
    """Effective rank and entropy of BATO's attention at each resume point, means over images."""
    found = []
    for file in sorted((run / "checkpoints").glob("*.pt")):
        model = load(file, device="cpu")
        surveyed = survey(model, IMAGES)
        found.append(
            {
                "step": model.step,
                "rank": float(surveyed.guidance_rank.mean()),
                "entropy": float(surveyed.guidance_entropy.mean()),
            }
        )
    return sorted(found, key=lambda point: point["step"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = parser.parse_args().runs
    record = {}
    for run in runs:
        record[run.name] = {"left_out": ablated(run), "training": over_training(run)}
        (MEASUREMENTS / "bato.json").write_text(json.dumps(record, indent=1) + "\n")
