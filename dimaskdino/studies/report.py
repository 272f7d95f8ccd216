"""Report of a study: means and deviations, differences with intervals, and the published numbers."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dimaskdino.studies.comparison import Comparison, ComparisonResult, Interval, Quantity, compare
from dimaskdino.studies.runs import EvaluatedRun
from dimaskdino.studies.study import Study, Variant
from dimaskdino.utils.files import write_text
from dimaskdino.utils.markdown import escape

_EXPLANATION = (
    "Differences between means, in points; the imbalance is mask AP − box AP. The 95 % interval covers other trainings "
    "and other images; `over images` covers other images for these trained models. `p` is two-sided and adjusted for "
    "all comparisons of the study (Holm). `MDE` is the minimum detectable effect: the difference that such a study "
    "finds with 80 % power. A published difference is *supported* (same sign) or *contradicted* (opposite sign) if "
    "p < 0.05 and all registered seeds, at least three, were run; otherwise the comparison is *inconclusive*."
)
PAPER = Path(__file__).parent / "paper_tables.json"


def paper_tables() -> dict[str, Any]:
    """The numbers of the paper's tables and of its figure 1."""
    return json.loads(PAPER.read_text())


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

    def published_difference(self, column: str, comparison: Comparison) -> float | None:
        """The same difference in the paper, in points; None if the paper lacks one of its numbers."""
        difference = 0.0
        for name, weight in comparison.weights.items():
            value = self.published[column].get(name, {}).get(str(comparison.quantity))
            if value is None:
                return None
            difference += weight * value
        return round(difference, 2)

    def published_differences(self, comparison: Comparison) -> dict[str, float]:
        """The published differences by column, where there are any."""
        found = {}
        for column in self.published:
            difference = self.published_difference(column, comparison)
            if difference is not None:
                found[column] = difference
        return found

    def to_json(self) -> dict[str, Any]:
        """The whole report as plain values."""
        return {
            "study": self.study.title,
            "scale": self.scale,
            "seeds": len(self.study.seeds),
            "variants": [self._variant(variant) for variant in self.study.variants],
            "comparisons": [self._result(result) for result in self.results],
        }

    def _variant(self, variant: Variant) -> dict[str, Any]:
        measured = {}
        for quantity in self.study.quantities:
            values = self.values(variant.name, quantity)
            measured[str(quantity)] = {
                "by_seed": values,
                "mean": statistics.mean(values.values()) if values else None,
                "standard_deviation": statistics.stdev(values.values()) if len(values) > 1 else None,
            }
        published = {column: by_name[variant.name] for column, by_name in self.published.items()}
        return {"name": variant.name, "label": variant.label, "measured": measured, "published": published}

    def _result(self, result: ComparisonResult) -> dict[str, Any]:
        published = self.published_differences(result.comparison)
        verdicts = {column: result.verdict(value) for column, value in published.items()}
        return result.to_json() | {"published": published, "verdicts": verdicts}

    def markdown(self) -> str:
        """The report as two tables: the variants, and their differences."""
        title = f"**{escape(self.study.title)}**, scale {escape(self.scale)}: mean over seeds ± standard deviation"
        parts = [title, _table(*self._variants_table())]
        if self.results:
            parts += [_EXPLANATION, _table(*self._differences_table())]
        return "\n\n".join(parts)

    def _variants_table(self) -> tuple[list[str], list[list[str]]]:
        quantities = self.study.quantities
        published = []
        for column, by_name in self.published.items():
            for quantity in quantities:
                if any(str(quantity) in values for values in by_name.values()):
                    published.append((column, quantity))
        header = ["", *(q.label for q in quantities), "seeds", *(f"{column}: {q.label}" for column, q in published)]
        lines = []
        for variant in self.study.variants:
            line = [escape(variant.label)]
            for quantity in quantities:
                line.append(_spread(list(self.values(variant.name, quantity).values()), quantity))
            line.append(str(len(self.measured.get(variant.name, {}))))
            for column, quantity in published:
                line.append(_number(self.published[column][variant.name].get(str(quantity)), quantity))
            lines.append(line)
        return header, lines

    def _differences_table(self) -> tuple[list[str], list[list[str]]]:
        header = ["", "", "difference", "95 % interval", "over images", "p", "MDE", "runs"]
        for column in self.published:
            header += [column, "verdict"]
        lines = []
        for result in self.results:
            line = [escape(result.comparison.label), result.comparison.quantity.label, f"{result.difference:+.1f}"]
            line += [_interval(result.joint), _interval(result.over_images)]
            line.append("–" if result.adjusted_p is None else show_p(result.adjusted_p))
            line.append("–" if result.mde is None else f"±{result.mde:.1f}")
            line.append(" / ".join(map(str, result.runs.values())))
            for column in self.published:
                published = self.published_difference(column, result.comparison)
                line += ["–", "–"] if published is None else [f"{published:+.1f}", result.verdict(published)]
            lines.append(line)
        return header, lines

    def save(self, folder: Path) -> None:
        """Write table.json and table.md.

        Raises:
            UserError: they cannot be written.
        """
        write_text(folder / "table.json", json.dumps(self.to_json(), indent=1) + "\n")
        write_text(folder / "table.md", self.markdown() + "\n")


def _interval(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.low:+.1f} to {interval.high:+.1f}"


def show_p(p: float) -> str:
    """A p-value with two digits, or that it is below 0.001."""
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


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns aligned in plain text."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
