"""Draw the figures of README and docs, and write tables and numbers from the committed records: `make figures`."""

import tempfile
from pathlib import Path

from PIL import Image

from dimaskdino import load, load_config, viz
from dimaskdino.data.coco import CocoDataset
from dimaskdino.data.shapes import generate, scene
from dimaskdino.viz.effect import object_to_follow, plot_effect
from tools.records.records import ARCHIVES, ROOT, course_model, study_report, write_all

SHAPES = load_config("shapes/demo").data.shapes


def two_models() -> viz.style.Figure:
    """The first figure of the demo: the course's two models at every stage, and an object of a validation image."""
    names = {"MaskDINO": "maskdino", "DI-MaskDINO": "dimaskdino"}
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder) / "shapes", SHAPES.model_copy(update={"train": 1, "val": 4}), processes=0)
        sample = CocoDataset(Path(folder) / "shapes", "val", only_with_objects=True)[1]
    looks = {label: load(f"{name}-shapes", device="cpu").inspect(sample) for label, name in names.items()}
    return plot_effect({label: course_model(n) for label, n in names.items()}, looks, object_to_follow(looks))


def drawing() -> viz.style.Figure:
    """The drawn image of the README's example, which is written beside it, with the detections of the small model."""
    file = ROOT / "docs" / "figures" / "scene.png"
    Image.fromarray(scene(SHAPES, "val", 4)[0]).save(file)
    return load("dimaskdino-shapes", device="cpu").predict(file).plot()


def box_formula() -> viz.style.Figure:
    """The modules under three formulas for the boxes of masks, at every stage, in the second study on the shapes."""
    return viz.plot_study_layers(study_report("box_formula", "miniature"))


FIGURES = {
    "two_models": two_models,
    "drawing": drawing,
    "box_formula": box_formula,
    "architecture": viz.draw_architecture,
}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        path = ROOT / "docs" / "figures" / f"{name}.png"
        draw().savefig(path, dpi=45 if name == "drawing" else 130)
        print(f"written: {path}")
    for file in sorted(ARCHIVES.glob("*/*/table.md")):
        file.write_text(study_report(file.parent.name, file.parents[1].name).markdown() + "\n")
    write_all()
