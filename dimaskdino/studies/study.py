"""Studies: variants of a model, each some settings of one configuration, trained with several seeds."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from dimaskdino.config import Config, Section, explain, load_config, parse_yaml
from dimaskdino.studies.comparison import Contrast, EvaluatedRun, Quantity
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.resources import configs_folder


class Row(Section):
    """One variant of the model."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$",
        description="name of the row and of its runs; rows with the same name in several studies share them",
    )
    label: str
    published: str | None = Field(None, description="path in the paper's tables: keys and positions separated by dots")
    settings: dict[str, tuple[str, ...]] = Field({}, description="`key=value` by scale; those of `all` apply first")


class Compared(Section):
    """A comparison that a study registers: the mean of some rows minus the mean of others."""

    plus: tuple[str, ...] = Field(min_length=1, description="names of rows")
    minus: tuple[str, ...] = Field(min_length=1, description="names of the rows that they are compared with")
    label: str | None = Field(None, description="for people; by default the labels of the rows")


class Study(Section):
    """Variants of one configuration.

    Attributes:
        title: for people.
        columns: datasets that the paper has numbers for, and the key of each below `Row.published` ("" if none).
        report: quantities to compare: `STAGE.box`, `STAGE.mask` or `STAGE.imbalance`; the stage may be `first` or
            `last`, for the decoder layers. `STAGE.imbalance@25` is read where the stage's box AP reaches 25 during the
            training, which then has to score that stage (`train.validation`).
        seeds: seeds of the training. Their number is fixed before the first run; comparisons of fewer decide nothing.
        deviation: expected standard deviation over trainings by quantity, from a pilot, for the power of the plan.
        scales: the configuration that the settings change, by scale; absolute paths after `load_study`.
        starts: by scale, the configuration of a training that all rows of a seed start from. Comparisons are then made
            by pairs with one seed, which share their start.
        rows: the variants.
        contrasts: the comparisons, of every quantity; their p-values are adjusted together.
    """

    title: str
    columns: dict[str, str] = Field({})
    report: tuple[str, ...]
    seeds: tuple[int, ...]
    scales: dict[str, Path]
    starts: dict[str, Path] = Field({})
    deviation: dict[str, float] = Field({})
    rows: tuple[Row, ...]
    contrasts: tuple[Compared, ...] = Field(())

    @field_validator("rows")
    @classmethod
    def _names(cls, rows: tuple[Row, ...]) -> tuple[Row, ...]:
        names = [row.name for row in rows]
        if "start" in names:
            raise ValueError("a row cannot be called start, as the trainings are that rows start from")
        if len(set(names)) != len(names):
            raise ValueError(f"row names must be unique, got {', '.join(names)}")
        return rows

    @model_validator(mode="after")
    def _compared(self) -> "Study":
        names = [row.name for row in self.rows]
        for compared in self.contrasts:
            for name in (*compared.plus, *compared.minus):
                if name not in names:
                    raise ValueError(f"'{name}' is compared, but the rows are {', '.join(names)}")
            if both := set(compared.plus) & set(compared.minus):
                raise ValueError(f"{', '.join(sorted(both))} cannot be compared with itself")
        return self

    @field_validator("report", "deviation")
    @classmethod
    def _quantities(cls, named: Any) -> Any:
        for text in named:
            Quantity.parse(text)
        return named

    @model_validator(mode="after")
    def _published(self) -> "Study":
        missing = [row.name for row in self.rows if self.columns and row.published is None]
        if missing:
            raise ValueError(f"the study has published columns, but no place of {', '.join(missing)} in them")
        return self

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        return tuple(map(Quantity.parse, self.report))

    @property
    def registered(self) -> tuple[Contrast, ...]:
        """All contrasts of the study: every comparison of every quantity."""
        return tuple(
            Contrast(self._label(compared), compared.plus, compared.minus, quantity)
            for compared in self.contrasts
            for quantity in self.quantities
        )

    def _label(self, compared: Compared) -> str:
        sides = (", ".join(self.row(name).label for name in names) for names in (compared.plus, compared.minus))
        return compared.label or " − ".join(sides)

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def overrides(self, row: Row, scale: str, seed: int = 0) -> list[str]:
        """Settings of one run of this row, relative to the configuration of the scale.

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

    def published(self, tables: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
        """Published values by column, row name and quantity, from the paper's tables (`report.paper_tables`).

        A single pair of box and mask AP belongs to the last layer.
        """
        published_values: dict[str, dict[str, dict[str, float]]] = {column: {} for column in self.columns}
        for row in self.rows:
            for column, key in self.columns.items():
                node: Any = tables
                for step in [*(row.published or "").split("."), *([key] if key else [])]:
                    node = node[int(step) if isinstance(node, list) else step]
                layers = node if "last" in node else {"last": node}
                values = {f"{layer}.{kind}": ap[kind] for layer, ap in layers.items() for kind in ("box", "mask")}
                values |= {f"{layer}.imbalance": ap["mask"] - ap["box"] for layer, ap in layers.items()}
                published_values[column][row.name] = values
        return published_values

    def measured(self, folder: Path) -> dict[str, dict[int, EvaluatedRun]]:
        """Results in a study folder by row name and seed; rows without results are left out."""
        results: dict[str, dict[int, EvaluatedRun]] = {}
        for row in self.rows:
            for file in sorted((folder / "runs").glob(f"{row.name}_*/evaluation/layers.json")):
                seed = file.parents[1].name.removeprefix(f"{row.name}_")
                if seed.isdigit():
                    results.setdefault(row.name, {})[int(seed)] = EvaluatedRun.load(file.parents[1])
        return results


def run_path(folder: Path, row: Row, seed: int) -> Path:
    """The run folder of a row and seed in a study folder."""
    return folder / "runs" / f"{row.name}_{seed}"


def start_path(folder: Path, seed: int) -> Path:
    """The run folder of the training that the rows of a seed start from."""
    return folder / "runs" / f"start_{seed}"


def find_study(name: str) -> Path:
    """The file of a study: a path, or the name of one in `configs/ablations`.

    Raises:
        UserError: there is neither.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    folder = configs_folder() / "ablations"
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if name in known:
        return folder / f"{name}.yaml"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UserError(f"no study '{name}'; {hint}the kit has {', '.join(known)}")


def load_study(path: Path) -> Study:
    """Read a study's YAML file.

    Raises:
        UserError: it cannot be read, or is not a study.
    """
    try:
        study = Study.model_validate(parse_yaml(path.read_text(encoding="utf-8"), str(path)))
    except OSError as error:
        raise UserError(f"cannot read the study {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not in UTF-8; save it in that encoding") from None
    except ValidationError as error:
        raise UserError(explain(error, f"{path} is not a study", Study)) from None
    files = {
        key: {name: (path.parent / file).resolve() for name, file in getattr(study, key).items()}
        for key in ("scales", "starts")
    }
    return study.model_copy(update=files)
