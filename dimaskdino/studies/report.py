"""Report of a study: means and deviations, differences with intervals, and the published numbers."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dimaskdino.studies.comparison import Comparison, ComparisonResult, Interval, Quantity, compare
from dimaskdino.studies.runs import EvaluatedRun
from dimaskdino.studies.study import Study
from dimaskdino.utils.files import write_text
from dimaskdino.utils.markdown import escape, table

_EXPLANATION = (
    "Differences between means, in points; the imbalance is mask AP − box AP. The 95 % interval covers other trainings "
    "and other images; `over images` covers other images for these trained models. `p` is two-sided and adjusted for "
    "all comparisons of the study (Holm). `MDE` is the minimum detectable effect: the difference that such a study "
    "finds with 80 % power. A published difference is *supported* (same sign) or *contradicted* (opposite sign) if "
    "p < 0.05 and all registered seeds, at least three, were run; otherwise the comparison is *inconclusive*."
)


def paper_tables() -> dict[str, Any]:
    """The numbers of the paper's tables and of its figure 1."""
    return json.loads((Path(__file__).parent / "paper_tables.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class StudyReport:
    """The results of a study.

    Attributes:
        study: the study file.
        scale: the scale that was run.
        measured: evaluated runs by name of the variant and seed; variants without results are left out.
        published: published values by column of the study, name of the variant and quantity.
    """

    study: Study
    scale: str
    measured: dict[str, dict[int, EvaluatedRun]]
    published: dict[str, dict[str, dict[str, float]]]

    @classmethod
    def of(cls, study: Study, scale: str, folder: Path) -> "StudyReport":
        """Read the results in a study folder.

        Raises:
            UserError: a result cannot be read.
        """
        published = study.published(paper_tables()) if study.columns else {}
        return cls(study, scale, study.measured(folder), published)

    def values(self, variant: str, quantity: Quantity) -> dict[int, float]:
        """A quantity of a variant's runs by seed, where it is defined."""
        return quantity.by_seed(self.measured.get(variant, {}))

    @cached_property
    def results(self) -> list[ComparisonResult]:
        """Results of the registered comparisons whose variants were all measured."""
        paired = self.scale in self.study.starts
        return compare(self.study.registered, self.measured, len(self.study.seeds), paired)

    def published_differences(self, comparison: Comparison) -> dict[str, float]:
        """The same difference in the paper by column, in points, where the paper has all its numbers."""
        differences = {}
        for column, by_name in self.published.items():
            parts = []
            for name, weight in comparison.weights.items():
                values = by_name.get(name, {})
                if str(comparison.quantity) in values:
                    parts.append(weight * values[str(comparison.quantity)])
            if len(parts) == len(comparison.weights):
                differences[column] = round(sum(parts), 2)
        return differences

    def to_json(self) -> dict[str, Any]:
        """The whole report as plain values."""
        variants = []
        for variant in self.study.variants:
            measured = {}
            for quantity in self.study.quantities:
                values = self.values(variant.name, quantity)
                measured[str(quantity)] = {
                    "by_seed": values,
                    "mean": statistics.mean(values.values()) if values else None,
                    "standard_deviation": statistics.stdev(values.values()) if len(values) > 1 else None,
                }
            published = {column: by_name[variant.name] for column, by_name in self.published.items()}
            about = {"name": variant.name, "label": variant.label}
            variants.append(about | {"measured": measured, "published": published})
        comparisons = []
        for result in self.results:
            content = asdict(result)
            content |= content.pop("comparison") | {"quantity": str(result.comparison.quantity)}
            differences = self.published_differences(result.comparison)
            verdicts = {column: result.verdict(difference) for column, difference in differences.items()}
            comparisons.append(content | {"published": differences, "verdicts": verdicts})
        return {
            "study": self.study.title,
            "scale": self.scale,
            "seeds": len(self.study.seeds),
            "variants": variants,
            "comparisons": comparisons,
        }

    def markdown(self) -> str:
        """The report as two tables: the variants, and their differences."""
        title = f"**{escape(self.study.title)}**, scale {escape(self.scale)}: mean over seeds ± standard deviation"
        parts = [title, table(self._variants())]
        if self.results:
            parts += [_EXPLANATION, table(self._differences())]
        return "\n\n".join(parts)

    def _variants(self) -> list[list[str]]:
        """The table of variants, with its header."""
        quantities = self.study.quantities
        rows = [["", *(quantity.label for quantity in quantities), "seeds"]]
        for variant in self.study.variants:
            row = [escape(variant.label)]
            for quantity in quantities:
                row.append(_spread(list(self.values(variant.name, quantity).values()), quantity))
            rows.append([*row, str(len(self.measured.get(variant.name, {})))])
        for column, by_name in self.published.items():
            for quantity in quantities:
                values = [by_name[variant.name].get(str(quantity)) for variant in self.study.variants]
                if any(value is not None for value in values):
                    cells = [f"{column}: {quantity.label}", *(_number(value, quantity) for value in values)]
                    for row, cell in zip(rows, cells, strict=True):
                        row.append(cell)
        return rows

    def _differences(self) -> list[list[str]]:
        """The table of comparisons, with its header."""
        rows = [["", "", "difference", "95 % interval", "over images", "p", "MDE", "runs"]]
        for column in self.published:
            rows[0] += [column, "verdict"]
        for result in self.results:
            row = [escape(result.comparison.label), result.comparison.quantity.label, f"{result.difference:+.1f}"]
            row += [_interval(result.joint), _interval(result.over_images)]
            row.append(_p_value(result.adjusted_p))
            row.append("–" if result.mde is None else f"±{result.mde:.1f}")
            row.append(" / ".join(map(str, result.runs.values())))
            published = self.published_differences(result.comparison)
            for column in self.published:
                if column in published:
                    row += [f"{published[column]:+.1f}", result.verdict(published[column])]
                else:
                    row += ["–", "–"]
            rows.append(row)
        return rows

    def save(self, folder: Path) -> None:
        """Write table.json and table.md.

        Raises:
            UserError: they cannot be written.
        """
        write_text(folder / "table.json", json.dumps(self.to_json(), indent=1) + "\n")
        write_text(folder / "table.md", self.markdown() + "\n")


def _interval(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.low:+.1f} to {interval.high:+.1f}"


def _p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def _number(value: float | None, quantity: Quantity) -> str:
    if value is None:
        return "–"
    return f"{value:+.1f}" if quantity.metric == "imbalance" else f"{value:.1f}"


def _spread(values: Sequence[float], quantity: Quantity) -> str:
    if not values:
        return "–"
    mean = _number(statistics.mean(values), quantity)
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean
