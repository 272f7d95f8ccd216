"""Study files: variants of one model configuration, each trained with several seeds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator

from dimaskdino.config import Config, Section, explain, load_config, read_tree
from dimaskdino.studies.comparison import Comparison, Quantity
from dimaskdino.studies.runs import EvaluatedRun, load_runs
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.resources import configs_folder


class Variant(Section):
    """One variant of the model: a row of the study's table."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$",
        description="name of the variant and of its runs; studies in one folder share the runs of a name",
    )
    label: str
    published: str | None = Field(None, description="path in the paper's tables: keys and positions separated by dots")
    settings: dict[str, tuple[str, ...]] = Field({}, description="`key=value` by scale; those of `all` apply first")


class RegisteredComparison(Section):
    """A comparison in a study file: the mean of some variants minus the mean of others, for every quantity."""

    plus: tuple[str, ...] = Field(min_length=1, description="names of variants")
    minus: tuple[str, ...] = Field(min_length=1, description="names of the variants that are subtracted")
    label: str | None = Field(None, description="name in tables; by default made of the variants' labels")


class Study(Section):
    """A study file. Those of version 0.2 call the variants `rows` and the comparisons `contrasts`.

    Attributes:
        title: heading of the report.
        columns: datasets with published numbers, and the key of each below `Variant.published` ("" if none).
        report: quantities to compare: `STAGE.box`, `STAGE.mask` or `STAGE.imbalance`, where STAGE is a stage's name or
            `first` or `last` for those decoder layers. `STAGE.imbalance@25` is read where the stage's box AP reaches 25
            during training; the training must score that stage (`train.validation`).
        seeds: training seeds. Fix their number before the first run; with fewer, comparisons are inconclusive.
        deviation: expected standard deviation over trainings by quantity, from a pilot, for the power of the plan.
        scales: the configuration that the settings change, by scale; absolute paths after `load_study`.
        starts: by scale, the configuration of a training from which all variants of a seed start. Variants are then
            compared in pairs with the same seed.
        variants: the variants, in the order of the report.
        comparisons: which variants to compare. The p-values of all comparisons and quantities are adjusted together.
    """

    title: str
    columns: dict[str, str] = Field({})
    report: tuple[str, ...]
    seeds: tuple[int, ...]
    scales: dict[str, Path]
    starts: dict[str, Path] = Field({})
    deviation: dict[str, float] = Field({})
    variants: tuple[Variant, ...] = Field(validation_alias=AliasChoices("variants", "rows"))
    comparisons: tuple[RegisteredComparison, ...] = Field((), validation_alias=AliasChoices("comparisons", "contrasts"))

    @field_validator("variants")
    @classmethod
    def _check_names(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        names = [variant.name for variant in variants]
        if "start" in names:
            raise ValueError("a variant cannot be called start: this is the name of the trainings that variants share")
        if len(set(names)) != len(names):
            raise ValueError(f"names of variants must be unique, got {', '.join(names)}")
        return variants

    @field_validator("report", "deviation")
    @classmethod
    def _check_quantities(cls, named: Any) -> Any:
        for text in named:
            Quantity.parse(text)
        return named

    @model_validator(mode="after")
    def _check_references(self) -> "Study":
        for comparison in self.comparisons:
            for name in (*comparison.plus, *comparison.minus):
                if name not in self.names:
                    known = ", ".join(self.names)
                    raise ValueError(f"unknown variant '{name}' in a comparison; the variants are {known}")
                if name in comparison.plus and name in comparison.minus:
                    raise ValueError(f"{name} cannot be compared with itself")
        missing = [variant.name for variant in self.variants if variant.published is None]
        if self.columns and missing:
            raise ValueError(f"the study has published columns; set `published` for {', '.join(missing)}")
        return self

    @property
    def names(self) -> list[str]:
        """Names of the variants."""
        return [variant.name for variant in self.variants]

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        return tuple(map(Quantity.parse, self.report))

    @property
    def registered(self) -> tuple[Comparison, ...]:
        """Every comparison of the file, once for each quantity."""
        found = []
        for comparison in self.comparisons:
            label = comparison.label
            if label is None:
                plus = ", ".join(self.variant(name).label for name in comparison.plus)
                minus = ", ".join(self.variant(name).label for name in comparison.minus)
                label = f"{plus} − {minus}"
            for quantity in self.quantities:
                found.append(Comparison(label, comparison.plus, comparison.minus, quantity))
        return tuple(found)

    def variant(self, name: str) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)

    def overrides(self, variant: Variant, scale: str, seed: int = 0) -> list[str]:
        """Settings of one run of a variant, relative to the configuration of the scale.

        Raises:
            UserError: the study has no such scale.
        """
        if scale not in self.scales:
            raise UserError(f"the study has no scale '{scale}', only {', '.join(self.scales)}")
        return [*variant.settings.get("all", ()), *variant.settings.get(scale, ()), f"train.seed={seed}"]

    def config(self, variant: Variant, scale: str, seed: int = 0) -> Config:
        """The configuration of one run."""
        overrides = self.overrides(variant, scale, seed)
        return load_config(self.scales[scale], overrides)

    def published(self, tables: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
        """Published values by column, name of the variant and quantity.

        Args:
            tables: the paper's tables (`report.paper_tables`). Where they have a single pair of box and mask AP, it
                belongs to the last layer.
        """
        by_column: dict[str, dict[str, dict[str, float]]] = {}
        for column, key in self.columns.items():
            by_column[column] = {}
            for variant in self.variants:
                path = (variant.published or "").split(".")
                by_column[column][variant.name] = _published_values(tables, [*path, key] if key else path)
        return by_column

    def measured(self, folder: Path) -> dict[str, dict[int, EvaluatedRun]]:
        """Evaluated runs in a study folder by name of the variant and seed; variants without any are left out.

        Raises:
            UserError: a run is damaged.
        """
        return load_runs(folder, self.names)


def _published_values(tables: Mapping[str, Any], path: list[str]) -> dict[str, float]:
    """Published values by quantity below a path of keys and positions."""
    node: Any = tables
    for step in path:
        node = node[int(step) if isinstance(node, list) else step]
    layers = node if "last" in node else {"last": node}
    values = {}
    for layer, ap in layers.items():
        values[f"{layer}.box"] = ap["box"]
        values[f"{layer}.mask"] = ap["mask"]
        values[f"{layer}.imbalance"] = ap["mask"] - ap["box"]
    return values


def run_path(folder: Path, variant: Variant, seed: int) -> Path:
    """The run folder of a variant and seed in a study folder."""
    return folder / "runs" / f"{variant.name}_{seed}"


def start_path(folder: Path, seed: int) -> Path:
    """The run folder of the training from which the variants of a seed start."""
    return folder / "runs" / f"start_{seed}"


def find_study(name: str) -> Path:
    """The file of a study: the name of one in `configs/ablations`, or a path that ends in `.yaml`.

    Raises:
        UserError: there is neither.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    folder = configs_folder() / "ablations"
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if name in known:
        return folder / f"{name}.yaml"
    raise UserError(f"no study '{name}': give a YAML file, or one of {', '.join(known)}")


def load_study(path: Path) -> Study:
    """Read a study's YAML file.

    Raises:
        UserError: it cannot be read, or is not a study.
    """
    try:
        study = Study.model_validate(read_tree(path))
    except ValidationError as error:
        raise UserError(explain(error, f"{path} is not a study", Study)) from None
    files = {}
    for key in ("scales", "starts"):
        files[key] = {name: (path.parent / file).resolve() for name, file in getattr(study, key).items()}
    return study.model_copy(update=files)
