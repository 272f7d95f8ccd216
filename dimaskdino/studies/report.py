"""Report of a study: means and deviations, differences with intervals, and the published numbers."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dimaskdino.studies.comparison import Comparison, Contrast, EvaluatedRun, Interval, Quantity, compare
from dimaskdino.studies.study import Row, Study
from dimaskdino.utils.files import write_text
from dimaskdino.utils.markdown import escape

_EXPLANATION = (
    "Differences between the means of rows. The interval is over other trainings and other images together; "
    "`over images` is for these very models. `p` is adjusted for all comparisons of this table (Holm); `finds` is the "
    "difference that four of five such studies would find. `as published`: whether the sign is the paper's, which "
    "requires all registered seeds, at least three, and p < 0.05."
)
PAPER = Path(__file__).parent / "paper_tables.json"


def paper_tables() -> dict[str, Any]:
    """The numbers of the paper's tables and of its figure 1."""
    return json.loads(PAPER.read_text())


@dataclass(frozen=True)
class StudyReport:
    """The results of a study.

    Attributes:
        study: the definition.
        scale: the scale that was run.
        measured: by row name and seed; rows without results are left out.
        published: by column of the study, row name and quantity.
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

    def values(self, row: str, quantity: Quantity) -> dict[int, float]:
        """A quantity by seed, where it is defined."""
        return quantity.by_seed(self.measured.get(row, {}))

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The registered contrasts that were measured."""
        paired = self.scale in self.study.starts
        return compare(self.study.registered, self.measured, len(self.study.seeds), paired)

    def published_difference(self, column: str, contrast: Contrast) -> float | None:
        """The same difference in the paper; None if the paper does not have all its numbers."""
        values = {n: self.published[column].get(n, {}).get(str(contrast.quantity)) for n in contrast.weights}
        if any(value is None for value in values.values()):
            return None
        return round(sum(weight * values[name] for name, weight in contrast.weights.items()), 2)

    def published_differences(self, contrast: Contrast) -> dict[str, float]:
        """The published differences by column, where there are any."""
        found = {column: self.published_difference(column, contrast) for column in self.published}
        return {column: value for column, value in found.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """The whole report as plain values."""
        return {
            "study": self.study.title,
            "scale": self.scale,
            "seeds": len(self.study.seeds),
            "rows": [self._row(row) for row in self.study.rows],
            "contrasts": [self._contrast(comparison) for comparison in self.comparisons],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        record: dict[str, Any] = {"name": row.name, "label": row.label, "measured": {}}
        for quantity in self.study.quantities:
            values = self.values(row.name, quantity)
            record["measured"][str(quantity)] = {
                "by_seed": values,
                "mean": statistics.mean(values.values()) if values else None,
                "standard_deviation": statistics.stdev(values.values()) if len(values) > 1 else None,
            }
        record["published"] = {column: rows[row.name] for column, rows in self.published.items()}
        return record

    def _contrast(self, comparison: Comparison) -> dict[str, Any]:
        published = self.published_differences(comparison.contrast)
        verdicts = {column: comparison.agrees(value) for column, value in published.items()}
        return comparison.to_json() | {"published": published, "as_published": verdicts}

    def markdown(self) -> str:
        """The report as two tables: the rows, and their differences."""
        title = f"**{escape(self.study.title)}**, scale {escape(self.scale)}: means of the seeds ± standard deviation"
        parts = [title, _table(*self._rows_table())]
        if self.comparisons:
            parts += [_EXPLANATION, _table(*self._differences_table())]
        return "\n\n".join(parts)

    def _rows_table(self) -> tuple[list[str], list[list[str]]]:
        quantities = self.study.quantities
        published = [(column, q) for column in self.published for q in quantities if self._is_published(column, q)]
        header = ["", *(q.label for q in quantities), "seeds", *(f"{column}: {q.label}" for column, q in published)]
        rows = []
        for row in self.study.rows:
            cells = [_spread(list(self.values(row.name, q).values()), q) for q in quantities]
            numbers = [_number(self.published[column][row.name].get(str(q)), q) for column, q in published]
            rows.append([escape(row.label), *cells, str(len(self.measured.get(row.name, {}))), *numbers])
        return header, rows

    def _is_published(self, column: str, quantity: Quantity) -> bool:
        return any(str(quantity) in values for values in self.published[column].values())

    def _differences_table(self) -> tuple[list[str], list[list[str]]]:
        header = ["", "", "difference", "95 % interval", "over images", "p", "finds", "runs"]
        header += [text for column in self.published for text in (column, "as published")]
        rows = []
        for found in self.comparisons:
            cells = [escape(found.contrast.label), found.contrast.quantity.label, f"{found.difference:+.1f}"]
            cells += [_interval(found.joint), _interval(found.over_images)]
            cells.append("–" if found.adjusted_p is None else show_p(found.adjusted_p))
            cells.append("–" if found.detectable is None else f"±{found.detectable:.1f}")
            cells.append(" / ".join(map(str, found.runs.values())))
            for column in self.published:
                there = self.published_difference(column, found.contrast)
                cells += ["–", "–"] if there is None else [f"{there:+.1f}", found.agrees(there)]
            rows.append(cells)
        return header, rows

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
    return "–" if value is None else f"{value:{'+' if quantity.what == 'imbalance' else ''}.1f}"


def _spread(values: Sequence[float], quantity: Quantity) -> str:
    if not values:
        return "–"
    mean = _number(statistics.mean(values), quantity)
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns aligned in plain text."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)
