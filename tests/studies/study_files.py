"""A small study file, and synthetic runs for it."""

import json
from pathlib import Path

import numpy as np
import yaml

from dimaskdino.config import dump_config, load_config
from dimaskdino.evaluation.bootstrap import BootstrapAP
from dimaskdino.evaluation.coco_ap import AveragePrecision
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP, StageAP
from dimaskdino.studies.study import load_study

ROOT = Path(__file__).parents[2]


def write_study(folder, **changes):
    """A study file of two variants, `a` and `b`, at the scale `tiny`."""
    content = {
        "title": "Two variants",
        "report": ["last.box", "first.imbalance"],
        "seeds": [0],
        "scales": {"tiny": str(ROOT / "configs" / "shapes" / "dimaskdino_r18.yaml")},
        "variants": [
            {"name": "a", "label": "A"},
            {"name": "b", "label": "B", "settings": {"tiny": ["model.bato.enabled=false"]}},
        ],
        "comparisons": [{"plus": ["b"], "minus": ["a"]}],
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content | changes))
    return folder / "study.yaml"


def stage_ap(box, mask=None):
    fields = dict.fromkeys(AveragePrecision.__dataclass_fields__) | {"per_class": {}}
    return StageAP(AveragePrecision(**fields | {"AP": box}), AveragePrecision(**fields | {"AP": mask}))


def write_run(folder, variant, seed, first, last, samples=None):
    """The evaluation of a run: (box, mask) AP of the first and last layer, and bootstrap samples by stage and kind."""
    run = folder / "runs" / f"{variant}_{seed}"
    result = LayerwiseAP({"decoder.1": stage_ap(*first), "decoder.2": stage_ap(*last)}, 1, "synthetic")
    result.save(run / "evaluation" / "layers.json")
    if samples:
        arrays = {name: np.array(values, float) for name, values in samples.items()}
        BootstrapAP("same", arrays).save(run / "evaluation" / "bootstrap.npz")
    return run


def write_training(run, study_file, variant, seed, *changes):
    """The training of a run: its configuration, its versions and two validations, which score the first layer too."""
    study = load_study(study_file)
    overrides = [*study.overrides(study.variant(variant), "tiny", seed), *changes]
    (run / "config.yaml").write_text(dump_config(load_config(study.scales["tiny"], overrides)))
    (run / "versions.json").write_text(json.dumps({"python": "3.11.7", "command": ["/home/somebody/study"]}))
    records = [{"step": 1, "loss": 2.0, "seconds_per_step": 0.5}]
    for step, box, mask in ((10, 1.0, 2.0), (20, None, None)):
        stages = {"decoder.1": {"box": step / 20, "mask": 1.0}}
        records.append({"step": step, "validation": {"box_AP": box, "mask_AP": mask, "images": 4, "stages": stages}})
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
