"""Record evaluated trainings on photographs: `python docs/measure_photographs.py RUN … --data NAME --source WHERE`.

Writes measurements/photographs.json: of each run its data, settings, time and AP of every stage. The photographs are
not in the repository.
"""

import argparse
import datetime
import json
from pathlib import Path

import records

from dimaskdino.config import Config, load_config
from dimaskdino.data.annotations import read_annotations
from dimaskdino.data.coco import find_split
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.runs.folder import RunFolder


def counted(settings: Config, split: str) -> dict[str, int]:
    """Numbers of images, objects and classes of a split."""
    found = read_annotations(find_split(settings.data.root, split)[0])
    return {"images": len(found.images), "objects": len(found.annotations), "classes": len(found.categories)}


def measured(run: Path) -> dict[str, object]:
    """The record of a run."""
    settings, status = load_config(run), RunFolder(run).status()
    start, end = (datetime.datetime.strptime(status[key], "%Y-%m-%dT%H:%M:%S%z") for key in ("started", "ended"))
    versions = json.loads((run / "versions.json").read_text())
    layers = LayerwiseAP.load(run / "evaluation" / "layers.json")
    return {
        "train": counted(settings, settings.data.train),
        "val": counted(settings, settings.data.val),
        "backbone": settings.model.backbone.name,
        "de_imbalance": len(settings.model.selection.k) > 1,
        "bato": settings.model.bato.enabled,
        "size": settings.data.jitter.size,
        "batch": settings.train.batch_size,
        "steps": settings.schedule.steps,
        "seed": settings.train.seed,
        "minutes": round((end - start).total_seconds() / 60, 1),
        "threads": versions["cpu_threads"],
        "torch": versions["packages"]["torch"],
        "stages": {
            name: {"box": stage.box.AP, "mask": stage.mask.AP if stage.mask else None}
            for name, stage in layers.stages.items()
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", required=True, help="name of the data set, such as animals")
    parser.add_argument("--source", required=True, help="where the photographs come from")
    arguments = parser.parse_args()
    file = records.MEASUREMENTS / "photographs.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    content[arguments.data] = {"source": arguments.source, "runs": [measured(run) for run in arguments.runs]}
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {file}")
