"""The start of every chapter: a trained model and its validation images."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from dimaskdino.checkpoints.catalogue import find_model
from dimaskdino.data import shapes
from dimaskdino.data.coco import CocoDataset, Sample
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP, evaluate_layers
from dimaskdino.inspection.look import Look
from dimaskdino.model import Model, load
from dimaskdino.runs import RunFolder, project_root


@dataclass(frozen=True)
class Lesson:
    """A trained model, the validation split of its training data, and its run folder (or the folder of its file)."""

    trained: Model
    data: CocoDataset
    run: RunFolder

    def samples(self, count: int) -> list[Sample]:
        """Some of the first 3 · count images: those with at least three objects, then others."""
        found = [self.data[i] for i in range(min(3 * count, len(self.data)))]
        return sorted(found, key=lambda sample: -min(len(sample.labels), 3))[:count]

    def looks(self, count: int) -> list[Look]:
        """The same images with the model's predictions."""
        return [self.trained.inspect(sample) for sample in self.samples(count)]

    def layerwise_ap(self) -> LayerwiseAP:
        """AP of every stage: from the run folder, or computed now."""
        saved = self.run.path / "evaluation" / "layers.json"
        return LayerwiseAP.load(saved) if saved.exists() else evaluate_layers(self.trained)


def begin(model: str, overrides: Iterable[str] = ()) -> Lesson:
    """Change to the project's folder, load a trained model and open its validation images.

    The shapes data are generated once, if the model was trained on them.

    Args:
        model: a name such as `dimaskdino-shapes`, or a run folder or file, relative to the project's folder.
        overrides: `key=value` settings that differ from those of the training, such as data.root.

    Raises:
        UserError: there is no such model, or its data are missing.
    """
    os.chdir(project_root())
    path = find_model(model)
    trained = load(path, overrides=overrides)
    data = trained.config.data
    shapes.ensure(data)
    images = CocoDataset(data.root, data.val)
    images.use_classes(trained.classes, data)
    return Lesson(trained, images, RunFolder(path if path.is_dir() else path.parent))
