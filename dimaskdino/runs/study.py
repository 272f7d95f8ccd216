"""Studies: the rows of one table of the paper, each a few settings away from one configuration, over several seeds."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator
from tqdm import tqdm

from dimaskdino.config import Config, Section, load_config
from dimaskdino.errors import UserError
from dimaskdino.evaluation.layers import LayerwiseAP, evaluate_layers
from dimaskdino.runs.folder import RunFolder
from dimaskdino.runs.launch import TrainingProcess
from dimaskdino.training.checkpoint import load_model


class Row(Section):
    """One variant of the model."""

    name: str = Field(description="also the name of its runs: rows of several studies with one name are one variant")
    label: str
    published: str = Field(description="its place in the paper's tables: keys and positions with dots between them")
    settings: dict[str, tuple[str, ...]] = Field({}, description="`key=value` by scale; those of `all` come first")


class Study(Section):
    """A table of the paper as variants of one configuration.

    Attributes:
        title: for people.
        columns: data sets that the paper gives numbers for, and the key below `Row.published` of each ("" if none).
        scales: the configuration that the settings change, by scale; absolute paths after `load_study`.
        rows: the variants.
    """

    title: str
    columns: dict[str, str]
    scales: dict[str, Path]
    rows: tuple[Row, ...]

    @field_validator("rows")
    @classmethod
    def _names(cls, rows: tuple[Row, ...]) -> tuple[Row, ...]:
        names = [row.name for row in rows]
        if len(set(names)) != len(names):
            raise ValueError(f"every row needs a name of its own, got {', '.join(names)}")
        return rows

    def overrides(self, row: Row, scale: str, seed: int = 0) -> list[str]:
        """Settings that make the scale's configuration into a run of this row.

        Raises:
            UserError: the study has no such scale.
        """
        if scale not in self.scales:
            raise UserError(f"the study has no scale '{scale}', only {', '.join(self.scales)}")
        return [*row.settings.get("all", ()), *row.settings.get(scale, ()), f"train.seed={seed}"]

    def config(self, row: Row, scale: str, seed: int = 0) -> Config:
        """The configuration of one run."""
        overrides = self.overrides(row, scale, seed)
        return load_config(self.scales[scale], overrides)

    def published(self, tables: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
        """Box and mask AP by column and row name, from the paper's tables (`docs/paper_tables.json`)."""
        found: dict[str, dict[str, tuple[float, float]]] = {column: {} for column in self.columns}
        for row in self.rows:
            for column, key in self.columns.items():
                node: Any = tables
                for step in [*row.published.split("."), *([key] if key else [])]:
                    node = node[int(step) if isinstance(node, list) else step]
                found[column][row.name] = node["box"], node["mask"]
        return found

    def measured(self, folder: Path) -> dict[str, list[LayerwiseAP]]:
        """What has been measured in a folder of runs, by row name, one result a seed; rows without any are left out."""
        results = {}
        for row in self.rows:
            files = sorted(folder.glob(f"{row.name}_*/evaluation/layers.json"))
            seeds = [f for f in files if f.parents[1].name.removeprefix(f"{row.name}_").isdigit()]
            if seeds:
                results[row.name] = [LayerwiseAP.load(file) for file in seeds]
        return results

    def table(self, results: Mapping[str, Sequence[LayerwiseAP]]) -> str:
        """Means over the seeds ± their standard deviation: last layer, and how far boxes lag at the first."""
        header = f"{'':<34}{'box AP':>14}{'mask AP':>14}{'first layer: mask − box':>26}{'seeds':>7}"
        lines = [header, "-" * len(header)]
        for row in self.rows:
            if row.name not in results:
                lines.append(f"{row.label:<34}{'–':>14}{'–':>14}{'–':>26}{0:>7}")
                continue
            layers = [result.first_and_last() for result in results[row.name]]
            cells = [
                _spread([layer["last"]["box"] for layer in layers]),
                _spread([layer["last"]["mask"] for layer in layers]),
                _spread([layer["first"]["mask"] - layer["first"]["box"] for layer in layers], "+"),
            ]
            lines.append(f"{row.label:<34}{cells[0]:>14}{cells[1]:>14}{cells[2]:>26}{len(layers):>7}")
        return "\n".join(lines)


def _spread(values: Sequence[float], sign: str = "") -> str:
    mean = f"{statistics.mean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def load_study(path: Path) -> Study:
    """Read a study's YAML file.

    Raises:
        UserError: it cannot be read, or is not a study.
    """
    try:
        study = Study.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise UserError(f"cannot read the study {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
        raise UserError(f"{path} is not a study: {'; '.join(problems)}") from None
    scales = {name: (path.parent / file).resolve() for name, file in study.scales.items()}
    return study.model_copy(update={"scales": scales})


def run_study(study: Study, scale: str, seeds: Sequence[int], folder: Path, changes: Sequence[str] = ()) -> None:
    """Train and evaluate every row with every seed that has no result yet; all rows of a seed before the next seed.

    An interrupted study goes on where it was.

    Args:
        study: what to run.
        scale: one of its scales.
        seeds: seeds of the training.
        folder: each run goes into `folder/ROW_SEED`.
        changes: settings for every row, after its own.

    Raises:
        UserError: a run failed, or the folder holds runs of another scale or with other settings; nothing is lost.
    """
    todo = [(row, seed) for seed in seeds for row in study.rows]
    for row, seed in tqdm(todo, study.title, mininterval=1):
        run = RunFolder(folder / f"{row.name}_{seed}")
        result = run.path / "evaluation" / "layers.json"
        overrides = [*study.overrides(row, scale, seed), *changes]
        if result.exists():
            if load_config(run.path / "config.yaml") != load_config(study.scales[scale], overrides):
                raise UserError(f"{run.path} holds a run with other settings than this study's; use another folder")
            continue
        with TrainingProcess(str(study.scales[scale]), run.path, overrides) as training:
            for _ in training.follow():
                pass
        evaluate_layers(load_model(run.path)).save(result)
