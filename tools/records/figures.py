"""Draw the figures of README and docs, and write the numbers around them: `make figures`.

Each figure is made from the committed records named in its function. The Markdown between
`<!-- records: NAME -->` and `<!-- end -->` is written by the function NAME of records.py; a test compares both.
"""

import json

import dimaskdino
from dimaskdino import viz
from dimaskdino.data.coco import CocoDataset
from dimaskdino.inspection.objects import track_objects
from tools.records import miniature_blocks, records, study_blocks
from tools.records.sources import MEASUREMENTS, ROOT, course_models

FOLDER = ROOT / "docs" / "figures"
SCENE = 0  # of the rendered scenes: one that shows the lag of boxes


def first_and_last() -> viz.style.Figure:
    """The claim: the paper's figure 1 beside the two models of the course (their layers.json)."""
    return viz.plot_first_and_last_layer(records.first_and_last_layers())


def layers() -> viz.style.Figure:
    """Box and mask AP of the course's DI-MaskDINO at every stage (its layers.json)."""
    return viz.plot_layerwise_ap({"DI-MaskDINO": course_models()["DI-MaskDINO"]})


def objects() -> viz.style.Figure:
    """A rendered scene at three stages of the model for them; notes the IoUs in measurements/objects_figure.json."""
    model = dimaskdino.load("dimaskdino-solids", device="cpu")
    stages = ["first_selection", "decoder.1", model.stages[-1]]
    look = model.inspect(CocoDataset(ROOT / "notebooks" / "scenes", "val")[SCENE])
    track = track_objects(look, stages, threshold=0.3)
    found = {
        stage: {
            kind: [round(value, 4) for value in ious[i].tolist()]  # the last digits depend on the number of threads
            for kind, ious in (("box_iou", track.box_iou), ("mask_iou", track.mask_iou))
        }
        for i, stage in enumerate(stages)
    }
    record = {"classes": [look.classes[label] for label in look.sample.labels.tolist()], "stages": found}
    (MEASUREMENTS / "objects_figure.json").write_text(json.dumps(record, indent=1) + "\n")
    return viz.draw_object_stages(look, stages, track)


def box_formula() -> viz.style.Figure:
    """The modules under three formulas for the boxes of masks, at every stage (the second miniature's runs)."""
    return viz.study_figures(miniature_blocks.registered("box_formula"))["layers"]


def architecture() -> viz.style.Figure:
    """The model as figure 2 of the paper has it."""
    return viz.draw_architecture()


FIGURES = (first_and_last, layers, objects, box_formula, architecture)

if __name__ == "__main__":
    for figure in FIGURES:
        path = FOLDER / f"{figure.__name__}.png"
        figure().savefig(path, dpi=130)
        print(f"written: {path}")
    for runs, name in miniature_blocks.all_reports():
        report, folder = study_blocks.report(name, runs), study_blocks.FOLDERS[runs] / name
        report.save(folder)
        for kind, drawn in viz.study_figures(report).items():
            drawn.savefig(folder / f"{kind}.png")
        print(f"written: {folder}")
    for path in records.write_all():
        print(f"written: {path}")
