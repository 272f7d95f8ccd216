"""What every chapter begins with: a trained model and the images it has not seen."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dimaskdino.data import shapes
from dimaskdino.data.coco import CocoDataset
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP, evaluate_layers
from dimaskdino.inspection.look import Look
from dimaskdino.model import Model, load
from dimaskdino.runs import RunFolder, project_root


@dataclass(frozen=True)
class Lesson:
    """A trained model with its validation images.

    Attributes:
        trained: the model.
        data: the validation split of the data that it was trained on.
        run: the run folder that it comes from; a file's folder if it is no run's.
    """

    trained: Model
    data: CocoDataset
    run: RunFolder

    def looks(self, count: int) -> list[Look]:
        """Some images as the model sees them: of the first 3·count those with at least three objects, then others."""
        samples = [self.data[i] for i in range(min(3 * count, len(self.data)))]
        samples.sort(key=lambda sample: -min(len(sample.labels), 3))
        return [self.trained.inspect(sample) for sample in samples[:count]]

    def layerwise_ap(self) -> LayerwiseAP:
        """AP of every stage: as the run folder has it, else measured now."""
        saved = self.run.path / "evaluation" / "layers.json"
        return LayerwiseAP.load(saved) if saved.exists() else evaluate_layers(self.trained)


def begin(model: str, overrides: Iterable[str] = ()) -> Lesson:
    """Go to the project's folder, load a trained model and open its validation images.

    The shapes data are generated, once, if they are what the model was trained on.

    Args:
        model: a run folder or a file, from the project's folder.
        overrides: `key=value` settings that differ from those of the training, such as data.root.

    Raises:
        UserError: there is no such model, or its data are missing.
    """
    os.chdir(project_root())
    path = Path(model)
    trained = load(path, overrides=overrides)
    data = trained.config.data
    shapes.ensure(data)
    return Lesson(trained, CocoDataset(data.root, data.val), RunFolder(path if path.is_dir() else path.parent))
