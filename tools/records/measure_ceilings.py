"""Measure what the box formula does: `measure_ceilings.py [--photographs FOLDER SPLIT] [--animals FOLDER]`.

Writes measurements/ceilings.json: the ceilings of the shapes at two resolutions and of the second miniature's, of
photographs in COCO format at the paper's resolution, and of the animals at that of their study (neither are in the
repository); and AP of the course's MaskDINO at every stage with each formula for the boxes that enter its decoder,
changed at test time only.
"""

import argparse
import json
import tempfile
from pathlib import Path

from dimaskdino import load
from dimaskdino.config import Config, load_config
from dimaskdino.data.coco import find_split
from dimaskdino.data.shapes import ensure
from dimaskdino.evaluation.coco_ap import read_truth
from dimaskdino.evaluation.layerwise_ap import evaluate_layers
from dimaskdino.evaluation.upper_bounds import upper_bounds
from tools.records.sources import MEASUREMENTS

PAPER = "coco/instance-segmentation/dimaskdino_r50_4scale_bs16_12ep"
FORMULAS = ("mask2box", "bitmask", "no")


def measured(settings: Config) -> dict[str, object]:
    """The ceilings of a configuration on its validation split."""
    truth = read_truth(find_split(settings.data.root, settings.data.val)[0])
    found = upper_bounds(truth, settings)
    return {"images": len(truth.dataset["images"]), "mask": found.mask.__dict__} | {
        convention: recall.__dict__ for convention, recall in found.box.items()
    }


def shapes(folder: Path, size: int) -> dict[str, object]:
    """The ceilings of the built-in data, drawn at this size in pixels."""
    sizes = [f"data.shapes.size={size}", f"data.resize.shortest={size}", f"data.resize.longest={size}"]
    return drawn(folder / str(size), "shapes/dimaskdino_r18", *sizes)


def drawn(folder: Path, name: str, *overrides: str) -> dict[str, object]:
    """The ceilings of a configuration with synthetic data, which are drawn into the folder."""
    settings = load_config(name, [f"data.root={folder}", "data.shapes.train=1", *overrides])
    ensure(settings.data)
    return measured(settings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", nargs=2, metavar=("FOLDER", "SPLIT"))
    parser.add_argument("--animals", metavar="FOLDER", help="with the splits train and val")
    arguments = parser.parse_args()
    path = MEASUREMENTS / "ceilings.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        record["shapes"] = {str(size): shapes(Path(folder), size) for size in (128, 256)}
        record["miniature"] = drawn(Path(folder) / "miniature", "shapes/miniature")
    if arguments.photographs:
        root, split = arguments.photographs
        record["photographs"] = measured(load_config(PAPER, [f"data.root={root}", f"data.val={split}"]))
    if arguments.animals:
        record["animals"] = measured(
            load_config("photographs/study", [f"data.root={arguments.animals}", "data.val=val"])
        )
    record["maskdino_shapes"] = {}
    for formula in FORMULAS:
        model = load("maskdino-shapes", device="cpu", overrides=[f"model.selection.mask_to_box={formula}"])
        ensure(model.config.data)
        found = evaluate_layers(model)
        record["maskdino_shapes"][formula] = {
            name: {"box": stage.box.AP, "mask": stage.mask and stage.mask.AP} for name, stage in found.stages.items()
        }
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")
