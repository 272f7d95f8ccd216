"""Explorers as pictures with a slider, for pages where no Python runs."""

import html
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from dimaskdino.course.build import with_palette
from dimaskdino.course.lesson import begin
from dimaskdino.files import write_atomically
from dimaskdino.viz.explorers import (
    Explorer,
    explore_architecture,
    explore_curves,
    explore_guidance,
    explore_layers,
    explore_sampling,
    explore_selection,
    explore_true_boxes,
)

MOST_FRAMES = 12


@dataclass(frozen=True)
class Example:
    """An explorer with the course's models.

    Attributes:
        explorer: the figure and its controls.
        chapter: name of the chapter that has it.
        control: the control that the slider of a page moves.
    """

    explorer: Explorer
    chapter: str
    control: str


def examples(images: int = 6) -> dict[str, Example]:
    """The explorers of the chapters, by name."""
    lesson, baseline = begin("notebooks/models/dimaskdino"), begin("notebooks/models/maskdino")
    looks = lesson.looks(images)
    scenes = begin("notebooks/models/solids", ["data.root=notebooks/scenes"]).looks(images)
    runs = {"MaskDINO": baseline.layerwise_ap(), "DI-MaskDINO": lesson.layerwise_ap()}
    return {
        "architecture": Example(explore_architecture(looks), "00_detr", "place"),
        "layers": Example(explore_layers(scenes), "01_imbalance", "stage"),
        "true boxes": Example(explore_true_boxes(lesson.samples(images)), "01_imbalance", "formula"),
        "curves": Example(explore_curves(runs), "01_imbalance", "names"),
        "sampling": Example(explore_sampling(looks), "03_deformable_attention", "query"),
        "selection": Example(explore_selection(scenes), "04_de_imbalance", "k1"),
        "guidance": Example(explore_guidance(looks), "05_bato", "token"),
    }


def frames(example: Example) -> Iterator[tuple[str, str, bytes]]:
    """Label, description and PNG for values of the control that the slider moves, at most `MOST_FRAMES`."""
    control = example.explorer.controls[example.control]
    for label, value in _thinned(list(_values(control))):
        control.value = value
        yield label, example.explorer.picture.alt, with_palette(example.explorer.picture.png)


def _values(control: widgets.ValueWidget) -> Iterator[tuple[str, Any]]:
    if isinstance(control, widgets.IntSlider):
        yield from ((str(value), value) for value in range(control.min, control.max + 1, control.step))
    elif isinstance(control, widgets.SelectMultiple):
        yield from ((name, (name,)) for name in control.options)
        yield "all", tuple(control.options)
    else:
        yield from ((str(option[0]), option[1]) for option in control.options)


def _thinned(values: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    step = max(1, -(-len(values) // MOST_FRAMES))
    return values[::step]


_PAGE = """# Explorers

What the explorers of the chapters show, without Python: move a slider with the mouse, or with the arrow keys. In
JupyterLab (`make lab`) every control works, and images and models of your own take the place of these.

{parts}
"""

_PART = """## {title}

From []({chapter}.ipynb).

```{{raw}} html
<figure class="frames" data-frames="{files}" data-labels="{labels}" data-alts="{alts}">
<label>{control} <input type="range" min="0" max="{last}" value="0" aria-label="{title}: {control}"></label>
<output></output>
<img loading="lazy" style="max-width: 100%; background: white">
</figure>
```
"""

_SCRIPT = """
```{raw} html
<script>
for (const figure of document.querySelectorAll("figure.frames")) {
  const [files, labels, alts] = ["frames", "labels", "alts"].map((name) => JSON.parse(figure.dataset[name]));
  const slider = figure.querySelector("input"), image = figure.querySelector("img");
  const show = () => {
    image.src = files[slider.value];
    image.alt = alts[slider.value];
    figure.querySelector("output").value = labels[slider.value];
  };
  slider.addEventListener("input", show);
  show();
  figure.addEventListener("pointerenter", () => files.forEach((file) => (new Image().src = file)), { once: true });
}
</script>
```
"""


def write_page(page: Path, static: Path, shown: dict[str, Example], chapters: set[str]) -> None:
    """Write the page of the explorers, and their pictures.

    Args:
        page: Markdown file of the site.
        static: folder for the pictures, which Sphinx copies to `_static`.
        shown: explorers by name.
        chapters: names of the chapters that the site has.
    """
    parts = []
    for title, example in shown.items():
        files, labels, alts = [], [], []
        for number, (label, alt, png) in enumerate(frames(example)):
            name = f"{title.replace(' ', '_')}_{number}.png"
            write_atomically(static / name, lambda path, png=png: path.write_bytes(png))
            files.append(f"_static/{static.name}/{name}")
            labels.append(label)
            alts.append(alt)
        quoted = {
            name: html.escape(json.dumps(values))
            for name, values in (("files", files), ("labels", labels), ("alts", alts))
        }
        part = _PART.format(
            title=title.capitalize(), chapter=example.chapter, control=example.control, last=len(files) - 1, **quoted
        )
        if example.chapter not in chapters:
            part = part.replace(f"From []({example.chapter}.ipynb).\n\n", "")
        parts.append(part)
    page.write_text(_PAGE.format(parts="\n".join(parts)) + _SCRIPT)
