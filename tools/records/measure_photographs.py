"""Record trainings on photographs: `python tools/records/measure_photographs.py animals --source WHERE --recipe RUN …`.

Writes measurements/photographs.json: of each run its data, settings, time, loss and AP of every stage, the peers, and
the registered comparison of the two models. What the record has already stays, so runs may come from several machines:
a run replaces the one with its seed. The photographs are not in the repository. The runs were evaluated with
`--bootstrap`, so that intervals can be over other images too.
"""

import argparse
import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from dimaskdino.checkpoints import load_checkpoint
from dimaskdino.config import Config, load_config
from dimaskdino.data.annotations import read_annotations
from dimaskdino.data.coco import find_split
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.runs.folder import RunFolder
from dimaskdino.studies.comparison import Comparison, EvaluatedRun, Quantity, compare
from tools.benchmarks import peers
from tools.records.sources import MEASUREMENTS

SEEDS = 3  # registered
QUANTITIES = ("last.box", "first.imbalance")  # registered
LOSS_STEPS = 100  # per point of the curve


def counted(settings: Config, split: str) -> dict[str, int]:
    """Numbers of images, objects and classes of a split."""
    found = read_annotations(find_split(settings.data.root, split)[0])
    return {"images": len(found.images), "objects": len(found.annotations), "classes": len(found.categories)}


def measured(run: Path) -> dict[str, Any]:
    """The record of a run."""
    settings, folder = load_config(run), RunFolder(run)
    versions = json.loads((run / "versions.json").read_text())
    losses = [record for record in folder.read_metrics() if "loss" in record]
    steps = np.diff([0, *(record["step"] for record in losses)])
    seconds = float(sum(n * record["seconds_per_step"] for n, record in zip(steps, losses, strict=True)))
    parts = itertools.groupby(losses, lambda record: (record["step"] - 1) // LOSS_STEPS)
    layers = LayerwiseAP.load(run / "evaluation" / "layers.json")
    return {
        "seed": settings.train.seed,
        "start": str(settings.train.weights),
        "minutes": round(seconds / 60, 1),
        "threads": versions["cpu_threads"],
        "torch": versions["packages"]["torch"],
        "parameters": sum(p.numel() for p in load_checkpoint(run).detector.parameters()),
        "loss": [round(float(np.mean([record["loss"] for record in part])), 2) for _, part in parts],
        "stages": {
            name: {"box": stage.box.AP, "mask": stage.mask.AP if stage.mask else None}
            for name, stage in layers.stages.items()
        },
    }


def settings_of(run: Path) -> dict[str, Any]:
    """What all runs on the data have in common."""
    settings = load_config(run)
    return {
        "train": counted(settings, settings.data.train),
        "val": counted(settings, settings.data.val),
        "backbone": settings.model.backbone.name,
        "size": settings.data.jitter.size,
        "batch": settings.train.batch_size,
        "steps": settings.schedule.steps,
    }


def peer(folder: Path) -> dict[str, Any]:
    """The record of a peer, with the lines of code that it took."""
    result = json.loads((folder / "result.json").read_text())
    own = (peers.PEERS[result["model"]], peers.build_optimizer, peers.step_of, peers.score, peers.train)
    lines = sum(len(inspect.getsource(part).splitlines()) for part in own)
    return {key: value for key, value in result.items() if key != "versions"} | {"lines": lines}


def probe(folder: Path) -> dict[str, Any]:
    """A short training of a peer with another rate."""
    result = json.loads((folder / "result.json").read_text())
    return {key: result[key] for key in ("model", "lr", "steps", "box", "mask")}


def merged(before: list[dict[str, Any]], new: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """Records in the order of their keys; a new one replaces the one with the same keys."""
    found = {tuple(record[key] for key in keys): record for record in [*before, *new]}
    return [found[key] for key in sorted(found)]


def comparisons(rows: dict[str, list[Path]]) -> list[dict[str, Any]]:
    """The registered comparisons of the two models."""
    comparisons = [
        Comparison(f"DI-MaskDINO − MaskDINO, {q.label}", ("DI-MaskDINO",), ("MaskDINO",), q)
        for q in map(Quantity.parse, QUANTITIES)
    ]
    runs = {
        name: {load_config(run).train.seed: EvaluatedRun.load(run) for run in found} for name, found in rows.items()
    }
    found = compare(comparisons, runs, SEEDS)
    published = {"last.box": 1.0, "first.imbalance": -1.0}  # the paper's signs
    return [c.to_json() | {"verdict": c.verdict(published[str(c.comparison.quantity)])} for c in found]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="name of the data set, such as animals")
    parser.add_argument("--source", required=True, help="where the photographs come from")
    parser.add_argument("--recipe", type=Path, nargs="*", default=[], help="runs as 'dimaskdino new' starts them")
    parser.add_argument("--dimaskdino", type=Path, nargs="*", default=[], help="runs of the comparison")
    parser.add_argument("--maskdino", type=Path, nargs="*", default=[], help="runs of the comparison")
    parser.add_argument("--peers", type=Path, nargs="*", default=[], help="folders of trained peers")
    parser.add_argument("--probes", type=Path, nargs="*", default=[], help="short trainings of peers with other rates")
    parser.add_argument("--times", type=Path, help="what 'peers time' wrote")
    arguments = parser.parse_args()
    compared = {"DI-MaskDINO": arguments.dimaskdino, "MaskDINO": arguments.maskdino}
    file = MEASUREMENTS / "photographs.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    record = content.setdefault(
        arguments.data, {"recipe": [], "rows": {}, "comparisons": [], "peers": [], "probes": []}
    )
    runs = arguments.recipe + arguments.dimaskdino + arguments.maskdino
    record.update({"source": arguments.source, "registered": SEEDS, **(settings_of(runs[0]) if runs else {})})
    record["recipe"] = merged(record["recipe"], [measured(run) for run in arguments.recipe], "seed")
    for name, found in compared.items():
        if found:
            record["rows"][name] = merged(record["rows"].get(name, []), [measured(run) for run in found], "seed")
    if all(compared.values()):
        record["comparisons"] = comparisons(compared)
    record["peers"] = merged(record["peers"], [peer(folder) for folder in arguments.peers], "model")
    record["probes"] = merged(record["probes"], [probe(folder) for folder in arguments.probes], "model", "lr")
    record["times"] = json.loads(arguments.times.read_text()) if arguments.times else record.get("times", {})
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {file}")
