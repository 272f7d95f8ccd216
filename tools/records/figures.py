"""Draw the figures of README and docs, and write tables and numbers from the committed records: `make figures`."""

from dataclasses import replace

from dimaskdino import viz
from tools.records.records import ARCHIVES, ROOT, course_model, study_report, write_all


def layers() -> viz.style.Figure:
    """Box and mask AP of the course's two models at every stage, without their upper bounds."""
    models = {"MaskDINO": "maskdino", "DI-MaskDINO": "dimaskdino"}
    return viz.plot_layerwise_ap({label: replace(course_model(n), upper_bounds=None) for label, n in models.items()})


def box_formula() -> viz.style.Figure:
    """The modules under three formulas for the boxes of masks, at every stage, in the second study on the shapes."""
    return viz.plot_study_layers(study_report("box_formula", "miniature"))


FIGURES = {"layers": layers, "box_formula": box_formula, "architecture": viz.draw_architecture}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        path = ROOT / "docs" / "figures" / f"{name}.png"
        draw().savefig(path, dpi=130)
        print(f"written: {path}")
    for file in sorted(ARCHIVES.glob("*/*/table.md")):
        file.write_text(study_report(file.parent.name, file.parents[1].name).markdown() + "\n")
    write_all()
